"""The table of features and its markers."""

from __future__ import annotations

import pytest

from tests import features


def test_every_row_has_a_test() -> None:
    page = features.listed(features.PAGE.read_text(encoding="utf-8"))
    assert page, "the table is empty: python -m tests.features"
    unknown = page - features.marked()
    assert not unknown, f"rows without a test: {sorted(unknown)}. Write the table anew: python -m tests.features"


def test_a_row_needs_a_test_that_ran_and_none_that_failed() -> None:
    outcomes = [
        ("Ranks: two", False, "passed", "tests/training/test_ddp.py::test_a"),
        ("Ranks: two", False, "passed", "tests/training/test_ddp.py::test_a"),
        ("Ranks: two", False, "skipped", "tests/training/test_ddp.py::test_b"),
        ("Ranks: four", False, "skipped", "tests/training/test_ddp.py::test_b"),
        ("Ranks: spawn", True, "passed", "tests/training/test_ddp.py::test_c"),
        ("Loops: Fabric", False, "passed", "tests/x.py::test_d"),
        ("Loops: Fabric", False, "failed", "tests/x.py::test_d"),
    ]
    text = features.table(features.rows(outcomes))
    assert features.listed(features.BEGIN + text + features.END) == {("Ranks: two", False), ("Ranks: spawn", True)}
    assert "| two | supported | `training/test_ddp`: test_a (2) |" in text


@pytest.mark.parametrize("name", ["DDP", "Ranks:DDP", "Ranks: a | b"])
def test_a_name_without_a_group_is_refused(name: str) -> None:
    with pytest.raises(pytest.UsageError, match="Group: row"):
        features.read(name)
