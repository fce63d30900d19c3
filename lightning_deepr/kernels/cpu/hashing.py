"""The hash of :mod:`lightning_deepr.algorithm.randomness` for kernels. It gives the same integers."""

from __future__ import annotations

import numpy as np
from numba import njit

from lightning_deepr.algorithm import randomness

GOLDEN = np.uint64(randomness.GOLDEN)
FIRST = np.uint64(randomness.MULTIPLIER_1)
SECOND = np.uint64(randomness.MULTIPLIER_2)
LARGEST = np.uint64(randomness.LARGEST)


@njit(inline="always")
def mix(word: np.uint64) -> np.uint64:
    word = (word ^ (word >> np.uint64(30))) * FIRST
    word = (word ^ (word >> np.uint64(27))) * SECOND
    return word ^ (word >> np.uint64(31))


@njit(inline="always")
def extend(state: np.uint64, coordinate: np.uint64) -> np.uint64:
    """Add a coordinate to a key. ``randomness.key`` starts with the number of coordinates."""
    return mix(state + GOLDEN + mix(coordinate))


@njit(inline="always")
def bits(key: np.uint64, counter: np.uint64) -> np.uint64:
    return mix(counter * GOLDEN + key)
