"""``LIGHTNING_DEEPR=0.01 python train.py`` trains sparsely without a changed line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from lightning_deepr._environment import callbacks
from tests.helpers.paths import ROOT

SCRIPT = """
import sys, torch
from importlib import import_module
package = import_module(sys.argv[1])
from torch.utils.data import DataLoader
class Model(package.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(30, 20)
    def training_step(self, batch, i):
        return self.net(batch).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
def trainer(*callbacks):
    return package.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*callbacks],
    )
model = Model()
trainer().fit(model, DataLoader(torch.randn(40, 30), batch_size=8))
print(len(dict(model.named_parameters())["net.parametrizations.weight.original"]) if hasattr(model.net, "parametrizations") else "dense")
print("numba" in sys.modules, "lightning_deepr.methods" in sys.modules)
if len(sys.argv) > 2:
    from lightning_deepr import DeepR
    model = Model()
    trainer(DeepR(0.5)).fit(model, DataLoader(torch.randn(40, 30), batch_size=8))
    print(len(model.net.parametrizations.weight.original))
"""  # noqa: E501


def run(tmp_path: Path, value: str | None, package: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the script with the entry points of ``pyproject.toml`` installed: our own installation has them, or a made-up one."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    points = re.findall(r'\[project\.entry-points\."(.+)"\]\nlightning_deepr = "(.+)"', text)
    installed = {(point.group, point.value) for point in entry_points(name="lightning_deepr")}
    points = [point for point in points if point not in installed]
    info = tmp_path / "lightning_deepr_points-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-deepr-points\nVersion: 0.1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\nlightning_deepr_points = {target}\n" for group, target in points), encoding="utf-8"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    environment.pop("LIGHTNING_DEEPR", None)
    if value is not None:
        environment["LIGHTNING_DEEPR"] = value
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, package, *more],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.feature("Packages: LIGHTNING_DEEPR=0.01, no changed line")
@pytest.mark.parametrize("package", ["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.slow)])
def test_the_variable_trains_sparsely(package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    done = run(tmp_path, "0.05", package, "and another")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "30" and done.stdout.split()[-1] == "300"
    assert "is not used" in done.stderr  # beside a callback of the script


@pytest.mark.slow
def test_without_the_variable_nothing_happens(tmp_path: Path) -> None:
    done = run(tmp_path, None, "lightning.pytorch")
    assert done.stdout.split() == ["dense", "False", "False"], done.stderr


@pytest.mark.parametrize("value", ["", "0", " "])
def test_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DEEPR", value)
    assert callbacks() == []


@pytest.mark.parametrize(
    ("value", "connectivity"), [("0.01", 0.01), ("1e-2", 0.01), ("2662", 2662), ("{fc1: 0.1, fc2: 7}", {"fc1": 0.1, "fc2": 7})]
)
def test_values(value: str, connectivity: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DEEPR", value)
    (callback,) = callbacks()
    assert callback.connectivity == connectivity


@pytest.mark.parametrize("value", ["1", "yes", "true", "[0.1]", "{", "1 %"])
def test_values_that_make_no_sense(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_DEEPR", value)
    with pytest.raises(ValueError, match="LIGHTNING_DEEPR: expected a connectivity"):
        callbacks()
