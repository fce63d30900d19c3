"""Connections that are added to a frozen weight: ``weight = base + difference``, and ``y = x @ base.T + x @ difference.T``.

No gradient of the frozen weight is computed. theta's gradient comes from the K places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_deepr.compute.eager import is_recorded


def add_to_base(base: Tensor, theta: Tensor, signs: Tensor, places: Tensor) -> Tensor:
    """Build the weight: the base, with s_k * theta_k added at the K places.

    The sums are taken in theta's dtype and rounded to the base's. At theta = 0 the result equals the base.

    Args:
        base: the frozen weight, detached.
        theta: [K].
        signs: [K], +-1 in theta's dtype.
        places: int64 [K], unique flat indices.

    Returns:
        a new tensor of the base's shape and dtype, differentiable in theta: O(N).
    """
    flat = base.reshape(-1)
    values = (flat.index_select(0, places).to(theta.dtype) + theta * signs).to(flat.dtype)
    if not torch.compiler.is_dynamo_compiling() and is_recorded():  # exporters know this operator better
        return flat.scatter(0, places, values).view(base.shape)
    return flat.index_copy(0, places, values).view(base.shape)


def join(y: Tensor, difference: Tensor) -> Tensor:
    """Add the connections' product to that of the base, in place where nobody looks on."""
    if torch.compiler.is_dynamo_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return y + difference
    return y.add_(difference)
