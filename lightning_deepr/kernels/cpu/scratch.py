"""The working memory of kernels.

A kernel must not allocate: numba would raise a MemoryError in a C function, where it is printed and lost, and the caller would
go on with half a result. So the caller allocates the most that a kernel can need (:mod:`.room`), which is an ordinary error if
it fails, and before anything is written. Pages that the kernel does not touch take no memory.

A *cell* is an int64 word with the address of the next free byte.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from lightning_deepr.kernels.cpu.native import load_int64, pointer, store_int64

CELL_BYTES = 64  # of a cell on the stack, as a literal for ``stack_space``


@njit(inline="always")
def take(cell: int, size: int) -> int:
    """Take ``size`` bytes, and return their address: that of a cache line."""
    address = (load_int64(cell) + 63) & ~np.int64(63)
    store_int64(cell, address + size)
    return address


@njit
def int64s(cell: int, count: int) -> Any:
    """Take an array of int64 with any values."""
    return carray(pointer(take(cell, 8 * count)), count, np.int64)


@njit
def uint64s(cell: int, count: int) -> Any:
    return carray(pointer(take(cell, 8 * count)), count, np.uint64)


@njit
def int32s(cell: int, count: int) -> Any:
    return carray(pointer(take(cell, 4 * count)), count, np.int32)


@njit
def bytes_of(cell: int, count: int) -> Any:
    return carray(pointer(take(cell, count)), count, np.uint8)
