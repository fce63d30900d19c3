"""Networks to export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_deepr import DeepR, MagnitudePruning, SoftDeepR, sparsify
from lightning_deepr.models import LeNet300100


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))


def after_training(callback: Any, net: nn.Module, size: int = 40, steps: int = 5) -> nn.Module:
    """Train a few steps in a plain loop, so that values, places and dormant weights are those of the method."""
    callback.prepare(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rewiring = callback.attach(net, optimizer, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, size)).square().sum().backward()
        optimizer.step()
    rewiring.remove()
    return net


def one_connection() -> nn.Module:
    return sparsify(small_net(), {"0": 1, "2": 1})


def empty_rows() -> nn.Module:
    return sparsify(nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 6)), {"0": 37, "2": 3})


KINDS = {
    "deepr": lambda: after_training(DeepR(0.1, l1=1e-3), small_net()),
    "global": lambda: after_training(DeepR(0.1, scope="global"), small_net()),
    "soft": lambda: after_training(SoftDeepR(0.1, temperature=1e-6, l1=1e-3), small_net()),
    "pruned": lambda: after_training(MagnitudePruning(0.1), small_net()),
    "one_connection": one_connection,
    "empty_rows": empty_rows,
    "all_connections": lambda: sparsify(small_net(), 1.0),
    "converted_in_part": lambda: sparsify(small_net(), {"0": 0.1}),
    "dense": small_net,
}
kinds = pytest.mark.parametrize("kind", KINDS)


def inputs_of(net: nn.Module) -> int:
    return next(layer.in_features for layer in net.modules() if isinstance(layer, nn.Linear))


def lenet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return sparsify(LeNet300100(), 0.01, distribution="deepr", seed=seed)
