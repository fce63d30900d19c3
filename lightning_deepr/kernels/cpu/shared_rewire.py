"""Rewiring with one K for a whole network, in one call. :mod:`lightning_deepr.algorithm.shared_rewiring` gives the same result.

One pass finds the slots that have gone dormant. A second pass puts the places of the survivors into a hash table. Layers and
places are then drawn one by one. At the end the survivors move up, the births fill the rest of each layer, and all tensors of
theta's shape follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from lightning_deepr.algorithm import randomness
from lightning_deepr.algorithm.newborns import State
from lightning_deepr.algorithm.shared_rewiring import RULES
from lightning_deepr.kernels import gate
from lightning_deepr.kernels.cpu import room
from lightning_deepr.kernels.cpu.fields import LAYER_WORDS, STATE_WORDS, StateRow, filler, packer
from lightning_deepr.kernels.cpu.fields import LayerRow as L
from lightning_deepr.kernels.cpu.fields import SharedArguments as A
from lightning_deepr.kernels.cpu.hashing import LARGEST, bits, extend
from lightning_deepr.kernels.cpu.means import mean
from lightning_deepr.kernels.cpu.native import (
    Kernel,
    load_float,
    load_int64,
    pointer,
    stack_space,
    store_float,
    store_int64,
)
from lightning_deepr.kernels.cpu.rewire import SIGN_BIT, birth_stream, find, negative_at
from lightning_deepr.kernels.cpu.scratch import CELL_BYTES, int32s, int64s, take, uint64s
from lightning_deepr.kernels.cpu.sorting import sort_with
from lightning_deepr.kernels.slots import Slots

LAYER = np.uint64(randomness.LAYER)
BY_BUDGET = RULES.index("budget")

_fill, _pack_layer, _pack_state = filler(A), packer(L), packer(StateRow, floats=("START",))


@njit(inline="always")
def layer_stream(seed: int, step: int) -> np.uint64:
    return extend(extend(extend(np.uint64(4), np.uint64(seed)), LAYER), np.uint64(step))


@njit(inline="always")
def draw_place(key: np.uint64, counter: int, total: int) -> int:
    """Draw a place as ``randomness.uniform_places`` does, or return -1 if the draw has to be repeated."""
    draw, n = bits(key, np.uint64(counter)) & LARGEST, np.uint64(total)
    rest = (LARGEST % n + np.uint64(1)) % n
    return np.int64(draw % n) if draw <= LARGEST - rest else np.int64(-1)


@njit
def draw_layers(
    t: np.ndarray, layers: int, first: int, count: int, seed: int, step: int, chosen: np.ndarray, cell: int
) -> None:
    """Draw a layer for each of ``count`` births, in proportion to the budgets, into ``chosen[first:]``. ROOM shrinks."""
    pending = int64s(cell, count)
    for i in range(count):
        pending[i] = i
    left, attempt = count, np.uint64(0)
    ends = int64s(cell, layers)
    while left > 0:
        total = np.int64(0)
        for i in range(layers):
            total += t[i, L.BUDGET] if t[i, L.ROOM] > 0 else 0
            ends[i] = total
        if total == 0:  # all layers with a budget are full
            for i in range(layers):
                total += t[i, L.ROOM]
                ends[i] = total
        key = extend(layer_stream(seed, step), attempt)
        waiting = 0
        for j in range(left):
            rank = pending[j]
            draw = draw_place(key, rank, total)
            layer = 0
            while draw >= ends[layer]:
                layer += 1
            if draw >= 0 and t[layer, L.ROOM] > 0:
                t[layer, L.ROOM] -= 1
                chosen[first + rank] = layer
            else:
                pending[waiting] = rank
                waiting += 1
        left, attempt = waiting, attempt + np.uint64(1)


@njit
def draw_free(
    table: int, mask: int, shift: np.uint64, key_base: np.uint64, counter: int, total: int, start: int, count: int,
    chosen: np.ndarray, first: int, scratch: int,
) -> None:  # fmt: skip
    """Find for each of ``count`` counters the first of its draws that is free, judged in the order (attempt, counter).

    ``scratch`` is the cell of working memory.
    """
    pending = int64s(scratch, count)
    for i in range(count):
        pending[i] = i
    left, attempt = count, np.uint64(0)
    while left > 0:
        key, waiting = extend(key_base, attempt), 0
        for j in range(left):
            i = pending[j]
            place = draw_place(key, counter + i, total)
            at = find(table, mask, shift, place + start) if place >= 0 else np.int64(-1)
            if at >= 0 and load_int64(table + at * 8) == -1:
                store_int64(table + at * 8, place + start)
                chosen[first + i] = place + start
            else:
                pending[waiting] = i
                waiting += 1
        left, attempt = waiting, attempt + np.uint64(1)


@njit
def draw_listed(
    table: int, mask: int, shift: np.uint64, key: np.uint64, counter: int, total: int, start: int, count: int,
    chosen: np.ndarray, first: int, scratch: int,
) -> None:  # fmt: skip
    """Choose the first ``count`` dormant places in a random order. ``scratch`` is the cell of working memory."""
    numbers, keys = int32s(scratch, total), uint64s(scratch, total)
    n = 0
    for place in range(total):
        at = find(table, mask, shift, place + start)
        if load_int64(table + at * 8) == -1:
            numbers[n] = np.int32(place)
            keys[n] = bits(key, np.uint64(counter + place)) ^ SIGN_BIT  # PyTorch sorts the hash as a signed number
            n += 1
    _, numbers = sort_with(keys[:n], numbers[:n], np.uint64(randomness.WORD), scratch)
    for i in range(count):
        place = np.int64(numbers[i]) + start
        store_int64(table + find(table, mask, shift, place) * 8, place)
        chosen[first + i] = place


@njit
def draw_within(
    t: np.ndarray, layers: int, table: int, mask: int, shift: np.uint64, seed: int, step: int, chosen: np.ndarray, cell: int,
) -> None:  # fmt: skip
    """Draw places for the ``BIRTHS`` births of each layer, layer by layer, into ``chosen``."""
    base, first = birth_stream(seed, step), np.int64(0)
    for i in range(layers):
        births, alive, total = t[i, L.BIRTHS], t[i, L.ALIVE], t[i, L.TOTAL]
        if births == 0:
            continue
        free = load_int64(cell)
        if 2 * (alive + births) > total:
            draw_listed(
                table, mask, shift, extend(base, np.uint64(0)), t[i, L.COUNTER], total, t[i, L.START], births, chosen, first,
                cell,
            )  # fmt: skip
        else:
            draw_free(table, mask, shift, base, t[i, L.COUNTER] + alive, total, t[i, L.START], births, chosen, first, cell)
        store_int64(cell, free)
        first += births


@njit(inline="always")
def owner_of(t: np.ndarray, layers: int, place: int) -> int:
    layer = 0
    while layer + 1 < layers and place >= t[layer + 1, L.START]:
        layer += 1
    return layer


@cache
def rewire_kernel(size: int) -> Kernel:
    """Make the kernel of a rewiring. A float of theta has ``size`` bytes."""

    def rewire(a: int) -> None:
        count, layers, theta = load_int64(a + 8 * A.COUNT), load_int64(a + 8 * A.LAYERS), load_int64(a + 8 * A.THETA)
        t = carray(pointer(load_int64(a + 8 * A.TABLE)), (layers, LAYER_WORDS), np.int64)
        seed, step, since = load_int64(a + 8 * A.SEED), load_int64(a + 8 * A.STEP), load_int64(a + 8 * A.NEWBORN_SINCE)
        least = load_int64(a + 8 * A.LEAST)
        # count the slots that have gone dormant
        births, k = np.int64(0), np.int64(0)
        for i in range(layers):
            born, deaths, newborn = t[i, L.BORN], np.int64(0), np.int64(0)
            for j in range(t[i, L.KEPT]):
                if load_float(theta + k * size, size) < 0:
                    deaths += 1
                    newborn += load_int64(born + j * 8) >= since
                k += 1
            t[i, L.DEATHS], t[i, L.NEWBORN_DEATHS], t[i, L.ALIVE], t[i, L.BIRTHS] = deaths, newborn, t[i, L.KEPT] - deaths, 0
            births += deaths
        store_int64(a + 8 * A.BIRTHS, births)
        if births == 0:
            return
        # put the places of the survivors into the table
        size_of_table, length = np.int64(16), np.uint64(4)
        while size_of_table < 2 * (count + 1):
            size_of_table, length = 2 * size_of_table, length + np.uint64(1)
        cell = stack_space(CELL_BYTES)
        store_int64(cell, load_int64(a + 8 * A.SCRATCH))
        cells = int64s(cell, size_of_table)
        cells[:] = -1
        table, mask, shift = np.int64(cells.ctypes.data), size_of_table - 1, np.uint64(64) - length
        k = 0
        for i in range(layers):
            places, start = t[i, L.PLACES], t[i, L.START]
            for j in range(t[i, L.KEPT]):
                if not load_float(theta + k * size, size) < 0:
                    place = load_int64(places + j * 8) + start
                    store_int64(table + find(table, mask, shift, place) * 8, place)
                k += 1
        # draw a layer and a place for each birth
        layer_of, chosen = int64s(cell, births), int64s(cell, births)
        drawn, at = int64s(cell, births), int64s(cell, layers + 1)
        source = int64s(cell, count)  # the old slot, or -1 for a newborn
        scratch = carray(pointer(take(cell, 8 * count)), count, np.float64)
        owed, network = np.int64(0), np.int64(0)
        for i in range(layers):
            short = max(min(least, t[i, L.TOTAL]) - t[i, L.ALIVE], 0)
            for _ in range(min(short, births - owed)):
                layer_of[owed] = i
                t[i, L.BIRTHS] += 1
                owed += 1
            t[i, L.ROOM] = t[i, L.TOTAL] - t[i, L.ALIVE] - t[i, L.BIRTHS]
            network += t[i, L.TOTAL]
        if load_int64(a + 8 * A.RULE) == BY_BUDGET:
            draw_layers(t, layers, owed, births - owed, seed, step, layer_of, cell)
            for n in range(owed, births):
                t[layer_of[n], L.BIRTHS] += 1
            draw_within(t, layers, table, mask, shift, seed, step, chosen, cell)
        else:
            draw_within(t, layers, table, mask, shift, seed, step, chosen, cell)
            rest, base = births - owed, layer_stream(seed, step)
            if rest > 0:
                if 2 * (count + owed) > network:
                    draw_listed(table, mask, shift, extend(base, np.uint64(0)), 0, network, 0, rest, chosen, owed, cell)
                else:
                    draw_free(table, mask, shift, base, 0, network, 0, rest, chosen, owed, cell)
            # sort the places by layer, and within a layer in the order of their draws
            drawn[:] = chosen
            at[:] = 0
            for n in range(births):
                at[owner_of(t, layers, drawn[n]) + 1] += 1
            for i in range(layers):
                t[i, L.BIRTHS] = at[i + 1]
                at[i + 1] += at[i]
            for n in range(births):
                i = owner_of(t, layers, drawn[n])
                chosen[at[i]] = drawn[n]
                at[i] += 1
        # move the survivors up and add the births
        new_places, new_signs = load_int64(a + 8 * A.NEW_PLACES), load_int64(a + 8 * A.NEW_SIGNS)
        new_born = load_int64(a + 8 * A.NEW_BORN)
        k, to, n = np.int64(0), np.int64(0), 0
        for i in range(layers):
            places, born, signs = t[i, L.PLACES], t[i, L.BORN], t[i, L.SIGNS]
            t[i, L.MOVED] = to
            for j in range(t[i, L.KEPT]):
                if not load_float(theta + k * size, size) < 0:
                    source[to] = k
                    store_int64(new_places + to * 8, load_int64(places + j * 8))
                    store_int64(new_born + to * 8, load_int64(born + j * 8))
                    store_float(new_signs + to * size, load_float(signs + j * size, size), size)
                    to += 1
                k += 1
            for _ in range(t[i, L.BIRTHS]):
                place = chosen[n] - t[i, L.START]
                negative = negative_at(place, t[i, L.SIGN_SEED], t[i, L.EXCEPTIONS], t[i, L.EXCEPTION_COUNT])
                source[to] = -1
                store_int64(new_places + to * 8, place)
                store_int64(new_born + to * 8, step)
                store_float(new_signs + to * size, -1.0 if negative else 1.0, size)
                to += 1
                n += 1
            t[i, L.AFTER] = t[i, L.ALIVE] + t[i, L.BIRTHS]
        states, number = load_int64(a + 8 * A.STATES), load_int64(a + 8 * A.STATE_COUNT)
        for s in range(number):
            entry = states + 8 * STATE_WORDS * s
            address, start = load_int64(entry + 8 * StateRow.ADDRESS), load_float(entry + 8 * StateRow.START, 8)
            if load_int64(entry + 8 * StateRow.SIZE) == 4:
                old, value = scratch.view(np.float32), carray(pointer(address), count, np.float32)
                for k in range(count):
                    old[k] = value[k]
                for k in range(count):
                    value[k] = old[source[k]] if source[k] >= 0 else np.float32(start)
                if load_int64(entry + 8 * StateRow.AVERAGED) != 0:
                    for i in range(layers):
                        first, alive, after = t[i, L.MOVED], t[i, L.ALIVE], t[i, L.AFTER]
                        if after > alive:  # a layer's survivors come first, and the reborn would count as 0
                            value[first + alive : first + after] = mean(address + 4 * first, 4, alive, alive, start)
            else:
                wide = carray(pointer(address), count, np.float64)
                for k in range(count):
                    scratch[k] = wide[k]
                for k in range(count):
                    wide[k] = scratch[source[k]] if source[k] >= 0 else start
                if load_int64(entry + 8 * StateRow.AVERAGED) != 0:
                    for i in range(layers):
                        first, alive, after = t[i, L.MOVED], t[i, L.ALIVE], t[i, L.AFTER]
                        if after > alive:
                            wide[first + alive : first + after] = mean(address + 8 * first, 8, alive, alive, start)

    return Kernel(rewire)


def _refuse_misfits(members: Sequence[Slots], theta: Tensor, values: Sequence[Tensor]) -> None:
    """Refuse tensors that the kernel must not read or write, before it writes any."""
    for begin, member in zip(np.cumsum([0, *(one.places.numel() for one in members)]), members, strict=False):
        gate.check(theta.narrow(0, int(begin), member.places.numel()), member)
    for value in values:
        found = gate.fault(value, theta.shape, device=theta.device)
        if found is not None:
            raise RuntimeError(f"A tensor that moves along with theta: {found}.")


class Result:
    """The result of a call: the counts of each layer in lists, and the new state of all slots in tensors."""

    def __init__(self, places: Tensor, signs: Tensor, born: Tensor, table: np.ndarray) -> None:
        self.places, self.signs, self.born = places, signs, born
        self.counts, self.births, self.deaths, self.newborn_deaths = table[:, L.AFTER : L.NEWBORN_DEATHS + 1].T.tolist()


def rewire(
    members: Sequence[Slots], budgets: Sequence[int], theta: Tensor, values: Sequence[State], *, rule: int,
    least: int, newborn_since: int, seed: int, step: int,
) -> Result | None:  # fmt: skip
    """Rewire once. The kernel writes ``values`` (theta among them) in place; the result holds new places, signs and births.

    Args:
        members: the KSlots of the layers, in the order of their slots.
        budgets: the budget of each layer, for the rule "budget".
        theta: [K], float32 or float64, contiguous, on the CPU.
        values: all tensors that move along, each with the value of a newborn; an averaged one gets its layer's mean. What is
            said of theta holds for them.
        rule: 0 for "budget", 1 for "uniform".
        least, newborn_since, seed, step: as in :func:`lightning_deepr.algorithm.shared_rewiring.plan`.

    Returns:
        The result, or None if nothing went dormant.
    """
    count, size = theta.numel(), theta.element_size()
    _refuse_misfits(members, theta, [part for one in values for part in one if isinstance(part, Tensor)])
    start, rows = 0, bytearray()
    for member, budget in zip(members, budgets, strict=True):
        places, total, exceptions = member.places, member.total, member.exceptions
        rows += _pack_layer(
            KEPT=places.numel(), TOTAL=total, COUNTER=member.index << randomness.SLOT_BITS, START=start, BUDGET=budget,
            PLACES=places.data_ptr(), BORN=member.born.data_ptr(), SIGNS=member.signs.data_ptr(), SIGN_SEED=member.sign_seed,
            EXCEPTIONS=exceptions.data_ptr(), EXCEPTION_COUNT=exceptions.numel(),
        )  # fmt: skip
        start += total
    table = np.frombuffer(rows, np.int64).reshape(-1, LAYER_WORDS)
    new_places, new_born, new_signs = (
        torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64), torch.empty_like(theta)
    )  # fmt: skip
    free = room.empty(room.shared(count, len(members), start))
    states = [
        _pack_state(ADDRESS=value.data_ptr(), SIZE=value.element_size(), START=begins, AVERAGED=averaged)
        for _, value, begins, averaged in values
    ]
    moving = np.frombuffer(b"".join(states), np.int64)
    arguments = _fill(
        COUNT=count, LAYERS=len(table), THETA=theta.data_ptr(), TABLE=table.ctypes.data, RULE=rule, LEAST=least,
        NEWBORN_SINCE=newborn_since, SEED=seed, STEP=step, NEW_PLACES=new_places.data_ptr(), NEW_SIGNS=new_signs.data_ptr(),
        NEW_BORN=new_born.data_ptr(), STATES=moving.ctypes.data, STATE_COUNT=len(values),
        SCRATCH=free.data_ptr(),
    )  # fmt: skip
    rewire_kernel(size)(arguments)
    if arguments[A.BIRTHS] == 0:
        return None
    changed = [one.value for one in values if not one.value.is_inference()]
    torch.autograd.graph.increment_version(changed)
    return Result(new_places, new_signs, new_born, table)
