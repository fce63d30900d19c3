"""The connections of a weight in the order of its rows and in the order of its columns: what sparse compute reads.

A weight of shape [rows, ...] counts as a matrix of rows x columns. One int32 tensor holds both orders, so that an operator takes
it as one argument and its size never changes (K is constant): where each row begins, and for each connection its column and its slot;
the same by column. The slot's top bit is set where the connection's sign is negative. Values are not here: theta stays in the order of its
slots, so that the optimizer's state stays valid, and whoever writes theta need not know of this.

The order is a function of the places alone (by row, then by column), however it came about: resuming is exact.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lightning_deepr.kernels.cpu.fields import ORDER, ROW_WORDS, CpuRow, Row, StepArguments, filler, pack_order

_fill = filler(StepArguments)
_PAD = 32  # entries after each part that may be read (not used) by kernels that look ahead


class Order:
    """Both orders of a converted weight; follows ``places`` when told to.

    Args:
        places: int64 [K].
        signs: +-1 [K].
        shape: the weight's shape.
    """

    def __init__(self, places: Tensor, signs: Tensor, shape: torch.Size) -> None:
        self.rows, self.columns = shape[0], math.prod(shape[1:])
        self.count = places.numel()
        with torch.inference_mode(
            False
        ):  # a validation may be the first to need it, and training saves it for its backward pass
            self.buffer = torch.zeros(size_of(self.rows, self.columns, self.count), dtype=torch.int32)
        self.addresses = addresses(self.buffer, self.rows, self.columns, self.count)
        self.packed = pack_order(*self.addresses)  # as kernels of whole layers take them
        self.build(places, signs)

    def build(self, places: Tensor, signs: Tensor) -> None:
        """Put all connections in order anew. O(K + rows + columns)."""
        from lightning_deepr.kernels.cpu import orders

        self.buffer.zero_()  # empty orders, into which every connection is born
        self.note(places)
        torch.autograd.graph.increment_version(self.buffer)
        if self.count == 0:
            return
        signs = signs if signs.element_size() >= 4 else signs.float()  # the kernel reads the sign bit of a float32 or float64
        everything = torch.arange(self.count)
        row = np.zeros(ROW_WORDS, np.int64)
        row[Row.COUNT], row[Row.PLACES] = self.count, places.data_ptr()
        row[CpuRow.REBORN], row[CpuRow.REBORN_COUNT] = everything.data_ptr(), self.count
        row[Row.SIGNS], row[CpuRow.SIZE] = signs.data_ptr(), signs.element_size()
        row[CpuRow.ROWS], row[CpuRow.COLUMNS] = self.rows, self.columns
        row[ORDER] = self.addresses
        arguments = _fill(TENSORS=1, TABLE=row.ctypes.data)
        orders.update_kernel()(arguments, 2 if self.count > 20_000 and torch.get_num_threads() > 1 else 1)

    def is_stale(self, places: Tensor) -> bool:
        """Whether somebody has written other places since the order was made."""
        known = self.noted
        return known[0] is not places or known[1] != _version_of(places)

    def note(self, places: Tensor) -> None:
        """The order is that of these places, as they are now."""
        self.noted = places, _version_of(places)


def _version_of(places: Tensor) -> int:
    return 0 if places.is_inference() else places._version


def size_of(rows: int, columns: int, count: int) -> int:
    return rows + columns + 2 + 4 * count + 6 * _PAD


def addresses(buffer: Tensor, rows: int, columns: int, count: int) -> list[int]:
    """Where the six parts begin: row starts, columns and slots by row; column starts, rows and slots by column."""
    found, address = [], buffer.data_ptr()
    for length in (rows + 1, count, count, columns + 1, count, count):
        found.append(address)
        address += 4 * (length + _PAD)
    return found
