"""Features of Lightning beside our callback: the training is the same with and without them, where they do not change it."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_deepr import DeepR, connections
from tests.helpers.classifier import Net, batches
from tests.helpers.trainer import trainer

STEPS = 24


def callback() -> DeepR:
    return DeepR(0.3, l1=0.05, temperature=1e-6, check_invariants=True)


def reference() -> Net:
    net = Net()
    trainer(callback(), max_epochs=2).fit(net, batches())
    return net


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    expected, found = one.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


# what changes nothing of the training
def feature(options: Callable[[Path], dict[str, Any]], mark: Any) -> Any:
    return pytest.param(options, marks=mark, id=mark.args[0])


HARMLESS = [
    feature(
        lambda folder: {
            "callbacks": [
                *(EarlyStopping("seen", patience=99), LearningRateMonitor(), Timer()),
                *(ModelSummary(), DeviceStatsMonitor(cpu_stats=False)),
            ],
            "logger": CSVLogger(folder),
            "enable_model_summary": True,
        },
        pytest.mark.feature("Callbacks: EarlyStopping, LearningRateMonitor, Timer, ModelSummary, DeviceStatsMonitor"),
    ),
    feature(lambda folder: {"deterministic": True}, pytest.mark.feature("Loops: deterministic=True")),
    feature(
        lambda folder: {
            "barebones": True,
            **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")),
        },
        pytest.mark.feature("Loops: barebones"),
    ),
    feature(
        lambda folder: {"num_sanity_val_steps": 2, "val_check_interval": 5, "inference_mode": False},
        pytest.mark.feature("Loops: sanity checks, validation in the middle of an epoch, with or without inference_mode"),
    ),
    feature(
        lambda folder: {"logger": [CSVLogger(folder)], "profiler": "simple", "log_every_n_steps": 1},
        pytest.mark.feature("Loops: loggers and profilers"),
    ),
    feature(
        lambda folder: {"gradient_clip_val": 1e6, "gradient_clip_algorithm": "value"},
        pytest.mark.feature("Optimizers: gradient_clip_algorithm"),
    ),
    feature(lambda folder: {"detect_anomaly": True}, pytest.mark.feature("Loops: detect_anomaly")),
    feature(
        lambda folder: {
            "callbacks": [ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1), OnExceptionCheckpoint(folder)],
            "enable_checkpointing": True,
        },
        pytest.mark.feature("Checkpoints: ModelCheckpoint every few steps"),
    ),
]


class Validated(Net):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if not self.trainer.barebones:
            self.log("seen", loss)


@pytest.mark.parametrize("make", HARMLESS)
@pytest.mark.filterwarnings("ignore")
def test_what_changes_nothing(make: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    options, net = make(tmp_path), Validated()
    trainer(callback(), *options.pop("callbacks", []), max_epochs=2, **options).fit(net, batches(), batches(4))
    assert_equal(reference(), net)


@pytest.mark.feature("Callbacks: LearningRateFinder and BatchSizeFinder")
@pytest.mark.parametrize("make", [lambda: LearningRateFinder(num_training_steps=5), lambda: BatchSizeFinder(max_trials=1)])
@pytest.mark.filterwarnings("ignore")
def test_finders_put_everything_back(make: Callable[[], Callback], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    class Found(Net):
        batch_size = 8

        def train_dataloader(self) -> Any:
            return batches(size=8)

        def val_dataloader(self) -> Any:
            return batches(2, size=self.batch_size)

    class Keeping(Callback):
        """Puts the learning rate back: then the training is the one without a finder."""

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.lr = 0.3
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 0.3

    net = Found()
    trainer(callback(), make(), Keeping(), max_epochs=2, default_root_dir=tmp_path).fit(net)
    assert_equal(reference(), net)


@pytest.mark.feature("Callbacks: EarlyStopping ends the training")
def test_early_stopping_ends_the_training() -> None:
    net = Validated(lr=0.0)
    loop = trainer(callback(), EarlyStopping("seen", patience=1), max_epochs=50)
    loop.fit(net, batches(), batches(2))
    assert loop.current_epoch < 50
    thetas = [len(p) for name, p in net.named_parameters() if name.endswith(".original")]
    assert [places.numel() for _, places, _ in connections(net).values()] == thetas


class Stops(Callback):
    """Ends the training in the middle of an epoch: by an exception or by a signal."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 12:
            if self.how == "exception":
                raise ValueError("stop")
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.feature("Checkpoints: on an exception (OnExceptionCheckpoint), resumed exactly")
def test_a_checkpoint_on_an_exception(tmp_path: Path) -> None:
    callbacks = callback(), OnExceptionCheckpoint(tmp_path), Stops("exception")
    loop = trainer(*callbacks, max_epochs=2, enable_checkpointing=True, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="stop"):
        loop.fit(Net(), batches())
    net = Net()
    trainer(callback(), max_epochs=2).fit(net, batches(), ckpt_path=tmp_path / "on_exception.ckpt")
    assert_equal(reference(), net)


@pytest.mark.feature("Checkpoints: on SIGTERM")
@pytest.mark.skipif(os.name == "nt", reason="os.kill ends the process there, and no handler runs")
def test_sigterm_ends_cleanly() -> None:
    net, ours = Net(), callback()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        trainer(ours, Stops("signal"), max_epochs=2).fit(net, batches())
    assert signal.getsignal(signal.SIGTERM) == before
    assert not ours._is_at_work
    assert set(connections(net)) == {"fc1.weight", "fc2.weight"}


@pytest.mark.feature("Modules: activation checkpointing")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    class Checkpointing(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            hidden = checkpoint(self.fc1, x, use_reentrant=use_reentrant)
            return checkpoint(self.fc2, self.norm(hidden).relu(), use_reentrant=use_reentrant)

    net = Checkpointing()
    trainer(callback(), max_epochs=2).fit(net, batches())
    assert_equal(reference(), net)


@pytest.mark.feature("Modules: inference_mode, before and after a training")
def test_inference_mode() -> None:
    net = Net()
    with torch.inference_mode():
        net(torch.ones(1, 12))
    trainer(callback(), max_epochs=2).fit(net, batches())
    with torch.inference_mode():
        found = net(torch.ones(1, 12))
    torch.testing.assert_close(found, net(torch.ones(1, 12)).detach())
    assert_equal(reference(), net)


@pytest.mark.feature("Modules: deepcopy in the middle of a training, both go on alike")
def test_a_copy_trains_alike() -> None:
    net = Net()
    ours = callback()
    trainer(ours, max_epochs=1).fit(net, batches())
    other, theirs = copy.deepcopy(net), copy.deepcopy(ours)
    trainer(ours, max_epochs=1).fit(net, batches())
    trainer(theirs, max_epochs=1).fit(other, batches())
    assert_equal(net, other)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.3, total_steps=STEPS + 1),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 5), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[5],
    ),
}


@pytest.mark.feature("Optimizers: schedulers per step, equal to a plain loop")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_per_step(name: str) -> None:
    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
            return [optimizer], [{"scheduler": SCHEDULERS[name](optimizer), "interval": "step"}]

    net = Scheduled()
    trainer(callback(), max_epochs=2).fit(net, batches())
    plain = callback().prepare(Net())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.3)
    scheduler = SCHEDULERS[name](optimizer)
    callback().attach(plain, optimizer, total_steps=STEPS)
    for _ in range(2):
        for x, y in batches():
            optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()
            scheduler.step()
    assert_equal(net, plain)
