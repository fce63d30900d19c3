"""Networks with one K for all layers, and their invariants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deepr import sparsify
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.regression import SEED, plain_mlp
from tests.helpers.state import all_slots

RULES = ("budget", "uniform")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.05),
}


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2)
        self.out = nn.Linear(8 * 2 * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.conv2(self.conv1(x).relu()).relu().flatten(1))
        return y


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(6, 7, bidirectional=True), nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.lstm(x)[0])
        return y


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.attention(x, x, x, need_weights=False)[0])
        return y


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (lambda: plain_mlp((12, 10, 8, 6)), lambda: torch.randn(8, 12)),
    "conv": (Images, lambda: torch.randn(4, 2, 6, 6)),
    "lstm": (Sequences, lambda: torch.randn(5, 3, 6)),
    "attention": (Attending, lambda: torch.randn(5, 3, 8)),
}


def network(name: str = "mlp", connectivity: Any = 0.25, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return sparsify(NETWORKS[name][0](), connectivity, scope="global", seed=SEED, **options)


def small(connectivity: Any = 0.3, **options: Any) -> nn.Module:
    return sparsify(plain_mlp(), connectivity, scope="global", distribution="uniform", seed=SEED, **options)


def shared(net: nn.Module) -> nn.Parameter:
    """Return theta, and check that it is one object and one of the parameters."""
    found = {id(c.theta): c.theta for c in converted_tensors(net)}
    assert len(found) == 1, "the layers do not share one theta"
    theta = next(iter(found.values()))
    assert sum(p is theta for p in net.parameters()) == 1
    return theta


def counts(net: nn.Module) -> list[int]:
    return [slots.count for slots in all_slots(net)]


def assert_sound(net: nn.Module, total: int, least: int = 1) -> None:
    theta, seen = shared(net).detach(), 0
    assert theta.shape == (total,) and bool((theta >= 0).all())
    for slots in all_slots(net):
        assert slots.places.dtype == torch.int64 and slots.places.shape == slots.signs.shape == slots.born.shape
        assert slots.places.unique().numel() == slots.count and least <= slots.count <= slots.total
        assert bool(((slots.places >= 0) & (slots.places < slots.total)).all())
        assert torch.equal(slots.signs, slots.signs_at(slots.places))
        assert torch.equal(slots.own(theta), theta[seen : seen + slots.count]), "layers are not sorted in theta"
        seen += slots.count
    assert seen == total


def by_connection(net: nn.Module, *values: Tensor) -> dict[tuple[int, int], tuple[float, ...]]:
    """Return {(layer, place): the value of each tensor of theta's shape there}."""
    theta, found, start = shared(net).detach(), {}, 0
    for layer, slots in enumerate(all_slots(net)):
        for i, place in enumerate(slots.places.tolist()):
            found[layer, place] = tuple(float(value[start + i]) for value in (theta, *values))
        start += slots.count
    return found
