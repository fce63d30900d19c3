"""Loads and tests every model of the zoo: ``python -m lightning_deepr.zoo.results --data FOLDER``.

The command writes ``results.csv`` and the README's table into the folder of the models. It exits with 1 if a count of correct
predictions differs by more than one from the recorded count.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_deepr import zoo
from lightning_deepr.recipes.running import data_of_recipe
from lightning_deepr.zoo.loading import folder_of_checkout
from lightning_deepr.zoo.verification import counting, evaluate

_COLUMNS = (
    "name", "connections", "potential", "connectivity", "bytes", "bytes_per_connection", "metric",
    "correct", "recorded", "examples", "value", "mean", "std", "seeds",
)  # fmt: skip


def row(name: str, folder: str) -> dict[str, Any]:
    """Test one model and return its row of the table.

    Args:
        name: a name of the zoo, or a path.
        folder: folder of the model's data; "": the recipe's folder.
    """
    info = zoo.info(name)
    ((metric, recorded),) = info["metrics"].items()
    correct, examples = evaluate(zoo.load(name), data_of_recipe(info, folder), counting(info["architecture"]))
    connectivity = info["connectivity"]
    return {
        "name": info["name"],
        "connections": connectivity["active"],
        "potential": connectivity["total"],
        "connectivity": f"{connectivity['connectivity']:.5f}",
        "bytes": info["bytes"],
        "bytes_per_connection": f"{info['bytes'] / connectivity['active']:.2f}",
        "metric": metric,
        "correct": correct,
        "recorded": recorded["correct"],
        "examples": examples,
        "value": f"{correct / examples:.4f}",
        "mean": f"{recorded['mean']:.4f}",
        "std": f"{recorded['std']:.4f}" if "std" in recorded else "",
        "seeds": len(recorded["seeds"]),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows as a Markdown table."""
    lines = ["| model | connections | bytes | per connection | this file, % | mean, % |", "|---|---:|---:|---:|---:|---:|"]
    for found in rows:
        spread = f" ± {100 * float(found['std']):.2f}" if found["std"] else ""
        lines.append(
            f"| `{found['name']}` | {found['connections']:,} of {found['potential']:,} | {found['bytes']:,} "
            f"| {found['bytes_per_connection']} | {100 * float(found['value']):.2f} "
            f"| {100 * float(found['mean']):.2f}{spread} ({found['seeds']}) |"
        )
    return "\n".join(lines)


def _put_into(page: Path, text: str) -> None:
    """Write the table between its two comments, if the page exists and has them."""
    if not page.is_file():
        return
    before, begin, rest = page.read_text(encoding="utf-8").partition("<!-- table: ")
    comment, _, rest = rest.partition("\n")
    _, end, after = rest.partition("<!-- end -->")
    if begin and end:
        page.write_text(f"{before}{begin}{comment}\n{text}\n{end}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m lightning_deepr.zoo.results``."""
    parser = argparse.ArgumentParser(prog="python -m lightning_deepr.zoo.results", description="Test every model of the zoo.")
    parser.add_argument("models", nargs="*", help="names or paths (default: the whole zoo)")
    parser.add_argument("--data", default="", help="folder of the data sets (default: the recipes' folders)")
    parser.add_argument("--out", type=Path, help="path of the table (default: results.csv in zoo/ of the checkout)")
    given = parser.parse_intermixed_args(arguments)
    try:
        out = given.out or folder_of_checkout("--out") / "results.csv"
    except ValueError as error:
        parser.error(str(error))
    names = given.models or zoo.list_models()
    rows = []
    for number, name in enumerate(names, 1):
        rows.append(row(name, given.data))
        found = rows[-1]
        print(
            f"{number}/{len(names)} {found['name']}: "
            f"{found['correct']:,} of {found['examples']:,}, recorded {found['recorded']:,}"
        )
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    _put_into(out.with_name("README.md"), table(rows))
    off = [found["name"] for found in rows if abs(found["correct"] - found["recorded"]) > 1]
    if off:
        sys.exit(f"not as recorded: {', '.join(off)}")


if __name__ == "__main__":
    main()
