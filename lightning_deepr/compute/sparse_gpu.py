"""Sparse compute of linear layers on a GPU, with Triton kernels.

After a change of the connections, two sorts on the device order them by row and by column. That takes O(K log K) per rewiring,
without a host synchronization.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_deepr.compute.gather import TWICE
from lightning_deepr.compute.order import _version_of
from lightning_deepr.compute.slots import Connections
from lightning_deepr.kernels.gpu import linear as triton_linear

CONNECTIONS, LARGEST_BATCH = 32, 64  # the tile of one program
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
_SUMS = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.float32, torch.float16: tl.float32}


class _Lines(NamedTuple):
    """The connections of each row, or of each column."""

    starts: Tensor  # int64 [lines + 1]
    others: Tensor  # int64 [K], the column of each connection, or its row
    slots: Tensor  # int64 [K]


class GpuOrder:
    """The connections of a weight [rows, columns] by row and by column.

    Args:
        places: int64 [K] on the device.
        rows, columns: the sizes of the weight.
    """

    def __init__(self, places: Tensor, rows: int, columns: int) -> None:
        self.rows, self.columns, self.count = rows, columns, places.numel()
        self.noted = weakref.ref(places), _version_of(places)
        self.sorted, slots = places.sort()
        row = self.sorted // columns
        self.by_row = _Lines(_starts(row, rows), self.sorted - row * columns, slots)
        row = places // columns
        across, slots = ((places - row * columns) * rows + row).sort()
        column = across // rows
        self.by_column = _Lines(_starts(column, columns), across - column * rows, slots)

    def is_of(self, places: Tensor) -> bool:
        """Tell whether this is the order of these places in their present version."""
        return self.noted[0]() is places and self.noted[1] == _version_of(places)


def _starts(line: Tensor, lines: int) -> Tensor:
    return torch.searchsorted(line, torch.arange(lines + 1, device=line.device))


_orders: weakref.WeakKeyDictionary[Any, GpuOrder] = weakref.WeakKeyDictionary()


def order_of(slots: Connections) -> GpuOrder:
    """Return the present order of a :class:`lightning_deepr.weights.k_slots.KSlots`; sort again if the places changed."""
    order = _orders.get(slots)
    if order is None or not order.is_of(slots.places):
        with torch.inference_mode(False), torch.no_grad():
            order = _orders[slots] = GpuOrder(slots.places, slots.rows, slots.columns)
    return order


def linear(x: Tensor, theta: Tensor, bias: Tensor | None, slots: Connections) -> Tensor:
    """Multiply x [B, columns] by the connections of ``slots``, to [B, rows].

    Raises:
        RuntimeError: the caller asks for a second derivative.
    """
    y: Tensor = _Product.apply(x, theta, slots.signs, slots.places, order_of(slots))
    return y if bias is None else y + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, theta: Tensor, signs: Tensor, places: Tensor, order: GpuOrder
    ) -> Tensor:
        across = x.t().contiguous()
        ctx.save_for_backward(across, theta, signs, places)  # with places, autograd refuses a backward pass after a rewiring
        ctx.order = order
        return _multiply(across, theta, signs, order.by_row, order.rows).t().contiguous()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(TWICE)
        across, theta, signs, _ = ctx.saved_tensors
        order, dx, dtheta = ctx.order, None, None
        dy = dy.t().contiguous()
        if ctx.needs_input_grad[0]:
            dx = _multiply(dy, theta, signs, order.by_column, order.columns).t().contiguous()
        if ctx.needs_input_grad[1]:
            dtheta = torch.zeros_like(theta)
            batch = dy.shape[1]
            if order.count and batch:
                with torch.cuda.device_of(dy):
                    triton_linear.sampled[(triton.cdiv(order.count, CONNECTIONS),)](
                        across, dy, dtheta, signs, order.sorted, order.by_row.slots, order.count, order.columns, batch,
                        WIDE=_SUMS[theta.dtype], CONNECTIONS=CONNECTIONS, BATCH=_tile(batch), **OPTIONS
                    )  # fmt: skip
        return dx, dtheta, None, None, None


def _multiply(x: Tensor, theta: Tensor, signs: Tensor, lines: _Lines, count: int) -> Tensor:
    """Multiply x [others, B] to [lines, B]."""
    batch = x.shape[1]
    y = x.new_empty((count, batch))
    if count and batch:
        tile = _tile(batch)
        with torch.cuda.device_of(x):
            triton_linear.product[(count * triton.cdiv(batch, tile),)](
                x, y, theta, signs, *lines, batch, WIDE=_SUMS[theta.dtype], CONNECTIONS=CONNECTIONS, BATCH=tile, **OPTIONS
            )
    return y


def _tile(batch: int) -> int:
    return max(16, min(LARGEST_BATCH, triton.next_power_of_2(batch)))
