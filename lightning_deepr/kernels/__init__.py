"""Compiled kernels for the CPU, made by numba when they are first used. Import the submodules only where :func:`available` says so."""

from __future__ import annotations

import os
import sys
from functools import cache

import torch
from torch import Tensor


@cache
def available() -> bool:
    """Whether kernels can be compiled and run here. ``LIGHTNING_DEEPR_KERNELS=0`` turns them off."""
    if os.environ.get("LIGHTNING_DEEPR_KERNELS", "1") == "0" or sys.byteorder != "little" or sys.maxsize < 2**32:
        return False
    try:
        from lightning_deepr.kernels import native
    except ImportError:  # no numba for this Python, or one that doesn't get on with this NumPy
        return False
    return bool(native)


def suits(theta: Tensor) -> bool:
    """Whether the kernels can work on this theta: float32 or float64 on the CPU."""
    return theta.device.type == "cpu" and theta.dtype in (torch.float32, torch.float64) and theta.is_contiguous() and available()
