"""Run the tests of ``tests/packages`` with several versions of Lightning and torch, and say what was run.

    python benchmarks/versions.py --lightning 2.4 2.5 2.6 --torch 2.14      writes benchmarks/versions.csv
    python benchmarks/versions.py --check                                    what is in the table

Each combination gets an environment of its own, which shares the installed packages of this Python and lies over them: it has
another Lightning (``lightning`` and ``pytorch_lightning``, without their dependencies) and, if asked for, another torch. So a
combination takes little space, and needs a package index.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks" / "versions.csv"
COLUMNS = ["lightning", "pytorch_lightning", "torch", "python", "passed", "failed", "skipped"]
TESTS = [
    "tests/packages",
    "tests/training/test_length.py",
    "tests/training/test_state_keys.py",
    "tests/training/test_resume.py",
]


def install(folder: Path, *packages: str) -> None:
    """Put packages into a folder, without their dependencies."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    subprocess.run(command, check=True)


def run(lightning: str, torch: str | None, tests: list[str]) -> dict[str, str]:
    """Run the tests with one combination; ``"2.5"`` is the newest patch of that minor version."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = f"~={lightning}.0"
        install(folder, f"lightning{wanted}", f"pytorch-lightning{wanted}")
        if torch is not None:
            install(folder, f"torch~={torch}.0")
        environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
        code = (
            "import lightning, pytorch_lightning, torch, platform\n"
            "print(lightning.__version__, pytorch_lightning.__version__, torch.__version__, platform.python_version())"
        )
        found = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], env=environment, check=True, capture_output=True, text=True
        )
        versions = found.stdout.split()[-4:]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "0", "--no-header", *tests],
            env=environment, cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
    closing = done.stdout.splitlines()[-1] if done.stdout else done.stderr
    counts = {word: number for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", closing)}
    print(f"lightning {versions[0]}, torch {versions[2]}: {closing}", flush=True)
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            print("  ", line, flush=True)
    if done.returncode not in (0, 1):  # no test ran: a file could not be imported
        raise SystemExit(f"versions: expected tests that run, found pytest's exit status {done.returncode}: {closing}")
    counts["failed"] = str(int(counts.get("failed", 0)) + int(counts.get("error", 0)))
    row = dict(zip(COLUMNS, versions, strict=False))
    return {**row, **{key: counts.get(key, "0") for key in COLUMNS[4:]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lightning", nargs="+", default=["2.4", "2.5", "2.6"], help="minor versions")
    parser.add_argument("--torch", nargs="+", default=["installed"], help='minor versions, or "installed"')
    parser.add_argument("--tests", nargs="+", default=TESTS)
    parser.add_argument("--check", action="store_true", help="print the table")
    given = parser.parse_args()
    if given.check:
        print(TABLE.read_text(encoding="utf-8"), end="")
        return
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    if TABLE.is_file():
        with TABLE.open(encoding="utf-8", newline="") as file:
            rows = {tuple(row[key] for key in COLUMNS[:4]): row for row in csv.DictReader(file)}
    for torch in given.torch:
        for lightning in given.lightning:
            row = run(lightning, None if torch == "installed" else torch, given.tests)
            rows[tuple(row[key] for key in COLUMNS[:4])] = row
            with TABLE.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows[key] for key in sorted(rows))


if __name__ == "__main__":
    main()
