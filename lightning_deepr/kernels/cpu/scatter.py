"""The transient weight of dense compute: K values to their places, and their gradients back. Signs are applied on the way."""

from __future__ import annotations

import ctypes
from functools import cache

from torch import Tensor

from lightning_deepr.kernels.cpu.native import Kernel, fetch_add, load_float, load_int64, store_float, threads_for

# arguments: the next task; addresses of theta or its gradient, signs, places, weight or its gradient; K
TASK, OWN, SIGNS, PLACES, WEIGHT, COUNT, ARGUMENTS = range(7)
PIECE = 1 << 13  # slots of a task


@cache
def scatter_kernel(size: int) -> Kernel:
    """weight[places[k]] = signs[k] * theta[k]; the rest of the weight is not touched."""

    def scatter(a):
        own, signs, places = load_int64(a + 8 * OWN), load_int64(a + 8 * SIGNS), load_int64(a + 8 * PLACES)
        weight, count = load_int64(a + 8 * WEIGHT), load_int64(a + 8 * COUNT)
        task = fetch_add(a + 8 * TASK, 1)
        while task * PIECE < count:
            for k in range(task * PIECE, min((task + 1) * PIECE, count)):
                value = load_float(own + k * size, size) * load_float(signs + k * size, size)
                store_float(weight + load_int64(places + k * 8) * size, value, size)
            task = fetch_add(a + 8 * TASK, 1)

    return Kernel(scatter)


@cache
def gather_kernel(size: int) -> Kernel:
    """gradient of theta[k] = signs[k] * gradient of weight[places[k]]."""

    def gather(a):
        own, signs, places = load_int64(a + 8 * OWN), load_int64(a + 8 * SIGNS), load_int64(a + 8 * PLACES)
        weight, count = load_int64(a + 8 * WEIGHT), load_int64(a + 8 * COUNT)
        task = fetch_add(a + 8 * TASK, 1)
        while task * PIECE < count:
            for k in range(task * PIECE, min((task + 1) * PIECE, count)):
                value = load_float(weight + load_int64(places + k * 8) * size, size) * load_float(signs + k * size, size)
                store_float(own + k * size, value, size)
            task = fetch_add(a + 8 * TASK, 1)

    return Kernel(gather)


def run(kernel: Kernel, own: Tensor, signs: Tensor, places: Tensor, weight: Tensor) -> None:
    """One of the two kernels on contiguous tensors of one dtype, float32 or float64, on the CPU."""
    count = places.numel()
    addresses = (own.data_ptr(), signs.data_ptr(), places.data_ptr(), weight.data_ptr())
    kernel((ctypes.c_int64 * ARGUMENTS)(0, *addresses, count), threads_for(count, 1 << 15))
