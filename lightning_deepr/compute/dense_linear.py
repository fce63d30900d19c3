"""Dense compute of linear layers in one autograd node: the transient weight and its gradient lie in memory that is kept.

The result is that of ``F.linear`` with :func:`lightning_deepr.compute.dense.build_weight`, by the same operators of torch. A
layer would otherwise allocate and free two tensors of N entries in each step, and the C library gives such blocks back to the
system, which fills new ones with zeros, page by page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from lightning_deepr.compute import full
from lightning_deepr.compute.dense import (
    LARGE,
    NARROW,
    are_readable,
    build_weight,
    read_narrow_gradient,
    write_narrow_weight,
    write_weight,
)
from lightning_deepr.compute.slots import SparseSlots
from lightning_deepr.compute.sparse import is_ordinary, is_quick
from lightning_deepr.kernels import gate
from lightning_deepr.kernels.cpu import buffers

PLAIN = (Tensor, torch.nn.Parameter)
_casts = torch.is_autocast_enabled


def quick_linear(x: Tensor, theta: Tensor, bias: Tensor | None, slots: SparseSlots) -> Tensor | None:
    """Compute ``F.linear`` with the transient weight, for an ordinary call; return None if the call is another one.

    Args:
        x: [..., columns].
        theta: [K], the weight's own part.
        bias: [rows] or None.
        slots: the connections.
    """
    if (
        type(x) is not Tensor  # (torch.fx records with proxies)
        or slots.places.numel() < LARGE
        or x.dim() < 2
        or x.shape[-1] != slots.columns
        or x.numel() == 0
        or slots.is_large
        or type(slots.places) is not Tensor
    ):
        return None
    narrow = None
    if not is_quick(x, theta, slots):
        narrow = _narrow_of(x, theta, bias, slots)
        if narrow is None:
            return None
        if _casts("cpu"):
            x, bias = x.to(narrow), bias if bias is None else bias.to(narrow)
    if bias is not None and (bias.dtype is not x.dtype or bias.shape != (slots.rows,) or not bias.is_cpu):
        return None
    if not are_readable(theta, slots.signs, slots.places):
        return None
    gate.check_values(theta, slots)
    is_small = x.numel() < full.MANY * slots.columns
    if is_small and narrow is None and slots.in_place_order and (bias is None or bias.is_contiguous()):
        bits = _sign_bits(slots)
        if torch.is_grad_enabled():
            product: Tensor = _FullLinear.apply(x, theta, bias, slots.signs, slots.places, slots, bits)
            return product
        return _full_product(x, theta, bias, bits, slots.shape)
    if torch.is_grad_enabled():
        y: Tensor = _DenseLinear.apply(x, theta, bias, slots.signs, slots.places, slots, slots.in_place_order, narrow)
        return y
    return torch_linear(x, _weight(theta, slots.signs, slots.places, slots.shape, slots.in_place_order, narrow), bias)


def _narrow_of(x: Tensor, theta: Tensor, bias: Tensor | None, slots: SparseSlots) -> torch.dtype | None:
    """Return the dtype of 16 bits in which an ordinary call computes, by the layer's dtype or under autocast; None: in none.

    Under autocast the float32 weight would be cast after it was built, and so would its gradient: the numbers are the same.
    """
    if theta.dtype is not torch.float32 or slots.signs.dtype is not torch.float32:
        return None
    dtype = torch.get_autocast_dtype("cpu") if _casts("cpu") else slots.narrow
    if dtype not in NARROW or slots.narrow not in (None, dtype) or not is_ordinary(x, theta):
        return None
    known = (dtype,) if not _casts("cpu") else (torch.float32, *NARROW)
    if x.dtype not in known or (bias is not None and (bias.dtype not in known or type(bias) not in PLAIN)):
        return None
    return dtype


def _weight(
    theta: Tensor, signs: Tensor, places: Tensor, shape: torch.Size, in_place_order: bool, narrow: torch.dtype | None
) -> Tensor:
    weight = buffers.kept(tuple(shape), theta, narrow)
    if in_place_order:
        torch.mul(theta.detach(), signs, out=weight.view(-1))
    elif narrow is None:
        write_weight(theta.detach(), signs, places, weight.zero_())
    else:
        write_narrow_weight(theta.detach(), signs, places, weight.zero_())
    return weight


def _in_operators(
    across: Tensor, x: Tensor, theta: Tensor, signs: Tensor, places: Tensor, shape: torch.Size, narrow: torch.dtype | None,
    need: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Compute the gradients of x and theta for ``create_graph=True``, in operators that can be differentiated again.

    Args:
        across: dy as [B, rows].
        need: whether x and theta need a gradient.
    """
    dx = dtheta = None
    if need[0]:
        dx = across.mm(build_weight(theta, signs, places, shape, narrow)).view(x.shape)
    if need[1]:
        gradient = across.t().mm(x.reshape(-1, shape[1]))
        dtheta = gradient.view(-1).index_select(0, places).to(signs.dtype) * signs
    return dx, dtheta


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
        narrow: torch.dtype | None,
    ) -> Tensor:
        shape = slots.shape
        gate.note_finite(slots, None)  # lets go of the last gradient's memory
        weight = _weight(theta, signs, places, shape, in_order, narrow)
        ctx.save_for_backward(x, theta, signs, places, weight)  # with places, autograd refuses a backward pass after a rewiring
        ctx.in_order, ctx.shape, ctx.slots, ctx.narrow = in_order, shape, slots, narrow
        return torch_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, theta, signs, places, weight = ctx.saved_tensors
        need, (rows, columns) = ctx.needs_input_grad, ctx.shape
        dx = dtheta = dbias = None
        across, before = dy.reshape(-1, rows), x.reshape(-1, columns)
        if need[2]:
            dbias = across.sum(0)
        if torch.is_grad_enabled():
            dx, dtheta = _in_operators(across, x, theta, signs, places, ctx.shape, ctx.narrow, need)
            return dx, dtheta, dbias, None, None, None, None, None
        if need[0]:
            dx = across.mm(weight).view(x.shape)
        if need[1]:
            gradient = torch.mm(across.t(), before, out=buffers.kept(tuple(ctx.shape), weight))
            dtheta, finite = _read(gradient, signs, places, ctx.in_order)
            gate.note_finite(ctx.slots, dtheta if finite else None)
        return dx, dtheta, dbias, None, None, None, None, None


def _sign_bits(slots: SparseSlots) -> Tensor:
    """Return the signs of a weight with connections at all places as bits. They are made anew if the signs are others."""
    signs, known = slots.signs, vars(slots).get("_sign_bits")
    mark = 0 if signs.is_inference() else signs._version, signs.data_ptr()
    if known is None or known[0] is not signs or known[1] != mark:
        known = vars(slots)["_sign_bits"] = signs, mark, full.sign_bits(signs, *slots.shape)
    bits: Tensor = known[2]
    return bits


def _full_product(x: Tensor, theta: Tensor, bias: Tensor | None, bits: Tensor, shape: torch.Size) -> Tensor:
    rows, columns = shape
    y = full.forward(x.reshape(-1, columns).contiguous(), theta.detach(), bias, bits, rows, columns)
    return y.view(*x.shape[:-1], rows)


class _FullLinear(torch.autograd.Function):
    """The layer with a connection at every place: no weight is built."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, theta: Tensor, bias: Tensor | None, signs: Tensor, places: Tensor, slots: SparseSlots, bits: Tensor
    ) -> Tensor:
        gate.note_finite(slots, None)  # lets go of the last gradient's memory
        ctx.save_for_backward(x, theta, signs, places)
        ctx.bits, ctx.shape, ctx.slots = bits, slots.shape, slots
        return _full_product(x, theta, bias, bits, slots.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, theta, signs, places = ctx.saved_tensors
        need, (rows, columns) = ctx.needs_input_grad, ctx.shape
        dx = dtheta = dbias = None
        across, before = dy.reshape(-1, rows), x.reshape(-1, columns)
        if need[2]:
            dbias = across.sum(0)
        if torch.is_grad_enabled():
            dx, dtheta = _in_operators(across, x, theta, signs, places, ctx.shape, None, need)
            return dx, dtheta, dbias, None, None, None, None
        across = across.contiguous()
        if need[1]:
            dtheta, finite = full.backward_theta(across, before.contiguous(), theta, ctx.bits, rows, columns)
            gate.note_finite(ctx.slots, dtheta if finite else None)
        if need[0]:
            dx = full.backward_input(across, theta, ctx.bits, rows, columns).view(x.shape)
        return dx, dtheta, dbias, None, None, None, None


def _read(gradient: Tensor, signs: Tensor, places: Tensor, in_order: bool) -> tuple[Tensor, bool]:
    """Return theta's gradient, and whether it is known as finite."""
    from lightning_deepr.kernels.cpu import scatter

    size = signs.element_size()
    if gradient.dtype is not signs.dtype:
        if in_order:
            return torch.mul(gradient.view(-1), signs), False
        return read_narrow_gradient(gradient, signs, places)
    if in_order:
        found = gradient.view(-1)
        return found, scatter.run(scatter.signed_kernel(size), found, signs, places, gradient)
    found = torch.empty_like(signs)
    return found, scatter.run(scatter.gather_kernel(size), found, signs, places, gradient)
