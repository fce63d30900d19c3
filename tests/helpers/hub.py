"""Helpers for the tests of the Hub."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_deepr import connections, sparsify, zoo
from lightning_deepr.hub import SparseHubMixin
from lightning_deepr.models import LeNet300100

MODEL = "writer/lenet300_100.test"


class Net(nn.Module, SparseHubMixin):
    def __init__(self, width: int = 30, depth: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))
        self.dropout = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.body(x))


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have equal connections and equal other tensors, bit for bit."""
    ours, theirs = connections(one), connections(other)
    if ours.keys() != theirs.keys():
        return False
    for name, (shape, places, values) in ours.items():
        mine, yours = places.argsort(), theirs[name][1].argsort()  # files store connections in the order of places
        if shape != theirs[name][0] or not torch.equal(places[mine], theirs[name][1][yours]):
            return False
        if values[mine].numpy().tobytes() != theirs[name][2][yours].numpy().tobytes():
            return False
    dense = [{n: v for n, v in net.state_dict().items() if "parametrizations" not in n} for net in (one, other)]
    return dense[0].keys() == dense[1].keys() and all(torch.equal(dense[0][name], dense[1][name]) for name in dense[0])


def lenet(seed: int = 0, connectivity: float = 0.02) -> nn.Module:
    torch.manual_seed(seed)
    return sparsify(LeNet300100(), connectivity, seed=seed)


def saved(net: nn.Module, path: Path) -> Path:
    metrics = {"test_accuracy": {"value": 0.97, "mean": 0.969, "std": 0.001, "seeds": [0, 1, 2]}}
    zoo.save(
        net,
        path,
        architecture="lenet300_100",
        algorithm="DeepR",
        seeds=[0],
        metrics=metrics,
        data={"name": "MNIST", "split": "test"},
        recipe={"name": "mnist_best", "overrides": []},
        license="Apache-2.0",
    )
    return path
