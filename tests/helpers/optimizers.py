"""The optimizers of most trainings in the tests."""

from __future__ import annotations

from typing import Any

from torch import optim


def sgd(params: Any) -> optim.Optimizer:
    return optim.SGD(params, lr=0.1, momentum=0.5)


def adam(params: Any) -> optim.Optimizer:
    return optim.Adam(params, lr=0.02)


def adam_fused(params: Any) -> optim.Optimizer:
    return optim.Adam(params, lr=0.02, fused=True)
