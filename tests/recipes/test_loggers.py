"""Every Lightning logger gets what makes a run; a logger that fails is told of once, and the training goes on."""

from __future__ import annotations

import csv
import errno
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_deepr import SET, DeepR, LinearDecay, SoftDeepR
from lightning_deepr.recipes import running
from lightning_deepr.recipes.callbacks import SparseCheckpoint
from lightning_deepr.recipes.run_log import RunLog
from lightning_deepr.training import run_config
from tests.helpers.optional import needs
from tests.helpers.paths import ROOT

RECIPE = str(ROOT / "recipes" / "mnist_quickstart.yaml")


class Module(pl.LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3))

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


def batches() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(64, 20, generator=generator), torch.arange(64) % 3), batch_size=8)


def fit(logger: Any, where: Path, callback: Any = None, *more: Any) -> pl.Trainer:
    callback = DeepR(0.2, l1=LinearDecay(1e-3), seed=5, log_every_n_steps=1) if callback is None else callback
    trainer = pl.Trainer(
        max_epochs=1, logger=logger, callbacks=[callback, *more], default_root_dir=where, log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Module(), batches())
    return trainer


def check(config: dict[str, Any]) -> None:
    """What every logger has, as nested dicts."""
    sparsity = config["sparsity"]
    assert sparsity["method"] == "DeepR" and float(sparsity["connectivity"]) == 0.2 and int(sparsity["K"]) == 55
    assert int(sparsity["N"]) == 276 and sparsity["distribution"] == "erdos_renyi" and sparsity["init"] == "module"
    assert int(sparsity["seed"]) == 5 and sparsity["l1"]["schedule"] == "LinearDecay" and float(sparsity["l1"]["start"]) == 1e-3
    assert config["versions"]["torch"] == torch.__version__ or config["versions"]["torch"]
    assert config["data_digest"] == run_config.digest_of(batches().dataset.tensors)  # type: ignore[attr-defined]


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in flat.items():
        at = found
        *heads, last = key.split("/")
        for head in heads:
            at = at.setdefault(head, {})
        at[last] = value
    return found


def test_csv(tmp_path: Path) -> None:
    fit(CSVLogger(tmp_path, name="csv"), tmp_path)
    folder = tmp_path / "csv" / "version_0"
    config = yaml.safe_load((folder / "hparams.yaml").read_text())
    check(config)
    assert config["lr"] == 0.1, "the module's own hyperparameters are still there"
    with (folder / "metrics.csv").open() as file:
        assert any(row["train_loss"] for row in csv.DictReader(file))


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    fit(TensorBoardLogger(tmp_path, name="tb"), tmp_path, None, SparseCheckpoint(), RunLog("mine"))
    folder = tmp_path / "tb" / "version_0"
    check(yaml.safe_load((folder / "hparams.yaml").read_text()))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    events = EventAccumulator(str(folder)).Reload()
    assert "connections" in events.Tags()["images"] and "connectivity/text_summary" in events.Tags()["tensors"]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    found = {key: value.number_value or value.string_value for key, value in start.hparams.items()}
    assert found["sparsity/K"] == 55 and found["sparsity/method"] == "DeepR" and found["lr"] == 0.1


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    logger = MLFlowLogger("sparse", tracking_uri=f"file:{tmp_path}/mlruns")
    patterns = DeepR({"net.0": 0.2, "net.[2]": 0.2}, seed=5)  # MLflow takes no pattern in a name
    fit(logger, tmp_path, patterns, SparseCheckpoint(), RunLog("mine"))
    client = mlflow.MlflowClient(f"file:{tmp_path}/mlruns")
    run = client.get_run(logger.run_id)
    found = nested(run.data.params)
    assert found["sparsity"]["method"] == "DeepR" and found["sparsity"]["K"] == "55" and found["recipe"] == "mine"
    assert found["sparsity"]["connectivity"] == '{"net.0": 0.2, "net.[2]": 0.2}'
    assert {one.path for one in client.list_artifacts(logger.run_id)} >= {
        "connections.png", "sparse.safetensors", "connectivity.csv",
    }  # fmt: skip


@pytest.mark.parametrize(
    "callback", [SET(0.2, seed=5), SoftDeepR(0.2, temperature=1e-9, seed=5), DeepR(55, seed=5, scope="global")]
)
def test_other_methods(callback: Any, tmp_path: Path) -> None:
    fit(CSVLogger(tmp_path, name="csv"), tmp_path, callback)
    sparsity = yaml.safe_load((tmp_path / "csv/version_0/hparams.yaml").read_text())["sparsity"]
    assert sparsity["method"] == type(callback).__name__ and sparsity["seed"] == 5 and sparsity["N"] == 276
    assert sparsity["K"] == sum(sparsity["K_by_tensor"].values())


def test_two_loggers(tmp_path: Path) -> None:
    fit([CSVLogger(tmp_path, name="a"), CSVLogger(tmp_path, name="b")], tmp_path)
    for name in "ab":
        check(yaml.safe_load((tmp_path / name / "version_0" / "hparams.yaml").read_text()))


# -- loggers that fail --------------------------------------------------------------------------------------------------------


class Failing(Logger):
    """Fails in one of its calls, from the third metric on."""

    name, version = "failing", 0

    def __init__(self, call: str, error: Exception) -> None:
        super().__init__()
        self.call, self.error, self.calls = call, error, 0

    def _maybe(self, call: str) -> None:
        self.calls += call == "log_metrics"
        if call == self.call and (call != "log_metrics" or self.calls >= 3):
            raise self.error

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self._maybe("log_metrics")

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._maybe("log_hyperparams")

    def save(self) -> None:
        self._maybe("save")

    def finalize(self, status: str) -> None:
        self._maybe("finalize")


@pytest.mark.parametrize("call", ["log_metrics", "log_hyperparams", "save", "finalize"])
def test_a_logger_that_raises(call: str, tmp_path: Path) -> None:
    logger, other = Failing(call, OSError(errno.ENOSPC, "No space left on device")), CSVLogger(tmp_path, name="csv")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit([logger, other], tmp_path)
    assert trainer.global_step == 8 and trainer.state.finished
    told = [str(one.message) for one in caught if "Failing failed" in str(one.message)]
    assert len(told) == 1 and "No space left on device" in told[0] and "goes on" in told[0]
    with (tmp_path / "csv" / "version_0" / "metrics.csv").open() as file:
        assert sum(bool(row["train_loss"]) for row in csv.DictReader(file)) == 8, "the other logger has everything"
    assert "log_metrics" not in vars(logger), "the logger has its own calls back"
    with pytest.raises(OSError, match="No space left"):
        [logger._maybe(call) for _ in range(3)]


def test_a_keyboard_interrupt_of_a_logger_is_no_failure(tmp_path: Path) -> None:
    class Interrupted(Failing):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(Interrupted("none", OSError()), tmp_path)


@needs("jsonargparse")
def test_a_log_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "csvfile").write_text("in the way")
    config = yaml.safe_load(Path(RECIPE).read_text())
    config["trainer"]["logger"][0]["init_args"]["name"] = "csvfile"
    Path("recipe.yaml").write_text(yaml.safe_dump(config))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = running.train(
            ["fit", "--config", "recipe.yaml", "--out", "out", "--trainer.max_steps=2", "--trainer.limit_test_batches=1",
             "--trainer.enable_progress_bar=false"]
        )  # fmt: skip
    assert done.trainer.global_step == 2
    assert len([one for one in caught if "CSVLogger failed" in str(one.message)]) == 1
    assert (tmp_path / "out" / "sparse.safetensors").is_file()


@needs("jsonargparse")
def test_wandb_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match="wandb is not installed"):
        done = running.train(
            ["fit", "--config", RECIPE, "--out", "out", "--trainer.max_steps=2", "--trainer.limit_test_batches=1",
             "--trainer.enable_progress_bar=false"]
        )  # fmt: skip
    assert [type(one).__name__ for one in done.trainer.loggers] == ["CSVLogger"]
    assert (tmp_path / "out" / "csv" / "version_0" / "metrics.csv").is_file()


# -- wandb.watch --------------------------------------------------------------------------------------------------------------


def test_wandb_watch_before_the_fit_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    from wandb.integration.torch.wandb_torch import TorchHistory

    from lightning_deepr import sparsify

    assert wandb
    for first in (False, True):
        module = Module()
        if first:
            sparsify(module, 0.2)
        TorchHistory().add_log_gradients_hook(module, log_freq=1)  # what logger.watch(module) does
        trainer = pl.Trainer(
            max_steps=1, logger=False, callbacks=[DeepR(None if first else 0.2)], enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, accelerator="cpu",
        )  # fmt: skip
        monkeypatch.setattr(TorchHistory, "log_tensor_stats", lambda *arguments: None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(module, batches())
        told = [one for one in caught if "wandb.watch was called before the conversion of 2 weights" in str(one.message)]
        assert len(told) == (0 if first else 1)
