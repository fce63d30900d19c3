"""One step of Algorithm 1 for all tensors of a network: fills the kernels' table and calls them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_deepr import randomness
from lightning_deepr.kernels import native, rewire

State = tuple[Tensor, float]  # a state tensor of theta's shape, and what the optimizer starts it with
_NUMBERS = struct.Struct("dd")


class Slots(Protocol):
    """What a step has to know of a tensor (see :class:`lightning_deepr.connections.KSlots`)."""

    places: Tensor
    born: Tensor
    signs: Tensor
    exceptions: Tensor
    total: int
    index: int
    sign_seed: int
    order: Any

    def refresh_order(self) -> Any: ...


class Table:
    """The kernels' view of some tensors that step together.

    Args:
        tensors: all of one dtype, float32 or float64, on the CPU.
        size: of theta's floats in bytes.
    """

    def __init__(self, tensors: Sequence[Slots], size: int) -> None:
        self.tensors, self.size = tuple(tensors), size
        self.fields = np.zeros((len(tensors), rewire.FIELDS), np.int64)
        self.numbers = self.fields.view(np.float64)
        # where the numbers of the reborn slots are put; the pages that are never written take no memory
        self.reborn = [torch.empty(t.places.numel(), dtype=torch.int64) for t in tensors]
        self.counts = self.fields[:, rewire.REBORN_COUNT]
        self.work = 0
        for row, tensor, reborn in zip(self.fields, tensors, self.reborn, strict=True):
            row[rewire.COUNT], row[rewire.TOTAL] = tensor.places.numel(), tensor.total
            row[rewire.REBORN], row[rewire.SIZE] = reborn.data_ptr(), size
            self.work += tensor.places.numel()
        self.arguments = (ctypes.c_int64 * 5)(0, len(tensors), self.fields.ctypes.data, 0, 0)
        self.known: list[tuple[Any, ...]] = [()] * len(tensors)

    def step(
        self,
        thetas: Sequence[Tensor],
        decrements: Sequence[float],
        noises: Sequence[float],
        rewires: Sequence[bool],
        states: Sequence[Sequence[State]],
        newborn_since: int,
        seed: int,
        step: int,
    ) -> list[Tensor]:
        """Shrink, diffuse, rewire; places, signs, births, states and orders follow.

        Returns:
            the reborn slots of each tensor, int64 [R_i], valid until the next step.
        """
        ordered = False
        for i, (tensor, theta) in enumerate(zip(self.tensors, thetas, strict=True)):
            row, order = self.fields[i], tensor.order
            if order is not None and order.is_stale(tensor.places):
                order = tensor.refresh_order()
            places, born, signs, exceptions = tensor.places, tensor.born, tensor.signs, tensor.exceptions
            known = (
                theta.data_ptr(), places.data_ptr(), born.data_ptr(), signs.data_ptr(), exceptions.data_ptr(), exceptions.numel(),
                0 if order is None else order.addresses[0], tensor.index, tensor.sign_seed,
            )  # fmt: skip
            if known != self.known[i]:
                self.known[i] = known
                row[: rewire.COUNT] = known[: rewire.COUNT]
                row[rewire.COUNTER], row[rewire.SIGN_SEED] = tensor.index << randomness.SLOT_BITS, tensor.sign_seed
                row[rewire.ROW_START] = 0
                if order is not None:
                    row[rewire.ROWS], row[rewire.COLUMNS] = order.rows, order.columns
                    row[rewire.ROW_START : rewire.ROW_START + 6] = order.addresses
            ordered = ordered or order is not None
            numbers = self.numbers[i]
            numbers[rewire.DECREMENT], numbers[rewire.NOISE] = decrements[i], noises[i]
            row[rewire.REWIRES], row[rewire.NEWBORN_SINCE] = rewires[i], newborn_since
            own = states[i]
            row[rewire.STATES] = len(own)
            for j, (value, start) in enumerate(own):
                field = rewire.STATE + 3 * j
                row[field], row[field + 1], numbers[field + 2] = value.data_ptr(), value.element_size(), start
        self.counts[:] = 0
        self.fields[:, rewire.NEWBORN_DEATHS] = 0
        arguments = self.arguments
        arguments[0], arguments[3], arguments[4] = 0, step, seed
        threads = native.threads_for(self.work) if len(self.tensors) > 1 else 1
        rewire.rewire_kernel(self.size)(arguments, threads)
        counts = self.counts.tolist()
        if ordered and any(counts):
            arguments[0] = 0
            rewire.update_kernel()(arguments, native.threads_for(self.work, 1 << 14))
            for tensor, count in zip(self.tensors, counts, strict=True):
                if count and tensor.order is not None:  # a backward pass through the connections of before would be wrong
                    torch.autograd.graph.increment_version(tensor.order.buffer)
        return [reborn[:count] for reborn, count in zip(self.reborn, counts, strict=True)]

    def newborn_deaths(self) -> list[int]:
        return self.fields[:, rewire.NEWBORN_DEATHS].tolist()  # type: ignore[no-any-return]


def all_finite(values: Sequence[Tensor]) -> bool:
    """Whether every value of contiguous float32 and float64 CPU tensors is finite."""
    flat: list[int] = []
    for value in values:
        flat += (value.data_ptr(), value.numel(), value.element_size())
    table = (ctypes.c_int64 * len(flat))(*flat)
    arguments = (ctypes.c_int64 * 3)(0, len(values), ctypes.addressof(table))
    rewire.finite_kernel()(arguments)
    return bool(arguments[0])
