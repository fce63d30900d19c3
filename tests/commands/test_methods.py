"""The command line accepts every method by its name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_deepr import SET, DeepR, RigL, TurnoverTarget
from lightning_deepr.recipes import running
from tests.helpers.optional import needs

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@needs("jsonargparse")
def test_the_command_line_takes_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-deepr"])

    def made(*arguments: str) -> pl.Callback:
        return running.train(["--config", "mnist_quickstart", *arguments], run=False).trainer.callbacks[0]

    Path("set.yaml").write_text(
        "sparsity:\n  class_path: lightning_deepr.SET\n  init_args: {connectivity: 0.02, drop_fraction: 0.2}\n"
    )
    found: Any = made("--config", "set.yaml", "--sparsity.connectivity", ".05", "--seed_everything", "7")
    assert type(found) is SET
    assert (found.connectivity, found.drop_fraction, found.seed) == (0.05, 0.2, 7)
    found = made("--sparsity", "RigL", "--sparsity.drop_fraction", ".4")  # settings that only DeepR has are dropped
    assert type(found) is RigL
    assert (found.connectivity, found.drop_fraction, found.distribution) == (2662, 0.4, "deepr")
    Path("dicts.yaml").write_text(
        """
sparsity:
  class_path: lightning_deepr.DeepR
  init_args:
    l1:
      fc1: {class_path: lightning_deepr.LinearDecay, init_args: {start: 2.0e-4, end: 1.0e-5}}
      "fc[23]": 1.0e-4
    temperature:
      fc1: {class_path: lightning_deepr.LrPower, init_args: {coefficient: 1.0e-12, power: 2}}
      "fc[23]": 0.0
"""
    )
    found = made("--config", "dicts.yaml", "--sparsity.connectivity", ".05")
    assert type(found) is DeepR
    assert (found.l1["fc1"].start, found.l1["fc1"].end, found.l1["fc[23]"]) == (2e-4, 1e-5, 1e-4)
    assert (found.temperature["fc1"].coefficient, found.temperature["fc[23]"]) == (1e-12, 0.0)
    target = "{class_path: lightning_deepr.TurnoverTarget, init_args: {start: 0.1, shape: linear}}"
    wanted = TurnoverTarget(0.1, "linear")
    for written, expected in (
        ("auto", "auto"),
        (target, wanted),
        (f"{{fc1: {target}, fc2: auto, fc3: 1.0e-4}}", {"fc1": wanted, "fc2": "auto", "fc3": 1e-4}),
    ):
        Path("turnover.yaml").write_text(f"sparsity:\n  class_path: lightning_deepr.DeepR\n  init_args:\n    l1: {written}\n")
        assert made("--config", "turnover.yaml").l1 == expected
    assert made("--sparsity.l1", "auto").l1 == "auto"
    assert made("--sparsity.l1", "TurnoverTarget", "--sparsity.l1.start", ".1").l1 == TurnoverTarget(0.1)
    for arguments in (["--sparsity", "Nope"], ["--sparsity.class_path=Nope"]):
        with pytest.raises(SystemExit, match=r"no method 'Nope'\. Methods: DeepR, FixedRandom"):
            made(*arguments)


@needs("jsonargparse")
def test_an_unknown_class_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-deepr"])
    Path("nope.yaml").write_text("sparsity:\n  class_path: lightning_deepr.Nope\n")
    with pytest.raises(SystemExit):
        running.train(["--config", "mnist_quickstart", "--config", "nope.yaml"], run=False)
    assert "no attribute 'Nope'; it has Band" in capsys.readouterr().err
