"""Write the tables of the adapter studies into README.md, from their csv files.

    python benchmarks/adapters/tables.py

A cell whose tests have not run yet says "not run".
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import digits
import encoder
import forgetting
import pictures

HERE = Path(__file__).parent
PAGE = HERE / "README.md"


def tables() -> dict[str, list[str]]:
    """Make all tables: {name in README.md: lines}."""
    found = {}
    for task in digits.TASKS:
        for optimizer in digits.STUDY.rates:
            name = f"{task} {optimizer}"
            found[name] = digits.STUDY.table(task, optimizer, digits.ARMS, list(digits.RANKS.values()))
    found["forgetting"] = forgetting.table()
    found["encoder"] = encoder.STUDY.table(encoder.TASK, "AdamW", encoder.ARMS, [encoder.COUNT])
    for task in pictures.TASKS:
        found[f"pictures {task}"] = pictures.STUDY.table(task, "AdamW", pictures.ARMS, [pictures.COUNT])
    found["step"] = of_file("step.csv")
    found["layers"] = of_file("layers.csv")
    return found


def of_file(name: str) -> list[str]:
    """Make the table of a csv file."""
    with (HERE / name).open() as file:
        rows = list(csv.reader(file))
    return [f"| {' | '.join(row)} |".replace("_", " ") for row in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def written(text: str) -> str:
    """Put the tables between their marks."""
    for name, lines in tables().items():
        marks = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
        assert re.search(marks, text, re.DOTALL), f"no marks for {name!r}"
        table = "\n".join(lines) or "Not run yet."
        text = re.sub(marks, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
