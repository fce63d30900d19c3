"""Sparse compute of linear layers: neither the forward nor the backward pass builds the dense weight.

``lightning_deepr::linear`` and ``lightning_deepr::linear_backward`` are operators with fake and autograd rules, for compilers,
shape propagation and profilers. An ordinary eager call takes a shorter way to the same kernels, since the call of an operator
takes longer than a small layer.

If there is no kernel (another device or dtype, no numba), :mod:`lightning_deepr.compute.gather` computes the same in plain
PyTorch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear as torch_linear

from lightning_deepr.compute import flops, gpu_check, sparse_input, tokens
from lightning_deepr.compute.dense import rounded
from lightning_deepr.compute.eager import (
    TRACED,
    check_backward,
    dispatch_modes,
    function_modes,
    is_jit_tracing,
    is_plain,
    is_recorded,
    needs_operators,
    transforms,
)
from lightning_deepr.compute.gather import TWICE
from lightning_deepr.compute.order import addresses, size_of
from lightning_deepr.compute.slots import SparseSlots
from lightning_deepr.compute.upon_base import join
from lightning_deepr.kernels.cpu.buffers import LARGE, empty, scratch
from lightning_deepr.kernels.cpu.fields import LinearArguments, LinearPhase, pack_order, packer, writable
from lightning_deepr.kernels.gate import check_values, fault


class _Plan(NamedTuple):
    """The settings of a product, which follow from its sizes alone."""

    kernel: Any  # compiled for (bytes per float, lanes, vectors)
    size: int  # bytes per float
    lanes: int
    vectors: int
    tiles: int
    tiled_x: int  # entries
    tiled_y: int  # entries
    work: int  # multiplications and copied entries
    large: bool  # True if a buffer is large enough for pages of its own


@lru_cache(maxsize=512)
def _plan(batch: int, rows: int, columns: int, count: int, size: int, backward: bool) -> _Plan:
    from lightning_deepr.kernels.cpu import linear

    lanes, vectors = linear.tile_of(batch, size, max(rows, columns))
    width = lanes * vectors
    tiles = -(-batch // width)
    work = (rows + columns + (2 if backward else 1) * count) * width * tiles
    kernel = (linear.backward_kernel if backward else linear.forward_kernel)(size, lanes, vectors)
    return _Plan(
        kernel,
        size,
        lanes,
        vectors,
        tiles,
        tiles * columns * width,
        tiles * rows * width,
        work,
        tiles * width * max(rows, columns) * size >= LARGE,
    )


_pack = packer(LinearArguments)  # (PHASE is ALL where it is not given)
# (a member of an enumeration takes longer to look up)
_TASK, _PHASE, _TILE = int(LinearArguments.TASK), int(LinearArguments.PHASE), int(LinearArguments.TILE)
_TRANSPOSE, _MULTIPLY = int(LinearPhase.TRANSPOSE), int(LinearPhase.MULTIPLY)
_KERNEL_TYPES = (torch.float32, torch.float64)
_STRIDED = torch.strided
_is_profiled, _casts, _with_gradients = torch.autograd._profiler_enabled, torch.is_autocast_enabled, torch.is_grad_enabled
_SMALL = 1 << 18  # up to this amount of work one thread does it alone


def _forward(
    x: Tensor, theta: Tensor, bias: Tensor | None, buffer: Tensor, order: bytes, rows: int, columns: int
) -> tuple[Tensor, Tensor | None]:
    """Compute y [B, rows] and, if the kernel has made them, the tiles of x. x is [B, columns] and contiguous."""
    batch = x.shape[0]
    if (batch >= tokens.FROM or rows + columns >= tokens.WIDE) and tokens.suits(
        batch, rows, columns, theta.shape[0], x.element_size()
    ):
        return tokens.forward(x, theta, bias, buffer, order, rows, columns), None
    plan = _plan(batch, rows, columns, theta.shape[0], x.element_size(), False)
    if plan.large:
        y, tiled = empty((batch, rows), x), empty((plan.tiled_x,), x)
    else:
        y, tiled = x.new_empty((batch, rows)), x.new_empty(plan.tiled_x)
    packed = _pack(
        BATCH=batch, TILES=plan.tiles, ROWS=rows, COLUMNS=columns, X=x.data_ptr(), XT=tiled.data_ptr(), Y=y.data_ptr(),
        THETA=theta.data_ptr(), BIAS=0 if bias is None else bias.data_ptr(), PARTS=plan.vectors, order=order,
    )  # fmt: skip
    _run(plan, packed)
    return y, tiled


def _backward(
    dy: Tensor, x: Tensor | None, tiled: Tensor | None, theta: Tensor, buffer: Tensor, order: bytes, rows: int, columns: int,
    need_x: bool, need_theta: bool, need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Compute the needed gradients of x, theta and bias, from x or, if there are any, from its tiles."""
    if not (need_x or need_theta):
        return None, None, dy.sum(0) if need_bias else None
    batch = dy.shape[0]
    if (
        x is not None
        and (batch >= tokens.FROM or rows + columns >= tokens.WIDE)
        and tokens.suits(batch, rows, columns, theta.shape[0], dy.element_size())
    ):
        return tokens.backward(dy, x, theta, buffer, order, rows, columns, need_x, need_theta, need_bias)
    plan = _plan(batch, rows, columns, theta.shape[0], dy.element_size(), True)
    at, held = scratch(plan.tiled_y * plan.size, dy) if need_x else (0, None)  # the tiles of dy
    source = 0
    if tiled is None:
        assert x is not None
        tiled, source = empty((plan.tiled_x,), dy) if plan.large else dy.new_empty(plan.tiled_x), x.data_ptr()
    dx = (empty((batch, columns), dy) if plan.large else dy.new_empty((batch, columns))) if need_x else None
    dtheta = torch.empty_like(theta) if need_theta else None
    dbias = dy.new_empty(rows) if need_bias else None
    packed = _pack(
        BATCH=batch, TILES=plan.tiles, ROWS=rows, COLUMNS=columns, X=source, XT=tiled.data_ptr(), Y=dy.data_ptr(),
        YT=at, THETA=theta.data_ptr(), DX=0 if dx is None else dx.data_ptr(),
        DTHETA=0 if dtheta is None else dtheta.data_ptr(), DBIAS=0 if dbias is None else dbias.data_ptr(),
        PARTS=plan.vectors, order=order,
    )  # fmt: skip
    _run(plan, packed, plan.tiles if need_x else 1)
    del held
    return dx, dtheta, dbias


def _run(plan: _Plan, packed: bytes, passes: int = 1) -> None:
    if plan.work <= _SMALL:
        plan.kernel.alone(packed)
        return
    from lightning_deepr.kernels.cpu.native import threads_for

    threads = threads_for(plan.work, _SMALL)
    if threads == 1:
        plan.kernel.alone(packed)
        return
    several = writable(packed)
    several[_PHASE] = _TRANSPOSE
    plan.kernel(several, threads)
    several[_PHASE] = _MULTIPLY
    for tile in range(passes):
        several[_TASK], several[_TILE] = 0, tile
        plan.kernel(several, threads)


class LinearFunction(torch.autograd.Function):
    """The short way to the kernels, for eager mode and ordinary tensors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, theta: Tensor, bias: Tensor | None, buffer: Tensor, order: Any) -> Tensor:  # type: ignore[override]
        y, tiled = _forward(x, theta, bias, buffer, order.packed, order.rows, order.columns)
        # x itself costs nothing where its maker keeps it too; its tiles save the time to make them again
        ctx.tiled = tiled is not None and tiled.nbytes < LARGE
        ctx.save_for_backward(tiled if ctx.tiled else x, theta, buffer)
        ctx.order = order
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        if _with_gradients():  # create_graph=True
            raise RuntimeError(TWICE)
        kept, theta, buffer = ctx.saved_tensors  # raises if a rewiring came in between
        x, tiled = (None, kept) if ctx.tiled else (kept, None)
        order, need = ctx.order, ctx.needs_input_grad
        if (  # the ordinary case of check_backward, without a call
            type(dy) is not Tensor
            or theta.numel() != order.count
            or theta.dtype is not kept.dtype
            or not theta.is_contiguous()
            or dispatch_modes()
            or transforms()
            or is_jit_tracing()
        ):
            check_backward(kept.dtype, (dy,), (theta, order.count))
        if x is not None and x.shape != (dy.shape[0], order.columns):
            raise RuntimeError(f"x was exchanged between the forward and the backward pass: found shape {tuple(x.shape)}.")
        dx, dtheta, dbias = _backward(
            dy.contiguous(), x, tiled, theta, buffer, order.packed, order.rows, order.columns, need[0], need[1], need[2]
        )
        return dx, dtheta, dbias, None, None


@torch.library.custom_op("lightning_deepr::linear", mutates_args=())
def linear_op(x: Tensor, theta: Tensor, bias: Tensor | None, order: Tensor, rows: int, columns: int) -> Tensor:
    """Multiply x [B, columns] to [B, rows]. ``order`` is the buffer of a :class:`lightning_deepr.compute.order.Order`."""
    x, theta, bias = x.contiguous(), theta.contiguous(), None if bias is None else bias.contiguous()
    _check_operator(x, theta, order, rows, columns, bias)
    if x.shape[0] == 0:
        return x.new_empty((0, rows))
    return _forward(x, theta, bias, order, pack_order(*addresses(order, rows, columns, theta.numel())), rows, columns)[0]


def _check_operator(
    x: Tensor, theta: Tensor, order: Tensor, rows: int, columns: int, bias: Tensor | None = None, dy: Tensor | None = None
) -> None:
    """Refuse arguments of an operator that do not fit each other: a compiled graph may hold tensors that were exchanged."""
    batch = x.shape[0]
    for word, value, shape, dtype in (
        ("x", x, (batch, columns), x.dtype),
        ("theta", theta, (theta.numel(),), x.dtype),
        ("the order of the connections", order, (size_of(rows, columns, theta.numel()),), torch.int32),
        ("the bias", bias, (rows,), x.dtype),
        ("the gradient", dy, (batch, rows), x.dtype),
    ):
        found = None if value is None else fault(value, shape, dtype, x.device)
        if found is not None:
            raise RuntimeError(f"lightning_deepr::linear: {word}: {found}.")
    if x.dtype not in _KERNEL_TYPES or not x.is_cpu:
        raise RuntimeError(f"lightning_deepr::linear: expected float32 or float64 on the CPU, found {x.dtype} on {x.device}.")


@linear_op.register_fake
def _(x: Tensor, theta: Tensor, bias: Tensor | None, order: Tensor, rows: int, columns: int) -> Tensor:
    return x.new_empty((x.shape[0], rows))


@torch.library.custom_op("lightning_deepr::linear_backward", mutates_args=())
def linear_backward_op(
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
    """Compute the gradients of x, theta and bias, with an empty tensor for each gradient that is not needed."""
    if dy.shape[0] == 0:
        return (
            dy.new_zeros(x.shape if need_x else (0,)),
            dy.new_zeros(theta.shape if need_theta else (0,)),
            dy.new_zeros(rows if need_bias else 0),
        )
    dy, x, theta = dy.contiguous(), x.contiguous(), theta.contiguous()
    _check_operator(x, theta, order, rows, columns, dy=dy)
    places = pack_order(*addresses(order, rows, columns, theta.numel()))
    found = _backward(dy, x, None, theta, order, places, rows, columns, need_x, need_theta, need_bias)
    dx, dtheta, dbias = (dy.new_empty(0) if gradient is None else gradient for gradient in found)
    return dx, dtheta, dbias


@linear_backward_op.register_fake
def _(
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
    dx, dtheta, dbias = linear_backward_op(
        dy, x, theta, order, ctx.rows, ctx.columns, need[0], need[1], ctx.has_bias and need[2]
    )
    return (dx if need[0] else None, dtheta if need[1] else None, dbias if ctx.has_bias and need[2] else None, None, None, None)


def _refuse_twice(ctx: Any, *gradients: Tensor) -> Any:
    raise RuntimeError(TWICE)


linear_op.register_autograd(_differentiate, setup_context=_setup)
linear_backward_op.register_autograd(_refuse_twice)


def is_ordinary(x: Tensor, theta: Tensor) -> bool:
    """Tell whether a call is an ordinary one: plain CPU tensors, and nothing watches the operators."""
    return not (
        type(x) is not Tensor
        or x.layout is not _STRIDED
        or x.is_nested
        or not x.is_cpu
        or not theta.is_cpu
        or dispatch_modes()
        or transforms()
        or _is_profiled()
        or is_jit_tracing()
        or forward_ad._current_level >= 0
        or (function_modes() and is_recorded())
        # kernels take addresses, and no types, sizes or strides
        or (type(theta) is not torch.nn.Parameter and type(theta) is not Tensor)
        or not theta.is_contiguous()
    )


def is_quick(x: Tensor, theta: Tensor, slots: SparseSlots) -> bool:
    """Tell whether a call is an ordinary one, and all has one dtype for which there are kernels."""
    return (
        x.dtype is theta.dtype
        and slots.narrow is None
        and x.dtype in _KERNEL_TYPES
        and not _casts("cpu")
        and is_ordinary(x, theta)
    )


def quick_linear(x: Tensor, theta: Tensor, bias: Tensor | None, slots: SparseSlots) -> Tensor | None:
    """Compute :func:`linear` for an ordinary call with few checks; return None if the call needs all of them.

    A small layer takes some 10 microseconds, so every attribute access counts.
    """
    order = slots.order
    if order is None or slots.adapts or not is_quick(x, theta, slots):
        return None
    shape = x.shape
    if (
        len(shape) != 2
        or shape[1] != order.columns
        or not shape[0]
        or not x.is_contiguous()
        or theta.numel() != order.count
        or order.is_stale(slots.places)
    ):
        return None
    if bias is not None and (
        bias.dtype is not x.dtype or bias.shape != order.bias_shape or not bias.is_contiguous() or not bias.is_cpu
    ):
        return None
    if _with_gradients():
        return LinearFunction.apply(x, theta, bias, order.buffer, order)  # type: ignore[no-any-return]
    return _forward(x, theta, bias, order.buffer, order.packed, order.rows, order.columns)[0]


def linear(x: Tensor, theta: Tensor, bias: Tensor | None, slots: SparseSlots) -> Tensor:
    """Compute ``F.linear`` with a converted weight of K connections.

    Args:
        x: [..., columns], also a sparse tensor.
        theta: [K].
        bias: [rows] or None.
        slots: the :class:`lightning_deepr.weights.k_slots.KSlots` of the weight.

    Returns:
        [..., rows] in x's dtype. Under autocast it has the autocast dtype, and the sums are taken in theta's dtype. If the
        weight has fewer bits than theta (bfloat16, float16), the sums are taken in theta's, too.

    Raises:
        RuntimeError: the width or the dtype of x does not fit (the message is that of ``nn.Linear``), or the caller asks for a
            second derivative.
    """
    if not isinstance(x, Tensor):  # torch.fx records with proxies
        return torch_linear(x, slots.weight_of(theta), bias)
    if slots.adapts and (x.layout is not _STRIDED or x.is_nested):
        return torch_linear(x, slots.weight_of(theta), bias)
    if x.layout is not _STRIDED or x.is_nested:
        return sparse_input.linear(x, theta, bias, slots, linear)
    in_operators = torch.compiler.is_exporting() if torch.compiler.is_dynamo_compiling() else needs_operators()
    if in_operators and not slots.is_large:
        return torch_linear(x, slots.weight_of(theta), bias)
    if slots.adapts:
        y = torch_linear(x, slots.base.detach(), bias)
        return join(y, _product(x, theta, None, slots, in_operators))
    return _product(x, theta, bias, slots, in_operators)


def _product(x: Tensor, theta: Tensor, bias: Tensor | None, slots: SparseSlots, in_operators: bool) -> Tensor:
    """Compute :func:`linear` with the connections alone."""
    rows, columns = slots.rows, slots.columns
    if x.device != theta.device or x.device.type == "meta" or x.dim() == 0 or x.shape[-1] != columns:
        return _as_torch_does(x, theta, bias, rows, columns)
    cast = None
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.is_floating_point() and torch.float64 not in (x.dtype, theta.dtype):
        cast = torch.get_autocast_dtype(kind)
        x = x.to(theta.dtype)
        bias = bias if bias is None else bias.to(theta.dtype)
    elif slots.narrow is not None:
        if x.dtype is not slots.narrow or (bias is not None and bias.dtype is not slots.narrow):
            return _as_torch_does(x, theta.to(slots.narrow), bias, rows, columns)
        values = theta if slots.adapts else rounded(theta, slots.narrow)
        cast, x, theta = slots.narrow, x.to(theta.dtype), values
        bias = bias if bias is None else bias.to(theta.dtype)
    elif x.dtype != theta.dtype:
        return _as_torch_does(x, theta, bias, rows, columns)
    if theta.numel() != slots.count:
        check_values(theta, slots)  # raises
    if bias is not None and (bias.shape != (rows,) or bias.dtype != theta.dtype or bias.device != theta.device):
        if bias.dtype != theta.dtype or bias.device != theta.device:
            return _as_torch_does(x.reshape(-1, columns)[:0], theta, bias, rows, columns)
        y = _product(x, theta, None, slots, in_operators) + bias  # F.linear takes every bias that broadcasts
        return y if cast is None else y.to(cast)
    # kernels take addresses and no strides
    theta = theta.contiguous()
    bias = bias if bias is None else bias.contiguous()
    flat = x if x.dim() == 2 else x.reshape(-1, columns)
    if (
        not torch.compiler.is_dynamo_compiling()
        and dispatch_modes() == 0
        and transforms() is None
        and gpu_check.multiplies(theta, slots)
    ):
        from lightning_deepr.compute import sparse_gpu

        y = sparse_gpu.linear(flat, theta, bias, slots)
    elif not slots.has_kernel(theta):
        from lightning_deepr.compute import gather

        y = gather.linear(flat, theta, bias, slots)
    elif in_operators and not torch.compiler.is_dynamo_compiling() and not is_recorded():
        raise RuntimeError(f"Forward-mode differentiation of a weight of more than 1 GiB is not possible. {TRACED}")
    elif not torch.compiler.is_dynamo_compiling() and transforms() is not None:
        from lightning_deepr.compute.transforms import TransformedLinear

        y = TransformedLinear.apply(flat, theta, bias, slots.ordered().buffer, rows, columns)
    elif torch.compiler.is_dynamo_compiling() or not is_plain(x) or flat.shape[0] == 0:
        if not torch.compiler.is_dynamo_compiling():
            flops.register()
        y = linear_op(flat, theta, bias, slots.ordered().buffer, rows, columns)
    else:
        if not flat.is_contiguous():
            flat = flat.contiguous()
        order = slots.ordered()
        if torch.is_grad_enabled():
            y = LinearFunction.apply(flat, theta, bias, order.buffer, order)
        else:
            y = _forward(flat, theta, bias, order.buffer, order.packed, rows, columns)[0]
    if cast is not None:
        y = y.to(cast)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], rows)


def _as_torch_does(x: Tensor, theta: Tensor, bias: Tensor | None, rows: int, columns: int) -> Tensor:
    """Call torch for its error message, or for the shape on the meta device; one expanded number stands for the weight."""
    return torch_linear(x, theta.sum().expand(rows, columns), bias)
