"""A small network, and a check that it does not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Check that the module has the same parameters with the same values afterwards."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    parameters = {name: id(parameter) for name, parameter in module.named_parameters()}
    yield
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == parameters


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
