"""The LightningModule of the TIMIT recipes. It is an ordinary dense module; a callback makes it sparse."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric

from lightning_deepr.algorithm import randomness
from lightning_deepr.models import BLSTMClassifier
from lightning_deepr.packages.classes import LightningModule
from lightning_deepr.recipes.classifier import check_choices, cosine_of
from lightning_deepr.recipes.sequences import SequenceBatch
from lightning_deepr.recipes.timit_phones import IGNORED, folding

SCHEDULES = ("constant", "cosine")
_NOISE = 113  # a random stream, separate from the rewiring's and the batches'


def frame_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy as the mean over all labelled frames of a batch; 0 for a batch without a labelled frame.

    Args:
        logits: [batch, time, classes].
        labels: int64 [batch, time], -100 for frames without a label.
    """
    total = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


def frame_errors(logits: Tensor, labels: Tensor, matrix: Tensor) -> Tensor:
    """Find the wrongly classified frames after summing the posteriors to the 39 scored classes.

    Args:
        logits: [batch, time, classes].
        labels: int64 [batch, time], training targets, -100 for frames without a label.
        matrix: [classes, 39], from :func:`lightning_deepr.recipes.timit_phones.folding`.

    Returns:
        float32 [labelled frames], 1 for a wrong frame.
    """
    counts = labels != IGNORED
    posteriors = logits[counts].float().softmax(-1) @ matrix
    return (posteriors.argmax(-1) != matrix.argmax(1)[labels[counts]]).float()


def disturbed(features: Tensor, noise: float, offset: float) -> Tensor:
    """Add normal noise to features.

    Args:
        features: [batch, time, features], normalized.
        noise: standard deviation of the noise that is drawn for each frame.
        offset: standard deviation of the noise that is drawn once per sequence and added to all of its frames.
    """
    if noise:
        features = features + noise * torch.randn_like(features)
    if offset:
        features = features + offset * torch.randn_like(features[:, :1])
    return features


class FrameClassifier(LightningModule):
    """A bidirectional LSTM that predicts the phone of each frame, trained with cross-entropy and Adam.

    It logs ``train_loss``, ``val_loss``, and the share of wrong frames among 39 classes as ``val_frame_error`` and
    ``test_frame_error``.

    Args:
        hidden: LSTM units per direction.
        layers: number of LSTM layers.
        classes: number of training targets, the same as the data's: 60 phones or the 39 scored classes.
        inputs: features per frame.
        dropout: dropout probability of the LSTM's outputs.
        lr: initial learning rate of Adam.
        schedule: schedule of the learning rate: "constant" | "cosine" (to 0, per step).
        input_noise: standard deviation of the normal noise that is added to each frame's (normalized) features in training.
        input_offset: standard deviation of normal noise that is added to all frames of a sequence alike in training; it
            imitates unknown voices and channels.
        seed: seed of noise and dropout; None: the seed of ``seed_everything``. Both are functions of (seed, epoch, batch), so
            that an interrupted training continues with the same draws.

    Raises:
        ValueError: a setting is out of its range.
    """

    folding: Tensor

    def __init__(
        self,
        hidden: int = 128,
        layers: int = 1,
        classes: int = 60,
        inputs: int = 39,
        dropout: float = 0.0,
        lr: float = 1e-3,
        schedule: str = "constant",
        input_noise: float = 0.0,
        input_offset: float = 0.0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_choices(("schedule", schedule, SCHEDULES))
        for name, value in (("input_noise", input_noise), ("input_offset", input_offset)):
            if value < 0:
                raise ValueError(f"{name}: expected a standard deviation, 0 or more, found {value}.")
        self.save_hyperparameters()
        self.net = BLSTMClassifier(inputs, hidden, classes, layers, dropout)
        self.register_buffer("folding", folding(classes), persistent=False)
        self.val_error, self.test_error = MeanMetric(), MeanMetric()

    def forward(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.net(features, lengths)

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        features, labels, lengths = batch
        with self._drawing(batch_idx):
            features = disturbed(features, self.hparams["input_noise"], self.hparams["input_offset"])
            loss = frame_loss(self.net(features, lengths), labels)
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(labels))
        return loss

    @contextmanager
    def _drawing(self, batch_idx: int) -> Iterator[None]:
        """A context that seeds noise and dropout for this batch and restores the global generators afterwards."""
        if not any(self.hparams[name] for name in ("input_noise", "input_offset", "dropout")):
            yield
            return
        seed = torch.initial_seed() if self.hparams["seed"] is None else self.hparams["seed"]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(randomness.key(seed, _NOISE, self.current_epoch, batch_idx, self.global_rank))
            yield

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        logits = self.net(batch.features, batch.lengths)
        frames = int((batch.labels != IGNORED).sum())
        self.val_error(frame_errors(logits, batch.labels, self.folding))
        self.log("val_loss", frame_loss(logits, batch.labels), batch_size=frames)
        self.log("val_frame_error", self.val_error, prog_bar=True)

    def test_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        logits = self.net(batch.features, batch.lengths)
        self.test_error(frame_errors(logits, batch.labels, self.folding))
        self.log("test_frame_error", self.test_error)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])
        if self.hparams["schedule"] == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError('schedule="cosine" needs the length of the training: give the Trainer max_epochs or max_steps.')
        return cosine_of(optimizer, steps)
