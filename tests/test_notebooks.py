"""The notebooks run from top to bottom, as a kernel runs them, and show what their text says."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def run(path: Path) -> dict[str, Any]:
    """Run the code cells in one namespace; the value of a last expression is shown as a notebook shows it."""
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(content["cells"]):
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [] and cell["execution_count"] is None, "notebooks are kept without outputs"
        source = "".join(cell["source"])
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{path.name}, cell {number}", "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"{path.name}, cell {number}", "eval"), namespace)
            if value is not None:
                assert repr(value)
    return namespace


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["own_module", "pretrained"]


def test_own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(NOTEBOOKS[0])
    assert found["per_input"][:10].mean() > 3 * found["per_input"][10:].mean()
    assert found["accuracy"] > 0.85
    assert "equal outputs: True" in capsys.readouterr().out


@pytest.mark.slow
def test_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(NOTEBOOKS[1])
    assert found["cut_accuracy"] < found["sparse_accuracy"] and found["sparse_accuracy"] > 0.9
