"""Dense compute: scatter the K values into a transient dense weight, and let the layer run as its author wrote it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_deepr import kernels
from lightning_deepr.compute import sparse

LARGE = 1 << 13  # from this number of connections on, the kernels save more time than their calls cost


def build_weight(theta: Tensor, signs: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Build the dense-shaped weight: w_k = s_k * theta_k at the K places, exactly 0 elsewhere.

    The value is not clamped, so that the gradient dE/dtheta_k = s_k * dE/dw_k also reaches a connection at theta = 0. The
    backward pass gathers K values from the gradient of the transient weight, and keeps nothing else of it.

    Args:
        theta: [K].
        signs: [K], +-1 in theta's dtype.
        places: int64 [K], unique flat indices.
        shape: the shape of the weight.

    Returns:
        a tensor of ``shape`` in theta's dtype.
    """
    if places.numel() >= LARGE and not torch.compiler.is_compiling() and _fits(theta, signs, places):
        weight: Tensor = _Scatter.apply(theta, signs, places, shape)
        return weight
    return _scattered(theta * signs, places, shape)


def _scattered(values: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    weight = torch.zeros(shape.numel(), dtype=values.dtype, device=values.device)
    # vmap refuses to write into a tensor that it does not map over.
    if not torch.compiler.is_compiling() and sparse.transforms() is not None:
        return weight.index_copy(0, places, values).view(shape)
    return weight.index_copy_(0, places, values).view(shape)


def _fits(*tensors: Tensor) -> bool:
    """Tell whether the kernels, which take addresses, fit: the tensors are plain, and no mode or transform watches them."""
    theta = tensors[0]
    return (
        theta.dtype in (torch.float32, torch.float64)
        and tensors[1].dtype is theta.dtype
        and all(t.is_cpu and t.is_contiguous() and type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and sparse.is_plain(tensors[1])
        and forward_ad._current_level < 0
        and kernels.available()
    )


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, signs: Tensor, places: Tensor, shape: torch.Size) -> Tensor:  # type: ignore[override]
        from lightning_deepr.kernels.cpu import scatter

        ctx.save_for_backward(signs, places)  # autograd refuses a backward pass after a rewiring
        weight = torch.zeros(shape, dtype=theta.dtype)
        scatter.run(scatter.scatter_kernel(theta.element_size()), theta, signs, places, weight)
        return weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        from lightning_deepr.kernels.cpu import scatter

        signs, places = ctx.saved_tensors
        gradient = gradient.contiguous()
        if torch.is_grad_enabled() or gradient.dtype is not signs.dtype or not _fits(gradient, signs, places):
            return gradient.view(-1).index_select(0, places) * signs, None, None, None
        found = torch.empty_like(signs)
        scatter.run(scatter.gather_kernel(signs.element_size()), found, signs, places, gradient)
        return found, None, None, None
