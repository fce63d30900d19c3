"""One step of Algorithm 1 for all tensors of a network: this module fills the kernels' table and calls them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_deepr.algorithm import randomness
from lightning_deepr.algorithm.newborns import State
from lightning_deepr.kernels import gate, rows
from lightning_deepr.kernels.cpu import native, orders, rewire, room
from lightning_deepr.kernels.cpu.buffers import WIDE, give_back
from lightning_deepr.kernels.cpu.fields import (
    ORDER,
    ROW_WORDS,
    CpuRow,
    FiniteArguments,
    Row,
    StartArguments,
    StepArguments,
    filler,
)
from lightning_deepr.kernels.cpu.rules import allowed_words, sign_words
from lightning_deepr.kernels.slots import PLAIN, OrderedSlots, SlotOrder

# (looking up a member of an enumeration takes longer)
_TASK, _STEP, _SEED = int(StepArguments.TASK), int(StepArguments.STEP), int(StepArguments.SEED)
_NEWBORN_SINCE, _FINISHED = int(StepArguments.NEWBORN_SINCE), int(StepArguments.FINISHED)
_DECREMENT, _SCALE, _REWIRES = int(Row.DECREMENT), int(Row.SCALE), int(Row.REWIRES)
_fill, _fill_start, _fill_finite = filler(StepArguments), filler(StartArguments), filler(FiniteArguments)
_MARKS_KNOWN = int(CpuRow.MARKS_KNOWN)
_PLAIN, _FLOATS = frozenset(PLAIN), frozenset((torch.float32, torch.float64))
_IS_CPU, _DTYPE = attrgetter("is_cpu"), attrgetter("dtype")


_FINITE = int(FiniteArguments.FINITE)
_ready: list[Any] = []  # the last arguments of the search for values that are not finite
# of each tensor: first what the gate has compared, addresses among them
_known = attrgetter("passed", "index", "sign_seed", "sign_table", "notes", "stays", "allowed", "ranked")


class Marks:
    """A bitmap of a tensor's places, which the kernel makes at the first rebirth and updates at each further one.

    Args:
        tensor: the tensor.
    """

    def __init__(self, tensor: OrderedSlots) -> None:
        self.tensor = tensor
        self.words = torch.empty((tensor.total + 63) >> 6, dtype=torch.int64, device="cpu")
        self.noted: tuple[Tensor, int, int] | None = None
        self.said: bool | None = None  # what the table says of them

    def is_fresh(self) -> bool:
        """Tell whether the bitmap is that of the present places."""
        known, places = self.noted, self.tensor.places
        return known is not None and known[0] is places and known[1:] == (_version(places), places.data_ptr())

    def note(self, mark: tuple[Tensor, int, int, int]) -> None:
        """Record that the bitmap is that of the present places, of which this is the record of the gate."""
        places, address, _, version = mark
        self.noted = places, version, address
        self.said = True  # the kernel has written it


def _version(places: Tensor) -> int:
    return 0 if places.is_inference() else places._version


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
        self.reborn = [torch.empty(t.places.numel(), dtype=torch.int64, device="cpu") for t in tensors]
        self.results = self.fields.T[CpuRow.REBORN_COUNT : CpuRow.FINITE + 1]
        self.work = 0
        # working memory of the kernels: kept between steps only if it is small
        self.fits = self.ordered = False  # whether the sizes of the working memory are known; whether any tensor has an order
        self.starts = np.zeros(len(tensors), np.int64)
        self.scratch_at = 0
        self.scratch_bytes, self.kept_scratch = 0, torch.empty(0, dtype=torch.int64, device="cpu")
        self.wide = any(tensor.rows + tensor.columns >= WIDE for tensor in tensors)
        # a bitmap of the places of tensors that are dense enough, and the places that it is of
        self.marks = [
            Marks(t) if room.has_marks(t.places.numel(), t.total, None if t.allowed is None else t.allowed.count) else None
            for t in tensors
        ]
        for row, tensor, reborn, marks in zip(self.fields, tensors, self.reborn, self.marks, strict=True):
            row[Row.COUNT], row[Row.TOTAL] = tensor.places.numel(), tensor.total
            row[CpuRow.REBORN], row[CpuRow.SIZE] = reborn.data_ptr(), size
            row[CpuRow.MARKS] = 0 if marks is None else marks.words.data_ptr()
            self.work += tensor.places.numel()
        self.arguments = _fill(TENSORS=len(self.tensors), TABLE=self.fields.ctypes.data)
        # the content of the table: only what changes is written
        self.staying = [False] * len(tensors)
        self.known: list[tuple[Any, ...]] = [()] * len(tensors)
        self.passed: list[Any] = [()] * len(tensors)  # of ``known``, what the gate has compared
        self.orders: list[Any] = [None] * len(tensors)
        self.stateless: list[list[State]] = [[] for _ in tensors]
        self.has_states, self.has_marks = False, any(marks is not None for marks in self.marks)
        self.changing: tuple[Sequence[Any], ...] = ()
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
        checked: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Shrink, diffuse and rewire. Places, signs, births, states and orders follow.

        Args:
            checked: whether the gate has just let thetas and tensors pass.

        Returns:
            For each tensor, the number of reborn slots (their numbers come first in its entry of ``self.reborn``), and how many
            of them had been newborns.
        """
        if not checked:
            for tensor, theta in zip(self.tensors, thetas, strict=True):
                gate.check(theta, tensor)
        for i, tensor in enumerate(self.tensors):
            order = tensor.order
            if order is not None and order.is_stale(tensor.places):
                tensor.refresh_order()
            known = _known(tensor)
            if known != self.known[i] or order is not self.orders[i]:  # (an object is equal to itself without a look inside)
                self._note(i, tensor, thetas[i], order)
                self.known[i], self.orders[i], self.fits = known, order, False
                self.passed[i] = known[0]
        free = self._scratch()
        if self.has_marks:
            self._note_marks()
        if states != self.stateless or self.has_states:
            for i, theta in enumerate(thetas):
                self._note_states(i, states[i], theta)
            self.has_states = any(self.states)
        changing = decrements, noises, rewires
        if changing != self.changing:
            self.changing = changing
            self.numbers[:, _DECREMENT], self.numbers[:, _SCALE], self.fields[:, _REWIRES] = changing
        arguments = self.arguments
        arguments[_TASK] = arguments[_FINISHED] = 0
        arguments[_STEP], arguments[_SEED], arguments[_NEWBORN_SINCE] = step, seed, newborn_since
        threads = native.threads_for(self.work)
        begin = free.data_ptr()
        if begin != self.scratch_at:
            self.scratch_at = begin
            self.fields[:, CpuRow.SCRATCH] = self.starts + begin
        rewire.rewire_kernel(self.size)(arguments, threads)
        counts, newborns, finite = self.results.tolist()
        if self.work >= gate.LARGE:
            gate.note_finite_thetas(self.tensors, thetas, finite)
        if self.wide:
            give_back()
        if any(counts):
            if self.ordered:
                arguments[_TASK] = 0
                orders.update_kernel()(arguments, native.threads_for(self.work, 1 << 14))
            # A backward pass through the old connections would be wrong, dense or sparse. The new version makes autograd
            # refuse it.
            moved = [i for i, count in enumerate(counts) if count and not self.staying[i]]
            changed = [self.tensors[i] for i in moved]
            torch.autograd.graph.increment_version(
                [tensor.places for tensor in changed] + [tensor.order.buffer for tensor in changed if tensor.order is not None]
            )
            for i, tensor in zip(moved, changed, strict=True):
                mark = gate.note(tensor)
                order, marks = tensor.order, self.marks[i]
                if order is not None:
                    order.note_as(mark)
                if marks is not None:
                    marks.note(mark)
        return counts, newborns

    def _note_marks(self) -> None:
        """Say which bitmaps are those of the present places."""
        for i, marks in enumerate(self.marks):
            if marks is not None:
                fresh = marks.is_fresh()
                if fresh is not marks.said:  # (after a step without a rebirth, the kernel's word is the same)
                    self.fields[i, _MARKS_KNOWN] = marks.said = fresh

    def _scratch(self) -> Tensor:
        """Allocate the working memory of a step, before it writes to a tensor."""
        if not self.fits:
            sizes = []
            for i, tensor in enumerate(self.tensors):
                count, rows, columns, allowed = tensor.places.numel(), tensor.rows, tensor.columns, tensor.allowed
                self.fields[i, CpuRow.ALLOWED] = allowed_words(allowed)
                size = room.rewiring(count, tensor.total, None if allowed is None else allowed.count, tensor.ranked)
                if self.orders[i] is not None:
                    side = room.follow(count, rows)
                    self.fields[i, CpuRow.SCRATCH_SIDE] = side
                    size = max(size, side + room.follow(count, columns), room.order_anew(count, rows, columns))
                sizes.append(size)
            starts, self.scratch_bytes = room.total_of(sizes)
            self.starts, self.scratch_at, self.fits = np.array(starts, np.int64), 0, True
            self.ordered = any(order is not None for order in self.orders)
            self.kept_scratch = room.empty(self.scratch_bytes) if self.scratch_bytes <= room.SMALL else self.kept_scratch[:0]
        return self.kept_scratch if self.kept_scratch.numel() else room.empty(self.scratch_bytes)

    def _note(self, i: int, tensor: OrderedSlots, theta: Tensor, order: SlotOrder | None) -> None:
        """Write the addresses of a tensor to the table."""
        found = tensor.passed[gate.PLACES_COUNT]
        if found != self.reborn[i].numel():
            raise RuntimeError(f"A table for K = {self.reborn[i].numel()} connections: found {found} places.")
        row = self.fields[i]
        row[CpuRow.STAYS] = self.staying[i] = tensor.stays
        row[CpuRow.RANKED] = tensor.ranked
        order = None if tensor.stays else order
        row[CpuRow.SIGN_TABLE] = sign_words(tensor.sign_table)
        row[CpuRow.NOTES] = 0 if tensor.notes is None else tensor.notes.address
        rows.write_location(row, theta, tensor)
        row[CpuRow.ROW_START] = 0
        if order is not None:
            row[CpuRow.ROWS], row[CpuRow.COLUMNS] = order.rows, order.columns
            row[ORDER] = order.addresses

    def _note_states(self, i: int, states: Sequence[State], theta: Tensor) -> None:
        known = tuple([(value.data_ptr(), value.element_size(), start, averaged) for _, value, start, averaged in states])
        if known == self.states[i]:
            return
        gate.check_states(states, theta, self.tensors[i])
        self.states[i] = known
        rows.write_states(self.fields[i], self.numbers[i], CpuRow.FIRST_STATE, known)


def random_places(total: int, count: int, index: int, seed: int) -> Tensor:
    """Do ``rewiring.random_places`` for at most half of the places."""
    if not 0 <= 2 * count <= total:
        raise ValueError(f"random_places: expected a count of 0 to {total // 2} (half of {total} places), found {count}.")
    places = torch.empty(count, dtype=torch.int64, device="cpu")
    free = room.empty(room.arrays(8 * count) + room.rejection(count))
    counter = index << randomness.SLOT_BITS
    arguments = _fill_start(
        RESULT=places.data_ptr(), COUNT=count, SEED=seed, TOTAL=total, COUNTER=counter, SCRATCH=free.data_ptr()
    )
    rewire.start_kernel()(arguments)
    return places


def all_finite(values: Sequence[Tensor]) -> bool:
    """Tell whether every value is finite. The answer is also False if the kernels cannot read a tensor.

    They read contiguous float32 and float64 tensors on the CPU.
    """
    # this runs in every step: ``map`` takes a third of the time of the same calls in Python
    if not (
        _PLAIN.issuperset(map(type, values))
        and all(map(_IS_CPU, values))
        and all(map(Tensor.is_contiguous, values))
        and _FLOATS.issuperset(map(_DTYPE, values))
    ):
        return False
    addresses, counts = [*map(Tensor.data_ptr, values)], [*map(Tensor.numel, values)]
    if not all(addresses) and any(count and not address for address, count in zip(addresses, counts, strict=True)):
        return False  # the storage of one was released
    key = addresses, counts, [*map(_DTYPE, values)]
    # gradients nearly always get the memory of the last step's. (Taken out of the list, it is this thread's alone.)
    ready = _ready.pop() if _ready else None
    if ready is None or ready[0] != key:
        rows_of_values = zip(addresses, counts, map(Tensor.element_size, values), strict=True)  # each is a ValuesRow
        table = array("q", chain.from_iterable(rows_of_values))
        ready = key, table, _fill_finite(NUMBER=len(values), TABLE=table.buffer_info()[0])
    arguments = ready[2]
    rewire.finite_kernel()(arguments)
    answer = arguments[_FINITE] == 1
    if not _ready:
        _ready.append(ready)
    return answer
