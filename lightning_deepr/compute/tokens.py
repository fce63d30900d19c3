"""Sparse compute of linear layers whose input has many rows, such as the tokens of a transformer.

:mod:`lightning_deepr.compute.sparse` calls these functions where they are faster than its own kernels. The numbers are the same
up to rounding. An input that is not finite, or a gradient, is multiplied by the dense weight: there 0 * NaN is NaN, and an
output has it also where no connection comes from the entry.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from lightning_deepr.compute.order import addresses, dense_weight
from lightning_deepr.kernels.cpu.buffers import empty, kept
from lightning_deepr.kernels.cpu.fields import TokenArguments, TokenPhase, filler, pack_order

FROM = 512  # rows of an input from which on these kernels are used
# Wide layers use them from fewer rows on, per thread: elsewhere their whole input lies in another layout in a core's own cache.
WIDE, WIDEST, FROM_IF_WIDE = 4608, 1 << 14, 64  # rows plus columns of the weight
GROUPS = 16  # the most groups of blocks that have sums of their own for theta's gradient
FEW_GROUPS = 4  # so many may have, whatever their size
SUMS = 1 << 25  # the most bytes of these sums, if there are more groups
MOST_SUMS = 1 << 27  # the most bytes of the sums of few groups
DENSE = 1 << 30  # the most bytes of a weight that is built
_SMALL = 1 << 18  # multiplications for each further thread

_fill = filler(TokenArguments)
_TASK, _PHASE, _WORKER = int(TokenArguments.TASK), int(TokenArguments.PHASE), int(TokenArguments.WORKER)
_NOT_FINITE = int(TokenArguments.NOT_FINITE)
_GATHER, _MULTIPLY, _REDUCE = int(TokenPhase.GATHER), int(TokenPhase.MULTIPLY), int(TokenPhase.REDUCE)


class _Plan(NamedTuple):
    """The settings of a product, which follow from its sizes alone."""

    kernel: Any
    width: int  # rows of a block
    blocks: int
    groups: int
    work: int


def suits(batch: int, rows: int, columns: int, count: int, size: int) -> bool:
    """Tell whether these kernels are to compute a product.

    Args:
        batch: the number of rows of the input.
        rows, columns: the shape of the weight.
        count: K.
        size: the bytes of a float.
    """
    if FEW_GROUPS * count * size > MOST_SUMS:
        return False
    return batch >= FROM or (WIDE <= rows + columns <= WIDEST and batch >= FROM_IF_WIDE * torch.get_num_threads())


def _groups(blocks: int, count: int, size: int) -> int:
    return min(GROUPS, max(blocks // 2, 1), max(SUMS // max(count * size, 1), FEW_GROUPS))


@lru_cache(maxsize=512)
def _plan(batch: int, rows: int, columns: int, count: int, size: int, backward: bool) -> _Plan:
    from lightning_deepr.kernels.cpu import tokens

    lanes, vectors = tokens.tile_of(size, rows if backward else columns, backward)
    width = lanes * vectors
    blocks = -(-batch // width)
    kernel = (tokens.backward_kernel if backward else tokens.forward_kernel)(size, lanes, vectors)
    work = (rows + columns + (2 if backward else 1) * count) * width * blocks
    return _Plan(kernel, width, blocks, _groups(blocks, count, size), work)


def _threads(work: int) -> int:
    from lightning_deepr.kernels.cpu.native import threads_for

    return threads_for(work, _SMALL)


def _run(plan: _Plan, threads: int, arguments: Any, *phases: int) -> bool:
    """Run phases one after the other. Return True if a number was not finite."""
    for phase in phases:
        arguments[_PHASE], arguments[_TASK], arguments[_WORKER] = phase, 0, 0
        plan.kernel(arguments, threads)
    return bool(arguments[_NOT_FINITE])


def forward(x: Tensor, theta: Tensor, bias: Tensor | None, order: Tensor, parts: bytes, rows: int, columns: int) -> Tensor:
    """Compute y [B, rows].

    Args:
        x: [B, columns], contiguous.
        theta: [K], contiguous.
        bias: [rows], contiguous, or None.
        order: the buffer of a :class:`lightning_deepr.compute.order.Order`.
        parts: its packed addresses.
        rows, columns: the shape of the weight.
    """
    batch, count, size = x.shape[0], theta.numel(), x.element_size()
    plan = _plan(batch, rows, columns, count, size, False)
    threads = _threads(plan.work)
    y, values = empty((batch, rows), x), kept((count,), x)
    block = plan.width * columns
    scratch = kept((threads * block,), x)
    arguments = _fill(
        BATCH=batch, BLOCKS=plan.blocks, ROWS=rows, COLUMNS=columns, COUNT=count, X=x.data_ptr(), Y=y.data_ptr(),
        THETA=theta.data_ptr(), BIAS=0 if bias is None else bias.data_ptr(), VALUES=values.data_ptr(),
        SCRATCH=scratch.data_ptr(), SCRATCH_BYTES=block * size, order=parts,
    )  # fmt: skip
    if _run(plan, threads, arguments, _GATHER, _MULTIPLY) and rows * columns * size <= DENSE:
        with torch.autocast("cpu", enabled=False):
            return torch_linear(x, _weight(order, parts, theta, rows, columns), bias)
    return y


def _weight(order: Tensor, parts: bytes, theta: Tensor, rows: int, columns: int) -> Tensor:
    """Build the weight. The order may be that of its transpose, see ``compute/transposed.py``."""
    if parts == pack_order(*addresses(order, rows, columns, theta.numel())):
        return dense_weight(order, theta, rows, columns)
    return dense_weight(order, theta, columns, rows).t()


def backward(
    dy: Tensor, x: Tensor, theta: Tensor, order: Tensor, parts: bytes, rows: int, columns: int,
    need_x: bool, need_theta: bool, need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Compute the needed gradients of x, theta and bias, at least one of the first two. All tensors are contiguous."""
    batch, count, size = dy.shape[0], theta.numel(), dy.element_size()
    features = rows + columns if need_theta else rows
    plan = _plan(batch, rows, columns, count, size, True)
    threads = _threads(plan.work)
    dx = empty((batch, columns), dy) if need_x else None
    dtheta = torch.empty_like(theta) if need_theta else None
    dbias = dy.new_empty(rows) if need_bias else None
    values = kept((count if need_x else 0,), dy)
    sums, sums_bias = kept((plan.groups * count if need_theta else 0,), dy), kept((plan.groups * rows,), dy)
    block = plan.width * features
    scratch = kept((threads * block,), dy)
    arguments = _fill(
        BATCH=batch, BLOCKS=plan.blocks, GROUPS=plan.groups, ROWS=rows, COLUMNS=columns, COUNT=count, X=x.data_ptr(),
        Y=dy.data_ptr(), THETA=theta.data_ptr(), DX=0 if dx is None else dx.data_ptr(),
        DTHETA=0 if dtheta is None else dtheta.data_ptr(), DBIAS=0 if dbias is None else dbias.data_ptr(),
        VALUES=values.data_ptr(), SUMS=sums.data_ptr(), SUMS_BIAS=sums_bias.data_ptr(), SCRATCH=scratch.data_ptr(),
        SCRATCH_BYTES=block * size, order=parts,
    )  # fmt: skip
    phases = ([_GATHER] if need_x else []) + [_MULTIPLY] + ([_REDUCE] if need_theta or need_bias else [])
    if _run(plan, threads, arguments, *phases) and need_x and rows * columns * size <= DENSE:
        with torch.autocast("cpu", enabled=False):
            dx = dy.mm(_weight(order, parts, theta, rows, columns))
    return dx, dtheta, dbias
