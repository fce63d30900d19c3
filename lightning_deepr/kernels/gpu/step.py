"""One step of Algorithm 1 for all tensors of a network on a GPU: this module fills the table and launches the Triton kernels.

The host never waits for the device: all sizes follow from K. The host writes the table of addresses and numbers, and sends it
to the device before the kernels, in one asynchronous copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from lightning_deepr.algorithm import newborns, randomness
from lightning_deepr.algorithm.newborns import State
from lightning_deepr.algorithm.rewiring import rejects
from lightning_deepr.kernels import rows
from lightning_deepr.kernels.cpu.fields import (
    FLOATS,
    GPU_HEADER_WORDS,
    GPU_ROW_WORDS,
    MOST_STATES,
    GpuHeader,
    GpuRow,
    Row,
    signed,
)
from lightning_deepr.kernels.gpu import rewire
from lightning_deepr.kernels.slots import Slots

BLOCK = 256  # slots of a program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}  # a multiplication and an addition stay separate, as in PyTorch
MOST_SLOTS = (1 << 31) - 1  # the most slots of a tensor: the kernels list them as int32
CELLS = int(rewire.CELLS)
# (looking up a member of an enumeration takes longer)
_STEP, _NEWBORN_SINCE = int(GpuHeader.STEP), int(GpuHeader.NEWBORN_SINCE)
_BIRTH_STREAM, _NOISE_KEY = int(GpuHeader.BIRTH_STREAM), int(GpuHeader.NOISE_KEY)
_DECREMENT, _SCALE, _REWIRES = int(Row.DECREMENT), int(Row.SCALE), int(Row.REWIRES)
# the type of theta, and the type in which PyTorch computes with theta
_TYPES = {
    torch.float32: (tl.float32, tl.float32),
    torch.float64: (tl.float64, tl.float64),
    torch.bfloat16: (tl.bfloat16, tl.float32),
    torch.float16: (tl.float16, tl.float32),
}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def takes(theta: Tensor, slots: Slots) -> bool:
    """Tell whether the kernels can work on a tensor: they need certain dtypes, and contiguous memory on one device."""
    device = theta.device
    words = (slots.places, slots.born, slots.exceptions)
    return (
        theta.dtype in _TYPES
        and slots.signs.dtype == theta.dtype
        and theta.is_contiguous()
        and slots.signs.is_contiguous()
        and slots.signs.device == device
        and all(t.dtype == torch.long and t.is_contiguous() and t.device == device for t in words)
        and theta.numel() == slots.places.numel() <= MOST_SLOTS
    )


class Table:
    """The kernels' view of some tensors that step together.

    Args:
        tensors: tensors on one device, with thetas of one dtype (see :func:`takes`).
        dtype: the dtype of the thetas.
    """

    def __init__(self, tensors: Sequence[Slots], dtype: torch.dtype) -> None:
        self.tensors, self.dtype = tuple(tensors), dtype
        self.device = tensors[0].places.device
        counts = [t.places.numel() for t in tensors]
        starts = np.concatenate([[0], np.cumsum(counts)])
        self.slots = int(starts[-1])
        pieces = [(i, first) for i, count in enumerate(counts) for first in range(0, count, BLOCK)]
        self.pieces = torch.tensor(pieces, dtype=torch.long).reshape(-1, 2).to(self.device)
        self.groups = [torch.tensor(one, dtype=torch.long).reshape(-1, 2).to(self.device) for one in _groups(counts)]
        self.words = np.zeros(GPU_HEADER_WORDS + GPU_ROW_WORDS * len(tensors), np.int64)
        self.rows = self.words[GPU_HEADER_WORDS:].reshape(len(tensors), GPU_ROW_WORDS)
        self.numbers = self.rows.view(np.float64)
        self.listed = [not rejects(t) for t in tensors]
        self.rows[:, Row.COUNT], self.rows[:, GpuRow.SLOT_START], self.rows[:, GpuRow.LISTED] = counts, starts[:-1], self.listed
        self.rows[:, Row.TOTAL] = [t.total for t in tensors]
        # a draw above the limit is repeated (randomness.uniform_places)
        self.rows[:, GpuRow.LIMIT] = [randomness.LARGEST - (randomness.LARGEST % t.total + 1) % t.total for t in tensors]
        # the content of the table: only what changes is written
        self.known: list[tuple[int, ...]] = [()] * len(tensors)
        self.changing: list[tuple[Any, ...] | None] = [None] * len(tensors)
        self.states: list[tuple[tuple[int, int, int, int], ...]] = [()] * len(tensors)

    def step(
        self,
        thetas: Sequence[Tensor],
        decrements: Sequence[float | Tensor],
        scales: Sequence[float | Tensor],
        rewires: Sequence[bool],
        states: Sequence[Sequence[State]],
        newborn_since: int,
        seed: int,
        step: int,
        want_dormant: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Shrink, diffuse and rewire. Places, signs, births and states follow.

        Returns:
            int64 [tensors, 2] on the device: the number of reborn slots, and how many of them had been newborns. With
            ``want_dormant``, also a bool [K] of the reborn slots for each tensor, else an empty list.
        """
        words = self._words(thetas, decrements, scales, rewires, states, newborn_since, seed, step)
        counts = torch.zeros(len(self.tensors), 2, dtype=torch.long, device=self.device)
        dormant = torch.empty(self.slots, dtype=torch.int32, device=self.device)
        real, wide = _TYPES[self.dtype]
        grid = (len(self.pieces),)
        options: dict[str, Any] = {"BLOCK": BLOCK, **OPTIONS}
        with torch.cuda.device_of(words):
            rewire.shrink[grid](words, self.pieces, counts, dormant, REAL=real, WIDE=wide, **options)
            if not any(rewires):
                return counts, []
            if not all(self.listed):
                cells = torch.full((3, CELLS * self.slots), int(rewire.EMPTY), dtype=torch.long, device=self.device)
                taken, drawn, claims = cells
                rewire.insert[grid](words, self.pieces, counts, taken, REAL=real, WIDE=wide, **options)
                rewire.claim[grid](words, self.pieces, counts, dormant, taken, drawn, claims, **options)
            # PyTorch does what the last kernel can't do, and needs to know the slots
            masks: dict[int, Tensor] = {}
            for i, (theta, own) in enumerate(zip(thetas, states, strict=True)):
                if rewires[i] and (
                    want_dormant or self.listed[i] or self.tensors[i].ranked or not _can_write(own, self.device)
                ):
                    masks[i] = theta < 0
            if not all(self.listed):
                most = max((len(known) for known in self.states if any(one[3] for one in known)), default=0)
                total = self._add_living(words, counts, most, REAL=real, WIDE=wide, **options) if most else counts
                rewire.finish[grid](
                    words, self.pieces, counts, drawn, claims, total, len(self.tensors), MOST=most, REAL=real, **options
                )
        for i, mask in masks.items():
            if self.listed[i]:
                draw_from_list(thetas[i], self.tensors[i], mask, seed, step)
            if self.tensors[i].ranked:
                arrange(self.tensors[i], mask)
            if self.listed[i] or not _can_write(states[i], self.device):
                newborns.start_marked(states[i], mask)
        # A backward pass through the old connections would be wrong. The new version makes autograd refuse it.
        torch.autograd.graph.increment_version(
            [t.places for t, does in zip(self.tensors, rewires, strict=True) if does and not t.stays]
        )
        empty = torch.zeros(0, dtype=torch.bool, device=self.device)
        return counts, [masks.get(i, empty) for i in range(len(self.tensors))] if want_dormant else []

    def _add_living(self, words: Tensor, counts: Tensor, most: int, **options: Any) -> Tensor:
        """Add the living slots of averaged states. Returns float64 [most, tensors]."""
        sums = torch.empty(most, len(self.pieces), dtype=torch.float64, device=self.device)
        rewire.add_living[(len(self.pieces),)](words, self.pieces, counts, sums, MOST=most, **options)
        del options["REAL"], options["WIDE"]
        for groups in self.groups:
            total = torch.empty(most, len(groups), dtype=torch.float64, device=self.device)
            rewire.add_sums[(len(groups),)](groups, sums, total, sums.shape[1], MOST=most, **options)
            sums = total
        return sums

    def _words(
        self,
        thetas: Sequence[Tensor],
        decrements: Sequence[float | Tensor],
        scales: Sequence[float | Tensor],
        rewires: Sequence[bool],
        states: Sequence[Sequence[State]],
        newborn_since: int,
        seed: int,
        step: int,
    ) -> Tensor:
        """Return the table on the device. Only what has changed since the last step is written anew."""
        self.words[_STEP], self.words[_NEWBORN_SINCE] = step, newborn_since
        self.words[_BIRTH_STREAM] = signed(_birth_stream(seed, step))
        self.words[_NOISE_KEY] = signed(randomness.key(seed, randomness.NOISE, step))
        on_device: list[tuple[int, Tensor]] = []
        for i, (tensor, theta) in enumerate(zip(self.tensors, thetas, strict=True)):
            where = (theta, tensor.places, tensor.born, tensor.signs, tensor.exceptions)
            known = (*(t.data_ptr() for t in where), tensor.exceptions.numel(), tensor.index, tensor.sign_seed)
            if known != self.known[i]:
                self.known[i] = known
                rows.write_location(self.rows[i], theta, tensor)
            changing = decrements[i], scales[i], rewires[i]
            numbers = [n for n in changing if isinstance(n, Tensor) and n.device.type != "cpu"]
            if numbers or changing != self.changing[i]:
                self.changing[i] = None if any(isinstance(n, Tensor) for n in changing) else changing
                self.rows[i, _REWIRES] = rewires[i]
                for field, number in ((_DECREMENT, decrements[i]), (_SCALE, scales[i])):
                    if isinstance(number, Tensor) and number.device.type != "cpu":
                        on_device.append((GPU_HEADER_WORDS + GPU_ROW_WORDS * i + field, number))
                    else:
                        self.numbers[i, field] = float(number)
            own = states[i] if _can_write(states[i], self.device) and not self.listed[i] else []
            addresses = tuple(
                (value.data_ptr(), value.element_size(), _bits(start, value.dtype), _type(value) if averaged else 0)
                for _, value, start, averaged in own
            )
            if addresses != self.states[i]:
                self.states[i] = addresses
                rows.write_states(self.rows[i], self.rows[i], GpuRow.FIRST_STATE, addresses)
        host = torch.from_numpy(self.words)
        if self.device.type != "cuda":
            return host.to(self.device, copy=True)
        table = host.pin_memory().to(self.device, non_blocking=True)
        for at, number in on_device:  # they come from a learning rate on the device
            table[at : at + 1].view(torch.float64).copy_(number.reshape(1))
        return table


def draw_from_list(theta: Tensor, tensor: Slots, dormant: Tensor, seed: int, step: int) -> None:
    """Do ``rewiring.draw_from_list`` and give the reborn slots theta 0, place, sign and birth.

    The sizes of all operations are independent of the number of reborn slots.

    Args:
        dormant: bool [K], the slots that have gone dormant.
    """
    device, total, places = theta.device, tensor.total, tensor.places
    theta.masked_fill_(dormant, 0.0)
    tensor.born.masked_fill_(dormant, step)
    if tensor.stays:
        return  # nothing moves
    numbers = torch.arange(total, device=device)
    active = torch.zeros(total, dtype=torch.bool, device=device).scatter_(0, places, ~dormant)
    # The candidates come first, ascending, and then the active places. The stable sort below then never puts an active place
    # before a candidate, even if their keys are equal.
    among_free, among_active = (~active).cumsum(0) - 1, active.cumsum(0) - 1
    position = torch.where(active, among_free[-1:] + 1 + among_active, among_free)
    arranged = torch.empty_like(numbers).scatter_(0, position, numbers)
    key = randomness.bits(randomness.key(seed, randomness.BIRTH, step, 0), randomness.counters(tensor.index, arranged))
    key = torch.where(active[arranged], randomness.LARGEST, key)
    shuffled = arranged[key.argsort(stable=True)]
    chosen = torch.where(dormant, shuffled[(dormant.cumsum(0) - 1).clamp_(min=0)], places)
    tensor.signs.copy_(torch.where(dormant, tensor.signs_at(chosen), tensor.signs))
    places.copy_(chosen)


def arrange(tensor: Slots, dormant: Tensor) -> None:
    """Give the places of the reborn slots, a bool [K], to them by rank (``rewiring.by_rank``). Signs follow."""
    drawn = torch.where(dormant, tensor.places, randomness.LARGEST).sort().values  # those of the reborn slots come first
    places = torch.where(dormant, drawn[(dormant.cumsum(0) - 1).clamp_(min=0)], tensor.places)
    tensor.signs.copy_(torch.where(dormant, tensor.signs_at(places), tensor.signs))
    tensor.places.copy_(places)


def _can_write(states: Sequence[State], device: torch.device) -> bool:
    """Tell whether the kernels reset these states. If not, PyTorch does."""
    return len(states) <= MOST_STATES and all(
        value.device == device
        and value.is_contiguous()
        and value.element_size() in _BITS
        and (not averaged or _type(value) > 0)
        for _, value, _, averaged in states
    )


def _type(value: Tensor) -> int:
    """Return the number of a tensor's type among those of averaged states; 0: it has none."""
    return FLOATS.get(str(value.dtype).removeprefix("torch."), 0)


def _groups(counts: Sequence[int]) -> list[list[tuple[int, int]]]:
    """List the levels of the sums over tensors: (first sum, number of sums) of each group, in the order of the tensors.

    In the last level each tensor has one group.
    """
    sums = [-(-count // BLOCK) for count in counts]
    levels: list[list[tuple[int, int]]] = []
    while not levels or max(sums) > 1:
        level, start, left = [], 0, []
        for number in sums:
            within = [(start + i, min(BLOCK, number - i)) for i in range(0, number, BLOCK)] or [(start, 0)]
            level += within
            start += number
            left.append(len(within))
        levels.append(level)
        sums = left
    return levels


@cache
def _bits(start: float, dtype: torch.dtype) -> int:
    """Return the bits of a number in a dtype, as a signed integer of the same size."""
    value = torch.tensor([start], dtype=dtype)
    return int(value.view(_BITS[value.element_size()]))


def _birth_stream(seed: int, step: int) -> int:
    """Compute the key of a step's births without its last coordinate, the attempt (see ``randomness.key``)."""
    state = 4
    for coordinate in (seed, randomness.BIRTH, step):
        state = randomness.mix((state + randomness.GOLDEN + randomness.mix(coordinate & randomness.WORD)) & randomness.WORD)
    return state
