"""The floating point operations of sparse compute, for ``torch.utils.flop_counter`` and so for Lightning's ``measure_flops``.

torch counts by operator, and knows nothing of ours until a formula is registered: a converted layer would have 0. A connection
is a multiplication and an addition for each element of the batch (and each pixel), as torch counts a dense weight.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

_registered: list[bool] = []


def register() -> None:
    """Register the formulas, once somebody counts. Sparse layers call it when a mode watches the operators.

    Importing torch's counter takes long, and only who counts needs it.
    """
    counting: Any = sys.modules.get("torch.utils.flop_counter")
    if _registered or counting is None:
        return
    _registered.append(True)
    ours = torch.ops.lightning_deepr
    formulas = {
        ours.linear: linear, ours.linear_backward: linear_backward, ours.conv2d: conv2d, ours.conv2d_backward: conv2d_backward,
    }  # fmt: skip
    for operator, formula in formulas.items():
        counting.register_flop_formula(operator)(formula)
    for mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        found = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if found is not None:  # a counter at work took its copy of the formulas when it was made
            found.update({operator: counting.flop_registry[operator] for operator in formulas})


def linear(x: Any, theta: Any, *args: Any, **kwargs: Any) -> int:
    """Count the operations of ``lightning_deepr::linear``, from the shapes of its arguments."""
    return 2 * int(x[0]) * int(theta[0])


def linear_backward(
    dy: Any, x: Any, theta: Any, order: Any, rows: int, columns: int, need_x: bool, need_theta: bool, *args: Any, **kwargs: Any
) -> int:
    """Count the operations of ``lightning_deepr::linear_backward``: of the gradients of x and of theta."""
    return 2 * int(x[0]) * int(theta[0]) * (bool(need_x) + bool(need_theta))


def conv2d(x: Any, theta: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    """Count the operations of ``lightning_deepr::conv2d``; as torch does, also at the padding."""
    return 2 * int(x[0]) * int(theta[0]) * math.prod(out_shape[2:])


def conv2d_backward(
    dy: Any, x: Any, theta: Any, order: Any, weight: Any, stride: Any, padding: Any, dilation: Any,
    need_x: bool, need_theta: bool, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Count the operations of ``lightning_deepr::conv2d_backward``."""
    return 2 * int(x[0]) * int(theta[0]) * math.prod(dy[2:]) * (bool(need_x) + bool(need_theta))
