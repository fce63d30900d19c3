"""One step of Algorithm 1 for all tensors of a network: fills the kernels' table and calls them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_deepr.algorithm import randomness
from lightning_deepr.kernels.cpu import native, orders, rewire
from lightning_deepr.kernels.cpu.buffers import WIDE, give_back

State = tuple[Tensor, float]  # a state tensor of theta's shape, and what the optimizer starts it with


class Slots(Protocol):
    """What a step has to know of a tensor (see :class:`lightning_deepr.weights.k_slots.KSlots`)."""

    places: Tensor
    born: Tensor
    signs: Tensor
    exceptions: Tensor
    total: int
    rows: int
    columns: int
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
        self.results = self.fields.T[rewire.REBORN_COUNT : rewire.NEWBORN_DEATHS + 1]
        self.work = 0
        self.wide = any(tensor.rows + tensor.columns >= WIDE for tensor in tensors)
        for row, tensor, reborn in zip(self.fields, tensors, self.reborn, strict=True):
            row[rewire.COUNT], row[rewire.TOTAL] = tensor.places.numel(), tensor.total
            row[rewire.REBORN], row[rewire.SIZE] = reborn.data_ptr(), size
            self.work += tensor.places.numel()
        self.where = self.fields.ctypes.data
        self.arguments = (ctypes.c_int64 * 7)()
        # what is in the table, so that only what changes is written; the tensors are kept alive, so that none can take another's place
        self.known: list[tuple[Any, ...] | None] = [None] * len(tensors)
        self.changing: list[tuple[Any, ...] | None] = [None] * len(tensors)
        self.states: list[tuple[Any, ...]] = [()] * len(tensors)

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
    ) -> tuple[list[int], list[int]]:
        """Shrink, diffuse, rewire; places, signs, births, states and orders follow.

        Returns:
            for each tensor how many slots were reborn (the first in its ``self.reborn``), and how many of them had been newborns.
        """
        ordered = False
        for i, (tensor, theta) in enumerate(zip(self.tensors, thetas, strict=True)):
            order = tensor.order
            if order is not None:
                ordered = True
                if order.is_stale(tensor.places):
                    tensor.refresh_order()
            self._note(i, tensor, theta, order)
            changing = (decrements[i], noises[i], rewires[i])
            if changing != self.changing[i]:
                self.changing[i] = changing
                self.numbers[i, rewire.DECREMENT], self.numbers[i, rewire.NOISE] = changing[:2]
                self.fields[i, rewire.REWIRES] = changing[2]
            if states[i] or self.states[i]:
                self._note_states(i, states[i])
        arguments = self.arguments
        arguments[:] = [0, len(self.tensors), self.where, step, seed, newborn_since, 0]
        threads = native.threads_for(self.work)
        rewire.rewire_kernel(self.size)(arguments, threads)
        counts, newborns = self.results.tolist()
        if self.wide:
            give_back()
        if any(counts):
            if ordered:
                arguments[0] = 0
                orders.update_kernel()(arguments, native.threads_for(self.work, 1 << 14))
            # a backward pass through the connections of before would be wrong, dense or sparse: autograd refuses it
            changed = [tensor for tensor, count in zip(self.tensors, counts, strict=True) if count]
            torch.autograd.graph.increment_version(
                [tensor.places for tensor in changed] + [tensor.order.buffer for tensor in changed if tensor.order is not None]
            )
            for tensor in changed:
                if tensor.order is not None:
                    tensor.order.note(tensor.places)
        return counts, newborns

    def _note(self, i: int, tensor: Slots, theta: Tensor, order: Any) -> None:
        """Write down where the tensors lie, if they are others than in the last step."""
        known = self.known[i]
        buffer = None if order is None else order.buffer
        if (
            known is not None
            and known[0] is tensor.places
            and known[1] is tensor.signs
            and known[2] is buffer
            and known[3] is tensor.exceptions
            and known[4:] == (theta.data_ptr(), tensor.index, tensor.sign_seed)
        ):
            return
        self.known[i] = (
            tensor.places,
            tensor.signs,
            buffer,
            tensor.exceptions,
            theta.data_ptr(),
            tensor.index,
            tensor.sign_seed,
        )
        row = self.fields[i]
        row[: rewire.COUNT] = [t.data_ptr() for t in (theta, tensor.places, tensor.born, tensor.signs, tensor.exceptions)] + [
            tensor.exceptions.numel()
        ]
        row[rewire.COUNTER], row[rewire.SIGN_SEED] = tensor.index << randomness.SLOT_BITS, tensor.sign_seed
        row[rewire.ROW_START] = 0
        if order is not None:
            row[rewire.ROWS], row[rewire.COLUMNS] = order.rows, order.columns
            row[rewire.ROW_START : rewire.ROW_START + 6] = order.addresses

    def _note_states(self, i: int, states: Sequence[State]) -> None:
        known = tuple((value.data_ptr(), value.element_size(), start) for value, start in states)
        if known == self.states[i]:
            return
        self.states[i] = known
        row, numbers = self.fields[i], self.numbers[i]
        row[rewire.STATES] = len(known)
        for j, (address, size, start) in enumerate(known):
            field = rewire.STATE + 3 * j
            row[field], row[field + 1], numbers[field + 2] = address, size, start


def random_places(total: int, count: int, index: int, seed: int) -> Tensor:
    """``rewiring.random_places`` for at most half of the places."""
    places = torch.empty(count, dtype=torch.int64)
    arguments = (ctypes.c_int64 * 7)(0, 0, places.data_ptr(), count, seed, total, index << randomness.SLOT_BITS)
    rewire.start_kernel()(arguments)
    return places


def all_finite(values: Sequence[Tensor]) -> bool:
    """Whether every value is finite; False also where a tensor is none of the kernels' (contiguous float32 or float64 on the CPU)."""
    flat: list[int] = []
    for value in values:
        size = _SIZES.get(value.dtype, 0)
        if size == 0 or not value.is_cpu or not value.is_contiguous():
            return False
        flat += (value.data_ptr(), value.numel(), size)
    table = (ctypes.c_int64 * len(flat))(*flat)
    arguments = (ctypes.c_int64 * 3)(0, len(values), ctypes.addressof(table))
    rewire.finite_kernel()(arguments)
    return arguments[0] == 1


_SIZES = {torch.float32: 4, torch.float64: 8}
