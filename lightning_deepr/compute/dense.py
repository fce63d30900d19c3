"""Dense compute: the K values are scattered into a transient dense weight and the layer runs as its author wrote it."""

from __future__ import annotations

import torch
from torch import Tensor


def build_weight(theta: Tensor, signs: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """The dense-shaped weight: w_k = s_k * theta_k at the K places, exactly 0 elsewhere.

    The value is not clamped, so that the gradient dE/dtheta_k = s_k * dE/dw_k also reaches a connection at theta = 0. The
    backward pass gathers K values from the gradient of the transient weight and keeps nothing else.

    Args:
        theta: [K].
        signs: [K], +-1 in theta's dtype.
        places: int64 [K], unique flat indices.
        shape: the weight's shape.

    Returns:
        tensor of ``shape`` in theta's dtype.
    """
    weight = torch.zeros(shape.numel(), dtype=theta.dtype, device=theta.device)
    return weight.index_copy_(0, places, theta * signs).view(shape)
