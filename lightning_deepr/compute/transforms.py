"""Sparse compute under the transforms of ``torch.func``, which need another form of autograd function than eager mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_deepr.compute.gather import TWICE


class TransformedLinear(torch.autograd.Function):
    """``lightning_deepr::linear`` for ``torch.func.grad``, ``vjp`` and ``vmap`` (one element at a time)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, theta: Tensor, bias: Tensor | None, order: Tensor, rows: int, columns: int
    ) -> Tensor:
        return torch.ops.lightning_deepr.linear(x, theta, bias, order, rows, columns)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, theta, bias, order, ctx.rows, ctx.columns = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, theta, order)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        x, theta, order = ctx.saved_tensors
        need = ctx.needs_input_grad
        needed = need[0], need[1], ctx.has_bias and need[2]
        found = _TransformedBackward.apply(dy, x, theta, order, ctx.rows, ctx.columns, *needed)
        gradients = [gradient if wanted else None for gradient, wanted in zip(found, needed, strict=True)]
        return (*gradients, None, None, None)


class _TransformedBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        dy: Tensor,
        x: Tensor,
        theta: Tensor,
        order: Tensor,
        rows: int,
        columns: int,
        need_x: bool,
        need_theta: bool,
        need_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.lightning_deepr.linear_backward(  # type: ignore[no-any-return]
            dy, x, theta, order, rows, columns, need_x, need_theta, need_bias
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # type: ignore[override]
        raise RuntimeError(TWICE)
