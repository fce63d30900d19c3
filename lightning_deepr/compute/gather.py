"""Sparse compute of linear layers in plain PyTorch, for any device and dtype: gather, multiply, add by index.

The connections are processed in chunks, so that the transient [B, chunk] tensors stay small for any K.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_deepr.compute.slots import Connections

TWICE = 'Sparse compute has no double backward: expected a first derivative. Use compute="dense" for second derivatives.'
LARGEST = 1 << 24  # the most entries of a transient tensor


def linear(x: Tensor, theta: Tensor, bias: Tensor | None, slots: Connections) -> Tensor:
    """Multiply x [B, columns] by the connections of ``slots``, to [B, rows]."""
    y: Tensor = _Product.apply(x, theta, slots.signs, slots.places, slots.rows, slots.columns)
    return y if bias is None else y + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, theta: Tensor, signs: Tensor, places: Tensor, rows: int, columns: int
    ) -> Tensor:
        ctx.save_for_backward(x, theta, signs, places)
        ctx.columns = columns
        y = x.new_zeros((x.shape[0], rows))
        values = theta * signs
        for part in _parts(x.shape[0], places.numel()):
            row = places[part] // columns
            y.index_add_(1, row, x[:, places[part] - row * columns] * values[part])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(TWICE)
        x, theta, signs, places = ctx.saved_tensors
        dx = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        dtheta = torch.empty_like(theta)
        for part in _parts(x.shape[0], places.numel()):
            row = places[part] // ctx.columns
            column = places[part] - row * ctx.columns
            seen = dy[:, row]
            if dx is not None:
                dx.index_add_(1, column, seen * (theta[part] * signs[part]))
            dtheta[part] = (seen * x[:, column]).sum(0) * signs[part]
        return dx, dtheta, None, None, None, None


def _parts(batch: int, count: int) -> Iterator[slice]:
    size = max(LARGEST // max(batch, 1), 1)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
