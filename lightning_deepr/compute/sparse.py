"""Sparse compute of linear layers: the dense weight is never built, in no pass.

``lightning_deepr::linear`` and ``lightning_deepr::linear_backward`` are operators with fake and autograd rules, for compilers, shape
propagation and profilers; an ordinary eager call takes a shorter way to the same kernels, since the way of an operator takes
longer than a small layer.

Where there is no kernel (another device or dtype, no numba), :mod:`lightning_deepr.compute.gather` computes the same in plain PyTorch.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from lightning_deepr.compute.order import addresses

_TWICE = "Sparse compute has no double backward: expected a first derivative. Use compute=\"dense\" for second derivatives."


def _kernels() -> Any:
    from lightning_deepr.kernels import linear

    return linear


def _native() -> Any:
    from lightning_deepr.kernels import native

    return native


def _forward(
    x: Tensor, theta: Tensor, bias: Tensor | None, order: list[int], rows: int, columns: int, keep: bool
) -> tuple[Tensor, Tensor]:
    """y [B, rows] and x in tiles; x is [B, columns] and contiguous."""
    linear = _kernels()
    batch, size = x.shape[0], x.element_size()
    lanes, vectors = linear.tile_of(batch, size)
    width = lanes * vectors
    tiles = -(-batch // width)
    y = x.new_empty((batch, rows))
    tiled = x.new_empty(tiles * columns * width)
    arguments = _ARGUMENTS(
        0, linear.ALL, batch, tiles, rows, columns, x.data_ptr(), tiled.data_ptr(), y.data_ptr(), 0, theta.data_ptr(),
        0 if bias is None else bias.data_ptr(), *order, 0, 0, 0, vectors
    )  # fmt: skip
    _run(linear.forward_kernel(size, lanes, vectors), arguments, (rows + columns + theta.numel()) * width * tiles)
    return y, tiled


def _backward(
    dy: Tensor, x: Tensor | None, tiled: Tensor | None, theta: Tensor, order: list[int], rows: int, columns: int,
    need_x: bool, need_theta: bool, need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    linear = _kernels()
    batch, size = dy.shape[0], dy.element_size()
    lanes, vectors = linear.tile_of(batch, size)
    width = lanes * vectors
    tiles = -(-batch // width)
    dy_tiled = dy.new_empty(tiles * rows * width)
    source = 0
    if tiled is None:
        assert x is not None
        tiled, source = dy.new_empty(tiles * columns * width), x.data_ptr()
    dx = dy.new_empty((batch, columns)) if need_x else None
    dtheta = torch.empty_like(theta) if need_theta else None
    dbias = dy.new_empty(rows) if need_bias else None
    if not (need_x or need_theta):
        return dx, dtheta, dy.sum(0)
    arguments = _ARGUMENTS(
        0, linear.ALL, batch, tiles, rows, columns, source, tiled.data_ptr(), dy.data_ptr(), dy_tiled.data_ptr(), theta.data_ptr(),
        0, *order, 0 if dx is None else dx.data_ptr(), 0 if dtheta is None else dtheta.data_ptr(),
        0 if dbias is None else dbias.data_ptr(), vectors
    )  # fmt: skip
    _run(linear.backward_kernel(size, lanes, vectors), arguments, (rows + columns + 2 * theta.numel()) * width * tiles)
    return dx, dtheta, dbias


_ARGUMENTS = ctypes.c_int64 * 22


def _run(kernel: Any, arguments: Any, work: int) -> None:
    linear = _kernels()
    threads = _native().threads_for(work, 1 << 18)
    if threads == 1:
        kernel(arguments)
        return
    for phase in (linear.TRANSPOSE, linear.MULTIPLY):
        arguments[0], arguments[1] = 0, phase
        kernel(arguments, threads)


class LinearFunction(torch.autograd.Function):
    """The short way: eager mode, ordinary tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, bias: Tensor | None, buffer: Tensor, order: Any) -> Tensor:  # type: ignore[override]
        y, tiled = _forward(x, theta, bias, order.addresses, order.rows, order.columns, True)
        ctx.save_for_backward(tiled, theta, buffer)
        ctx.order = order
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        if dy.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(_TWICE)
        tiled, theta, _ = ctx.saved_tensors  # raises if connections were rewired since
        order, need = ctx.order, ctx.needs_input_grad
        dx, dtheta, dbias = _backward(
            dy.contiguous(), None, tiled, theta, order.addresses, order.rows, order.columns, need[0], need[1], need[2]
        )
        return dx, dtheta, dbias, None, None


@torch.library.custom_op("lightning_deepr::linear", mutates_args=())
def linear_op(x: Tensor, theta: Tensor, bias: Tensor | None, order: Tensor, rows: int, columns: int) -> Tensor:
    """x [B, columns] -> [B, rows]; ``order`` is the buffer of a :class:`lightning_deepr.compute.order.Order`."""
    x = x.contiguous()
    if x.shape[0] == 0:
        return x.new_empty((0, rows))
    return _forward(x, theta, bias, addresses(order, rows, columns, theta.numel()), rows, columns, False)[0]


@linear_op.register_fake
def _(x: Tensor, theta: Tensor, bias: Tensor | None, order: Tensor, rows: int, columns: int) -> Tensor:
    return x.new_empty((x.shape[0], rows))


@torch.library.custom_op("lightning_deepr::linear_backward", mutates_args=())
def linear_backward_op(
    dy: Tensor, x: Tensor, theta: Tensor, order: Tensor, rows: int, columns: int, need_x: bool, need_theta: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, theta and bias; empty tensors for those not needed."""
    if dy.shape[0] == 0:
        return torch.zeros_like(x), torch.zeros_like(theta), dy.new_zeros(rows if need_bias else 0)
    places = addresses(order, rows, columns, theta.numel())
    found = _backward(dy.contiguous(), x.contiguous(), None, theta, places, rows, columns, need_x, need_theta, need_bias)
    dx, dtheta, dbias = (dy.new_empty(0) if gradient is None else gradient for gradient in found)
    return dx, dtheta, dbias


@linear_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, theta: Tensor, order: Tensor, rows: int, columns: int, need_x: bool, need_theta: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        dy.new_empty(x.shape if need_x else (0,)),
        dy.new_empty(theta.shape if need_theta else (0,)),
        dy.new_empty(rows if need_bias else 0),
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, theta, bias, order, ctx.rows, ctx.columns = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, theta, order)


def _differentiate(ctx: Any, dy: Tensor) -> Any:
    x, theta, order = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx, dtheta, dbias = linear_backward_op(dy, x, theta, order, ctx.rows, ctx.columns, need[0], need[1], ctx.has_bias and need[2])
    return (dx if need[0] else None, dtheta if need[1] else None, dbias if ctx.has_bias and need[2] else None, None, None, None)


def _refuse_twice(ctx: Any, *gradients: Tensor) -> Any:
    raise RuntimeError(_TWICE)


linear_op.register_autograd(_differentiate, setup_context=_setup)
linear_backward_op.register_autograd(_refuse_twice)


def _is_plain(x: Tensor) -> bool:
    """Whether nobody watches or transforms operators: no compiler, fake or functional tensors, transforms or profiler."""
    return (
        type(x) in (Tensor, torch.nn.Parameter)
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.autograd._profiler_enabled()
    )


def linear(x: Tensor, theta: Tensor, bias: Tensor | None, slots: Any) -> Tensor:
    """``F.linear`` with a converted weight of K connections.

    Args:
        x: [..., columns].
        theta: [K].
        bias: [rows] or None.
        slots: the :class:`lightning_deepr.connections.KSlots` of the weight.

    Returns:
        [..., rows], of x's dtype (under autocast of the autocast dtype; the sums are taken in theta's dtype).

    Raises:
        RuntimeError: the width or the dtype of x does not fit, in the words of ``nn.Linear``; a second derivative is asked for.
    """
    rows, columns = slots.rows, slots.columns
    if x.dim() == 0 or x.shape[-1] != columns:
        shape = f"{x.shape[:-1].numel()}x{x.shape[-1]}" if x.dim() else "a number"
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({shape} and {columns}x{rows})")
    cast = None
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        cast = torch.get_autocast_dtype(kind)
        x = x.to(theta.dtype)
        bias = bias if bias is None else bias.to(theta.dtype)
    elif x.dtype != theta.dtype:
        raise RuntimeError(
            f"mat1 and mat2 must have the same dtype, but got {_torch_name(x.dtype)} and {_torch_name(theta.dtype)}"
        )
    flat = x if x.dim() == 2 else x.reshape(-1, columns)
    if not slots.has_kernel(theta):
        from lightning_deepr.compute import gather

        y = gather.linear(flat, theta, bias, slots)
    elif torch.compiler.is_compiling() or not _is_plain(x):
        y = linear_op(flat, theta, bias, slots.ordered().buffer, rows, columns)
    elif flat.shape[0] == 0:
        y = linear_op(flat, theta, bias, slots.ordered().buffer, rows, columns)
    else:
        if not flat.is_contiguous():
            flat = flat.contiguous()
        order = slots.ordered()
        if torch.is_grad_enabled():
            y = LinearFunction.apply(flat, theta, bias, order.buffer, order)
        else:
            y = _forward(flat, theta, bias, order.addresses, rows, columns, False)[0]
    if cast is not None:
        y = y.to(cast)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], rows)


def _torch_name(dtype: torch.dtype) -> str:
    names = {torch.float32: "Float", torch.float64: "Double", torch.float16: "Half", torch.bfloat16: "BFloat16"}
    return names.get(dtype, str(dtype))
