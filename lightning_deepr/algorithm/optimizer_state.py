"""Reset a reborn slot's optimizer state to its starting values, for any optimizer, without a list of known optimizers.

Every state tensor of theta's shape has an entry per slot. To find the starting values, a second optimizer of the same class
takes one step on a parameter of 0 with a gradient of 0. This module records the first value of each state entry, before the
step changes it: zero for moments, an accumulator's initial value, or a step size.
"""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_deepr.algorithm import probe
from lightning_deepr.algorithm.inner_optimizers import slot_tensors
from lightning_deepr.algorithm.newborns import State

_ONE = torch.Size([1])  # the shape of a probe


class StartingState:
    """The starting values of the state, cached for each parameter group of an optimizer."""

    def __init__(self) -> None:
        # by the optimizer's id and group; the reference shows whether the id still belongs to that optimizer
        self._known: dict[tuple[int, int], tuple[weakref.ref[Optimizer], Any, dict[str, float]]] = {}

    def reset(self, optimizer: Optimizer, group_index: int, theta: Tensor, reborn: Tensor) -> None:
        """Write the starting value at the reborn slots of every state tensor that has theta's shape.

        Args:
            optimizer: the optimizer that holds theta.
            group_index: the index of theta's parameter group.
            theta: [K], the parameter.
            reborn: int64 [R], the reborn slots.
        """
        for _, value, start, _ in self.tensors(optimizer, group_index, theta):
            value.index_fill_(0, reborn, start)

    def tensors(self, optimizer: Optimizer, group_index: int, theta: Tensor, averaged: Set[str] = frozenset()) -> list[State]:
        """List every state tensor that has theta's shape, with its starting value.

        Args:
            optimizer, group_index, theta: as in :meth:`reset`.
            averaged: the names of the states of which a newborn gets the mean of the living slots.
        """
        state = optimizer.state.get(theta)
        if not state:
            return []
        found = slot_tensors(state, theta.shape)
        if not found:
            return []
        start = self.of(optimizer, group_index, theta)
        return [State(name, value, start.get(name, 0.0), name in averaged) for name, value in found]

    def of(self, optimizer: Optimizer, group_index: int, theta: Tensor) -> dict[str, float]:
        """Map the name of each state tensor to its starting value."""
        group = optimizer.param_groups[group_index]
        # Use the initial learning rate if a scheduler has recorded it: then a step size that starts at the learning rate
        # (Rprop's) has the same start throughout the training, and after a resume.
        lr = group.get("initial_lr", group.get("lr"))
        known = self._known.get((id(optimizer), group_index))
        if known is None or known[0]() is not optimizer or (known[1] is not lr and not _equal(known[1], lr)):
            known = weakref.ref(optimizer), lr, starting_values(optimizer, {**group, "lr": lr}, theta)
            self._known[id(optimizer), group_index] = known
        return known[2]


def _equal(first: Any, second: Any) -> bool:
    return not isinstance(first, Tensor) and not isinstance(second, Tensor) and bool(first == second)


def starting_values(optimizer: Optimizer, group: dict[str, Any], theta: Tensor) -> dict[str, float]:
    """Find the values of an optimizer's state tensors before the first gradient (see the module's docstring).

    Args:
        optimizer: the optimizer; it does not change.
        group: the options of theta's parameter group.
        theta: the parameter; only its dtype and device are used.

    Returns:
        the starting value of each state tensor, by name.
    """
    for make in probe.WAYS:
        one = nn.Parameter(torch.zeros(1, dtype=theta.dtype, device=theta.device))
        try:
            with torch.no_grad():
                second = make(optimizer, probe.options_of(group), one)
                begun, second.state = second.state, _States()
                second.state.update(begun)
                probe.take_steps(second, one, gradient=0.0, count=1)
            first = second.state[one].first
        except Exception:
            continue
        # a list or dict that was filled after it was put into the state: a step of a gradient of 0 nearly keeps the start
        later = dict(slot_tensors(second.state[one], one.shape))
        return {name: float(value.reshape(-1)[0]) for name, value in (later | first).items() if value.shape == one.shape}
    warnings.warn(
        f"The starting state of {type(optimizer).__name__} could not be found out (a second optimizer could not take a step on "
        "its own parameter); the state of reborn connections is set to 0.",
        stacklevel=2,
    )
    return {}


class _State(dict[str, Any]):
    """A parameter's state that records the first value of each entry."""

    def __init__(self, entries: Any = ()) -> None:
        super().__init__()
        self.first: dict[str, Tensor] = {}
        self.update(entries)

    def __setitem__(self, name: str, value: Any) -> None:
        for path, tensor in slot_tensors({name: value}, _ONE):
            if path not in self.first:
                self.first[path] = tensor.detach().clone()
        super().__setitem__(name, value)

    def setdefault(self, name: str, default: Any = None) -> Any:
        if name not in self:
            self[name] = default
        return self[name]

    def update(self, *entries: Any, **named: Any) -> None:
        for name, value in dict(*entries, **named).items():
            self[name] = value


class _States(defaultdict[Tensor, _State]):
    """An optimizer's state, with a :class:`_State` for each parameter."""

    def __init__(self) -> None:
        super().__init__(_State)

    def __setitem__(self, parameter: Tensor, state: Any) -> None:
        super().__setitem__(parameter, state if isinstance(state, _State) else _State(state))

    def update(self, states: Any) -> None:  # type: ignore[override]
        for parameter, state in states.items():
            self[parameter] = state
