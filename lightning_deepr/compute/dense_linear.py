"""Dense compute of linear layers in one autograd node: the transient weight and its gradient lie in memory that is kept.

The result is that of ``F.linear`` with :func:`lightning_deepr.compute.dense.build_weight`, by the same operators of torch. A
layer would otherwise allocate and free two tensors of N entries in each step, and the C library gives such blocks back to the
system, which fills new ones with zeros, page by page.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from lightning_deepr.compute.dense import LARGE, build_weight, write_weight
from lightning_deepr.compute.slots import SparseSlots
from lightning_deepr.compute.sparse import is_quick
from lightning_deepr.kernels import gate
from lightning_deepr.kernels.cpu import buffers


def quick_linear(x: Tensor, theta: Tensor, bias: Tensor | None, slots: SparseSlots) -> Tensor | None:
    """Compute ``F.linear`` with the transient weight, for an ordinary call; return None if the call is another one.

    Args:
        x: [..., columns].
        theta: [K], the weight's own part.
        bias: [rows] or None.
        slots: the connections.
    """
    if (
        not is_quick(x, theta, slots)
        or x.dim() < 2
        or x.shape[-1] != slots.columns
        or x.numel() == 0
        or slots.places.numel() < LARGE
        or slots.is_large
        or (bias is not None and (bias.dtype is not x.dtype or bias.shape != (slots.rows,) or not bias.is_cpu))
        or type(slots.places) is not Tensor
    ):
        return None
    gate.check_values(theta, slots)
    if torch.is_grad_enabled():
        y: Tensor = _DenseLinear.apply(x, theta, bias, slots.signs, slots.places, slots, slots.in_place_order)
        return y
    return torch_linear(x, _weight(theta, slots.signs, slots.places, slots.shape, slots.in_place_order), bias)


def _weight(theta: Tensor, signs: Tensor, places: Tensor, shape: torch.Size, in_place_order: bool) -> Tensor:
    weight = buffers.kept(tuple(shape), theta)
    if in_place_order:
        torch.mul(theta.detach(), signs, out=weight.view(-1))
        return weight
    write_weight(theta.detach(), signs, places, weight.zero_())
    return weight


class _DenseLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        theta: Tensor,
        bias: Tensor | None,
        signs: Tensor,
        places: Tensor,
        slots: SparseSlots,
        in_order: bool,
    ) -> Tensor:
        shape = slots.shape
        gate.note_finite(slots, None)  # lets go of the last gradient's memory
        weight = _weight(theta, signs, places, shape, in_order)
        ctx.save_for_backward(x, theta, signs, places, weight)  # with places, autograd refuses a backward pass after a rewiring
        ctx.in_order, ctx.shape, ctx.slots = in_order, shape, slots
        return torch_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, theta, signs, places, weight = ctx.saved_tensors
        need, (rows, columns) = ctx.needs_input_grad, ctx.shape
        dx = dtheta = dbias = None
        across, before = dy.reshape(-1, rows), x.reshape(-1, columns)
        if need[2]:
            dbias = across.sum(0)
        if torch.is_grad_enabled():  # create_graph=True: all in operators that can be differentiated again
            if need[0]:
                dx = across.mm(build_weight(theta, signs, places, ctx.shape)).view(x.shape)
            if need[1]:
                dtheta = across.t().mm(before).view(-1).index_select(0, places) * signs
            return dx, dtheta, dbias, None, None, None, None
        if need[0]:
            dx = across.mm(weight).view(x.shape)
        if need[1]:
            from lightning_deepr.kernels.cpu import scatter

            gradient, size = torch.mm(across.t(), before, out=buffers.kept(tuple(ctx.shape), weight)), signs.element_size()
            if ctx.in_order:
                dtheta = gradient.view(-1)
                finite = scatter.run(scatter.signed_kernel(size), dtheta, signs, places, gradient)
            else:
                dtheta = torch.empty_like(signs)
                finite = scatter.run(scatter.gather_kernel(size), dtheta, signs, places, gradient)
            gate.note_finite(ctx.slots, dtheta if finite else None)
        return dx, dtheta, dbias, None, None, None, None
