"""Move the tensors of a parametrization with its module, without losing what they say.

``module.to(...)``, ``half()``, ``to_empty(...)``, ``type(...)`` and ``share_memory()`` all call one function on every tensor.
Places and signs are no values to initialize or to cast: they are carried over as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def follow(value: Tensor, fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, bool]:
    """Apply a function of ``module._apply`` to a tensor, and keep its values.

    ``to_empty`` would leave arbitrary memory, and ``type(...)`` would turn places into floats.

    Args:
        value: places, births, signs, exceptions or a mask.
        fn: the function that moves or casts every tensor of the module.

    Returns:
        the moved tensor, and whether its values are lost: the meta device keeps none.
    """
    moved = fn(value)
    if moved is value:
        return value, False
    if not value.is_floating_point() and moved.dtype is not value.dtype:
        moved = value.to(moved.device)
    if moved.is_meta or value.is_meta:
        return moved, value.numel() > 0
    if type(moved) is not Tensor or type(value) is not Tensor or torch._C._len_torch_dispatch_stack():
        return moved, False  # fake tensors
    if not torch.equal(moved.detach().to(value.device, value.dtype), value):
        moved = value.to(moved.device, moved.dtype)
    return moved, False
