"""The conditions that hold after every step (``check_invariants``)."""

from __future__ import annotations

from collections.abc import Callable

from lightning_deepr.algorithm import newborns
from lightning_deepr.training.tracked import Stepped, TrackedTensor


def requirement(tensor: TrackedTensor) -> Callable[[bool, str], None]:
    """Make a function that takes a condition and its description, and raises an error if the condition is false."""

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise RuntimeError(f"check_invariants: `{tensor.name}`, step {tensor.step}: {what}.")

    return require


def check_invariants(
    item: Stepped,
    *,
    least: int = 0,
    signed: bool = False,
) -> None:
    """Check all conditions that hold after every step of a method on K slots.

    Args:
        item: the tensor that took the step, with its reborn slots.
        least: the least number of connections of a layer that shares one theta with others.
        signed: whether theta may be negative.

    Raises:
        RuntimeError: a condition does not hold; the message names the tensor, the step and the condition.
    """
    tensor, slots, theta = item.tensor, item.tensor.slots, item.tensor.theta
    require = requirement(tensor)
    count = tensor.turnover.count
    require(bool(slots.shares) or slots.count == count, f"expected {count} slots, found {slots.count}")
    born = item.reborn.slots
    if born is None:
        born = slots.places[:0]
    states = [(state.name, state.value, newborns.expected(state, born, slots.own)) for state in item.states()]
    problem = slots.problem(theta.detach(), born, states, least=least, signed=signed)
    require(problem is None, str(problem))
