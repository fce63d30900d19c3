"""What a neutral newborn's state starts at, in NumPy: the mean of the living slots, by a binary tree of neighbours."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np


def tree_sum(values: list[float]) -> float:
    """Add the neighbours of a list whose length is a power of two, then the neighbours of these sums, and so on."""
    while len(values) > 1:
        values = [first + second for first, second in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def newborn_value(values: np.ndarray, reborn: Collection[int], start: float) -> np.floating:
    """Return what each reborn slot gets, in the dtype of the values.

    Args:
        values: [K], float32 or float64, the state after the optimizer's step.
        reborn: the reborn slots.
        start: the starting value of the optimizer.
    """
    living = [0.0 if slot in reborn else float(value) for slot, value in enumerate(values)]
    number = len(living) - len(reborn)
    length = 1
    while length < len(living):
        length *= 2
    total = tree_sum(living + [0.0] * (length - len(living)))
    mean = total / number if number else start
    return values.dtype.type(mean if np.isfinite(mean) else start)
