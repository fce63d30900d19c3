"""The studies of adapters: every arm has the same effort, speeches are not split, and the page has the tables of the csv."""

from __future__ import annotations

import csv
import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.helpers.paths import ROOT

FOLDER = ROOT / "benchmarks" / "adapters"
NAMES = ("digits", "encoder", "forgetting", "pictures", "study", "tables", "grid", "common")


@pytest.fixture(scope="module")
def tables() -> Iterator[ModuleType]:
    before, path = dict(sys.modules), list(sys.path)
    sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
    try:
        yield importlib.import_module("tables")
    finally:
        sys.path[:] = path
        for name in NAMES:  # other folders have modules of these names
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]


def test_the_page_has_the_tables_of_the_csv_files(tables: ModuleType) -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert tables.written(text) == text, "python benchmarks/adapters/tables.py"


def test_every_tested_cell_was_tuned_with_all_rates_and_has_equal_values(tables: ModuleType) -> None:
    studies = {"digits": tables.digits.STUDY, "encoder": tables.encoder.STUDY, "pictures": tables.pictures.STUDY}
    seen = 0
    for name, study in studies.items():
        file = FOLDER / f"{name}.csv"
        if not file.is_file():
            continue
        with file.open() as lines:
            rows = list(csv.DictReader(lines))
        assert len({tuple(row[key] for key in ("part", "arm", "connectivity", "seed", "trial")) for row in rows}) == len(rows)
        for row in rows:
            arm, optimizer = row["arm"].split()
            cell = tables.digits.Cell(row["part"], arm, optimizer, int(row["connectivity"]))
            assert arm in ("full", "head") or row["trained"] == row["connectivity"], row
            if row["split"] == "test":
                tuned = Counter(one["trial"] for one in study.rows(cell) if one["split"] == "validation")
                assert tuned == Counter(f"lr {rate:g}" for rate in study.rates_of(cell)), row
                assert row["settings"] == cell.job(int(row["seed"]), study.best(cell), "test").settings
                seen += 1
    assert seen > 20


def test_lines_are_split_by_whole_speeches(tables: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables.encoder, "SIZES", {"train": 30, "validation": 10, "test": 10})
    speeches = [(f"NAME {i % 12}:", [f"line {i} {j}" for j in range(3)]) for i in range(60)]
    text = "\n\n".join("\n".join([head, *lines]) for head, lines in speeches)
    parts = tables.encoder.lines_of(text)
    assert {part: len(lines) for part, lines in parts.items()} == {"train": 30, "validation": 10, "test": 10}
    of = {part: {line.split()[1] for line, _ in lines} for part, lines in parts.items()}
    assert not of["train"] & of["validation"] and not of["train"] & of["test"] and not of["validation"] & of["test"]
    characters = {label for lines in parts.values() for _, label in lines}
    assert characters <= set(range(10)) and len(characters) > 5
    named = {line.split()[1]: label for lines in parts.values() for line, label in lines}
    assert len({(int(number) % 12, label) for number, label in named.items()}) == len({int(number) % 12 for number in named})
