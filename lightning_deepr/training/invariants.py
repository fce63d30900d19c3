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


def check_invariants(item: Stepped, optimizer: Optimizer, starts: Mapping[str, float], signed: bool = False) -> None:
    """Everything that must hold after every step of a method on K slots.

    Args:
        item: the tensor that took the step, with what was reborn.
        optimizer: that holds its theta.
        starts: with which value each of the optimizer's state tensors begins, by name.
        signed: whether theta may be negative.

    Raises:
        RuntimeError: names the tensor, the step and what is broken.
    """
    tensor, slots, theta = item.tensor, item.tensor.slots, item.theta

    require = requirement(tensor)
    places = slots.places
    require(
        theta.shape == places.shape == (tensor.turnover.count,), f"expected {tensor.turnover.count} slots, found {theta.shape}"
    )
    require(bool(torch.isfinite(theta).all()), "theta is not finite")
    require(signed or bool((theta >= 0).all()), f"expected theta >= 0, found {float(theta.min())}")
    require(int(places.min()) >= 0 and int(places.max()) < slots.total, f"a place lies outside 0 ... {slots.total - 1}")
    require(places.unique().numel() == places.numel(), "two slots are at one place")
    require(torch.equal(slots.signs, slots.signs_at(places)), "a sign is not that of its place")
    reborn = item.reborn.slots
    if reborn is None or reborn.numel() == 0:
        return
    require(bool((theta[reborn] == 0).all()), "a reborn slot does not start at theta = 0")
    for name, value in optimizer.state.get(tensor.theta, {}).items():
        if isinstance(value, torch.Tensor) and value.shape == theta.shape:
            start = starts.get(name, 0.0)
            expected = torch.full_like(value[reborn], start)
            require(
                torch.equal(value[reborn], expected), f"the optimizer's {name} of a reborn slot is not at its start, {start}"
            )
