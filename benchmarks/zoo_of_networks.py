"""Do the architectures of torchvision, timm and transformers convert, train, and come back from files, copies and exports?

    python benchmarks/zoo_of_networks.py                    # everything that has no line in zoo_of_networks.csv yet
    python benchmarks/zoo_of_networks.py --only 'timm/*vit*' # only these; --again measures lines that are there anew
    python benchmarks/zoo_of_networks.py --table            # the recorded lines, as a markdown table

Each architecture is small, has random weights and gets random inputs. One line each:

| check | what has to hold |
|---|---|
| `convert` | `sparsify(net, .1)`: K = round(.1 N), every tensor by its dense name |
| `train` | 3 steps of AdamW with `DeepR(check_invariants=True)`: gradients where the dense tensors have one, connections move |
| `state_dict` | a fresh network after `load_state_dict`: equal connections and outputs, and it trains on |
| `sparse_file` | the same through `save_sparse` |
| `deepcopy` | the same of a deep copy, and training the copy does not change its source |
| `export` | `torch.export`: the exported program has the same outputs |
| `compute` | compute "dense" and "sparse": the outputs of "auto", and equal gradients |
| `densify` | the same outputs; the `state_dict` loads into an ordinary network, which has them, too |

Outcomes: "ok"; "refused: ..." (the library raised an error itself); "FAILED: ..."; "dense fails, too: ..." (the dense network
fails the same check); "not run": conversion or training failed. Each architecture runs in a process of its own
with a time limit; "CRASHED": it did not come back.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import importlib
import importlib.util
import itertools
import logging
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from networks.case import Case
from networks.checks import CHECKS, Subject

PACKAGES = ("torchvision", "timm", "transformers")
COLUMNS = ("architecture", "parameters", "converted", "connections", *CHECKS, "seconds", "package", "torch")
Row = dict[str, Any]


def known() -> dict[str, Case]:
    """List the architectures of the packages that are installed; the others are said.

    The packages take turns, so that a run that is interrupted has seen some of each.
    """
    found: list[list[Case]] = []
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: its architectures are skipped", flush=True)
        else:
            found.append(list(importlib.import_module(f"networks.of_{package}").cases()))
    turns = itertools.zip_longest(*found)
    return {case.name: case for turn in turns for case in turn if case is not None}


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.ERROR)  # torch.export prints whole graphs


def check(case: Case, results: Connection) -> None:
    """Check one architecture, in a process of its own."""
    torch.set_num_threads(1)
    quiet()
    results.send(Subject(case).row())


def run(case: Case, limit: float) -> Row:
    """Check one architecture in a forked process, which has all imports already."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=check, args=(case, sender), daemon=True)
    process.start()
    sender.close()
    row: Row = {"architecture": case.name, "seconds": f"{limit:g}"}
    crash = ""
    try:
        if receiver.poll(limit):
            row |= receiver.recv()
        else:
            crash = f"CRASHED: more than {limit:g} s"
            process.kill()
    except EOFError:
        process.join()
        crash = f"CRASHED: exit code {process.exitcode}"
    process.join()
    if crash:
        row |= dict.fromkeys(CHECKS, crash)
    return row | {"package": f"{case.package} {version(case.package)}", "torch": version("torch").split("+")[0]}


def read(path: Path) -> dict[str, Row]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {row["architecture"]: dict(row) for row in csv.DictReader(file)}


def write(path: Path, rows: dict[str, Row], order: Sequence[str]) -> None:
    """Write all lines, in the order of the list; lines of packages that are missing here stay at the end."""
    names = [name for name in order if name in rows] + [name for name in rows if name not in order]
    new = path.with_suffix(".new")
    with new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows[name] for name in names)
    new.replace(path)


def kind(outcome: str) -> str:
    return outcome.split(":")[0]


def summary(rows: Sequence[Row]) -> str:
    """Count the outcomes of each check, and list all that are not ok."""
    lines = [f"{len(rows)} architectures; all checks ok: {sum(all(row[c] == 'ok' for c in CHECKS) for row in rows)}"]
    for name in CHECKS:
        counts = Counter(kind(row[name]) for row in rows)
        lines.append(f"  {name}: " + ", ".join(f"{count} {what}" for what, count in counts.most_common()))
    lines += [
        f"  {row['architecture']}, {name}: {row[name]}" for row in rows for name in CHECKS if row[name] not in ("ok", "not run")
    ]
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """Format the lines as a markdown table."""
    lines = ["| architecture | parameters | converted | " + " | ".join(CHECKS) + " | s |", "|---" * (len(CHECKS) + 4) + "|"]
    for row in rows:
        cells = [
            row["architecture"],
            row["parameters"],
            row["converted"],
            *(kind(row[name]) for name in CHECKS),
            row["seconds"],
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="*", help="names (fnmatch) or parts of them, separated by commas")
    parser.add_argument("--again", action="store_true", help="measure lines that are there anew")
    parser.add_argument("--table", action="store_true", help="print the recorded lines, and run nothing")
    parser.add_argument("--list", action="store_true", help="print the names, and run nothing")
    parser.add_argument("--limit", type=float, default=240, help="seconds per architecture (default: 240)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of the csv (default: the script's)")
    options = parser.parse_args()
    path = options.out / "zoo_of_networks.csv"

    def chosen(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) or pattern in name for pattern in options.only.split(","))

    rows = read(path)
    if options.table:
        shown = [row for name, row in rows.items() if chosen(name)]
        print(table(shown) + "\n\n" + summary(shown))
        return
    quiet()
    cases = known()
    wanted = [case for name, case in cases.items() if chosen(name)]
    if options.list:
        print("\n".join(case.name for case in wanted))
        return
    todo = [case for case in wanted if options.again or case.name not in rows]
    print(f"{len(todo)} of {len(wanted)} architectures to run", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for number, case in enumerate(todo, 1):
        row = run(case, options.limit)
        rows[case.name] = dict.fromkeys(COLUMNS, "") | row
        write(path, rows, sorted(cases, key=lambda name: PACKAGES.index(cases[name].package)))
        print(f"{number}/{len(todo)} {case.name}: {row['seconds']} s", *_not_ok(row), sep="\n    ", flush=True)
    print(summary([rows[case.name] for case in wanted if case.name in rows]))


def _not_ok(row: Row) -> list[str]:
    return [f"{name}: {row[name]}" for name in CHECKS if row[name] != "ok"]


if __name__ == "__main__":
    main()
