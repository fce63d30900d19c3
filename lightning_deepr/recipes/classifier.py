"""The LightningModule of the MNIST recipes. Nothing in it knows of sparsity: that is the callback's."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from lightning_deepr.models import LeNet300100

OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "cosine", "exponential")


class DigitClassifier(LightningModule):
    """LeNet-300-100 on digits, with cross-entropy.

    Args:
        lr: learning rate at the start.
        momentum: of SGD.
        optimizer: "sgd" | "adam".
        schedule: of the learning rate: "constant" | "cosine" (to 0, per step) | "exponential" (times ``gamma`` per epoch).
        gamma: see ``schedule``.
        bias: whether the layers have (dense) biases.
    """

    def __init__(
        self,
        lr: float = 0.05,
        momentum: float = 0.0,
        optimizer: str = "sgd",
        schedule: str = "constant",
        gamma: float = 0.7,
        bias: bool = True,
    ) -> None:
        super().__init__()
        for name, value, known in (("optimizer", optimizer, OPTIMIZERS), ("schedule", schedule, SCHEDULES)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, found {value!r}.")
        self.save_hyperparameters()
        self.net: nn.Module = LeNet300100(bias=bias)
        self.val_accuracy = MulticlassAccuracy(10, average="micro")
        self.test_accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        if batch_idx % 50 == 0:  # logging costs as much as a step of so small a network
            self.log("train_loss", loss.detach(), prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.val_accuracy(self.net(images), labels)
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.test_accuracy(self.net(images), labels)
        self.log("test_accuracy", self.test_accuracy)

    def configure_optimizers(self) -> Any:
        h = self.hparams
        optimizer: torch.optim.Optimizer
        if h["optimizer"] == "adam":
            optimizer = torch.optim.Adam(self.parameters(), lr=h["lr"])
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=h["lr"], momentum=h["momentum"])
        if h["schedule"] == "constant":
            return optimizer
        if h["schedule"] == "exponential":
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, h["gamma"])]
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError('schedule="cosine" has to know its length: give the Trainer max_epochs or max_steps.')
        cosine = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
        )
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]
