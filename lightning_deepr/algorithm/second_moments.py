"""Find the states of an optimizer that behave like a second moment, by a probe, without a list of names.

Second optimizers take a few steps on a parameter of their own: one with a gradient of .7, one with -.7. A state that moves, and
ends at the same value in both, behaves like a second moment. A first moment flips its sign. A step size, like Rprop's, does not
mind the sign either; a third optimizer tells it apart: with twice the learning rate a step size is about twice as large.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_deepr.algorithm import probe
from lightning_deepr.algorithm.inner_optimizers import slot_tensors
from lightning_deepr.algorithm.newborns import State
from lightning_deepr.algorithm.optimizer_state import StartingState

_GRADIENT = 0.7
_LR = 2.0**-6  # of the probe: the group's may be 0 now, in a warm-up
_STEPS = 3  # some optimizers only set up their state in the first step


class SecondMoments:
    """The names of the states that behave like a second moment, cached for each parameter group of an optimizer.

    The optimizers have to live as long as this object.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], frozenset[str]] = {}

    def mark(self, starting: StartingState, optimizer: Optimizer, group_index: int, theta: Tensor) -> list[State]:
        """List every state tensor that has theta's shape. Those that behave like a second moment are marked as averaged.

        Args:
            starting: the starting values of the optimizer's state.
            optimizer: the optimizer.
            group_index: the index of theta's parameter group.
            theta: [K], the parameter.
        """
        known = self._known.get((id(optimizer), group_index))
        if known is None:
            states = starting.tensors(optimizer, group_index, theta)
            if not states:
                return states
            found = second_moments(optimizer, optimizer.param_groups[group_index], theta, {s.name: s.start for s in states})
            if found is None:
                warnings.warn(
                    f'newborn="neutral": which states of {type(optimizer).__name__} are second moments could not be found out '
                    '(a second optimizer could not take a step on its own parameter). Newborns start as under newborn="start".',
                    stacklevel=2,
                )
            known = self._known[id(optimizer), group_index] = found or frozenset()
        return starting.tensors(optimizer, group_index, theta, known)


def second_moments(
    optimizer: Optimizer, group: Mapping[str, Any], theta: Tensor, starts: Mapping[str, float]
) -> frozenset[str] | None:
    """Find the states that behave like a second moment (see the module's docstring).

    Args:
        optimizer: the optimizer; it does not change, and none of its hooks is called.
        group: the options of theta's parameter group.
        theta: the parameter; only its dtype and device are used.
        starts: the starting value of each state of theta's shape, by name.

    Returns:
        the names of these states; None if no second optimizer could take a step.
    """
    for make in probe.WAYS:
        try:
            up = _after_steps(make, optimizer, group, theta, _GRADIENT, _LR)
            down = _after_steps(make, optimizer, group, theta, -_GRADIENT, _LR)
            faster = _after_steps(make, optimizer, group, theta, _GRADIENT, 2 * _LR)
        except Exception:
            continue
        return frozenset(
            name
            for name, start in starts.items()
            if name in up and name in down and name in faster and _follows_size(start, up[name], down[name], faster[name])
        )
    return None


def _after_steps(
    make: Any, optimizer: Optimizer, group: Mapping[str, Any], theta: Tensor, gradient: float, lr: float
) -> dict[str, float]:
    """Return the state of a second optimizer's only parameter after a few steps, by name."""
    one = nn.Parameter(torch.zeros(1, dtype=theta.dtype, device=theta.device))
    with torch.no_grad():
        second = make(optimizer, probe.options_of(group, lr), one)
        probe.take_steps(second, one, gradient, _STEPS)
    found = slot_tensors(second.state[one], one.shape)
    return {name: float(value) for name, value in found if value.is_floating_point()}


def _follows_size(start: float, up: float, down: float, faster: float) -> bool:
    """Whether a state with these values follows the size of the gradients, but neither their sign nor the learning rate."""
    moves = math.isfinite(up) and math.isfinite(faster) and up != start
    return moves and up == down and abs(faster - up) < 0.25 * abs(up)
