"""The table of features in ``docs/lightning.md``, made from the tests that ran.

A test says what it shows:

    @pytest.mark.feature("Ranks: DDP, 2 processes")
    @pytest.mark.feature("Ranks: strategy ddp_spawn", refused=True)    # refused, with a message that the test reads

The part before the colon is the group, the rest is the row. A row is in the table if at least one test with its marker ran and
none failed. Skipped tests do not count.

    python -m tests.features          runs all marked tests, the slow ones too, and writes the table
    python -m tests.features --show   the same, printed and not written
    python -m tests.features --from FILE   writes the table from outcomes that `pytest -m feature --features=FILE` has written

This module is also the pytest plugin that notes the outcomes (``tests/conftest.py`` loads it).
"""

from __future__ import annotations

import ast
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "lightning.md"
BEGIN, END = "<!-- features: begin -->\n", "<!-- features: end -->\n"
# The order of the groups in the table; others follow by name.
GROUPS = [
    "Packages",
    "Loops",
    "Ranks",
    "Sharding",
    "Precision",
    "Optimizers",
    "Length",
    "Callbacks",
    "Checkpoints",
    "Command line",
    "Modules",
    "Compilers",
    "Others",
]
PACKAGES = ["torch", "lightning", "pytorch_lightning", "timm", "transformers", "peft", "accelerate", "schedulefree"]

Row = dict[str, Any]

# -- the plugin -------------------------------------------------------------------------------------------------------------

_outcomes: list[tuple[str, bool, str, str]] = []  # feature, refused, outcome, test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--features", metavar="FILE", help="write the outcome of each test with a `feature` marker, as JSON")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("feature"):
            name, refused = read(*marker.args, **marker.kwargs)
            # xdist sends the properties of a test to the process that reports
            item.user_properties.append(("feature", json.dumps([name, refused])))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":  # a fixture that fails or skips, too
        for key, value in report.user_properties:
            if key == "feature":
                name, refused = json.loads(str(value))
                _outcomes.append((name, refused, report.outcome, report.nodeid.split("[")[0]))


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--features")
    if file and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(Path(file)))


class _Writer:
    """Writes the outcomes after each test: a run that is interrupted leaves those that it has."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.file.write_text("[]", encoding="utf-8")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            self.file.write_text(json.dumps(_outcomes), encoding="utf-8")


def read(name: str, refused: bool = False) -> tuple[str, bool]:
    """Check a marker's arguments: ``"Group: row"``, and whether the feature is refused."""
    if name.count(": ") < 1 or "|" in name:
        raise pytest.UsageError(f'feature: expected "Group: row" without a bar, found {name!r}.')
    return name, refused


# -- the table --------------------------------------------------------------------------------------------------------------


def marked() -> set[tuple[str, bool]]:
    """List the features that markers in the sources name, without running them."""
    found = set()
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.feature":
                options = {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
                found.add(read(*[ast.literal_eval(one) for one in node.args], **options))
    return found


def rows(outcomes: list[tuple[str, bool, str, str]]) -> list[Row]:
    """Sum up the outcomes by feature, in the order of the table. A feature with a failed test is no row."""
    by_feature: dict[tuple[str, bool], list[tuple[str, str]]] = defaultdict(list)
    for name, refused, outcome, test in outcomes:
        by_feature[name, refused].append((outcome, test))
    found = []
    for (name, refused), results in by_feature.items():
        passed = [test for outcome, test in results if outcome == "passed"]
        if not passed or any(outcome == "failed" for outcome, _ in results):
            continue
        group, _, row = name.partition(": ")
        found.append({"group": group, "row": row, "refused": refused, "tests": sorted(set(passed)), "count": len(passed)})
    place = {group: i for i, group in enumerate(GROUPS)}
    return sorted(found, key=lambda one: (place.get(one["group"], len(GROUPS)), one["group"], one["row"], one["refused"]))


def table(found: list[Row]) -> str:
    """Format the rows as Markdown."""
    lines = ["| feature | | tests that ran |", "|---|---|---|"]
    group = None
    for one in found:
        if one["group"] != group:
            group = one["group"]
            lines.append(f"| **{group}** | | |")
        tests = [re.sub(r"^tests/(.*)\.py::", r"\1 ", test) for test in one["tests"]]
        files: dict[str, list[str]] = defaultdict(list)
        for test in tests:
            file, _, name = test.partition(" ")
            files[file].append(name)
        cell = "; ".join(f"`{file}`: {', '.join(names)}" for file, names in files.items())
        state = "refused, with a message" if one["refused"] else "supported"
        lines.append(f"| {one['row']} | {state} | {cell} ({one['count']}) |")
    return "\n".join(lines) + "\n"


def versions() -> str:
    """Name the versions of what the tests ran with."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return f"Python {platform.python_version()}, {', '.join(found)}"


def listed(text: str) -> set[tuple[str, bool]]:
    """Read the features of a page's table."""
    found, group = set(), ""
    for line in text.split(BEGIN)[-1].split(END)[0].splitlines():
        if title := re.fullmatch(r"\| \*\*(.+)\*\* \| \| \|", line):
            group = title[1]
        elif row := re.match(r"\| (.+?) \| (supported|refused, with a message) \| ", line):
            found.add((f"{group}: {row[1]}", row[2] != "supported"))
    return found


def main(arguments: list[str]) -> int:
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        if "--from" in arguments:
            file = Path(arguments[arguments.index("--from") + 1])
        else:
            file = Path(folder) / "features.json"
            options = ["-q", "-m", "feature", f"--features={file}", "tests"]
            status = subprocess.run([sys.executable, "-m", "pytest", *options], cwd=ROOT).returncode
        outcomes = [tuple(one) for one in json.loads(file.read_text(encoding="utf-8"))]
    made = f"{BEGIN}{versions()}; the CPU of one machine.\n\n{table(rows(outcomes))}{END}"
    if "--show" in arguments:
        print(made)
        return status
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page.split(BEGIN)[0] + made + page.split(END)[-1], encoding="utf-8")
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
