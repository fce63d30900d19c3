"""Algorithm 1 after the gradient step, for all tensors in one call (see :mod:`lightning_deepr.algorithm.rewiring`).

The draws are the same integers as in the PyTorch version and are judged in the same order, so the result is the same. If R of
the K slots of a tensor go dormant:

1. One pass over the slots applies L1 and noise and lists the slots with theta < 0.
2. The R draws go into a hash table, and one more pass over the places of the active connections marks the draws that are taken.
   Slots without a place draw again, several attempts ahead: two passes nearly always suffice. A tensor of at least one
   connection in 16 places has a bitmap of its places instead, which follows the births: no pass, O(R).
3. The reborn slots get theta 0, a place, a sign, a birth and the optimizer's starting state, or the mean of the others'.

:mod:`lightning_deepr.kernels.cpu.orders` then updates the orders by rows and by columns.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import carray, njit

from lightning_deepr.algorithm import randomness
from lightning_deepr.kernels.cpu import room
from lightning_deepr.kernels.cpu.allowed import BITMAP, draw_allowed, fetch_allowed, negative_in_table, place_of
from lightning_deepr.kernels.cpu.deviates import BLOCK, deviates
from lightning_deepr.kernels.cpu.fields import (
    FORM_WORDS,
    ROW_WORDS,
    STATE_WORDS,
    VALUES_WORDS,
    CpuRow,
    FiniteArguments,
    NotesWords,
    Row,
    StartArguments,
    StateRow,
    ValuesRow,
)
from lightning_deepr.kernels.cpu.fields import AllowedWords as W
from lightning_deepr.kernels.cpu.fields import StepArguments as A
from lightning_deepr.kernels.cpu.hashing import GOLDEN, LARGEST, bits, extend
from lightning_deepr.kernels.cpu.means import mean
from lightning_deepr.kernels.cpu.native import (
    Kernel,
    advise_huge_pages,
    fetch_add,
    load_float,
    load_int32,
    load_int64,
    negative_of_64,
    pointer,
    prefetch,
    stack_space,
    store_byte,
    store_float,
    store_int32,
    store_int64,
    subtract_from_64,
    trailing_zeros,
)
from lightning_deepr.kernels.cpu.scratch import CELL_BYTES, bytes_of, int32s, int64s, uint64s
from lightning_deepr.kernels.cpu.sorting import sort_with

PASS_SIZE = 1 << 15  # slots of a large tensor that a thread takes at a time

FREE, ACTIVE, CLAIMED = 0, 1, 2
BIRTH, NOISE_STREAM = np.uint64(randomness.BIRTH), np.uint64(randomness.NOISE)
START_PLACES = np.uint64(randomness.START_PLACES)
SLOT = 0x7FFFFFFF
SIGN_BIT = np.uint64(1 << 63)
BATCH_BYTES, NOISE_BYTES, ROW_BYTES, MARKS_BYTES = 256, 8 * BLOCK, 8 * ROW_WORDS, 512  # of arrays on the stack
LISTED = room.LISTED  # places whose hashes are computed together
LISTED_BYTES, HASH_BYTES = 4 * LISTED, 8 * LISTED
ALL, SPAN = np.uint64(randomness.WORD), 2.0**64
BATCH = 32  # draws whose cells are prefetched together
AHEAD = 24  # the words of the reborn slot that comes this many later are prefetched


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
    drawn = carray(
        pointer(stack_space(BATCH_BYTES)), BATCH, np.int64
    )  # places of active connections that pass the filter: their cells are prefetched
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
def note_births(notes: int, born: int, dormant: np.ndarray, chosen: np.ndarray, reborn: int, step: int) -> None:
    """Note the places of births as tried, and how long the connections that die have lived."""
    words, stride = load_int64(notes + 8 * NotesWords.WORDS), load_int64(notes + 8 * NotesWords.STRIDE)
    lives, since = load_int64(notes + 8 * NotesWords.LIVES), load_int64(notes + 8 * NotesWords.SINCE)
    tried = load_int64(notes + 8 * NotesWords.TRIED)
    for i in range(reborn):
        place = chosen[i]
        if stride > 1:
            place = place // stride if place % stride == 0 else np.int64(-1)
        if place >= 0:
            word = words + 8 * (place >> 6)
            bits, bit = load_int64(word), np.int64(1) << (place & 63)
            tried += (bits & bit) == 0
            store_int64(word, bits | bit)
        if lives != 0:
            before = load_int64(born + dormant[i] * 8)
            if before >= since:
                life, kind = step - before - 1, 0  # a lifetime of 1, 2, 3-4, 5-8, ... steps
                while life > 0:
                    life >>= 1
                    kind += 1
                store_int64(lives + 8 * kind, load_int64(lives + 8 * kind) + 1)
    store_int64(notes + 8 * NotesWords.TRIED, tried)


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
    stream: np.uint64, chosen: np.ndarray, t: int, scratch: int, allowed: int,
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
        scratch: the cell of working memory (``room.rejection``).
        allowed: the address of the words of the allowed places, or 0. Then ``total`` is the number of these places.
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
    cells, status = int64s(scratch, capacity), bytes_of(scratch, capacity)
    advise_huge_pages(np.int64(cells.ctypes.data), 8 * capacity)
    advise_huge_pages(np.int64(status.ctypes.data), capacity)
    cells[:] = -1
    status[:] = FREE
    # A filter of at least 8 bits for each draw, but at most 1 MB. It dismisses most active connections, and it stays in a
    # core's own cache.
    words = uint64s(scratch, 1 << max(2, min(17, bits_of_table - 4)))
    table, filter_at = np.int64(cells.ctypes.data), np.int64(words.ctypes.data)
    pending = int64s(scratch, reborn)
    for i in range(reborn):
        pending[i] = i
    waiting, attempt, inserted = reborn, 0, 0
    where = int64s(scratch, max(reborn, 64) + 64)
    drawn = carray(pointer(stack_space(BATCH_BYTES)), BATCH, np.int64)
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
                if allowed != 0:  # first all reads of a list or a bitmap, which are cache misses
                    for i in range(number):
                        fetch_allowed(allowed, bits(key, np.uint64(counter + dormant[pending[begin + i]])))
                for i in range(number):
                    word = bits(key, np.uint64(counter + dormant[pending[begin + i]]))
                    if allowed != 0:
                        place = draw_allowed(allowed, word)
                    else:
                        draw = word & LARGEST
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
                        filter_word = filter_at + (bit >> 6) * 8
                        store_int64(filter_word, load_int64(filter_word) | (np.int64(1) << (bit & 63)))
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
def mark_places(marks: int, places: int, count: int, total: int) -> None:
    """Make the bitmap of a tensor's places anew: one bit for each of N places."""
    for word in range((total + 63) >> 6):
        store_int64(marks + 8 * word, 0)
    for k in range(count):
        mark(marks, load_int64(places + k * 8))


@njit(inline="always")
def mark(marks: int, place: int) -> None:
    word = marks + (place >> 6) * 8
    store_int64(word, load_int64(word) | (np.int64(1) << (place & 63)))


@njit(inline="always")
def unmark(marks: int, place: int) -> None:
    word = marks + (place >> 6) * 8
    store_int64(word, load_int64(word) & ~(np.int64(1) << (place & 63)))


@njit
def draw_by_marks(
    marks: int, total: int, dormant: np.ndarray, reborn: int, counter: int, stream: np.uint64, chosen: np.ndarray, scratch: int,
) -> None:  # fmt: skip
    """Do what :func:`draw_by_rejection` does, in a tensor that has a bitmap: O(R), no pass over the places.

    The bitmap has the places of the living slots, and gets those of the newborns. ``scratch``: ``room.rewiring``.
    """
    places_total = np.uint64(total)
    limit = LARGEST - (LARGEST % places_total + np.uint64(1)) % places_total
    pending = int32s(scratch, reborn)
    for i in range(reborn):
        pending[i] = np.int32(i)
    waiting, attempt = reborn, 0
    while waiting > 0:
        key, left = extend(stream, np.uint64(attempt)), 0
        for j in range(waiting):
            i = pending[j]
            draw = bits(key, np.uint64(counter + dormant[i])) & LARGEST
            place = np.int64(draw % places_total)
            word = marks + (place >> 6) * 8
            held, bit = load_int64(word), np.int64(1) << (place & 63)
            # without a branch, which would be mispredicted: the slot is listed again, and the list may end before it
            free = draw <= limit and held & bit == 0
            store_int64(word, held | bit if free else held)
            chosen[i] = place
            pending[left] = i
            left += 0 if free else 1
        waiting = left
        attempt += 1


@njit
def arrange(chosen: np.ndarray, reborn: int, total: int, scratch: int) -> None:
    """Sort the drawn places by a bitmap of all places (``rewiring.by_rank``; dormant slots are listed in ascending order).

    ``scratch`` is the cell of working memory (``room.arranging``).
    """
    words = (total + 63) >> 6
    bitmap = int64s(scratch, words)
    bitmap[:] = 0
    drawn = np.int64(bitmap.ctypes.data)
    for i in range(reborn):
        mark(drawn, chosen[i])
    n = 0
    for number in range(words):
        word = load_int64(drawn + 8 * number)
        while word != 0:
            chosen[n] = 64 * number + trailing_zeros(word)
            word &= word - 1
            n += 1


@njit
def draw_from_list(
    marks: int, count: int, total: int, reborn: int, counter: int, seed: int, step: int, chosen: np.ndarray, scratch: int,
    ranked: bool,
) -> None:  # fmt: skip
    """Draw new places in a tensor that is more than half full: the first R of its dormant places in a random order.

    With ``ranked`` they come in any order.

    The bitmap has the places of the living slots, and gets those of the newborns. ``scratch``: ``room.listing``.
    """
    free = total - count + reborn
    candidates, keys = int32s(scratch, free + LISTED), uint64s(scratch, free + LISTED)
    key = extend(birth_stream(seed, step), np.uint64(0))
    # Only the R smallest hashes count. Nearly always all of them are below this bound, and few others.
    share = (reborn + 6.0 * np.sqrt(np.float64(reborn)) + 16.0) / free
    found = list_below(marks, total, key, counter, np.uint64(share * SPAN) if share < 0.99 else ALL, candidates, keys)
    if found < reborn:
        found = list_below(marks, total, key, counter, ALL, candidates, keys)
    sure = np.int64(0)
    if ranked:  # the order does not matter: only the hashes near to the R-th smallest are sorted
        low = np.uint64(max((reborn - 6.0 * np.sqrt(np.float64(reborn)) - 16.0) / free, 0.0) * SPAN)
        for i in range(found):
            sure += keys[i] < low
        if sure > reborn:
            low, sure = np.uint64(0), np.int64(0)
        taken, left = np.int64(0), np.int64(0)
        for i in range(found):
            place, word = candidates[i], keys[i]
            if word < low:
                chosen[taken] = place
                taken += 1
            else:
                candidates[left], keys[left] = place, word
                left += 1
        found = left
    _, order = sort_with(keys[:found], candidates[:found], np.uint64(randomness.WORD), scratch)
    for i in range(reborn - sure):
        chosen[sure + i] = order[i]
    for i in range(reborn):
        mark(marks, chosen[i])


@njit
def list_below(
    marks: int, total: int, key: np.uint64, counter: int, high: np.uint64, candidates: np.ndarray, keys: np.ndarray,
) -> int:  # fmt: skip
    """List the unmarked places with a hash below ``high`` (ALL: every hash), ascending, and their hashes; return their number.

    Both lists need LISTED more entries.
    """
    listed, hashes = stack_space(LISTED_BYTES), stack_space(HASH_BYTES)
    into, into_key = np.int64(candidates.ctypes.data), np.int64(keys.ctypes.data)
    found, n = np.int64(0), np.int64(0)
    words, everything = (total + 63) >> 6, high == ALL
    for number in range(words):
        unmarked = ~load_int64(marks + 8 * number)
        if number == words - 1 and total & 63:
            unmarked &= (np.int64(1) << (total & 63)) - 1
        while unmarked != 0:
            store_int32(listed + 4 * n, np.int32(64 * number + trailing_zeros(unmarked)))
            unmarked &= unmarked - 1
            n += 1
        if n > LISTED - 64 or number == words - 1:
            for i in range(n):  # PyTorch sorts the hash as a signed number
                place = np.uint64(counter + np.int64(load_int32(listed + 4 * i)))
                store_int64(hashes + 8 * i, np.int64(bits(key, place) ^ SIGN_BIT))
            for i in range(n):
                word = load_int64(hashes + 8 * i)
                store_int32(into + 4 * found, load_int32(listed + 4 * i))
                store_int64(into_key + 8 * found, word)
                found += 1 if everything or np.uint64(word) < high else 0
            n = np.int64(0)
    return found


@njit
def draw_from_allowed_list(
    theta: int, size: int, places: int, count: int, reborn: int, counter: int, seed: int, step: int,
    chosen: np.ndarray, scratch: int, allowed: int,
) -> None:  # fmt: skip
    """Draw new places in a tensor that fills more than half of its allowed places (``rewiring.draw_allowed``).

    ``scratch`` is the cell of working memory (``room.listing_allowed``).
    """
    most = load_int64(allowed + 8 * W.COUNT)
    bits_of_table = 4
    while (1 << bits_of_table) < 2 * count:
        bits_of_table += 1
    mask, shift = (1 << bits_of_table) - 1, np.uint64(64 - bits_of_table)
    cells = int64s(scratch, 1 << bits_of_table)
    cells[:] = -1
    table = np.int64(cells.ctypes.data)
    active = 0
    for k in range(count):
        if not load_float(theta + k * size, size) < 0:
            place = load_int64(places + k * 8)
            store_int64(table + find(table, mask, shift, place) * 8, place)
            active += 1
    free, numbers, keys = int64s(scratch, most - active), int32s(scratch, most - active), uint64s(scratch, most - active)
    key = extend(birth_stream(seed, step), np.uint64(0))
    space, items, n, code = load_int64(allowed + 8 * W.SPACE), load_int64(allowed + 8 * W.ITEMS), 0, np.int64(0)
    by_bits = load_int64(allowed + 8 * W.FORMS) == 2 and load_int64(allowed + 8 * (W.FIRST_FORM + FORM_WORDS)) == BITMAP
    while code < space:
        if by_bits and code & 63 == 0 and load_int64(items + 8 * (code >> 6)) == 0:
            code += 64  # a word of the bitmap without an allowed place
            continue
        place = place_of(allowed, code)
        code += 1
        if place >= 0 and load_int64(table + find(table, mask, shift, place) * 8) == -1:
            free[n], numbers[n] = place, np.int32(n)
            keys[n] = bits(key, np.uint64(counter + place)) ^ SIGN_BIT  # PyTorch sorts the hash as a signed number
            n += 1
    keys, numbers = sort_with(keys, numbers, np.uint64(randomness.WORD), scratch)
    for i in range(reborn):
        chosen[i] = free[numbers[i]]


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
        working, marks_at = False, stack_space(MARKS_BYTES)
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
            less = real(decrement)
            if scale != 0.0:
                for k in range(count):
                    values[k] -= less
                less = real(0)
                key = extend(extend(extend(np.uint64(3), np.uint64(seed)), NOISE_STREAM), np.uint64(step))
                noise = carray(pointer(stack_space(NOISE_BYTES)), BLOCK, np.float64)
                for first in range(0, count, BLOCK):
                    length = min(BLOCK, count - first)
                    deviates(key, counter + first, length, noise)
                    for k in range(length):
                        values[first + k] += real(noise[k] * scale)
            reborn = np.int64(0)
            for i in range(64):
                store_float(marks_at + i * size, 0.0, size)
            for first in range(0, count, 64):  # L1 and the search in one pass over the memory
                at = theta + first * size
                if first + 64 <= count and less == 0:
                    below = negative_of_64(at, marks_at, size)  # without a write to memory
                elif first + 64 <= count:
                    below = subtract_from_64(at, less, marks_at, size)
                else:
                    below = np.int64(0)
                    for k in range(count - first):
                        value = load_float(at + k * size, size) - less
                        store_float(at + k * size, value, size)
                        store_float(marks_at, load_float(marks_at, size) + value * 0.0, size)
                        below |= np.int64(value < 0) << k
                while below != 0:
                    k = first + trailing_zeros(below)
                    below &= below - 1
                    if rewires == 0:  # it stays active at 0, with its place and its sign
                        values[k] = 0
                        continue
                    store_int64(dormant_at + reborn * 8, k)
                    reborn += 1
            fine = np.int64(1)
            for i in range(64):
                fine &= np.int64(load_float(marks_at + i * size, size) == 0)
            store_int64(t + 8 * CpuRow.FINITE, fine)
            if rewires == 0:
                continue
            store_int64(t + 8 * CpuRow.REBORN_COUNT, reborn)
            if reborn == 0:
                continue
            scratch = stack_space(CELL_BYTES)
            store_int64(scratch, load_int64(t + 8 * CpuRow.SCRATCH))
            dormant, chosen = carray(pointer(dormant_at), reborn, np.int64), int64s(scratch, reborn)
            allowed, marks = load_int64(t + 8 * CpuRow.ALLOWED), load_int64(t + 8 * CpuRow.MARKS)
            stays = load_int64(t + 8 * CpuRow.STAYS) != 0
            ranked = load_int64(t + 8 * CpuRow.RANKED) != 0 and not stays
            if allowed != 0:
                total = load_int64(allowed + 8 * W.COUNT)
            if marks != 0 and not stays:
                if load_int64(t + 8 * CpuRow.MARKS_KNOWN) == 0:
                    mark_places(marks, places, count, total)
                    store_int64(t + 8 * CpuRow.MARKS_KNOWN, 1)
                for i in range(reborn):  # the places of connections that went dormant in this step are free again
                    prefetch(places + dormant[min(i + AHEAD, reborn - 1)] * 8)
                    unmark(marks, load_int64(places + dormant[i] * 8))
            if stays:
                for i in range(reborn):
                    chosen[i] = load_int64(places + dormant[i] * 8)
            elif marks != 0 and (4 * count <= 3 * total if ranked else 2 * count <= total):
                draw_by_marks(marks, total, dormant, reborn, counter, birth_stream(seed, step), chosen, scratch)
            elif 2 * count <= total:
                draw_by_rejection(
                    theta, size, places, count, total, dormant, reborn, counter, birth_stream(seed, step), chosen, t, scratch,
                    allowed,
                )  # fmt: skip
            elif allowed != 0:
                draw_from_allowed_list(
                    theta, size, places, count, reborn, counter, seed, step, chosen, scratch, allowed
                )  # fmt: skip
            else:
                draw_from_list(marks, count, total, reborn, counter, seed, step, chosen, scratch, ranked)
            if ranked:
                arrange(chosen, reborn, load_int64(t + 8 * Row.TOTAL), scratch)
            born, signs = load_int64(t + 8 * Row.BORN), load_int64(t + 8 * Row.SIGNS)
            since, newborn_deaths = load_int64(a + 8 * A.NEWBORN_SINCE), 0
            sign_seed, sign_table = load_int64(t + 8 * Row.SIGN_SEED), load_int64(t + 8 * CpuRow.SIGN_TABLE)
            exceptions, exception_count = load_int64(t + 8 * Row.EXCEPTIONS), load_int64(t + 8 * Row.EXCEPTION_COUNT)
            notes = load_int64(t + 8 * CpuRow.NOTES)
            if notes != 0:
                note_births(notes, born, dormant, chosen, reborn, step)
            for i in range(reborn):
                later = dormant[min(i + AHEAD, reborn - 1)]
                prefetch(theta + later * size)
                prefetch(born + later * 8)
                prefetch(places + later * 8)
                prefetch(signs + later * size)
                k, place = dormant[i], chosen[i]
                newborn_deaths += load_int64(born + k * 8) >= since
                values[k] = 0
                store_int64(born + k * 8, step)
                if stays:  # with its place, a connection keeps its sign
                    continue
                if sign_table != 0:
                    negative = negative_in_table(sign_table, place)
                else:
                    negative = negative_at(place, sign_seed, exceptions, exception_count)
                store_int64(places + k * 8, place)
                store_float(signs + k * size, -1.0 if negative else 1.0, size)
            store_int64(t + 8 * CpuRow.NEWBORN_DEATHS, newborn_deaths)
            for state in range(load_int64(t + 8 * Row.STATES)):
                entry = t + 8 * (CpuRow.FIRST_STATE + STATE_WORDS * state)
                address, start = load_int64(entry + 8 * StateRow.ADDRESS), load_float(entry + 8 * StateRow.START, 8)
                if load_int64(entry + 8 * StateRow.SIZE) == 4:
                    if load_int64(entry + 8 * StateRow.AVERAGED) != 0:
                        for i in range(reborn):
                            store_float(address + dormant[i] * 4, np.float32(0), 4)
                        start = mean(address, 4, count, count - reborn, start)
                    for i in range(reborn):
                        prefetch(address + dormant[min(i + AHEAD, reborn - 1)] * 4)
                        store_float(address + dormant[i] * 4, np.float32(start), 4)
                else:
                    if load_int64(entry + 8 * StateRow.AVERAGED) != 0:
                        for i in range(reborn):
                            store_float(address + dormant[i] * 8, 0.0, 8)
                        start = mean(address, 8, count, count - reborn, start)
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
        scratch, t = stack_space(CELL_BYTES), stack_space(ROW_BYTES)
        store_int64(scratch, load_int64(a + 8 * StartArguments.SCRATCH))
        for word in range(ROW_WORDS):
            store_int64(t + 8 * word, 0)
        slots = int64s(scratch, count)
        for k in range(count):
            slots[k] = k
        draw_by_rejection(0, 4, 0, 0, total, slots, count, counter, stream, chosen, t, scratch, 0)

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
