"""The optimizer's state of a newborn: what the optimizer starts with, or the mean of the slots that live on.

An optimizer that normalizes (Adam) divides by a second moment. After a rebirth the second moment is 0, and the bias correction,
which shares one step count, is long over: the newborn's first step is several times the learning rate whatever its gradient.
``newborn="neutral"`` therefore starts a state that behaves like a second moment at the mean over the living slots of its
tensor. All other states start as the optimizer starts them.

:mod:`lightning_deepr.algorithm.second_moments` finds these states by a probe of the optimizer, without a list of names.

The mean is the same in every backend, bit for bit. It is a sum in float64 by a binary tree of neighbours: entries 0 and 1, 2
and 3, ... are added, then these sums in the same way, until one is left; reborn slots count as 0, and a missing neighbour, too.
The sum is divided by the number of living slots and rounded to the state's dtype (to float32 first if the dtype is narrower).
If no slot lives, or the mean is not finite, the newborn starts at the optimizer's starting value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

WORDS = ("neutral", "start")


class State(NamedTuple):
    """A tensor that has an entry per slot, and what a newborn gets there."""

    name: str
    value: Tensor
    start: float  # the value that the optimizer starts with
    averaged: bool = False  # True: a newborn gets the mean of the living slots


def tree_sum(values: Tensor) -> Tensor:
    """Add the entries of a vector in float64, by a binary tree of neighbours (see the module's docstring).

    Args:
        values: [K], any floating-point dtype.

    Returns:
        float64, a tensor without dimensions on the device of ``values``. It is 0 for K = 0.

    Example::

        >>> float(tree_sum(torch.tensor([1.0, 2.0, 4.0])))
        7.0
    """
    total = values.double()
    while total.numel() > 1:
        if total.numel() % 2:
            total = functional.pad(total, (0, 1))
        total = total[0::2] + total[1::2]
    return total.sum()


def mean_of(total: Tensor, living: int | Tensor, start: float, dtype: torch.dtype) -> Tensor:
    """Return what a newborn gets, as a tensor of a state's dtype without dimensions.

    Args:
        total: the sum of the living slots, see :func:`tree_sum`.
        living: the number of living slots.
        start: the starting value of the optimizer, for a sum of no slots or one that is not finite.
        dtype: the dtype of the state.
    """
    mean = total / living
    mean = torch.where(torch.isfinite(mean), mean, start)  # no living slot: 0 / 0
    return mean.to(dtype) if dtype == torch.float64 else mean.float().to(dtype)


def start_newborns(states: Iterable[State], slots: Tensor) -> None:
    """Write the newborns' values into states, in place.

    Args:
        states: the states, each [K].
        slots: int64 [R], the reborn slots, all different. The host knows R, so nothing waits for a device.
    """
    if slots.numel() == 0:
        return
    for _, value, start, averaged in states:
        where = slots if slots.device == value.device else slots.to(value.device)
        if averaged:
            living = value.index_fill(0, where, 0.0)
            mean = mean_of(tree_sum(living), value.numel() - slots.numel(), start, value.dtype)
            value.index_copy_(0, where, mean.expand(slots.numel()))
        else:
            value.index_fill_(0, where, start)


def start_marked(states: Iterable[State], reborn: Tensor) -> None:
    """Do :func:`start_newborns` for slots that only the device knows.

    Args:
        states: the states, each [K].
        reborn: bool [K], the reborn slots.
    """
    for _, value, start, averaged in states:
        mask = reborn.to(value.device)
        if averaged:
            living = (~mask).sum()
            mean = mean_of(tree_sum(value.masked_fill(mask, 0.0)), living, start, value.dtype)
            value.copy_(torch.where(mask, mean, value))
        else:
            value.masked_fill_(mask, start)


def expected(state: State, slots: Tensor, own: Callable[[Tensor], Tensor]) -> float:
    """Return the value that every slot of a layer has that was just reborn.

    Args:
        state: the state after the step.
        slots: int64 [R], the reborn slots of the layer.
        own: a function that cuts a layer's piece out of a tensor [K].
    """
    if not state.averaged or slots.numel() == 0:
        return state.start
    piece = own(state.value)
    living = piece.index_fill(0, slots.to(piece.device), 0.0)
    return float(mean_of(tree_sum(living), piece.numel() - slots.numel(), state.start, piece.dtype))
