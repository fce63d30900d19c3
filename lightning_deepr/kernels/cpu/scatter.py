"""The transient weight of dense compute: K values move to their places, and the gradients move back. Both apply the signs."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from lightning_deepr.kernels.cpu.fields import ScatterArguments as A
from lightning_deepr.kernels.cpu.fields import filler
from lightning_deepr.kernels.cpu.native import Kernel, fetch_add, load_float, load_int64, store_float, threads_for

PIECE = 1 << 13  # slots of a task

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
                value = load_float(own + k * size, size) * load_float(signs + k * size, size)
                store_float(weight + load_int64(places + k * 8) * size, value, size)
            task = fetch_add(a + 8 * A.TASK, 1)

    return Kernel(scatter)


@cache
def gather_kernel(size: int) -> Kernel:
    """Make the kernel of (gradient of theta)[k] = signs[k] * (gradient of weight)[places[k]]."""

    def gather(a: int) -> None:
        own, signs, places = load_int64(a + 8 * A.OWN), load_int64(a + 8 * A.SIGNS), load_int64(a + 8 * A.PLACES)
        weight, count = load_int64(a + 8 * A.WEIGHT), load_int64(a + 8 * A.COUNT)
        task = fetch_add(a + 8 * A.TASK, 1)
        while task * PIECE < count:
            for k in range(task * PIECE, min((task + 1) * PIECE, count)):
                value = load_float(weight + load_int64(places + k * 8) * size, size) * load_float(signs + k * size, size)
                store_float(own + k * size, value, size)
            task = fetch_add(a + 8 * A.TASK, 1)

    return Kernel(gather)


def run(kernel: Kernel, own: Tensor, signs: Tensor, places: Tensor, weight: Tensor) -> None:
    """Run one of the two kernels on contiguous CPU tensors. ``own`` is theta or its gradient, ``weight`` likewise.

    theta, signs and weight have one dtype, float32 or float64.
    """
    count = places.numel()
    arguments = _fill(
        OWN=own.data_ptr(), SIGNS=signs.data_ptr(), PLACES=places.data_ptr(), WEIGHT=weight.data_ptr(), COUNT=count
    )
    kernel(arguments, threads_for(count, 1 << 15))
