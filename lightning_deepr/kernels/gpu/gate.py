"""The decision to use the Triton kernels: Triton can be imported, and the kernels have passed a check on the device.

For each new device and dtype, the kernels take a few steps on a small made-up network beside the PyTorch version. If they can't
be compiled, or if anything differs, one warning says so, and PyTorch does the work.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_deepr.kernels.slots import Slots

Check = Callable[[torch.device, torch.dtype], "str | None"]  # says how the kernels differ from PyTorch, or None

DEVICE_TYPES = {"cuda"}  # the tests add "cpu", for Triton's interpreter
_verdicts: dict[tuple[str, torch.device, torch.dtype], bool] = {}


@cache
def _triton_step() -> Any:
    """Return the module with the kernels' step, or None."""
    if os.environ.get("LIGHTNING_DEEPR_KERNELS", "1") == "0":
        return None
    try:
        from lightning_deepr.kernels.gpu import step
    except Exception:  # no Triton for this platform, or one that can't be used
        return None
    return step


def admits(what: str, theta: Tensor, slots: Slots, check: Check) -> bool:
    """Tell whether the Triton kernels may work on a tensor. Only the first call for a device and a dtype takes long.

    Args:
        what: the work of the kernels, for messages: "rewiring" | "sparse linear layers".
        theta: [K].
        slots: the :class:`lightning_deepr.weights.k_slots.KSlots` of theta.
        check: a function that compares the kernels with PyTorch. It runs once per device and dtype.
    """
    if theta.device.type not in DEVICE_TYPES:
        return False
    module = _triton_step()
    return module is not None and module.takes(theta, slots) and _passes(what, check, theta.device, theta.dtype)


def _passes(what: str, check: Check, device: torch.device, dtype: torch.dtype) -> bool:
    key = what, device, dtype
    verdict = _verdicts.get(key)
    if verdict is None:
        problem = _problem(check, device, dtype)
        verdict = _verdicts[key] = problem is None
        if problem is not None:
            warnings.warn(
                f"The Triton kernels for {what} did not pass their check on {device}, {dtype}: {problem}. "
                "Plain PyTorch does the work instead: it is slower and gives the same result. "
                "LIGHTNING_DEEPR_KERNELS=0 turns the kernels and their check off.",
                stacklevel=3,
            )
    return verdict


def _problem(check: Check, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what a check finds. An error is a finding, too."""
    try:
        return check(device, dtype)
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0][:300]
