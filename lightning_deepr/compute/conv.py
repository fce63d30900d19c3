"""Sparse compute of 2-d convolutions: neither the forward nor the backward pass builds the dense weight.

``lightning_deepr::conv2d`` and ``lightning_deepr::conv2d_backward`` are operators with fake and autograd rules, for compilers,
shape propagation and profilers. An ordinary eager call takes a shorter way to the same kernels.

The kernels cover float32 and float64 on the CPU, one group, and zeros as padding. :func:`suits` checks this. Dense compute,
with the error messages of ``nn.Conv2d``, does the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import conv2d as torch_conv2d

from lightning_deepr import kernels
from lightning_deepr.compute import flops
from lightning_deepr.compute.dense import rounded
from lightning_deepr.compute.eager import check_backward, is_plain, needs_operators
from lightning_deepr.compute.gather import TWICE
from lightning_deepr.compute.order import addresses, size_of
from lightning_deepr.compute.slots import SparseSlots
from lightning_deepr.compute.upon_base import join
from lightning_deepr.kernels.cpu.fields import ConvArguments, ConvPhase, filler, pack_order
from lightning_deepr.kernels.gate import check_values, fault

CACHE = 1 << 20  # the bytes of planes that a band may read: they fit into a second-level cache
MOST_BANDS = 8  # the limit in the backward pass: each band has K sums of its own there

Pair = tuple[int, int]


def _kernels() -> Any:
    from lightning_deepr.kernels.cpu import conv

    return conv


def _native() -> Any:
    from lightning_deepr.kernels.cpu import native

    return native


# -- geometry -------------------------------------------------------------------------------------------------------------


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _block_of(rows: int, columns: int, most: int) -> Pair:
    """Choose a block of at most ``most`` pixels (across, down) that wastes little at the edges."""
    across = -(-columns // -(-columns // most))
    down = min(most // across, rows)
    return across, -(-rows // -(-rows // down))


class Geometry:
    """One convolution as the kernels see it: sizes of planes and blocks, and a shift for each kernel position.

    Args:
        image: the shape (C, H, W) of an image.
        weight: the shape (O, C, KH, KW) of the weight.
        stride: (down, across).
        padding: (top, bottom, left, right).
        dilation: (down, across).
        lanes: the number of batch elements in a tile.
        size: the number of bytes in a float.
    """

    def __init__(
        self,
        image: tuple[int, ...],
        weight: tuple[int, ...],
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        lanes: int,
        size: int,
    ) -> None:
        most, pixel = _kernels().BLOCK, lanes * size
        inputs, height, width = image
        outputs, _, *kernel = weight
        self.out_height, self.out_width = output_size(image[1:], kernel, stride, padding, dilation)
        self.forward_block = across, down = _block_of(self.out_height, self.out_width, most)
        last, columns = _up(self.out_height, down), _up(self.out_width, across)
        # A block of the backward pass holds pixels of x that have one phase (their position modulo the stride).
        phase_rows, phase_columns = -(-height // stride[0]), -(-width // stride[1])
        self.backward_block = back_across, back_down = _block_of(phase_rows, phase_columns, most)
        back_last, back_columns = _up(phase_rows, back_down), _up(phase_columns, back_across)

        top, _, left, _ = padding
        x_rows = max((last - 1) * stride[0] + (kernel[0] - 1) * dilation[0] + 1, top + back_last * stride[0])
        x_columns = max((columns - 1) * stride[1] + (kernel[1] - 1) * dilation[1] + 1, left + back_columns * stride[1])
        # At kernel position k, the pixel phase + stride * j of x meets the pixel j + move of y.
        reach = [[k * dilation[i] for k in range(kernel[i])] for i in (0, 1)]
        phases = [[(r - start) % s for r in reach[i]] for i, (s, start) in enumerate(zip(stride, (top, left), strict=True))]
        moves = [
            [(p + start - r) // s for p, r in zip(phases[i], reach[i], strict=True)]
            for i, (s, start) in enumerate(zip(stride, (top, left), strict=True))
        ]
        least = [min(move) for move in moves]
        y_rows = max(moves[0]) - least[0] + back_last
        y_columns = max(moves[1]) - least[1] + back_columns

        # (arrays of NumPy: torch's default device, or a mode, may be another one)
        rows, columns_of = (np.array(one, np.int64) for one in reach)
        channel = np.arange(inputs, dtype=np.int64)[:, None, None] * x_rows
        self._forward_shift = np.ascontiguousarray(((channel + rows[:, None]) * x_columns + columns_of) * pixel)
        down_moves, across_moves = (np.array(one, np.int64) - first for one, first in zip(moves, least, strict=True))
        self._backward_shift = np.ascontiguousarray((down_moves[:, None] * y_columns + across_moves) * pixel)
        down_phases, across_phases = (np.array(one, np.int64) for one in phases)
        self._meets = np.ascontiguousarray(down_phases[:, None] * stride[1] + across_phases)

        self.planes = inputs * x_rows * x_columns * lanes, outputs * y_rows * y_columns * lanes  # floats of one tile
        sizes = {
            "HEIGHT": height, "WIDTH": width, "X_ROWS": x_rows, "X_COLUMNS": x_columns, "TOP": top, "LEFT": left,
            "OUT_HEIGHT": self.out_height, "OUT_WIDTH": self.out_width, "Y_ROWS": y_rows, "Y_COLUMNS": y_columns,
            "OUT_TOP": -least[0], "OUT_LEFT": -least[1],
            "KERNEL": math.prod(kernel), "STRIDE_DOWN": stride[0], "STRIDE_ACROSS": stride[1],
            "CHANNELS_IN": inputs, "CHANNELS_OUT": outputs,
        }  # fmt: skip
        band = _band(last, down, inputs * stride[0] * x_columns * pixel, last)
        self.scratch = band * columns * lanes
        self.forward_words = {
            **sizes, "SCRATCH_COLUMNS": columns, "SCRATCH_BYTES": self.scratch * size,
            "LAST_ROW": last, "BAND": band, "BANDS": -(-last // band), "SHIFT": self._forward_shift.ctypes.data,
        }  # fmt: skip
        band = _band(back_last, back_down, outputs * y_columns * pixel, MOST_BANDS)
        self.bands = -(-back_last // band)
        self.back_scratch = band * stride[0] * back_columns * stride[1] * lanes
        self.backward_words = {
            **sizes, "SCRATCH_COLUMNS": back_columns * stride[1], "SCRATCH_BYTES": self.back_scratch * size,
            "LAST_ROW": back_last, "BAND": band, "BANDS": self.bands,
            "SHIFT": self._backward_shift.ctypes.data, "MEETS": self._meets.ctypes.data,
        }  # fmt: skip


def _band(rows: int, step: int, row_bytes: int, most: int) -> int:
    """Choose the number of rows of a band: all of them if their planes fit into the cache."""
    if rows * row_bytes <= 3 * CACHE // 2:
        return rows
    return max(_up(max(CACHE // row_bytes, 1), step), _up(-(-rows // most), step))


_geometry = lru_cache(maxsize=512)(Geometry)


def output_size(
    image: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Pair:
    """Compute the size (H', W') of the output."""
    height = (image[0] + padding[0] + padding[1] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    return height, (image[1] + padding[2] + padding[3] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1


def _lanes_of(batch: int, size: int) -> int:
    lanes = 64 // size
    return lanes // 2 if batch <= lanes // 2 else lanes


# -- kernels --------------------------------------------------------------------------------------------------------------

_fill = filler(ConvArguments)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run(kernel: Any, arguments: Any, phases: Sequence[int], threads: int) -> None:
    for phase in phases:
        arguments[ConvArguments.TASK], arguments[ConvArguments.WORKER], arguments[ConvArguments.PHASE] = 0, 0, phase
        kernel(arguments, threads)


def _forward(
    x: Tensor, theta: Tensor, bias: Tensor | None, order: bytes, weight: tuple[int, ...], how: tuple[tuple[int, ...], ...]
) -> tuple[Tensor, Tensor]:
    """Compute y [B, O, H', W'] and the planes of x. x is [B, C, H, W] and contiguous."""
    conv = _kernels()
    batch, size = x.shape[0], x.element_size()
    lanes = _lanes_of(batch, size)
    tiles = -(-batch // lanes)
    geometry = _geometry(tuple(x.shape[1:]), weight, *how, lanes, size)
    y = x.new_empty((batch, weight[0], geometry.out_height, geometry.out_width))
    planes = x.new_empty(tiles * geometry.planes[0])
    work = theta.numel() * geometry.out_height * geometry.out_width + x.numel() // batch + y.numel() // batch
    threads = _native().threads_for(work * tiles * lanes, 1 << 18)
    scratch = x.new_empty(threads * geometry.scratch)
    arguments = _fill(
        BATCH=batch, TILES=tiles, COUNT=theta.numel(), X=x.data_ptr(), XP=planes.data_ptr(), Y=y.data_ptr(),
        THETA=theta.data_ptr(), BIAS=_address(bias), SCRATCH=scratch.data_ptr(), order=order, **geometry.forward_words,
    )  # fmt: skip
    kernel = conv.forward_kernel(size, lanes, *geometry.forward_block, how[0][1])
    _run(kernel, arguments, (ConvPhase.LAYOUT, ConvPhase.MULTIPLY), threads)
    return y, planes


def _backward(
    dy: Tensor, planes: Tensor | None, theta: Tensor, order: bytes, image: tuple[int, ...], weight: tuple[int, ...],
    how: tuple[tuple[int, ...], ...], need_x: bool, need_theta: bool, need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    conv = _kernels()
    batch, size = dy.shape[0], dy.element_size()
    lanes = _lanes_of(batch, size)
    tiles = -(-batch // lanes)
    if not (need_x or need_theta):
        return None, None, dy.sum((0, 2, 3)) if need_bias else None
    geometry = _geometry(image, weight, *how, lanes, size)
    dy_planes = dy.new_empty(tiles * geometry.planes[1])
    dx = dy.new_empty((batch, *image)) if need_x else None
    dtheta = torch.empty_like(theta) if need_theta else None
    dbias = dy.new_empty(weight[0]) if need_bias else None
    partial = dy.new_empty(tiles * geometry.bands * theta.numel()) if need_theta else None
    partial_bias = dy.new_empty(tiles * weight[0]) if need_bias else None
    work = 2 * theta.numel() * geometry.out_height * geometry.out_width + math.prod(image) + dy.numel() // batch
    threads = _native().threads_for(work * tiles * lanes, 1 << 18)
    scratch = dy.new_empty(threads * geometry.back_scratch)
    arguments = _fill(
        BATCH=batch, TILES=tiles, COUNT=theta.numel(), XP=_address(planes), Y=dy.data_ptr(), YP=dy_planes.data_ptr(),
        THETA=theta.data_ptr(), DX=_address(dx), DTHETA=_address(dtheta), DBIAS=_address(dbias), SCRATCH=scratch.data_ptr(),
        PARTIAL=_address(partial), PARTIAL_BIAS=_address(partial_bias), order=order, **geometry.backward_words,
    )  # fmt: skip
    kernel = conv.backward_kernel(size, lanes, *geometry.backward_block, need_x, need_theta)
    _run(kernel, arguments, (ConvPhase.LAYOUT, ConvPhase.MULTIPLY, ConvPhase.REDUCE), threads)
    return dx, dtheta, dbias


class ConvFunction(torch.autograd.Function):
    """The short way to the kernels, for eager mode and ordinary tensors."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, theta: Tensor, bias: Tensor | None, buffer: Tensor, order: Any, weight: tuple[int, ...], how: Any
    ) -> Tensor:
        y, planes = _forward(x, theta, bias, order.packed, weight, how)
        ctx.save_for_backward(planes, theta, buffer)
        ctx.order, ctx.image, ctx.weight, ctx.how = order, tuple(x.shape[1:]), weight, how
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(TWICE)
        planes, theta, _ = ctx.saved_tensors  # raises if a rewiring came in between
        check_backward(planes.dtype, (dy,), (theta, ctx.order.count))
        need = ctx.needs_input_grad[:3]
        found = _backward(dy.contiguous(), planes, theta, ctx.order.packed, ctx.image, ctx.weight, ctx.how, *need)
        return *found, None, None, None, None


# -- operators ------------------------------------------------------------------------------------------------------------


def _places(order: Tensor, theta: Tensor, weight: Sequence[int]) -> bytes:
    return pack_order(*addresses(order, weight[0], math.prod(weight[1:]), theta.numel()))


@torch.library.custom_op("lightning_deepr::conv2d", mutates_args=())
def conv2d_op(
    x: Tensor, theta: Tensor, bias: Tensor | None, order: Tensor, weight: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """Convolve x [B, C, H, W] to [B, O, H', W'].

    ``order`` is the buffer of a :class:`lightning_deepr.compute.order.Order`, ``weight`` the shape (O, C, KH, KW) and
    ``padding`` (top, bottom, left, right).
    """
    x, theta, bias = x.contiguous(), theta.contiguous(), None if bias is None else bias.contiguous()
    size = output_size(x.shape[2:], weight[2:], stride, padding, dilation)
    _check_operator(x, theta, order, weight, size, bias)
    if x.shape[0] == 0:
        return x.new_empty((0, weight[0], *size))
    how = tuple(stride), tuple(padding), tuple(dilation)
    return _forward(x, theta, bias, _places(order, theta, weight), tuple(weight), how)[0]


def _check_operator(
    x: Tensor, theta: Tensor, order: Tensor, weight: Sequence[int], size: Pair, bias: Tensor | None = None,
    dy: Tensor | None = None,
) -> None:  # fmt: skip
    """Refuse arguments of an operator that do not fit each other: a compiled graph may hold tensors that were exchanged."""
    words = size_of(weight[0], math.prod(weight[1:]), theta.numel())
    for word, value, shape, dtype in (
        ("x", x, (x.shape[0], weight[1], *x.shape[2:]), x.dtype),
        ("theta", theta, (theta.numel(),), x.dtype),
        ("the order of the connections", order, (words,), torch.int32),
        ("the bias", bias, (weight[0],), x.dtype),
        ("the gradient", dy, (x.shape[0], weight[0], *size), x.dtype),
    ):
        found = None if value is None else fault(value, shape, dtype, x.device)
        if found is not None:
            raise RuntimeError(f"lightning_deepr::conv2d: {word}: {found}.")
    if x.dtype not in kernels.TYPES or not x.is_cpu or x.dim() != 4 or min(size) < 1:
        raise RuntimeError(
            f"lightning_deepr::conv2d: expected float32 or float64 images on the CPU, not smaller than the kernel, found "
            f"{x.dtype} {tuple(x.shape)} on {x.device}."
        )


@conv2d_op.register_fake
def _(
    x: Tensor, theta: Tensor, bias: Tensor | None, order: Tensor, weight: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    return x.new_empty((x.shape[0], weight[0], *output_size(x.shape[2:], weight[2:], stride, padding, dilation)))


@torch.library.custom_op("lightning_deepr::conv2d_backward", mutates_args=())
def conv2d_backward_op(
    dy: Tensor, x: Tensor, theta: Tensor, order: Tensor, weight: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], need_x: bool, need_theta: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of x, theta and bias, with an empty tensor for each gradient that is not needed."""
    if dy.shape[0] == 0:
        dx = x.new_zeros(x.shape if need_x else (0,))
        return dx, theta.new_zeros(theta.shape if need_theta else (0,)), dy.new_zeros(weight[0] if need_bias else 0)
    dy, x, theta = dy.contiguous(), x.contiguous(), theta.contiguous()
    size = output_size(x.shape[2:], weight[2:], stride, padding, dilation)
    _check_operator(x, theta, order, weight, size, dy=dy)
    how, places = (tuple(stride), tuple(padding), tuple(dilation)), _places(order, theta, weight)
    # A graph keeps x, not its planes: the first phase of the forward kernel makes them again.
    planes = _planes(x, tuple(weight), how) if need_theta else None
    image = tuple(x.shape[1:])
    found = _backward(dy, planes, theta, places, image, tuple(weight), how, need_x, need_theta, need_bias)
    dx, dtheta, dbias = (dy.new_empty(0) if gradient is None else gradient for gradient in found)
    return dx, dtheta, dbias


def _planes(x: Tensor, weight: tuple[int, ...], how: tuple[tuple[int, ...], ...]) -> Tensor:
    conv = _kernels()
    batch, size = x.shape[0], x.element_size()
    lanes = _lanes_of(batch, size)
    tiles = -(-batch // lanes)
    geometry = _geometry(tuple(x.shape[1:]), weight, *how, lanes, size)
    planes = x.new_empty(tiles * geometry.planes[0])
    arguments = _fill(BATCH=batch, TILES=tiles, X=x.data_ptr(), XP=planes.data_ptr(), **geometry.forward_words)
    kernel = conv.forward_kernel(size, lanes, *geometry.forward_block, how[0][1])
    _run(kernel, arguments, (ConvPhase.LAYOUT,), _native().threads_for(planes.numel(), 1 << 18))
    return planes


@conv2d_backward_op.register_fake
def _(
    dy: Tensor, x: Tensor, theta: Tensor, order: Tensor, weight: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], need_x: bool, need_theta: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        dy.new_empty(x.shape if need_x else (0,)),
        dy.new_empty(theta.shape if need_theta else (0,)),
        dy.new_empty(weight[0] if need_bias else 0),
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, theta, bias, order, *ctx.how = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, theta, order)


def _differentiate(ctx: Any, dy: Tensor) -> Any:
    x, theta, order = ctx.saved_tensors
    need = *ctx.needs_input_grad[:2], ctx.has_bias and ctx.needs_input_grad[2]
    found = conv2d_backward_op(dy, x, theta, order, *ctx.how, *need)
    return *(gradient if needed else None for gradient, needed in zip(found, need, strict=True)), *[None] * 5


def _refuse_twice(ctx: Any, *gradients: Tensor) -> Any:
    raise RuntimeError(TWICE)


conv2d_op.register_autograd(_differentiate, setup_context=_setup)
conv2d_backward_op.register_autograd(_refuse_twice)


# -- what layers call -----------------------------------------------------------------------------------------------------


def suits(module: nn.Module, x: Tensor) -> bool:
    """Tell whether :func:`conv2d` can compute this layer for this input. If it can't, dense compute does.

    Args:
        module: an ``nn.Conv2d`` with a converted weight.
        x: the input of the layer, [B, C, H, W].
    """
    if not isinstance(module, nn.Conv2d) or module.groups != 1 or module.padding_mode != "zeros" or x.dim() != 4:
        return False
    holder: Any = module._modules["parametrizations"]._modules["weight"]  # type: ignore[union-attr]
    theta: Tensor = holder._parameters["original"]
    if not kernels.suits(theta) or x.device.type != "cpu" or x.shape[1] != module.in_channels:
        return False
    narrow: torch.dtype | None = holder._modules["0"].narrow
    if x.dtype != (narrow or theta.dtype) and not torch.is_autocast_enabled("cpu"):
        return False
    around, image = _around(module.padding, module.kernel_size, module.dilation), x.shape[2:]
    height, width = output_size(image, module.kernel_size, module.stride, around, module.dilation)
    return image[0] > 0 and image[1] > 0 and height > 0 and width > 0


def stretch_of(image: Sequence[int], kernel: Sequence[int], around: Sequence[int]) -> float:
    """Compute how many times more pixels a padded image has than with the padding of a kernel without dilation; at least 1.

    Args:
        image: (H, W).
        kernel: (down, across).
        around: the padding (top, bottom, left, right).
    """
    padded = (image[0] + around[0] + around[1]) * (image[1] + around[2] + around[3])
    ordinary = (image[0] + kernel[0] - 1) * (image[1] + kernel[1] - 1)
    return max(1.0, padded / ordinary)


def padding_of(module: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return the padding (top, bottom, left, right) of a layer."""
    return _around(module.padding, module.kernel_size, module.dilation)


def _pair(value: int | Sequence[int]) -> Pair:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def _around(padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, int, int, int]:
    """Resolve a padding argument to (top, bottom, left, right)."""
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":  # of an odd number, the bottom and the right get one more, as in torch
        down, across = ((k - 1) * d for k, d in zip(kernel, dilation, strict=True))
        return down // 2, down - down // 2, across // 2, across - across // 2
    assert not isinstance(padding, str)
    down, across = _pair(padding)
    return down, down, across, across


def conv2d(
    x: Tensor, theta: Tensor, bias: Tensor | None, slots: SparseSlots, stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0, dilation: int | Sequence[int] = 1,
) -> Tensor:  # fmt: skip
    """Compute ``F.conv2d`` with a converted weight of K connections.

    If no kernel takes theta, the dense weight is built.

    Args:
        x: [B, C, H, W].
        theta: [K].
        bias: [O] or None.
        slots: the :class:`lightning_deepr.weights.k_slots.KSlots` of the weight of shape (O, C, KH, KW).
        stride, padding, dilation: as in ``F.conv2d``.

    Returns:
        [B, O, H', W'] in x's dtype. Under autocast it has the autocast dtype, and the sums are taken in theta's dtype.

    Raises:
        RuntimeError: the channels, the size or the dtype of x do not fit, or the caller asks for a second derivative.
    """
    weight = tuple(slots.shape)
    stride, dilation = _pair(stride), _pair(dilation)
    around = _around(padding, weight[2:], dilation)
    if x.dim() != 4:
        raise RuntimeError(f"Expected input[B, {weight[1]}, H, W] to a sparse convolution, but got {list(x.shape)}")
    autocast = (
        torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and torch.float64 not in (x.dtype, theta.dtype)
    )
    size = output_size(x.shape[2:], weight[2:], stride, around, dilation)
    own = slots.narrow or theta.dtype
    fits = x.device == theta.device and x.shape[1] == weight[1] and min(size) > 0 and (autocast or x.dtype == own)
    if bias is not None:
        fits = fits and bias.device == theta.device and bias.shape == weight[:1] and (autocast or bias.dtype == own)
    if not fits:  # torch writes the error message; one expanded number stands for the weight
        return torch_conv2d(x, theta.to(own).sum().expand(weight), bias, stride, padding, dilation)
    if theta.numel() != slots.count:
        check_values(theta, slots)  # raises
    if not torch.compiler.is_dynamo_compiling() and needs_operators(convolution=True) and not slots.is_large:
        return torch_conv2d(
            F.pad(x, (around[2], around[3], around[0], around[1])), slots.weight_of(theta), bias, stride, 0, dilation
        )
    if slots.adapts:
        if not kernels.suits(theta):
            return torch_conv2d(x, slots.weight_of(theta), bias, stride, padding, dilation)
        y = torch_conv2d(x, slots.base.detach(), bias, stride, padding, dilation)
        return join(y, _product(x, theta, None, slots, stride, around, dilation, autocast))
    return _product(x, theta, bias, slots, stride, around, dilation, autocast, padding)


def _product(
    x: Tensor, theta: Tensor, bias: Tensor | None, slots: SparseSlots, stride: Pair, around: tuple[int, int, int, int],
    dilation: Pair, autocast: bool, padding: str | int | Sequence[int] = 0,
) -> Tensor:  # fmt: skip
    """Compute :func:`conv2d` with the connections alone."""
    weight = tuple(slots.shape)
    cast = None
    if autocast:
        cast = torch.get_autocast_dtype(x.device.type)
    elif slots.narrow is not None and kernels.suits(theta):
        cast, theta = slots.narrow, theta if slots.adapts else rounded(theta, slots.narrow)
    if cast is not None:
        x = x.to(theta.dtype)
        bias = bias if bias is None else bias.to(theta.dtype)
    theta = theta.contiguous()  # kernels take addresses and no strides
    bias = bias if bias is None else bias.contiguous()
    if not kernels.suits(theta):
        y = torch_conv2d(x, slots.dense(theta), bias, stride, padding, dilation)
        return y if cast is None else y.to(cast)
    order = slots.ordered()
    if torch.compiler.is_compiling() or not is_plain(x) or x.shape[0] == 0:
        if not torch.compiler.is_compiling():
            flops.register()
        y = conv2d_op(x, theta, bias, order.buffer, weight, stride, around, dilation)
    elif torch.is_grad_enabled():
        y = ConvFunction.apply(x.contiguous(), theta, bias, order.buffer, order, weight, (stride, around, dilation))
    else:
        y = _forward(x.contiguous(), theta, bias, order.packed, weight, (stride, around, dilation))[0]
    return y if cast is None else y.to(cast)
