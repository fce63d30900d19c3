"""One step of Algorithm 1 for all tensors of a network: this module fills the kernels' table and calls them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_deepr.algorithm import randomness
from lightning_deepr.kernels import rows
from lightning_deepr.kernels.cpu import native, orders, rewire
from lightning_deepr.kernels.cpu.buffers import WIDE, give_back
from lightning_deepr.kernels.cpu.fields import (
    ORDER,
    ROW_WORDS,
    CpuRow,
    FiniteArguments,
    Row,
    StartArguments,
    StepArguments,
    ValuesRow,
    filler,
    packer,
)
from lightning_deepr.kernels.slots import OrderedSlots, SlotOrder, State

# (looking up a member of an enumeration takes longer)
_TASK, _STEP, _SEED = int(StepArguments.TASK), int(StepArguments.STEP), int(StepArguments.SEED)
_NEWBORN_SINCE, _FINISHED = int(StepArguments.NEWBORN_SINCE), int(StepArguments.FINISHED)
_DECREMENT, _SCALE, _REWIRES = int(Row.DECREMENT), int(Row.SCALE), int(Row.REWIRES)
_fill, _fill_start, _fill_finite = filler(StepArguments), filler(StartArguments), filler(FiniteArguments)
_pack_values = packer(ValuesRow)
_SIZES = {torch.float32: 4, torch.float64: 8}


class Table:
    """The kernels' view of some tensors that step together.

    Args:
        tensors: CPU tensors of one dtype, float32 or float64.
        size: the bytes of a float of theta.
    """

    def __init__(self, tensors: Sequence[OrderedSlots], size: int) -> None:
        self.tensors, self.size = tuple(tensors), size
        self.fields = np.zeros((len(tensors), ROW_WORDS), np.int64)
        self.numbers = self.fields.view(np.float64)
        # the kernel writes the numbers of the reborn slots here; pages that are never written take no memory
        self.reborn = [torch.empty(t.places.numel(), dtype=torch.int64) for t in tensors]
        self.results = self.fields.T[CpuRow.REBORN_COUNT : CpuRow.NEWBORN_DEATHS + 1]
        self.work = 0
        self.wide = any(tensor.rows + tensor.columns >= WIDE for tensor in tensors)
        for row, tensor, reborn in zip(self.fields, tensors, self.reborn, strict=True):
            row[Row.COUNT], row[Row.TOTAL] = tensor.places.numel(), tensor.total
            row[CpuRow.REBORN], row[CpuRow.SIZE] = reborn.data_ptr(), size
            self.work += tensor.places.numel()
        self.arguments = _fill(TENSORS=len(self.tensors), TABLE=self.fields.ctypes.data)
        # The content of the table: only what changes is written. The tensors are kept alive, so a new one never gets the
        # address of a known one.
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
        """Shrink, diffuse and rewire. Places, signs, births, states and orders follow.

        Returns:
            For each tensor, the number of reborn slots (their numbers come first in its entry of ``self.reborn``), and how many
            of them had been newborns.
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
                self.numbers[i, _DECREMENT], self.numbers[i, _SCALE] = changing[:2]
                self.fields[i, _REWIRES] = changing[2]
            if states[i] or self.states[i]:
                self._note_states(i, states[i])
        arguments = self.arguments
        arguments[_TASK] = arguments[_FINISHED] = 0
        arguments[_STEP], arguments[_SEED], arguments[_NEWBORN_SINCE] = step, seed, newborn_since
        threads = native.threads_for(self.work)
        rewire.rewire_kernel(self.size)(arguments, threads)
        counts, newborns = self.results.tolist()
        if self.wide:
            give_back()
        if any(counts):
            if ordered:
                arguments[_TASK] = 0
                orders.update_kernel()(arguments, native.threads_for(self.work, 1 << 14))
            # A backward pass through the old connections would be wrong, dense or sparse. The new version makes autograd
            # refuse it.
            changed = [tensor for tensor, count in zip(self.tensors, counts, strict=True) if count]
            torch.autograd.graph.increment_version(
                [tensor.places for tensor in changed] + [tensor.order.buffer for tensor in changed if tensor.order is not None]
            )
            for tensor in changed:
                if tensor.order is not None:
                    tensor.order.note(tensor.places)
        return counts, newborns

    def _note(self, i: int, tensor: OrderedSlots, theta: Tensor, order: SlotOrder | None) -> None:
        """Write the addresses of a tensor to the table, if they have changed since the last step."""
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
        rows.write_location(row, theta, tensor)
        row[CpuRow.ROW_START] = 0
        if order is not None:
            row[CpuRow.ROWS], row[CpuRow.COLUMNS] = order.rows, order.columns
            row[ORDER] = order.addresses

    def _note_states(self, i: int, states: Sequence[State]) -> None:
        known = tuple((value.data_ptr(), value.element_size(), start) for value, start in states)
        if known == self.states[i]:
            return
        self.states[i] = known
        rows.write_states(self.fields[i], self.numbers[i], CpuRow.FIRST_STATE, known)


def random_places(total: int, count: int, index: int, seed: int) -> Tensor:
    """Do ``rewiring.random_places`` for at most half of the places."""
    places = torch.empty(count, dtype=torch.int64)
    counter = index << randomness.SLOT_BITS
    rewire.start_kernel()(_fill_start(RESULT=places.data_ptr(), COUNT=count, SEED=seed, TOTAL=total, COUNTER=counter))
    return places


def all_finite(values: Sequence[Tensor]) -> bool:
    """Tell whether every value is finite. The answer is also False if the kernels cannot read a tensor.

    They read contiguous float32 and float64 tensors on the CPU.
    """
    table = bytearray()
    for value in values:
        size = _SIZES.get(value.dtype, 0)
        if size == 0 or not value.is_cpu or not value.is_contiguous():
            return False
        table += _pack_values(ADDRESS=value.data_ptr(), COUNT=value.numel(), SIZE=size)
    words = ctypes.c_char.from_buffer(table) if table else ctypes.c_char()
    arguments = _fill_finite(NUMBER=len(values), TABLE=ctypes.addressof(words))
    rewire.finite_kernel()(arguments)
    return arguments[FiniteArguments.FINITE] == 1
