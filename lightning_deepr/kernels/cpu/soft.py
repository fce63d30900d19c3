"""The part of a soft-DEEP R step that follows the optimizer's step, in one pass over a tensor (see ``soft_rewiring.step``)."""

from __future__ import annotations

from functools import cache

import numpy as np
from numba import carray
from torch import Tensor

from lightning_deepr.algorithm import randomness
from lightning_deepr.kernels.cpu.deviates import BLOCK, deviates
from lightning_deepr.kernels.cpu.fields import SoftArguments as A
from lightning_deepr.kernels.cpu.fields import filler, signed
from lightning_deepr.kernels.cpu.native import Kernel, fetch_add, load_float, load_int64, pointer, stack_space, threads_for

NOISE_BYTES = 8 * BLOCK
PIECE = 1 << 14  # places of a task

_fill = filler(A, floats=("DECREMENT", "SCALE", "BOUND"))


@cache
def soft_kernel(size: int) -> Kernel:
    """Make the kernel for floats of ``size`` bytes, 4 or 8."""
    real = np.float32 if size == 4 else np.float64

    def soft(a: int) -> None:
        count, rewires = load_int64(a + 8 * A.COUNT), load_int64(a + 8 * A.REWIRES)
        decrement, scale = real(load_float(a + 8 * A.DECREMENT, 8)), load_float(a + 8 * A.SCALE, 8)
        bound = real(load_float(a + 8 * A.BOUND, 8))
        key, counter = np.uint64(load_int64(a + 8 * A.KEY)), load_int64(a + 8 * A.COUNTER)
        noise = carray(pointer(stack_space(NOISE_BYTES)), BLOCK, np.float64)
        births, deaths = 0, 0
        task = fetch_add(a + 8 * A.TASK, 1)
        while task * PIECE < count:
            first, end = task * PIECE, min((task + 1) * PIECE, count)
            while first < end:
                length = min(BLOCK, end - first)
                deviates(key, counter + first, length, noise)
                theta = carray(pointer(load_int64(a + 8 * A.THETA) + first * size), length, real)
                before = carray(pointer(load_int64(a + 8 * A.BEFORE) + first * size), length, real)
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
            task = fetch_add(a + 8 * A.TASK, 1)
        fetch_add(a + 8 * A.BIRTHS, births)
        fetch_add(a + 8 * A.DEATHS, deaths)

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
    """Do ``soft_rewiring.step`` with its noise, or ``soft_rewiring.step_without_rewiring`` if ``bound`` is None.

    Returns:
        The numbers of births and deaths.
    """
    arguments = _fill(
        THETA=theta.data_ptr(), BEFORE=before.data_ptr(), COUNT=theta.numel(), DECREMENT=decrement, SCALE=scale,
        BOUND=bound or 0.0, REWIRES=bound is not None, COUNTER=index << randomness.SLOT_BITS,
        KEY=signed(randomness.key(seed, randomness.NOISE, number)),
    )  # fmt: skip
    soft_kernel(theta.element_size())(arguments, threads_for(theta.numel(), PIECE * 2))
    return arguments[A.BIRTHS], arguments[A.DEATHS]
