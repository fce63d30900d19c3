"""The mean of the living slots, which a neutral newborn starts at (see :mod:`lightning_deepr.algorithm.newborns`)."""

from __future__ import annotations

import numpy as np
from numba import carray, njit

from lightning_deepr.kernels.cpu.native import load_float, pointer, stack_space

BLOCK = 64  # entries that are added together, a power of two: the loops have constant lengths
LEVELS = 58  # sums of 1, 2, 4, ... blocks that wait for their neighbours
BLOCK_BYTES, LEVEL_BYTES = 8 * BLOCK, 8 * LEVELS


@njit
def halve(sums: np.ndarray, count: int) -> None:
    """Add neighbours: sums[i] = sums[2 i] + sums[2 i + 1]."""
    for i in range(count):
        sums[i] = sums[2 * i] + sums[2 * i + 1]


@njit
def tree_sum(address: int, size: int, count: int) -> float:
    """Add ``count`` floats of ``size`` bytes in float64, by the tree of ``newborns.tree_sum``."""
    sums = carray(pointer(stack_space(BLOCK_BYTES)), BLOCK, np.float64)
    waiting = carray(pointer(stack_space(LEVEL_BYTES)), LEVELS, np.float64)
    whole = count // BLOCK
    for block in range(whole + 1):
        if block < whole:
            if size == 4:
                short = carray(pointer(address + 4 * BLOCK * block), BLOCK, np.float32)
                for i in range(BLOCK // 2):
                    sums[i] = np.float64(short[2 * i]) + np.float64(short[2 * i + 1])
            else:
                wide = carray(pointer(address + 8 * BLOCK * block), BLOCK, np.float64)
                for i in range(BLOCK // 2):
                    sums[i] = wide[2 * i] + wide[2 * i + 1]
        else:  # the last block is filled up with zeros
            for i in range(BLOCK // 2):
                first, second = BLOCK * block + 2 * i, BLOCK * block + 2 * i + 1
                sums[i] = load_float(address + first * size, size) if first < count else 0.0
                sums[i] += load_float(address + second * size, size) if second < count else 0.0
        halve(sums, 16)
        halve(sums, 8)
        halve(sums, 4)
        halve(sums, 2)
        total = sums[0] + sums[1]
        # the sum of this block meets the sums of as many blocks before it, like a carry in a binary counter
        level, number = 0, block
        while number & 1:
            total = waiting[level] + total
            level += 1
            number >>= 1
        waiting[level] = total
    # what still waits for a neighbour, which is missing
    total = 0.0
    for level in range(LEVELS):
        if ((whole + 1) >> level) & 1:
            total = waiting[level] + total
    return total


@njit
def mean(address: int, size: int, count: int, living: int, start: float) -> float:
    """Return what a newborn gets: the mean, or ``start`` if no slot lives or the mean is not finite.

    Args:
        address, size, count: the floats; those of the reborn slots are 0.
        living: the number of slots that were not reborn.
    """
    if living == 0:
        return start
    found = tree_sum(address, size, count) / living
    return found if np.isfinite(found) else start
