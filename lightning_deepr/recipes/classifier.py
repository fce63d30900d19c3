"""The LightningModules of the MNIST and CIFAR-10 recipes. They are ordinary dense modules; a callback makes them sparse."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from lightning_deepr.models import CIFAR10CNN, LeNet300100
from lightning_deepr.packages.classes import LightningModule

_OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "cosine", "exponential")


class ImageClassifier(LightningModule):
    """Base class with cross-entropy and accuracy on (images, labels); subclasses set ``net`` and make the optimizer."""

    net: nn.Module
    log_every_n_batches = 1

    def __init__(self) -> None:
        super().__init__()
        self.val_accuracy = MulticlassAccuracy(10, average="micro")
        self.test_accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        if batch_idx % self.log_every_n_batches == 0:
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

    def cosine(self, optimizer: torch.optim.Optimizer, warmup_epochs: float = 0.0) -> Any:
        """Add a schedule: the learning rate rises linearly over ``warmup_epochs`` and falls to 0 on a cosine, per step.

        Returns:
            what ``configure_optimizers`` returns.

        Raises:
            ValueError: the Trainer has no max_epochs or max_steps.
        """
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError('schedule="cosine" needs the length of the training: give the Trainer max_epochs or max_steps.')
        warm = 0.0
        if warmup_epochs:
            epochs = self.trainer.max_epochs
            if not epochs or epochs < 0:
                raise ValueError("warmup_epochs needs the length of an epoch: give the Trainer max_epochs.")
            warm = steps * warmup_epochs / epochs

        return cosine_of(optimizer, steps, warm)


def cosine_of(optimizer: torch.optim.Optimizer, steps: float, warm: float = 0.0) -> Any:
    """Return what ``configure_optimizers`` returns: a linear rise over ``warm`` steps, and a cosine to 0 over ``steps``."""

    def factor(step: int) -> float:
        return min((step + 1) / warm, 1.0) * cosine_factor(step / steps) if warm else cosine_factor(step / steps)

    return [optimizer], [{"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"}]


def cosine_factor(progress: float) -> float:
    """Factor of the learning rate at a progress from 0 to 1: 1 at the start, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def check_choices(*choices: tuple[str, str, tuple[str, ...]]) -> None:
    """Check settings, each given as (name, value, known values).

    Raises:
        ValueError: a value is not among the known ones.
    """
    for name, value, known in choices:
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, found {value!r}.")


class DigitClassifier(ImageClassifier):
    """LeNet-300-100 on digits, with cross-entropy.

    Args:
        lr: initial learning rate.
        momentum: momentum of SGD.
        optimizer: "sgd" | "adam".
        schedule: schedule of the learning rate: "constant" | "cosine" (to 0, per step) | "exponential" (times ``gamma`` per
            epoch).
        gamma: factor of the exponential schedule.
        bias: whether the layers have (dense) biases.
    """

    log_every_n_batches = 50  # logging takes as long as a step of this small network

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
        check_choices(("optimizer", optimizer, _OPTIMIZERS), ("schedule", schedule, SCHEDULES))
        self.save_hyperparameters()
        self.net = LeNet300100(bias=bias)

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
        return self.cosine(optimizer)


class CIFAR10Classifier(ImageClassifier):
    """The tutorial's CNN (:class:`lightning_deepr.models.CIFAR10CNN`) with the tutorial's optimizer or a cosine schedule.

    The network runs in the channels-last memory format.

    Args:
        lr: initial learning rate.
        momentum: momentum of SGD; the tutorial has none.
        weight_decay: weight decay of ``local3`` and ``local4`` (the tutorial's L2 term of .004); no other tensor is decayed.
        schedule: "exponential" (the tutorial's: times ``gamma`` every ``decay_epochs`` epochs) | "cosine" (to 0, per step) |
            "constant".
        gamma, decay_epochs: factor and period of the exponential schedule.
        warmup_epochs: epochs of the cosine schedule's linear rise.
    """

    def __init__(
        self,
        lr: float = 0.1,
        momentum: float = 0.0,
        weight_decay: float = 0.004,
        schedule: str = "exponential",
        gamma: float = 0.1,
        decay_epochs: int = 350,
        warmup_epochs: float = 0.0,
    ) -> None:
        super().__init__()
        check_choices(("schedule", schedule, SCHEDULES))
        self.save_hyperparameters()
        self.net = CIFAR10CNN().to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def configure_optimizers(self) -> Any:
        h = self.hparams
        decayed = [p for name, p in self.named_parameters() if is_decayed(name)]
        others = [p for name, p in self.named_parameters() if not is_decayed(name)]
        groups = [{"params": decayed, "weight_decay": h["weight_decay"]}, {"params": others}]
        optimizer = torch.optim.SGD(groups, lr=h["lr"], momentum=h["momentum"])
        if h["schedule"] == "constant":
            return optimizer
        if h["schedule"] == "exponential":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, h["decay_epochs"], h["gamma"])]
        return self.cosine(optimizer, h["warmup_epochs"])


def is_decayed(name: str) -> bool:
    """Whether a parameter of the CNN has weight decay: ``local3.weight`` or ``local3.parametrizations.weight.original``."""
    return any(f"{layer}." in name for layer in ("local3", "local4")) and not name.endswith("bias")
