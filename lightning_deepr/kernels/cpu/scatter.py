"""The transient weight of dense compute: K values move to their places, and the gradients move back. Both apply the signs."""

from __future__ import annotations

from functools import cache

import numpy as np
from torch import Tensor

from lightning_deepr.kernels.cpu.fields import ScatterArguments as A
from lightning_deepr.kernels.cpu.fields import filler
from lightning_deepr.kernels.cpu.native import (
    Kernel,
    carray,
    fetch_add,
    load_float,
    load_int32,
    load_int64,
    load_short,
    pointer,
    prefetch,
    store_float,
    store_int32,
    store_int64,
    store_short,
    threads_for,
)

PIECE = 1 << 13  # slots of a task
SIGN = 1 << 31
EXPONENT, LONG_EXPONENT = 0x7F800000, 0x7FF0000000000000  # a float is finite unless all of these bits are set
AHEAD = 128  # the place of the slot that comes this many later is prefetched: neighbouring slots are at places far apart

_fill = filler(A)


@cache
def scatter_kernel(size: int) -> Kernel:
    """Make the kernel of weight[places[k]] = signs[k] * theta[k]. It does not touch the rest of the weight."""

    def scatter(a: int) -> None:
        own, signs, places = load_int64(a + 8 * A.OWN), load_int64(a + 8 * A.SIGNS), load_int64(a + 8 * A.PLACES)
        weight, count = load_int64(a + 8 * A.WEIGHT), load_int64(a + 8 * A.COUNT)
        task = fetch_add(a + 8 * A.TASK, 1)
        while task * PIECE < count:
            for k in range(task * PIECE, min((task + 1) * PIECE, count)):
                prefetch(weight + load_int64(places + min(k + AHEAD, count - 1) * 8) * size)
                value = load_float(own + k * size, size) * load_float(signs + k * size, size)
                store_float(weight + load_int64(places + k * 8) * size, value, size)
            task = fetch_add(a + 8 * A.TASK, 1)

    return Kernel(scatter)


@cache
def gather_kernel(size: int) -> Kernel:
    """Make the kernel of (gradient of theta)[k] = signs[k] * (gradient of weight)[places[k]]."""
    exponent = EXPONENT if size == 4 else LONG_EXPONENT

    def gather(a: int) -> None:
        own, signs, places = load_int64(a + 8 * A.OWN), load_int64(a + 8 * A.SIGNS), load_int64(a + 8 * A.PLACES)
        weight, count = load_int64(a + 8 * A.WEIGHT), load_int64(a + 8 * A.COUNT)
        task = fetch_add(a + 8 * A.TASK, 1)
        worst = np.int64(0)
        while task * PIECE < count:
            for k in range(task * PIECE, min((task + 1) * PIECE, count)):
                prefetch(weight + load_int64(places + min(k + AHEAD, count - 1) * 8) * size)
                at = weight + load_int64(places + k * 8) * size
                word = np.int64(load_int32(at)) if size == 4 else load_int64(at)
                worst = max(worst, word & exponent)
                store_float(own + k * size, load_float(at, size) * load_float(signs + k * size, size), size)
            task = fetch_add(a + 8 * A.TASK, 1)
        if worst == exponent:
            store_int64(a + 8 * A.ENDLESS, 1)

    return Kernel(gather)


@cache
def narrow_scatter_kernel() -> Kernel:
    """Make the kernel that writes the float32 values to a bfloat16 weight, each rounded to the nearest (or the even) one."""

    def scatter(a: int) -> None:
        own, signs, places = load_int64(a + 8 * A.OWN), load_int64(a + 8 * A.SIGNS), load_int64(a + 8 * A.PLACES)
        weight, count = load_int64(a + 8 * A.WEIGHT), load_int64(a + 8 * A.COUNT)
        task = fetch_add(a + 8 * A.TASK, 1)
        while task * PIECE < count:
            for k in range(task * PIECE, min((task + 1) * PIECE, count)):
                prefetch(weight + load_int64(places + min(k + AHEAD, count - 1) * 8) * 2)
                word = np.int64(load_int32(own + k * 4)) & 0xFFFFFFFF ^ np.int64(load_int32(signs + k * 4)) & SIGN
                short = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
                if word & ~SIGN > EXPONENT:  # NaN, which must not become infinity
                    short = np.int64(0x7FC0)
                store_short(weight + load_int64(places + k * 8) * 2, short)
            task = fetch_add(a + 8 * A.TASK, 1)

    return Kernel(scatter)


@cache
def narrow_gather_kernel() -> Kernel:
    """Make the kernel that reads a bfloat16 gradient of the weight into a float32 one of theta."""

    def gather(a: int) -> None:
        own, signs, places = load_int64(a + 8 * A.OWN), load_int64(a + 8 * A.SIGNS), load_int64(a + 8 * A.PLACES)
        weight, count = load_int64(a + 8 * A.WEIGHT), load_int64(a + 8 * A.COUNT)
        task = fetch_add(a + 8 * A.TASK, 1)
        worst = np.int64(0)
        while task * PIECE < count:
            for k in range(task * PIECE, min((task + 1) * PIECE, count)):
                prefetch(weight + load_int64(places + min(k + AHEAD, count - 1) * 8) * 2)
                word = load_short(weight + load_int64(places + k * 8) * 2) << 16
                worst = max(worst, word & EXPONENT)
                store_int32(own + k * 4, np.int32(word ^ np.int64(load_int32(signs + k * 4)) & SIGN))
            task = fetch_add(a + 8 * A.TASK, 1)
        if worst == EXPONENT:
            store_int64(a + 8 * A.ENDLESS, 1)

    return Kernel(gather)


@cache
def short_scatter_kernel() -> Kernel:
    """Make the kernel of weight[places[k]] = own[k] for two tensors of 16 bits. The signs are not used."""

    def scatter(a: int) -> None:
        own, places, weight = load_int64(a + 8 * A.OWN), load_int64(a + 8 * A.PLACES), load_int64(a + 8 * A.WEIGHT)
        count = load_int64(a + 8 * A.COUNT)
        task = fetch_add(a + 8 * A.TASK, 1)
        while task * PIECE < count:
            for k in range(task * PIECE, min((task + 1) * PIECE, count)):
                prefetch(weight + load_int64(places + min(k + AHEAD, count - 1) * 8) * 2)
                store_short(weight + load_int64(places + k * 8) * 2, load_short(own + k * 2))
            task = fetch_add(a + 8 * A.TASK, 1)

    return Kernel(scatter)


@cache
def short_gather_kernel() -> Kernel:
    """Make the kernel of own[k] = weight[places[k]] for two tensors of 16 bits. The signs are not used."""

    def gather(a: int) -> None:
        own, places, weight = load_int64(a + 8 * A.OWN), load_int64(a + 8 * A.PLACES), load_int64(a + 8 * A.WEIGHT)
        count = load_int64(a + 8 * A.COUNT)
        task = fetch_add(a + 8 * A.TASK, 1)
        while task * PIECE < count:
            for k in range(task * PIECE, min((task + 1) * PIECE, count)):
                prefetch(weight + load_int64(places + min(k + AHEAD, count - 1) * 8) * 2)
                store_short(own + k * 2, load_short(weight + load_int64(places + k * 8) * 2))
            task = fetch_add(a + 8 * A.TASK, 1)

    return Kernel(gather)


@cache
def signed_kernel(size: int) -> Kernel:
    """Make the kernel of gradient[k] *= signs[k], where the slots are in the order of all places."""
    real, integer = (np.float32, np.uint32) if size == 4 else (np.float64, np.uint64)
    exponent = EXPONENT if size == 4 else LONG_EXPONENT

    def signed(a: int) -> None:
        own, signs, count = load_int64(a + 8 * A.OWN), load_int64(a + 8 * A.SIGNS), load_int64(a + 8 * A.COUNT)
        task = fetch_add(a + 8 * A.TASK, 1)
        worst = integer(0)
        while task * PIECE < count:
            first, length = task * PIECE, min(PIECE, count - task * PIECE)
            values = carray(pointer(own + first * size), length, real)
            sign = carray(pointer(signs + first * size), length, real)
            words = carray(pointer(own + first * size), length, integer)
            for k in range(length):
                worst = max(worst, words[k] & integer(exponent))
            for k in range(length):
                values[k] *= sign[k]
            task = fetch_add(a + 8 * A.TASK, 1)
        if worst == integer(exponent):
            store_int64(a + 8 * A.ENDLESS, 1)

    return Kernel(signed)


def run(kernel: Kernel, own: Tensor, signs: Tensor, places: Tensor, weight: Tensor) -> bool:
    """Run one of the kernels on contiguous CPU tensors. ``own`` is theta or its gradient, ``weight`` likewise.

    theta, signs and weight have one dtype, float32 or float64.

    Returns:
        whether a gradient is finite.
    """
    count = places.numel()
    arguments = _fill(
        OWN=own.data_ptr(), SIGNS=signs.data_ptr(), PLACES=places.data_ptr(), WEIGHT=weight.data_ptr(), COUNT=count
    )
    kernel(arguments, threads_for(count, 1 << 15))
    return arguments[A.ENDLESS] == 0
