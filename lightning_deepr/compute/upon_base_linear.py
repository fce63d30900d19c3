"""A linear layer upon a frozen weight by way of the sum, in one autograd node, where that is faster than two products.

Forward and backward build the sum in memory that is used again by the next layer, and the backward pass gathers theta's
gradient from a product that lies there, too. So all layers together need the memory of two weights, and a graph keeps x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from lightning_deepr.compute import choice
from lightning_deepr.compute.slots import SparseSlots
from lightning_deepr.compute.sparse import is_quick
from lightning_deepr.compute.upon_base import add_to_base
from lightning_deepr.kernels import gate
from lightning_deepr.kernels.cpu import buffers


def quick_linear(x: Tensor, theta: Tensor, bias: Tensor | None, slots: SparseSlots) -> Tensor | None:
    """Compute ``F.linear`` with the sum; return None if two products are faster, or the call is not an ordinary one.

    Args:
        x: [..., columns].
        theta: [K], the weight's own part.
        bias: [rows] or None.
        slots: the connections, upon a frozen weight.
    """
    if (
        not torch.is_grad_enabled()
        or not theta.requires_grad
        or not is_quick(x, theta, slots)
        or slots.is_large
        or x.dim() < 2
        or x.shape[-1] != slots.columns
        or x.numel() == 0
        or not choice.prefers_sum(slots.rows, slots.columns, slots.count, x.numel() // slots.columns)
        or slots.base.dtype is not x.dtype
        or not slots.base.is_contiguous()
        or not slots.base.is_cpu
        or (bias is not None and (bias.dtype is not x.dtype or bias.shape != (slots.rows,) or not bias.is_cpu))
        or type(slots.places) is not Tensor
    ):
        return None
    gate.check_values(theta, slots)
    y: Tensor = _Linear.apply(x, theta, bias, slots.signs, slots.places, slots.base.detach())
    return y


def _sum(theta: Tensor, signs: Tensor, places: Tensor, base: Tensor) -> Tensor:
    weight = buffers.kept(tuple(base.shape), base).copy_(base)
    flat = weight.view(-1)
    flat.index_copy_(0, places, base.view(-1).index_select(0, places) + theta * signs)
    return weight


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, theta: Tensor, bias: Tensor | None, signs: Tensor, places: Tensor, base: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, theta, signs, places, base)  # with places, autograd refuses a backward pass after a rewiring
        return torch_linear(x, _sum(theta, signs, places, base), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, theta, signs, places, base = ctx.saved_tensors
        need, (rows, columns) = ctx.needs_input_grad, base.shape
        dx = dtheta = dbias = None
        across, before = dy.reshape(-1, rows), x.reshape(-1, columns)
        if need[2]:
            dbias = across.sum(0)
        if torch.is_grad_enabled():  # create_graph=True: all in operators that can be differentiated again
            if need[0]:
                dx = across.mm(add_to_base(base, theta, signs, places)).view(x.shape)
            if need[1]:
                dtheta = across.t().mm(before).view(-1).index_select(0, places) * signs
            return dx, dtheta, dbias, None, None, None
        if need[0]:
            dx = across.mm(_sum(theta, signs, places, base)).view(x.shape)
        if need[1]:
            gradient = torch.mm(across.t(), before, out=buffers.kept((rows, columns), base))
            dtheta = gradient.view(-1).index_select(0, places) * signs
        return dx, dtheta, dbias, None, None, None
