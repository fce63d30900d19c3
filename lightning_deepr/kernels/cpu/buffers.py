"""Large transient buffers: of activations, which go back to the operating system, and of weights, which are used again.

The C library keeps freed blocks of up to 32 MB for later, in pieces. If the activations of a layer have that size, the process
grows to twice the memory that it uses. Buffers of that size therefore map pages of their own.

Transient weights and their gradients have the same sizes in every step. Their memory is kept (:func:`kept`): allocated anew, it
would be filled with zeros by the operating system in each step, which takes longer than to write it.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

LARGE = 1 << 24  # bytes of a buffer that maps its own pages
WIDE = 1 << 20  # rows plus columns of a layer whose activations are that large


def empty(shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
    """Make an uninitialized CPU tensor of a shape, with the dtype of ``like``."""
    count = 1
    for size in shape:
        count *= size
    if count * like.element_size() < LARGE:
        return like.new_empty(shape)
    pages = mmap.mmap(-1, count * like.element_size())
    return torch.frombuffer(pages, dtype=like.dtype, count=count).view(shape)  # the tensor keeps the pages


_of_thread = threading.local()
_SCRATCH = 1 << 18  # bytes that each thread keeps for :func:`scratch`


def scratch(size: int, like: Tensor) -> tuple[int, Any]:
    """Return the address of bytes that nobody needs after the call, and what has to live as long as they are used.

    Small ones are the same in every call of a thread: an allocation takes longer than a small layer's product.

    Args:
        size: the bytes.
        like: a CPU tensor of the dtype for which they are.
    """
    if size > _SCRATCH:
        found = empty((-(-size // like.element_size()),), like)
        return found.data_ptr(), found
    try:
        return _of_thread.scratch  # type: ignore[no-any-return]
    except AttributeError:
        block = torch.empty(_SCRATCH, dtype=torch.uint8, device="cpu")
        _of_thread.scratch = block.data_ptr(), block
        return _of_thread.scratch  # type: ignore[no-any-return]


def room(size: int, like: Tensor) -> tuple[int, Any]:
    """Do what :func:`scratch` does; larger ones are kept, too (:func:`kept`), for callers that need the same in every step."""
    if size <= _SCRATCH:
        return scratch(size, like)
    found = kept((-(-size // like.element_size()),), like)
    return found.data_ptr(), found


# by type and number of values; a buffer is in use while a tensor refers to its array
_kept: dict[tuple[torch.dtype, int], list[np.ndarray]] = {}
KEPT_FROM, KEPT_IN_ALL = 1 << 16, 1 << 28  # bytes: smaller buffers come from the C library, and so do those beyond the sum


def kept(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Make an uninitialized CPU tensor of a shape, with a dtype or that of ``like``, in memory that is kept for the next call.

    The memory is used again when no tensor refers to it any more, whoever held it: a graph of autograd, a saved tensor, a view.
    """
    dtype, count = dtype or like.dtype, math.prod(shape)
    size = count * dtype.itemsize
    if size < KEPT_FROM or dtype not in _NUMPY_TYPES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    free, busy, array = _kept.setdefault((dtype, count), []), [], None
    while free:  # (taken out of the list, so that no other thread takes it, too)
        try:
            array = free.pop()
        except IndexError:
            break
        if sys.getrefcount(array) == 2:  # `array` and the argument
            break
        busy.append(array)
        array = None
    free.extend(busy)
    if array is None:
        if sum(kind.itemsize * n * len(arrays) for (kind, n), arrays in list(_kept.items())) + size > KEPT_IN_ALL:
            return torch.empty(shape, dtype=dtype, device="cpu")
        pages = np.empty(size + 64, np.uint8)
        start = -pages.ctypes.data % 64
        array = pages[start : start + size].view(_NUMPY_TYPES[dtype])
        del pages
    found = torch.from_numpy(array).view(dtype).view(shape)  # it refers to the array
    free.append(array)
    return found


_NUMPY_TYPES = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.uint16, torch.float16: np.uint16}


def give_back() -> None:
    """Return freed memory to the operating system, if the C library can (glibc).

    Aligned blocks of tens of megabytes leave gaps in the heap, and the blocks of the next step do not fit into them.
    In training, only steps with layers of such a width call this function, and it takes a small part of their time.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim.argtypes = [ctypes.c_size_t]
    return trim
