"""The connections of a weight in the order of its rows and in the order of its columns, for sparse compute.

A weight of shape [rows, ...] counts as a matrix of rows x columns. One int32 tensor holds both orders, so that an operator
takes them as one argument. Its size never changes, because K is constant. It says where each row begins, and holds for each
connection its column and its slot; then the same by column. The top bit of a slot is set if the connection's sign is negative.
The tensor holds no values: theta keeps the order of its slots, so the optimizer's state stays valid, and code that writes
theta does not touch the order.

The order is a function of the places alone (by row, then by column). It does not depend on how the places came about, so
resuming is exact.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lightning_deepr.kernels.cpu import room
from lightning_deepr.kernels.cpu.fields import ORDER, ROW_WORDS, CpuRow, Row, StepArguments, filler, pack_order

_fill = filler(StepArguments)
_PAD = 32  # entries after each part that may be read (not used) by kernels that look ahead


class Order:
    """Both orders of a converted weight.

    They do not follow a change of ``places`` by themselves: see :meth:`build` and :meth:`is_stale`.

    Args:
        places: int64 [K].
        signs: +-1 [K].
        shape: the shape of the weight.
    """

    def __init__(self, places: Tensor, signs: Tensor, shape: torch.Size) -> None:
        self.rows, self.columns = shape[0], math.prod(shape[1:])
        self.bias_shape = (self.rows,)
        self.count = places.numel()
        # A validation may be the first to need the buffer, but training saves it for its backward pass.
        with torch.inference_mode(False):
            self.buffer = torch.zeros(size_of(self.rows, self.columns, self.count), dtype=torch.int32, device="cpu")
        self.addresses = addresses(self.buffer, self.rows, self.columns, self.count)
        self.packed = pack_order(*self.addresses)  # as kernels of whole layers take them
        self.build(places, signs)

    def build(self, places: Tensor, signs: Tensor) -> None:
        """Sort all connections again. O(K + rows + columns)."""
        from lightning_deepr.kernels.cpu import orders

        signs = signs if signs.element_size() >= 4 else signs.float()  # the kernel reads the sign bit of a float32 or float64
        everything = torch.arange(self.count, device="cpu")
        free = room.empty(room.order_anew(self.count, self.rows, self.columns))
        self.buffer.zero_()  # empty orders: the kernel below inserts every connection as a newborn
        torch.autograd.graph.increment_version(self.buffer)
        if self.count:
            row = np.zeros(ROW_WORDS, np.int64)
            row[Row.COUNT], row[Row.PLACES] = self.count, places.data_ptr()
            row[CpuRow.REBORN], row[CpuRow.REBORN_COUNT] = everything.data_ptr(), self.count
            row[Row.SIGNS], row[CpuRow.SIZE] = signs.data_ptr(), signs.element_size()
            row[CpuRow.ROWS], row[CpuRow.COLUMNS] = self.rows, self.columns
            row[ORDER], row[CpuRow.SCRATCH] = self.addresses, free.data_ptr()
            arguments = _fill(TENSORS=1, TABLE=row.ctypes.data)
            orders.update_kernel()(arguments, 2 if self.count > 20_000 and torch.get_num_threads() > 1 else 1)
        self.note(places)

    def is_stale(self, places: Tensor) -> bool:
        """Tell whether the places have changed since the order was made."""
        known = self.noted
        return known[0] is not places or known[2] != places.data_ptr() or (not known[3] and known[1] != places._version)

    def note(self, places: Tensor) -> None:
        """Record that the order matches these places in their present version."""
        self.note_as((places, places.data_ptr(), self.count, _version_of(places)))

    def note_as(self, mark: tuple[Tensor, int, int, int]) -> None:
        """Record that the order matches the places of a record of :func:`lightning_deepr.kernels.gate.note`."""
        places, address, _, version = mark
        self.noted = places, version, address, places.is_inference()


def _version_of(places: Tensor) -> int:
    return 0 if places.is_inference() else places._version


def size_of(rows: int, columns: int, count: int) -> int:
    """Count the entries of the buffer."""
    return rows + columns + 2 + 4 * count + 6 * _PAD


def addresses(buffer: Tensor, rows: int, columns: int, count: int) -> list[int]:
    """List the addresses of the six parts: row starts, columns and slots by row; column starts, rows and slots by column."""
    found, address = [], buffer.data_ptr()
    for length in (rows + 1, count, count, columns + 1, count, count):
        found.append(address)
        address += 4 * (length + _PAD)
    return found


def dense_weight(buffer: Tensor, theta: Tensor, rows: int, columns: int) -> Tensor:
    """Build the weight [rows, columns] from the buffer of an order and theta [K]."""
    count, at = theta.numel(), rows + 1 + _PAD
    ends, column, slot = buffer[: rows + 1], buffer[at : at + count], buffer[at + count + _PAD : at + 2 * count + _PAD]
    row = torch.repeat_interleave(torch.arange(rows, device="cpu"), ends.diff())
    values = theta.detach()[(slot & 0x7FFFFFFF).long()] * torch.where(slot < 0, -1, 1)
    weight = theta.new_zeros((rows, columns))
    weight[row, column.long()] = values
    return weight
