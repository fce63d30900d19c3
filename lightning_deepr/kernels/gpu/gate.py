"""Whether the Triton kernels are used: where Triton can be imported, and on devices on which they have passed a check.

On a device and dtype that is new to them, the kernels take a few steps on a small made-up network beside the PyTorch version. If
they can't be compiled, or anything differs, that is said once, and PyTorch does the work.
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

Check = Callable[[torch.device, torch.dtype], "str | None"]  # what of the kernels differs from PyTorch, or None

DEVICE_TYPES = {"cuda"}  # the tests add "cpu", for Triton's interpreter
_verdicts: dict[tuple[str, torch.device, torch.dtype], bool] = {}


@cache
def _triton_step() -> Any:
    """The module with the kernels' step, or None."""
    if os.environ.get("LIGHTNING_DEEPR_KERNELS", "1") == "0":
        return None
    try:
        from lightning_deepr.kernels.gpu import step
    except Exception:  # no Triton for this platform, or one that can't be used
        return None
    return step


def admits(what: str, theta: Tensor, slots: Slots, check: Check) -> bool:
    """Whether the Triton kernels may work on a tensor. Cheap after the first question about a device and a dtype.

    Args:
        what: the kernels do, for messages: "rewiring" | "sparse linear layers".
        theta: [K].
        slots: its :class:`lightning_deepr.weights.k_slots.KSlots`.
        check: compares the kernels with PyTorch, once per device and dtype.
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
                f"The Triton kernels for {what} did not pass their check on {device}, {dtype}: {problem}. Plain PyTorch does the work "
                "instead, which is slower and gives the same result. LIGHTNING_DEEPR_KERNELS=0 turns the kernels off without asking.",
                stacklevel=3,
            )
    return verdict


def _problem(check: Check, device: torch.device, dtype: torch.dtype) -> str | None:
    """What a check finds; an error is a finding, too."""
    try:
        return check(device, dtype)
    except Exception as error:
        return f"{type(error).__name__}: {error}".split("\n")[0][:300]
