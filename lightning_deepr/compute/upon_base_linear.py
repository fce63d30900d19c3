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
    if not _suits(x, theta, bias, slots, slots.columns, slots.rows):
        return None
    gate.check_values(theta, slots)
    y: Tensor = _Linear.apply(x, theta, bias, slots.signs, slots.places, slots.base.detach())
    return y


def quick_addmm(x: Tensor, theta: Tensor, bias: Tensor, slots: SparseSlots) -> Tensor | None:
    """Compute ``torch.addmm(bias, x, weight)`` with the sum, as :func:`quick_linear` does for ``F.linear``.

    Args:
        x: [B, rows].
        theta: [K], the weight's own part.
        bias: [columns].
        slots: the connections, upon a frozen weight.
    """
    if not slots.may_sum or not _suits(x, theta, bias, slots, slots.rows, slots.columns):
        return None
    gate.check_values(theta, slots)
    y: Tensor = _Linear.apply(x, theta, bias, slots.signs, slots.places, slots.base.detach(), True)
    return y


def _suits(x: Tensor, theta: Tensor, bias: Tensor | None, slots: SparseSlots, inputs: int, outputs: int) -> bool:
    return not (
        not torch.is_grad_enabled()
        or not theta.requires_grad
        or not is_quick(x, theta, slots)
        or slots.is_large
        or x.dim() < 2
        or x.shape[-1] != inputs
        or x.numel() == 0
        or not choice.prefers_sum(slots.rows, slots.columns, slots.count, x.numel() // inputs)
        or slots.base.dtype is not x.dtype
        or not slots.base.is_contiguous()
        or not slots.base.is_cpu
        or (bias is not None and (bias.dtype is not x.dtype or bias.shape != (outputs,) or not bias.is_cpu))
        or type(slots.places) is not Tensor
    )


def _sum(theta: Tensor, signs: Tensor, places: Tensor, base: Tensor) -> Tensor:
    weight = buffers.kept(tuple(base.shape), base).copy_(base)
    flat = weight.view(-1)
    flat.index_copy_(0, places, base.view(-1).index_select(0, places) + theta * signs)
    return weight


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, theta: Tensor, bias: Tensor | None, signs: Tensor, places: Tensor, base: Tensor,
        inputs_first: bool = False,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, theta, signs, places, base)  # with places, autograd refuses a backward pass after a rewiring
        ctx.inputs_first = inputs_first  # the weight is [inputs, outputs]
        return torch_linear(x, _oriented(_sum(theta, signs, places, base), inputs_first), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, theta, signs, places, base = ctx.saved_tensors
        need, turned = ctx.needs_input_grad, ctx.inputs_first
        outputs, inputs = _oriented(base, turned).shape
        dx = dtheta = dbias = None
        across, before = dy.reshape(-1, outputs), x.reshape(-1, inputs)
        left, right = (before, across) if turned else (across, before)  # the weight's gradient is left^T right
        if need[2]:
            dbias = across.sum(0)
        if torch.is_grad_enabled():  # create_graph=True: all in operators that can be differentiated again
            if need[0]:
                dx = across.mm(_oriented(add_to_base(base, theta, signs, places), turned)).view(x.shape)
            if need[1]:
                dtheta = left.t().mm(right).view(-1).index_select(0, places) * signs
            return dx, dtheta, dbias, None, None, None, None
        if need[0]:
            dx = across.mm(_oriented(_sum(theta, signs, places, base), turned)).view(x.shape)
        if need[1]:
            gradient = torch.mm(left.t(), right, out=buffers.kept(tuple(base.shape), base))
            dtheta = gradient.view(-1).index_select(0, places) * signs
        return dx, dtheta, dbias, None, None, None, None


def _oriented(weight: Tensor, inputs_first: bool) -> Tensor:
    """Return the weight as [outputs, inputs]."""
    return weight.t() if inputs_first else weight
