"""The precision of theta where the weight has fewer than 32 bits (bfloat16, float16).

A step of theta is small beside theta: bfloat16 has 8 bits of mantissa, and ``theta - eta * alpha`` is theta again, so that L1,
noise and small gradients would do nothing. K is small, so theta, its signs and with them its gradient and the optimizer's state
stay in float32 then, and the weight is built in the layer's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def kept(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of theta for a weight of this dtype: float32 for floats with fewer than 32 bits, else the same."""
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def narrow(dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype of a weight that has fewer bits than its theta; None: they have the same dtype."""
    return None if kept(dtype) is dtype else dtype


def keeping(fn: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Change a function of ``module._apply`` so that it moves floats as before and casts them to another dtype.

    Args:
        fn: the function that moves or casts every tensor of the module.
        dtype: the dtype of every float afterwards.
    """

    def kept(value: Tensor) -> Tensor:
        found = fn(value)
        if not value.is_floating_point() or found.dtype is dtype:
            return found
        return value.to(found.device, dtype)

    return kept
