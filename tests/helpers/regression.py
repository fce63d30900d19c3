"""A regression on a linear teacher: data, networks and loss, as a plain loop and as a LightningModule."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

from lightning_deepr import sparsify

SEED = 3
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
Named = Iterable[tuple[str, nn.Parameter]]


def plain_mlp(sizes: tuple[int, ...] = (12, 10, 6)) -> nn.Sequential:
    """Make linear layers with ReLU between them, with the same weights in every call."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for size_in, size_out in itertools.pairwise(sizes):
        layers += [nn.Linear(size_in, size_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def mlp(connectivity: Any = 0.3, *, seed: int = SEED, **options: Any) -> nn.Module:
    """Make the same network, converted."""
    return sparsify(plain_mlp(), connectivity, distribution="uniform", seed=seed, **options)


class Branches(nn.Module):
    """Two parallel layers: gradients reach both, even if they are very sparse."""

    def __init__(self, sizes: tuple[int, int]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(*sizes), nn.Linear(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x.abs())


def batches(steps: int, size_in: int = 12, size_out: int = 6, count: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Make batches of a linear teacher. The noise of the targets keeps connections dying."""
    generator = torch.Generator().manual_seed(7)
    teacher = torch.randn(size_in, size_out, generator=generator)
    inputs = [torch.randn(count, size_in, generator=generator) for _ in range(steps)]
    return [(x, x @ teacher + torch.randn(count, size_out, generator=generator)) for x in inputs]


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    x, y = x.to(next(net.parameters()).dtype), y.to(next(net.parameters()).dtype)
    return (net(x) - y).square().mean()


class Twin:
    """Take the optimizer's step without rewiring, on copies."""

    def __init__(self, net: nn.Module, optimizer: optim.Optimizer, make: Callable[[Named], optim.Optimizer]) -> None:
        self.params = {name: nn.Parameter(p.detach().clone()) for name, p in net.named_parameters()}
        for copied, p in zip(self.params.values(), net.parameters(), strict=True):
            copied.grad = p.grad.clone()
        self.optimizer = make(self.params.items())
        self.optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        self.optimizer.step()


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, data: Iterable[tuple[Tensor, Tensor]], scheduler: Any = None
) -> None:
    """Train in a plain PyTorch loop."""
    for batch in data:
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


class Regression(pl.LightningModule):
    """The same network, named ``net``, and loss as a LightningModule."""

    def __init__(self, make: Callable[[Any], Any], steps: int = 30) -> None:
        super().__init__()
        self.net, self.make, self.steps = plain_mlp(), make, steps

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())

    def train_dataloader(self) -> Any:
        return DataLoader(batches(self.steps), batch_size=None)  # type: ignore[arg-type]
