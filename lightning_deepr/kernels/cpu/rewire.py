"""Algorithm 1 after the gradient step, for all tensors in one call (see :mod:`lightning_deepr.algorithm.rewiring`).

The draws are the same integers as in the PyTorch version and are judged in the same order, so the result is the same. If R of
the K slots of a tensor go dormant:

1. One pass over the slots applies L1 and noise and lists the slots with theta < 0.
2. The R draws go into a hash table, and one more pass over the places of the active connections marks the draws that are taken.
   Nothing is kept between steps, so nothing can go stale. Slots without a place draw again, several attempts ahead: two passes
   nearly always suffice.
3. The reborn slots get theta 0, a place, a sign, a birth and the optimizer's starting state.

:mod:`lightning_deepr.kernels.cpu.orders` then updates the orders by rows and by columns.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import carray, njit

from lightning_deepr.algorithm import randomness
from lightning_deepr.kernels.cpu.deviates import BLOCK, deviates
from lightning_deepr.kernels.cpu.fields import (
    ROW_WORDS,
    STATE_WORDS,
    VALUES_WORDS,
    CpuRow,
    FiniteArguments,
    Row,
    StartArguments,
    StateRow,
    ValuesRow,
)
from lightning_deepr.kernels.cpu.fields import StepArguments as A
from lightning_deepr.kernels.cpu.hashing import GOLDEN, LARGEST, bits, extend
from lightning_deepr.kernels.cpu.native import (
    Kernel,
    advise_huge_pages,
    fetch_add,
    load_float,
    load_int32,
    load_int64,
    pointer,
    prefetch,
    store_byte,
    store_float,
    store_int64,
)
from lightning_deepr.kernels.cpu.sorting import sort_with

PASS_SIZE = 1 << 15  # slots of a large tensor that a thread takes at a time

FREE, ACTIVE, CLAIMED = 0, 1, 2
BIRTH, NOISE_STREAM = np.uint64(randomness.BIRTH), np.uint64(randomness.NOISE)
START_PLACES = np.uint64(randomness.START_PLACES)
SLOT = 0x7FFFFFFF
SIGN_BIT = np.uint64(1 << 63)
BATCH = 32  # draws whose cells are prefetched together


@njit
def birth_stream(seed: int, step: int) -> np.uint64:
    """Compute the key of a step's births without its last coordinate, the attempt."""
    return extend(extend(extend(np.uint64(4), np.uint64(seed)), BIRTH), np.uint64(step))


@njit(inline="always")
def find(table: int, mask: int, shift: np.uint64, place: int) -> int:
    """Find the cell of a place in the table, or the empty cell where the place belongs."""
    cell = np.int64((np.uint64(place) * GOLDEN) >> shift)
    while load_int64(table + cell * 8) != -1 and load_int64(table + cell * 8) != place:
        cell = (cell + 1) & mask
    return cell


@njit
def look_for_active(t: int, size: int) -> None:
    """Mark the draws in a tensor's hash table that active connections have. A task is a piece of the tensor's places."""
    count, places, theta = load_int64(t + 8 * Row.COUNT), load_int64(t + 8 * Row.PLACES), load_int64(t + 8 * Row.THETA)
    table, status, filter_at = (
        load_int64(t + 8 * CpuRow.PASS_CELLS),
        load_int64(t + 8 * CpuRow.PASS_STATUS),
        load_int64(t + 8 * CpuRow.PASS_FILTER),
    )
    bits_of_table = load_int64(t + 8 * CpuRow.PASS_BITS)
    mask, shift = (np.int64(1) << bits_of_table) - 1, np.uint64(64 - bits_of_table)
    filter_shift = np.uint64(64 - load_int64(t + 8 * CpuRow.PASS_FILTER_BITS))
    drawn = np.empty(BATCH, np.int64)  # places of active connections that pass the filter: their cells are prefetched
    while True:
        first = fetch_add(t + 8 * CpuRow.PASS_CHUNK, PASS_SIZE)
        if first >= count:
            break
        suspects = 0
        for k in range(first, min(first + PASS_SIZE, count)):
            place = load_int64(places + k * 8)
            word = np.uint64(place) * GOLDEN
            bit = np.int64(word >> filter_shift)
            if (load_int64(filter_at + (bit >> 6) * 8) >> (bit & 63)) & 1 and load_float(theta + k * size, size) >= 0:
                prefetch(table + np.int64(word >> shift) * 8)
                drawn[suspects] = place
                suspects += 1
                if suspects == BATCH:
                    mark_active(table, mask, shift, drawn, suspects, status)
                    suspects = 0
        mark_active(table, mask, shift, drawn, suspects, status)


@njit
def mark_active(table: int, mask: int, shift: np.uint64, places: np.ndarray, count: int, status: int) -> None:
    for i in range(count):
        cell = find(table, mask, shift, places[i])
        if load_int64(table + cell * 8) == places[i]:
            store_byte(status + cell, ACTIVE)


@njit
def help_others(a: int, size: int) -> None:
    """Help other threads in their passes until all tensors are done. A thread that finds no more tensor calls this."""
    tensors, table = load_int64(a + 8 * A.TENSORS), load_int64(a + 8 * A.TABLE)
    while fetch_add(a + 8 * A.FINISHED, 0) < tensors:
        for task in range(tensors):
            t = table + task * ROW_WORDS * 8
            if fetch_add(t + 8 * CpuRow.PASS_OPEN, 0) > 0:
                # Count this thread, then check again: the thread that opened the pass closes it and then waits for counted
                # threads.
                fetch_add(t + 8 * CpuRow.PASS_BUSY, 1)
                if fetch_add(t + 8 * CpuRow.PASS_OPEN, 0) > 0:
                    look_for_active(t, size)
                fetch_add(t + 8 * CpuRow.PASS_BUSY, -1)


@njit
def is_active(place: int, columns: int, order: int, row_column: int, row_slot: int, theta: int, size: int) -> bool:
    """Tell whether a place has an active connection, by the order of the rows from before the step."""
    row = np.int64(np.uint64(place) // np.uint64(columns))
    across = place - row * columns
    low, high = np.int64(load_int32(order + 4 * row)), np.int64(load_int32(order + 4 * (row + 1)))
    end = high
    while low < high:
        middle = (low + high) >> 1
        if load_int32(row_column + 4 * middle) < across:
            low = middle + 1
        else:
            high = middle
    if low == end or load_int32(row_column + 4 * low) != across:
        return False
    return load_float(theta + (load_int32(row_slot + 4 * low) & SLOT) * size, size) >= 0


@njit
def draw_by_rejection(
    theta: int, size: int, places: int, count: int, total: int, dormant: np.ndarray, reborn: int, counter: int,
    stream: np.uint64, chosen: np.ndarray, t: int,
) -> None:  # fmt: skip
    """Draw new places for the dormant slots of a tensor that is at most half full (``rewiring.first_free`` has the rule).

    Args:
        theta, places: addresses. theta < 0 marks the slots that have gone dormant.
        size: the bytes of a float of theta.
        count, total: K and N.
        dormant: the array of the ``reborn`` dormant slots, ascending.
        counter: the counter of slot 0.
        stream: the key of the draws without the attempt.
        chosen: the result, an array [reborn].
        t: the address of the tensor's words. If its connections are kept in order, a few draws are looked up there. That is
            cheaper than another pass over all places.
    """
    order, row_column, row_slot = (
        load_int64(t + 8 * CpuRow.ROW_START),
        load_int64(t + 8 * CpuRow.ROW_COLUMN),
        load_int64(t + 8 * CpuRow.ROW_SLOT),
    )
    columns = load_int64(t + 8 * CpuRow.COLUMNS)
    places_total = np.uint64(total)
    limit = LARGEST - (LARGEST % places_total + np.uint64(1)) % places_total
    bits_of_table = 8
    while (1 << bits_of_table) < (4 if reborn < 1 << 20 else 2) * reborn:
        bits_of_table += 1
    capacity, mask, shift = 1 << bits_of_table, (1 << bits_of_table) - 1, np.uint64(64 - bits_of_table)
    cells, status = np.empty(capacity, np.int64), np.empty(capacity, np.uint8)
    advise_huge_pages(np.int64(cells.ctypes.data), 8 * capacity)
    advise_huge_pages(np.int64(status.ctypes.data), capacity)
    cells[:] = -1
    status[:] = FREE
    # A filter of at least 8 bits for each draw, but at most 1 MB. It dismisses most active connections, and it stays in a
    # core's own cache.
    words = np.empty(1 << max(2, min(17, bits_of_table - 4)), np.uint64)
    table, filter_at = np.int64(cells.ctypes.data), np.int64(words.ctypes.data)
    pending = np.arange(reborn)
    waiting, attempt, inserted = reborn, 0, 0
    where = np.empty(max(reborn, 64) + 64, np.int64)
    drawn = np.empty(BATCH, np.int64)
    while waiting > 0:
        look_up = order != 0 and 32 * waiting < count
        ahead = 1
        # as many attempts as are probably needed: this pass over the places should be the last
        if attempt > 0 and not look_up:
            left_over = 0.5 * waiting * count / total
            while left_over > 0.25 and (ahead + 1) * waiting <= max(reborn, 64):
                left_over *= count / total
                ahead += 1
        if inserted + ahead * waiting > capacity // 2:
            # forget the draws that are only known to be free or active; the accepted draws stay
            cells[:] = -1
            status[:] = FREE
            inserted = 0
            still = 0
            for i in range(reborn):
                if still < waiting and pending[still] == i:
                    still += 1
                    continue
                cell = find(table, mask, shift, chosen[i])
                cells[cell], status[cell] = chosen[i], CLAIMED
                inserted += 1
        filter_bits = 8
        while filter_bits < 23 and (1 << filter_bits) < 8 * ahead * waiting and (1 << filter_bits) < 64 * len(words):
            filter_bits += 1
        filter_shift = np.uint64(64 - filter_bits)
        if not look_up:
            words[: 1 << (filter_bits - 6)] = np.uint64(0)
        for a in range(ahead):
            key = extend(stream, np.uint64(attempt + a))
            for begin in range(0, waiting, BATCH):
                number = min(BATCH, waiting - begin)
                for i in range(number):
                    draw = bits(key, np.uint64(counter + dormant[pending[begin + i]])) & LARGEST
                    place = np.int64(draw % places_total) if draw <= limit else np.int64(-1)
                    drawn[i] = place
                    if place >= 0:
                        prefetch(table + np.int64((np.uint64(place) * GOLDEN) >> shift) * 8)
                for i in range(number):
                    place = drawn[i]
                    if place < 0:
                        where[a * waiting + begin + i] = -1
                        continue
                    cell = find(table, mask, shift, place)
                    where[a * waiting + begin + i] = cell
                    if load_int64(table + cell * 8) == -1:
                        store_int64(table + cell * 8, place)
                        inserted += 1
                        if look_up:
                            if is_active(place, columns, order, row_column, row_slot, theta, size):
                                status[cell] = ACTIVE
                            continue
                        bit = np.int64((np.uint64(place) * GOLDEN) >> filter_shift)
                        word = filter_at + (bit >> 6) * 8
                        store_int64(word, load_int64(word) | (np.int64(1) << (bit & 63)))
        if not look_up and count > 0:
            store_int64(t + 8 * CpuRow.PASS_CELLS, table)
            store_int64(t + 8 * CpuRow.PASS_STATUS, np.int64(status.ctypes.data))
            store_int64(t + 8 * CpuRow.PASS_BITS, bits_of_table)
            store_int64(t + 8 * CpuRow.PASS_FILTER, filter_at)
            store_int64(t + 8 * CpuRow.PASS_FILTER_BITS, filter_bits)
            store_int64(t + 8 * CpuRow.PASS_CHUNK, 0)
            fetch_add(t + 8 * CpuRow.PASS_OPEN, 1)
            look_for_active(t, size)
            fetch_add(t + 8 * CpuRow.PASS_OPEN, -1)
            while fetch_add(t + 8 * CpuRow.PASS_BUSY, 0) > 0:  # the threads that help are at their last pieces
                pass
        for a in range(ahead):
            left = 0
            for i in range(waiting):
                if pending[i] < 0:
                    continue
                cell = where[a * waiting + i]
                if cell >= 0 and status[cell] == FREE:
                    status[cell] = CLAIMED
                    chosen[pending[i]] = cells[cell]
                    pending[i] = -1
                else:
                    left += 1
            if left == 0:
                break
        left = 0
        for i in range(waiting):
            if pending[i] >= 0:
                pending[left] = pending[i]
                left += 1
        waiting = left
        attempt += ahead


@njit
def draw_from_list(
    theta: int, size: int, places: int, count: int, total: int, reborn: int, counter: int, seed: int, step: int,
    chosen: np.ndarray,
) -> None:  # fmt: skip
    """Draw new places in a tensor that is more than half full: the first R of its dormant places in a random order."""
    taken = np.zeros(total, np.uint8)
    active = 0
    for k in range(count):
        if not load_float(theta + k * size, size) < 0:
            taken[load_int64(places + k * 8)] = 1
            active += 1
    candidates, keys = np.empty(total - active, np.int32), np.empty(total - active, np.uint64)
    key = extend(birth_stream(seed, step), np.uint64(0))
    n = 0
    for place in range(total):
        if taken[place] == 0:
            candidates[n] = np.int32(place)
            keys[n] = bits(key, np.uint64(counter + place)) ^ SIGN_BIT  # PyTorch sorts the hash as a signed number
            n += 1
    keys, candidates = sort_with(keys, candidates, np.uint64(randomness.WORD))
    for i in range(reborn):
        chosen[i] = candidates[i]


@njit(inline="always")
def negative_at(place: int, sign_seed: int, exceptions: int, exception_count: int) -> bool:
    """Tell whether the constant sign of a place is -1 (``KSlots.signs_at``)."""
    negative = np.int64(bits(np.uint64(sign_seed), np.uint64(place))) < 0
    if exception_count > 0:
        low, high = 0, exception_count
        while low < high:
            middle = (low + high) // 2
            if load_int64(exceptions + middle * 8) < place:
                low = middle + 1
            else:
                high = middle
        if low < exception_count and load_int64(exceptions + low * 8) == place:
            negative = not negative
    return negative


@cache
def rewire_kernel(size: int) -> Kernel:
    """Make the kernel of one step of all tensors in the table. A task is a tensor. A float of theta has ``size`` bytes."""
    real = np.float32 if size == 4 else np.float64

    def rewire(a: int) -> None:
        tensors, table = load_int64(a + 8 * A.TENSORS), load_int64(a + 8 * A.TABLE)
        step, seed = load_int64(a + 8 * A.STEP), load_int64(a + 8 * A.SEED)
        working = False
        while True:
            if working:
                fetch_add(a + 8 * A.FINISHED, 1)
            task = fetch_add(a + 8 * A.TASK, 1)
            if task >= tensors:
                break
            working = True
            t = table + task * ROW_WORDS * 8
            theta, places, count = load_int64(t + 8 * Row.THETA), load_int64(t + 8 * Row.PLACES), load_int64(t + 8 * Row.COUNT)
            counter, total = load_int64(t + 8 * Row.COUNTER), load_int64(t + 8 * Row.TOTAL)
            decrement, scale = load_float(t + 8 * Row.DECREMENT, 8), load_float(t + 8 * Row.SCALE, 8)
            rewires, dormant_at = load_int64(t + 8 * Row.REWIRES), load_int64(t + 8 * CpuRow.REBORN)
            store_int64(t + 8 * CpuRow.REBORN_COUNT, 0)
            store_int64(t + 8 * CpuRow.NEWBORN_DEATHS, 0)
            # theta <- theta - eta * alpha + sqrt(2 * eta * T) * nu; then slots with theta < 0 go dormant
            values = carray(pointer(theta), count, real)
            if decrement != 0.0:
                less = real(decrement)
                for k in range(count):
                    values[k] -= less
            if scale != 0.0:
                key = extend(extend(extend(np.uint64(3), np.uint64(seed)), NOISE_STREAM), np.uint64(step))
                noise = np.empty(BLOCK, np.float64)
                for first in range(0, count, BLOCK):
                    length = min(BLOCK, count - first)
                    deviates(key, counter + first, length, noise)
                    for k in range(length):
                        values[first + k] += real(noise[k] * scale)
            if rewires == 0:  # slots stay active at 0, with their places and signs
                for k in range(count):
                    if values[k] < 0:
                        values[k] = 0
                continue
            reborn = np.int64(0)
            for k in range(count):
                store_int64(dormant_at + reborn * 8, k)
                reborn += values[k] < 0
            store_int64(t + 8 * CpuRow.REBORN_COUNT, reborn)
            if reborn == 0:
                continue
            dormant, chosen = carray(pointer(dormant_at), reborn, np.int64), np.empty(reborn, np.int64)
            if 2 * count <= total:
                draw_by_rejection(
                    theta, size, places, count, total, dormant, reborn, counter, birth_stream(seed, step), chosen, t
                )
            else:
                draw_from_list(theta, size, places, count, total, reborn, counter, seed, step, chosen)
            born, signs = load_int64(t + 8 * Row.BORN), load_int64(t + 8 * Row.SIGNS)
            since, newborn_deaths = load_int64(a + 8 * A.NEWBORN_SINCE), 0
            sign_seed = load_int64(t + 8 * Row.SIGN_SEED)
            exceptions, exception_count = load_int64(t + 8 * Row.EXCEPTIONS), load_int64(t + 8 * Row.EXCEPTION_COUNT)
            for i in range(reborn):
                k, place = dormant[i], chosen[i]
                newborn_deaths += load_int64(born + k * 8) >= since
                negative = negative_at(place, sign_seed, exceptions, exception_count)
                values[k] = 0
                store_int64(places + k * 8, place)
                store_float(signs + k * size, -1.0 if negative else 1.0, size)
                store_int64(born + k * 8, step)
            store_int64(t + 8 * CpuRow.NEWBORN_DEATHS, newborn_deaths)
            for state in range(load_int64(t + 8 * Row.STATES)):
                entry = t + 8 * (CpuRow.FIRST_STATE + STATE_WORDS * state)
                address, start = load_int64(entry + 8 * StateRow.ADDRESS), load_float(entry + 8 * StateRow.START, 8)
                if load_int64(entry + 8 * StateRow.SIZE) == 4:
                    for i in range(reborn):
                        store_float(address + dormant[i] * 4, np.float32(start), 4)
                else:
                    for i in range(reborn):
                        store_float(address + dormant[i] * 8, start, 8)
        help_others(a, size)

    return Kernel(rewire)


@cache
def start_kernel() -> Kernel:
    """Make the kernel that draws K places in an empty tensor (``rewiring.random_places``): all slots are reborn."""

    def start(a: int) -> None:
        count, seed = load_int64(a + 8 * StartArguments.COUNT), load_int64(a + 8 * StartArguments.SEED)
        total, counter = load_int64(a + 8 * StartArguments.TOTAL), load_int64(a + 8 * StartArguments.COUNTER)
        chosen = carray(pointer(load_int64(a + 8 * StartArguments.RESULT)), count, np.int64)
        stream = extend(extend(np.uint64(3), np.uint64(seed)), START_PLACES)
        nothing = np.zeros(ROW_WORDS, np.int64)
        slots = np.arange(count)
        t = np.int64(nothing.ctypes.data)
        draw_by_rejection(0, 4, 0, 0, total, slots, count, counter, stream, chosen, t)
        nothing[0] = 0  # (numba frees an array after its last mention)

    return Kernel(start)


@cache
def finite_kernel() -> Kernel:
    """Make the kernel that checks whether all values of the tensors in the table are finite."""

    def finite(a: int) -> None:
        number, table = load_int64(a + 8 * FiniteArguments.NUMBER), load_int64(a + 8 * FiniteArguments.TABLE)
        fine = np.int64(1)
        for i in range(number):
            entry = table + 8 * VALUES_WORDS * i
            address, count = load_int64(entry + 8 * ValuesRow.ADDRESS), load_int64(entry + 8 * ValuesRow.COUNT)
            # a float is finite unless all bits of its exponent are set
            if load_int64(entry + 8 * ValuesRow.SIZE) == 4:
                words = carray(pointer(address), count, np.uint32)
                worst = np.uint32(0)
                for k in range(count):
                    worst = max(worst, words[k] & np.uint32(0x7F800000))
                if worst == np.uint32(0x7F800000):
                    fine = np.int64(0)
            else:
                long_words = carray(pointer(address), count, np.uint64)
                worst_long = np.uint64(0)
                for k in range(count):
                    worst_long = max(worst_long, long_words[k] & np.uint64(0x7FF0000000000000))
                if worst_long == np.uint64(0x7FF0000000000000):
                    fine = np.int64(0)
        store_int64(a + 8 * FiniteArguments.FINITE, fine)

    return Kernel(finite)
