"""Trainings that crash before a given step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tests.helpers.dense_theta import STEPS, full_state
from tests.helpers.optimizers import adam
from tests.helpers.regression import Regression, batches, loss_of
from tests.helpers.trainer import trainer


class Crash(Exception):
    pass


class CrashAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Crash


class Crashing(Regression):
    """A module that crashes before a given step. The step selects its batch, since a plain data loader keeps no position."""

    def __init__(
        self,
        make: Callable[[Any], Any],
        steps: int,
        crash_at: int | None = None,
        data: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().__init__(make, steps)
        self.crash_at = crash_at
        self.data = batches(steps) if data is None else data

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.trainer.global_step == self.crash_at:
            raise Crash
        return loss_of(self.net, self.data[self.trainer.global_step])


def whole_and_resumed(
    folder: Path, callbacks: Callable[[], list[pl.Callback]], every: int, crash_at: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the final states of an uninterrupted fit and of one that crashes and resumes from its last checkpoint."""

    def fit(where: Path, crash_at: int | None, path: Path | None = None) -> list[Tensor]:
        saver = ModelCheckpoint(where, every_n_train_steps=every, save_top_k=-1)
        module = Crashing(adam, STEPS, crash_at)
        runner = trainer(*callbacks(), saver, enable_checkpointing=True)
        if crash_at is not None:
            with pytest.raises(Crash):
                runner.fit(module)
        else:
            runner.fit(module, ckpt_path=path)
        return full_state(module, runner.optimizers[0])

    whole = fit(folder / "whole", None)
    fit(folder / "crashed", crash_at)
    path = max((folder / "crashed").glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    assert f"step={(crash_at - 1) // every * every}" in path.name
    return whole, fit(folder / "crashed", None, path)
