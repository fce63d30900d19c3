"""Sparse compute of ``torch.addmm(bias, x, weight)``, the call of GPT-2's ``Conv1D``, whose weight is [inputs, outputs].

A product with the weight is one with its transpose, which has the same connections: by row they lie in the order as the weight
has them by column. So the kernels of ``F.linear`` do it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_deepr.compute import upon_base_linear
from lightning_deepr.compute.order import Order
from lightning_deepr.compute.slots import SparseSlots
from lightning_deepr.compute.sparse import LinearFunction, is_quick
from lightning_deepr.compute.upon_base import join
from lightning_deepr.kernels.cpu.fields import pack_order


class TransposedOrder:
    """The order of the transposed weight, a view of the weight's own."""

    def __init__(self, order: Order) -> None:
        self.rows, self.columns, self.count = order.columns, order.rows, order.count
        self.buffer = order.buffer
        self.packed = pack_order(*order.addresses[3:], *order.addresses[:3])


def addmm(x: Tensor, theta: Tensor, bias: Tensor, slots: SparseSlots) -> Tensor | None:
    """Compute ``bias + x @ weight``; return None if the call is not an ordinary one, which builds the weight.

    Args:
        x: [B, rows].
        theta: [K], the weight's own part.
        bias: [columns].
        slots: the weight's connections, also upon a frozen weight.

    Returns:
        [B, columns].
    """
    if (
        not is_quick(x, theta, slots)
        or x.dim() != 2
        or x.shape[1] != slots.rows
        or len(slots.shape) != 2
        or x.shape[0] == 0
        or type(bias) not in (Tensor, torch.nn.Parameter)
        or bias.dtype is not x.dtype
        or bias.shape != (slots.columns,)
        or not bias.is_cpu
        or theta.numel() != slots.count
        or type(slots.places) is not Tensor
        or not slots.has_kernel(theta)
    ):
        return None
    if not slots.adapts:
        return _product(x, theta, bias, slots)
    y = upon_base_linear.quick_addmm(x, theta, bias, slots)
    if y is None:
        y = join(torch.addmm(bias, x, slots.base.detach()), _product(x, theta, None, slots))
    return y


def _product(x: Tensor, theta: Tensor, bias: Tensor | None, slots: SparseSlots) -> Tensor:
    order = slots.ordered()
    y: Any = LinearFunction.apply(
        x.contiguous(), theta, None if bias is None else bias.contiguous(), order.buffer, TransposedOrder(order)
    )
    return y  # type: ignore[no-any-return]
