"""The LightningModule of the text recipe. It is an ordinary dense module; a callback makes it sparse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric

from lightning_deepr.conversion.weight_decay import decay_groups
from lightning_deepr.models import CharTransformer
from lightning_deepr.packages.classes import LightningModule
from lightning_deepr.recipes.classifier import cosine_of


class CharacterModel(LightningModule):
    """A transformer that predicts the next character, trained with cross-entropy and AdamW.

    It logs ``train_loss``; ``val_loss`` and ``test_loss`` in nats; ``val_bits`` and ``test_bits`` in bits per character; and
    the share of right characters as ``val_accuracy`` and ``test_accuracy``.

    Args:
        characters: size of the vocabulary.
        width: width of the residual stream.
        layers: number of layers.
        heads: number of heads.
        context: the largest number of characters.
        dropout: dropout probability.
        lr: the learning rate after the warm-up; it falls to 0 on a cosine, per step.
        weight_decay: decay of the dense matrices. Biases, norms and sparse weights have none.
        warmup: share of the steps in which the learning rate rises from 0.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        characters: int = 65,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        context: int = 64,
        dropout: float = 0.0,
        lr: float = 2e-3,
        weight_decay: float = 0.1,
        warmup: float = 0.05,
    ) -> None:
        super().__init__()
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup: expected a share of the steps, at least 0 and below 1, found {warmup}.")
        self.save_hyperparameters()
        self.net = CharTransformer(characters, width, layers, heads, context, dropout)
        self.val_mean, self.val_right = MeanMetric(), MeanMetric()
        self.test_mean, self.test_right = MeanMetric(), MeanMetric()

    def forward(self, characters: Tensor) -> Tensor:
        return self.net(characters)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten())
        if batch_idx % 10 == 0:
            self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.val_mean, self.val_right)

    def on_validation_epoch_end(self) -> None:
        self._report("val", self.val_mean, self.val_right)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, self.test_mean, self.test_right)

    def on_test_epoch_end(self) -> None:
        self._report("test", self.test_mean, self.test_right)

    def _evaluate(self, batch: tuple[Tensor, Tensor], mean: MeanMetric, right: MeanMetric) -> None:
        logits, labels = self.net(batch[0]).flatten(0, 1), batch[1].flatten()
        mean.update(cross_entropy(logits, labels, reduction="none"))
        right.update((logits.argmax(-1) == labels).float())

    def _report(self, part: str, mean: MeanMetric, right: MeanMetric) -> None:
        loss = mean.compute()
        self.log_dict({f"{part}_loss": loss, f"{part}_bits": loss / math.log(2), f"{part}_accuracy": right.compute()})
        mean.reset()
        right.reset()

    def configure_optimizers(self) -> Any:
        h = self.hparams
        optimizer = torch.optim.AdamW(decay_groups(self.net, h["weight_decay"]), lr=h["lr"], betas=(0.9, 0.99))
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("The schedule needs the length of the training: give the Trainer max_epochs or max_steps.")
        return cosine_of(optimizer, steps, h["warmup"] * steps)
