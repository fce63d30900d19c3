"""Compiled kernels: numba compiles those in ``cpu``, Triton those in ``gpu``, each at its first use.

Import the numba kernels only if :func:`available` returns True. ``gpu.gate`` decides about the Triton kernels.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_deepr.kernels.slots import PLAIN

TYPES = (torch.float32, torch.float64)


@cache
def available() -> bool:
    """Tell whether numba kernels can be compiled and run here. ``LIGHTNING_DEEPR_KERNELS=0`` turns them off."""
    if os.environ.get("LIGHTNING_DEEPR_KERNELS", "1") == "0" or sys.byteorder != "little" or sys.maxsize < 2**32:
        return False
    try:
        from lightning_deepr.kernels.cpu import native
    except ImportError:  # no numba for this Python, or one that does not work with this NumPy
        return False
    return bool(native)


def suits(theta: Tensor) -> bool:
    """Tell whether the numba kernels can work on this theta: float32 or float64, contiguous, on the CPU."""
    if theta.dtype not in TYPES or not theta.is_cpu or not theta.is_contiguous() or type(theta) not in PLAIN:
        return False
    return torch.compiler.is_dynamo_compiling() or available()  # a compiler can't trace a cached function


def all_finite(values: Sequence[Tensor]) -> bool:
    """Tell whether every value is known to be finite. The answer is also False if no kernel can check."""
    return available() and bool(_step().all_finite(values))


def random_places(total: int, count: int, index: int, seed: int) -> Tensor:
    """Draw K of at least 2 K places (see ``rewiring.random_places``)."""
    places: Tensor = _step().random_places(total, count, index, seed)
    return places


@cache
def _step() -> Any:
    from lightning_deepr.kernels.cpu import step

    return step
