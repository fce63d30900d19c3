"""Sparse linear layers, and a training with either kind of compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import DeepR, connections, sparsify
from lightning_deepr import kernels as kernels_module
from tests.helpers.regression import SEED, plain_mlp
from tests.helpers.state import slots_by_name

needs_kernels = pytest.mark.skipif(not kernels_module.available(), reason="no kernels here")


def sparse_layer(
    columns: int = 14,
    rows: int = 9,
    connectivity: float | int = 0.3,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    compute: str = "sparse",
) -> nn.Linear:
    torch.manual_seed(0)
    return sparsify(  # type: ignore[return-value]
        nn.Linear(columns, rows, bias=bias, dtype=dtype), connectivity, compute=compute, seed=SEED
    )


def dense_twin(layer: nn.Module) -> nn.Linear:
    """Make an ordinary layer with the same weights, as :func:`connections` reports them."""
    ((shape, places, values),) = connections(layer).values()
    plain = nn.Linear(shape[1], shape[0], bias=layer.bias is not None, dtype=values.dtype)
    with torch.no_grad():
        plain.weight.zero_().view(-1)[places] = values
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    return plain


def theta_gradient(layer: nn.Module, of_weight: Tensor) -> Tensor:
    """Compute theta's expected gradient from the dense weight's gradient."""
    slots = slots_by_name(layer)["weight"]
    return of_weight.reshape(-1)[slots.places] * slots.signs


MICRO, WIDTHS = 2, (20, 32, 16, 6)
Batch = list[tuple[Tensor, Tensor]]


class Trained:
    """A training of a network with one kind of compute, with the same seed and data for both kinds."""

    def __init__(self, compute: str, connectivity: float = 0.2) -> None:
        self.net: nn.Module = sparsify(plain_mlp(WIDTHS).double(), connectivity, seed=SEED, compute=compute)
        self.begin()

    def begin(self) -> None:
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        self.rewiring = DeepR(l1=0.25, temperature=1e-5, seed=SEED, check_invariants=True).attach(self.net, self.optimizer)

    def step(self, micro_batches: Batch) -> None:
        self.optimizer.zero_grad()
        for x, y in micro_batches:
            kind = next(self.net.parameters()).dtype
            ((self.net(x.to(kind)) - y.to(kind)).square().mean() / len(micro_batches)).backward()
        self.optimizer.step()


def data(steps: int, first: int = 0) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(7 + first)
    teacher = torch.randn(WIDTHS[0], WIDTHS[-1], generator=torch.Generator().manual_seed(1)).double()
    for _ in range(steps):
        inputs = [torch.randn(9, WIDTHS[0], generator=generator).double() for _ in range(MICRO)]
        yield [(x, x @ teacher + torch.randn(9, WIDTHS[-1], generator=generator)) for x in inputs]


def huge_layer(width: int = 1_000_000, count: int = 1000, **options: Any) -> nn.Linear:
    with torch.device("meta"):
        net = nn.Linear(width, width, **options)
    return sparsify(net, count, compute="sparse", seed=SEED)  # type: ignore[return-value]
