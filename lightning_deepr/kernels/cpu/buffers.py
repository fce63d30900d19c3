"""Large transient buffers that go back to the operating system when they are freed.

The C library keeps freed blocks of up to 32 MB for later, in pieces. If the activations of a layer have that size, the process
grows to twice the memory that it uses. Buffers of that size therefore map pages of their own.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

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
