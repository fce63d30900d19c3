"""What must hold after every step (``check_invariants``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.optim import Optimizer

from lightning_deepr.training.tracked import Stepped, TrackedTensor


def requirement(tensor: TrackedTensor) -> Callable[[bool, str], None]:
    """What ``check_invariants`` calls with a condition and what to say where it does not hold."""

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise RuntimeError(f"check_invariants: `{tensor.name}`, step {tensor.step}: {what}.")

    return require


def check_invariants(
    item: Stepped,
    optimizer: Optimizer,
    starts_of: Callable[[Stepped], Mapping[str, float]],
    *,
    least: int = 0,
    signed: bool = False,
) -> None:
    """Everything that must hold after every step of a method on K slots.

    Args:
        item: the tensor that took the step, with what was reborn.
        optimizer: the optimizer that holds its theta.
        starts_of: gives the value with which each of the optimizer's state tensors begins, by name.
        least: how many connections a layer must have that shares one theta with others.
        signed: whether theta may be negative.

    Raises:
        RuntimeError: names the tensor, the step and what is broken.
    """
    tensor, slots, theta = item.tensor, item.tensor.slots, item.tensor.theta
    require = requirement(tensor)
    count = tensor.turnover.count
    require(bool(slots.shares) or slots.count == count, f"expected {count} slots, found {slots.count}")
    state = optimizer.state.get(theta, {})
    starts = starts_of(item) if state else {}
    states = [
        (name, value, starts.get(name, 0.0))
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.shape == theta.shape
    ]
    born = item.reborn.slots
    if born is None:
        born = slots.places[:0]
    problem = slots.problem(theta.detach(), born, states, least=least, signed=signed)
    require(problem is None, str(problem))
