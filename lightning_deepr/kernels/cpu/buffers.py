"""Large transient buffers that go back to the operating system when they are freed.

The C library keeps freed blocks of up to 32 MB for later, in pieces; a layer whose activations are of that size would make a process
grow to twice of what it uses. A buffer that large is worth mapping pages of its own.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

LARGE = 1 << 24  # bytes
WIDE = 1 << 20  # rows and columns of a layer whose activations are that large


def empty(shape: tuple[int, ...] | torch.Size, like: Tensor) -> Tensor:
    """An uninitialized CPU tensor of a shape, with the dtype of another."""
    count = 1
    for size in shape:
        count *= size
    if count * like.element_size() < LARGE:
        return like.new_empty(shape)
    pages = mmap.mmap(-1, count * like.element_size())
    return torch.frombuffer(pages, dtype=like.dtype, count=count).view(shape)  # the tensor keeps the pages


def give_back() -> None:
    """Return freed memory to the operating system, where the C library can (glibc).

    Aligned blocks of tens of megabytes leave gaps in its heap that the next ones don't fit into, step after step. Called in the training
    of layers as wide as that, for which it is a small part of a step.
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
