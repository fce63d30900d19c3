"""A user's own LightningCLI, of either package, with our callbacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_deepr import DeepR, connections, load_state_dict
from lightning_deepr.files.checkpoint import report_of_checkpoint
from lightning_deepr.packages.names import PACKAGES, Package
from lightning_deepr.recipes.running import train
from tests.helpers.optional import needs


@pytest.fixture(params=PACKAGES, ids=lambda package: package.name)
def package(request: pytest.FixtureRequest) -> Package:
    pytest.importorskip(request.param.name)
    return request.param


def model_of(package: Package, configures: bool) -> type:
    class Model(package.get("", "LightningModule")):  # type: ignore[misc]
        def __init__(self, folder: Path = Path("/nowhere"), activation: type = nn.ReLU) -> None:
            super().__init__()
            self.save_hyperparameters()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(12, 16), activation(), nn.Linear(16, 4))

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.net(batch).square().mean()

        def train_dataloader(self) -> DataLoader:
            return DataLoader(torch.randn(64, 12, generator=torch.Generator().manual_seed(0)), batch_size=8)

    if configures:
        Model.configure_optimizers = lambda self: torch.optim.SGD(self.parameters(), lr=0.1)  # type: ignore[attr-defined]
    return Model


def run(package: Package, model: type, folder: Path, *arguments: str) -> Any:
    quiet = ["max_epochs=1", "accelerator=cpu", "devices=1", "logger=false", "enable_progress_bar=false"]
    quiet += ["enable_model_summary=false", f"default_root_dir={folder}", "enable_checkpointing=false"]
    given = ["fit", *(f"--trainer.{one}" for one in quiet), *arguments]
    return package.get("cli", "LightningCLI")(model, args=given, save_config_callback=None)


OPTIMIZERS = {
    "Adam": ["--optimizer=Adam", "--optimizer.lr=0.01"],
    "SGD, a scheduler": ["--optimizer=SGD", "--optimizer.lr=0.1", "--lr_scheduler=CosineAnnealingLR", "--lr_scheduler.T_max=3"],
}


@needs("jsonargparse")
@pytest.mark.feature("Command line: LightningCLI with --optimizer and --lr_scheduler")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_an_optimizer_of_the_command_line(package: Package, name: str, scope: str, tmp_path: Path) -> None:
    arguments = [*OPTIMIZERS[name], "--trainer.callbacks=DeepR", "--trainer.callbacks.connectivity=0.3"]
    made = run(package, model_of(package, False), tmp_path, *arguments, f"--trainer.callbacks.scope={scope}")
    (optimizer,) = made.trainer.optimizers
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in made.model.parameters()} and len(held) == len(set(held))
    assert set(connections(made.model)) == {"net.0.weight", "net.2.weight"}
    assert made.trainer.global_step == 8
    thetas = {p for name, p in made.model.named_parameters() if "original" in name}
    assert all(p.grad is not None for p in thetas)


YAML = """
trainer:
  callbacks:
    - class_path: lightning_deepr.DeepR
      init_args:
        connectivity: {net.0: 0.3}
        seed: null
        l1: {class_path: lightning_deepr.LinearDecay, init_args: {start: 0.01}}
    - class_path: lightning_deepr.SET
      init_args: {connectivity: {net.2: 0.5}}
"""


@needs("jsonargparse")
@pytest.mark.feature("Command line: LightningCLI, callbacks in YAML")
def test_callbacks_in_yaml(package: Package, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(YAML, encoding="utf-8")
    made = run(package, model_of(package, True), tmp_path, f"--config={file}")
    assert set(connections(made.model)) == {"net.0.weight", "net.2.weight"}
    assert [type(one).__name__ for one in made.trainer.callbacks][:2] == ["DeepR", "SET"]


@pytest.mark.feature("Checkpoints: hyperparameters with a Path or a class")
def test_hyperparameters_with_a_path_or_a_class(package: Package, tmp_path: Path) -> None:
    kind = model_of(package, True)
    model = kind(folder=tmp_path)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    loop = package.get("", "Trainer")(max_epochs=1, callbacks=[DeepR(0.3)], enable_checkpointing=False, **quiet)
    loop.fit(model)
    file = tmp_path / "one.ckpt"
    loop.save_checkpoint(file)
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(file, weights_only=True)
    again = load_state_dict(kind(), file)
    expected, found = model.state_dict(), again.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert len(report_of_checkpoint(file)) == 2


class Bomb:
    """An object whose unpickling runs code."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('the file ran code')",))


@pytest.mark.parametrize("where", ["hyper_parameters", "state_dict"])
def test_no_code_of_a_file_runs(where: str, tmp_path: Path) -> None:
    net = DeepR(0.3).prepare(nn.Sequential(nn.Linear(12, 16)))
    content: dict[str, Any] = {"state_dict": dict(net.state_dict()), "hyper_parameters": {}}
    content[where]["x"] = Bomb()
    torch.save(content, tmp_path / "one.ckpt")
    if where == "state_dict":
        with pytest.raises(ValueError, match="found a file that it refuses"):
            report_of_checkpoint(tmp_path / "one.ckpt")
    else:
        assert len(report_of_checkpoint(tmp_path / "one.ckpt")) == 1


@needs("jsonargparse")
@pytest.mark.feature("Command line: lightning-deepr with --optimizer Adam and with --sparsity null")
@pytest.mark.parametrize("arguments", [["--optimizer=Adam", "--optimizer.lr=0.01"], ["--sparsity=null"]], ids=["Adam", "null"])
def test_a_recipe(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    limits = [
        "--trainer.max_steps=2",
        "--trainer.logger=false",
        "--trainer.limit_val_batches=1",
        "--trainer.limit_test_batches=1",
    ]
    sparse = "null" not in arguments[0]
    plain = [] if sparse else ["--trainer.callbacks=null"]  # the others draw and write what is sparse
    made = train(["fit", "--config", "mnist_quickstart", *limits, *plain, *arguments])
    assert type(made.trainer.optimizers[0]).__name__ == ("Adam" if sparse else "SGD")
    assert bool(connections(made.model)) == sparse
