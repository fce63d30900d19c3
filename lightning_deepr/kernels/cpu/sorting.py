"""Sorting inside kernels."""

from __future__ import annotations

import numpy as np
from numba import njit

from lightning_deepr.kernels.cpu.native import load_int32, load_int64, store_int32, store_int64
from lightning_deepr.kernels.cpu.scratch import int32s, int64s, uint64s


@njit
def sort_with(keys: np.ndarray, payload: np.ndarray, largest: np.uint64, cell: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort R uint64 keys up to ``largest``, and an int32 payload with them. The sort is stable and takes O(R).

    ``cell`` is that of working memory (``room.sorting``), where the result may lie.

    It sorts by digits, the lowest first, but only by as many leading bits as tell most of R evenly spread keys apart. Then it
    moves the few keys that are still in the wrong order one by one. If they are many, it sorts again by all bits.
    """
    count, length, leading = len(keys), 0, 3
    while length < 64 and (largest >> np.uint64(length)) > np.uint64(0):
        length += 1
    while (count >> (leading - 3)) > 0:
        leading += 1
    if leading + 4 < length:
        keys, payload = sort_by_bits(keys, payload, length - leading, length, cell)
        if put_right(keys, payload, 2 * count):
            return keys, payload
    return sort_by_bits(keys, payload, 0, length, cell)


@njit
def sort_by_bits(
    keys: np.ndarray, payload: np.ndarray, lowest: int, length: int, cell: int,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Sort by the bits from ``lowest`` to before ``length``. The result may be in the given arrays or in others."""
    count = len(keys)
    # The passes are as few as digits of at most 9 bits allow, with digits of equal width. Wider digits write to more places at
    # a time, and that costs more than another pass.
    passes = max((length - lowest + 8) // 9, 1)
    digit = (length - lowest + passes - 1) // passes
    mask = (np.int64(1) << digit) - 1
    other_keys, other_payload = uint64s(cell, count), int32s(cell, count)
    counters = int64s(cell, (passes + 1) << digit)
    counters[:] = 0
    counter = np.int64(counters.ctypes.data)
    key, shift = np.int64(keys.ctypes.data), np.uint64(lowest)
    for i in range(count):
        add_one(counter, np.int64(np.uint64(load_int64(key + 8 * i)) >> shift) & mask)
    for turn in range(passes):
        key, item = np.int64(keys.ctypes.data), np.int64(payload.ctypes.data)
        into_key, into_item = np.int64(other_keys.ctypes.data), np.int64(other_payload.ctypes.data)
        position = np.int64(0)
        for d in range(mask + 1):
            number = load_int64(counter + 8 * d)
            store_int64(counter + 8 * d, position)
            position += number
        shift, following = np.uint64(lowest + digit * turn), counter + (8 << digit)
        next_shift = np.uint64(min(lowest + digit * (turn + 1), 63))  # (the counts of the last turn are not used)
        for i in range(count):
            word = np.uint64(load_int64(key + 8 * i))
            position = add_one(counter, np.int64(word >> shift) & mask)
            add_one(following, np.int64(word >> next_shift) & mask)
            store_int64(into_key + 8 * position, np.int64(word))
            store_int32(into_item + 4 * position, load_int32(item + 4 * i))
        counter = following
        keys, other_keys = other_keys, keys
        payload, other_payload = other_payload, payload
    return keys, payload


@njit
def put_right(keys: np.ndarray, payload: np.ndarray, most: int) -> bool:
    """Sort by insertion, unless that takes more than ``most`` moves. Return whether all is sorted."""
    key, item = np.int64(keys.ctypes.data), np.int64(payload.ctypes.data)
    moves = np.int64(0)
    last = np.uint64(0)
    for i in range(len(keys)):
        word = np.uint64(load_int64(key + 8 * i))
        if word >= last:
            last = word
            continue
        mine, at = load_int32(item + 4 * i), i
        while at > 0 and np.uint64(load_int64(key + 8 * (at - 1))) > word:
            store_int64(key + 8 * at, load_int64(key + 8 * (at - 1)))
            store_int32(item + 4 * at, load_int32(item + 4 * (at - 1)))
            at -= 1
        store_int64(key + 8 * at, np.int64(word))
        store_int32(item + 4 * at, mine)
        moves += i - at
        if moves > most:
            return False
    return True


@njit(inline="always")
def add_one(counters: int, cell: int) -> int:
    value = load_int64(counters + 8 * cell)
    store_int64(counters + 8 * cell, value + 1)
    return value
