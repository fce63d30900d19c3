"""What follows the optimizer's step under soft-DEEP R, in one pass over a tensor: see ``soft_rewiring.step``."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
from numba import carray
from torch import Tensor

from lightning_deepr.algorithm import randomness
from lightning_deepr.kernels.cpu.deviates import BLOCK, deviates
from lightning_deepr.kernels.cpu.native import Kernel, fetch_add, load_float, load_int64, pointer, threads_for

# arguments: the next task; addresses of theta and before; N; eta * alpha, sqrt(2 * eta * T) and theta_min (float64); whether the
# step rewires; the counter of place 0; the key of the step's noise; births; deaths
TASK, THETA, BEFORE, COUNT, DECREMENT, SCALE, BOUND, REWIRES, COUNTER, KEY, BIRTHS, DEATHS, ARGUMENTS = range(13)
PIECE = 1 << 14  # places of a task


@cache
def soft_kernel(size: int) -> Kernel:
    """The kernel for floats of 4 or 8 bytes."""
    real = np.float32 if size == 4 else np.float64

    def soft(a):
        count, rewires = load_int64(a + 8 * COUNT), load_int64(a + 8 * REWIRES)
        decrement, scale = real(load_float(a + 8 * DECREMENT, 8)), load_float(a + 8 * SCALE, 8)
        bound = real(load_float(a + 8 * BOUND, 8))
        key, counter = np.uint64(load_int64(a + 8 * KEY)), load_int64(a + 8 * COUNTER)
        noise = np.empty(BLOCK, np.float64)
        births, deaths = 0, 0
        task = fetch_add(a + 8 * TASK, 1)
        while task * PIECE < count:
            first, end = task * PIECE, min((task + 1) * PIECE, count)
            while first < end:
                length = min(BLOCK, end - first)
                deviates(key, counter + first, length, noise)
                theta = carray(pointer(load_int64(a + 8 * THETA) + first * size), length, real)
                before = carray(pointer(load_int64(a + 8 * BEFORE) + first * size), length, real)
                if rewires:
                    for k in range(length):
                        was = before[k]
                        value = max((theta[k] - decrement if was >= 0 else was) + real(noise[k] * scale), bound)
                        theta[k] = value
                        births += (was < 0) & (value >= 0)
                        deaths += (was >= 0) & (value < 0)
                else:
                    for k in range(length):
                        was = before[k]
                        theta[k] = max((theta[k] - decrement) + real(noise[k] * scale), real(0)) if was >= 0 else was
                first += length
            task = fetch_add(a + 8 * TASK, 1)
        fetch_add(a + 8 * BIRTHS, births)
        fetch_add(a + 8 * DEATHS, deaths)

    return Kernel(soft)


def step(
    theta: Tensor,
    before: Tensor,
    decrement: float,
    scale: float,
    bound: float | None,
    index: int,
    seed: int,
    number: int,
) -> tuple[int, int]:
    """``soft_rewiring.step`` with its noise; ``bound`` None: ``soft_rewiring.step_without_rewiring``.

    Returns:
        births and deaths.
    """
    key = randomness.key(seed, randomness.NOISE, number)
    words = np.zeros(ARGUMENTS, np.int64)
    words[THETA], words[BEFORE], words[COUNT] = theta.data_ptr(), before.data_ptr(), theta.numel()
    words[[DECREMENT, SCALE, BOUND]] = np.array([decrement, scale, bound or 0.0]).view(np.int64)
    words[REWIRES], words[COUNTER] = bound is not None, index << randomness.SLOT_BITS
    words[KEY] = np.array(key, np.uint64).view(np.int64)
    arguments = (ctypes.c_int64 * ARGUMENTS).from_buffer(words)
    soft_kernel(theta.element_size())(arguments, threads_for(theta.numel(), PIECE * 2))
    return int(words[BIRTHS]), int(words[DEATHS])
