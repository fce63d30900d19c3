"""A small classifier as a LightningModule, with its data and a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    """A two-layer classifier that records its batches and losses, for tests of a fit."""

    def __init__(self, lr: float = 0.3, hidden: int = 16, norm: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.fc1 = nn.Linear(12, hidden)
        self.norm: nn.Module = nn.BatchNorm1d(hidden) if norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, 4)
        self.lr = lr
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.fc1(x)).relu())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def batches(count: int = 12, size: int = 8) -> DataLoader:
    """Return the same few batches in the same order for every run."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count * size, 12, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, :4] + x[:, 4:8]).argmax(1)), batch_size=size)


def fit_plain(
    net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, each_step: Callable[[], None] | None = None
) -> None:
    """Train in a plain PyTorch loop over the same batches."""
    data = list(batches())
    for step in range(steps):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        if each_step is not None:
            each_step()
