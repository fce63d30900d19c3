"""Dense compute of linear layers with a connection at every place, whose slots are in the order of the places (K = N).

The weight is theta with its signs, and it is never written to memory as a whole: a small input is multiplied by the kernels of
:mod:`lightning_deepr.kernels.cpu.full`; for another one torch multiplies blocks of rows that have got their signs in a core's
own cache.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_deepr.kernels.cpu.buffers import empty, kept, room
from lightning_deepr.kernels.cpu.fields import FullArguments, FullPhase, filler

NEAR = 1 << 20  # the most bytes of an input, or of its gradient, for the kernels: it has to stay in a core's own cache
BLOCK, ROWS = 1 << 21, 256  # bytes and rows of a block that torch multiplies: of a smaller one it would be slower
MANY = 1024  # rows of an input from which on a weight that is built once costs less than blocks
LEAST = 6  # rows of an input, of a weight: the kernels compute so many together
_SMALL = 1 << 18  # multiplications for each further thread

_fill = filler(FullArguments)
_TASK, _PHASE, _WORKER = int(FullArguments.TASK), int(FullArguments.PHASE), int(FullArguments.WORKER)
_NOT_FINITE = int(FullArguments.NOT_FINITE)
_LAYOUT, _MULTIPLY = int(FullPhase.LAYOUT), int(FullPhase.MULTIPLY)


class _Plan(NamedTuple):
    """The settings of a product, which follow from its sizes alone."""

    forward: Any
    input: Any
    theta: Any
    lanes: int
    width: int  # floats of a row of sums
    tiles: int  # of the batch
    padded: int  # rows of all tiles
    work: int


@cache
def _vectors(size: int) -> tuple[int, int]:
    """Return the lanes of a vector, and the vectors of a row of sums: six rows fill the registers."""
    from lightning_deepr.kernels.cpu.tokens import has_long_vectors

    return (64 // size, 4) if has_long_vectors() else (32 // size, 2)


@lru_cache(maxsize=512)
def _plan(batch: int, rows: int, columns: int, size: int) -> _Plan | None:
    """Choose the kernels; None: torch is to multiply."""
    lanes, vectors = _vectors(size)
    if batch < LEAST or rows < LEAST or columns < lanes or max(batch, lanes) * max(rows, columns) * size > NEAR:
        return None
    from lightning_deepr.kernels.cpu import full

    across = min(vectors, -(-batch // lanes))
    tiles = -(-batch // (lanes * across))
    return _Plan(
        full.forward_kernel(size, lanes, across), full.input_kernel(size, lanes, vectors),
        full.theta_kernel(size, lanes, vectors), lanes, lanes * vectors, tiles, tiles * lanes * across, batch * rows * columns,
    )  # fmt: skip


def sign_bits(signs: Tensor, rows: int, columns: int) -> Tensor:
    """Pack the signs [N] of a weight [rows, columns]: a bit for each place, and whole bytes for each row."""
    from lightning_deepr.kernels.cpu.full import SPARE

    packed = np.packbits((signs.detach().view(rows, columns) < 0).numpy(), axis=1, bitorder="little")
    found = torch.zeros(packed.size + SPARE, dtype=torch.uint8, device="cpu")
    found[: packed.size] = torch.from_numpy(packed).view(-1)
    return found


def _threads(work: int) -> int:
    from lightning_deepr.kernels.cpu.native import threads_for

    return threads_for(work, _SMALL)


def _run(kernel: Any, threads: int, arguments: Any) -> None:
    if threads == 1:
        kernel(arguments)
        return
    for phase in (_LAYOUT, _MULTIPLY):
        arguments[_PHASE], arguments[_TASK], arguments[_WORKER] = phase, 0, 0
        kernel(arguments, threads)


def forward(x: Tensor, theta: Tensor, bias: Tensor | None, bits: Tensor, rows: int, columns: int) -> Tensor:
    """Compute y [B, rows].

    Args:
        x: [B, columns], contiguous.
        theta: [rows * columns], contiguous.
        bias: [rows], contiguous, or None.
        bits: what :func:`sign_bits` returned.
        rows, columns: the shape of the weight.
    """
    from lightning_deepr.kernels.cpu.full import DOWN, GROUP

    batch, size = x.shape[0], x.element_size()
    plan = _plan(batch, rows, columns, size)
    y = empty((batch, rows), x)
    if plan is None:
        for first, end, block in _blocks(theta, bits, rows, columns):
            if bias is None:
                torch.mm(x, block.t(), out=y[:, first:end])
            else:
                torch.addmm(bias[first:end], x, block.t(), out=y[:, first:end])
        return y
    threads = _threads(plan.work)
    own, laid = (DOWN * columns + (GROUP + DOWN) * plan.padded + 64 // size) * size, columns * plan.padded * size
    at, held = room(laid + threads * own, x)
    arguments = _fill(
        BATCH=batch, TILES=plan.tiles, ROWS=rows, COLUMNS=columns, X=x.data_ptr(), XT=at, Y=y.data_ptr(),
        THETA=theta.data_ptr(), BITS=bits.data_ptr(), BITS_ROW=-(-columns // 8), BIAS=0 if bias is None else bias.data_ptr(),
        SCRATCH=at + laid, SCRATCH_BYTES=own,
    )  # fmt: skip
    _run(plan.forward, threads, arguments)
    del held
    return y


def backward_input(dy: Tensor, theta: Tensor, bits: Tensor, rows: int, columns: int) -> Tensor:
    """Compute dx [B, columns]. All tensors are contiguous."""
    batch, size = dy.shape[0], dy.element_size()
    plan = _plan(batch, rows, columns, size)
    dx = empty((batch, columns), dy)
    if plan is None:
        for first, end, block in _blocks(theta, bits, rows, columns):
            if first == 0:
                torch.mm(dy[:, :end], block, out=dx)
            else:
                dx.addmm_(dy[:, first:end], block)
        return dx
    threads = _threads(plan.work)
    own = rows * plan.width * size
    at, held = room(threads * own, dy)
    arguments = _fill(
        BATCH=batch, ROWS=rows, COLUMNS=columns, Y=dy.data_ptr(), THETA=theta.data_ptr(), BITS=bits.data_ptr(),
        BITS_ROW=-(-columns // 8), DX=dx.data_ptr(), SCRATCH=at, SCRATCH_BYTES=own,
    )  # fmt: skip
    plan.input(arguments, threads)
    del held
    return dx


def backward_theta(dy: Tensor, x: Tensor, theta: Tensor, bits: Tensor, rows: int, columns: int) -> tuple[Tensor, bool]:
    """Compute the gradient of theta, and tell whether it is finite. All tensors are contiguous."""
    from lightning_deepr.kernels.cpu.full import GROUP

    batch, size = dy.shape[0], dy.element_size()
    plan = _plan(batch, rows, columns, size)
    dtheta = kept((theta.numel(),), theta)
    if plan is None:
        finite, height = True, _height(columns, size)
        for first in range(0, rows, height):
            end = min(first + height, rows)
            block = dtheta[first * columns : end * columns].view(end - first, columns)
            torch.mm(dy[:, first:end].t(), x, out=block)
            finite &= _sign(block, block, bits, first, columns)
        return dtheta, finite
    threads = _threads(plan.work)
    own, laid = batch * GROUP * size, batch * (columns + plan.lanes) * size
    at, held = room(laid + threads * own, x)
    arguments = _fill(
        BATCH=batch, ROWS=rows, COLUMNS=columns, X=x.data_ptr(), XT=at, Y=dy.data_ptr(), BITS=bits.data_ptr(),
        BITS_ROW=-(-columns // 8), DTHETA=dtheta.data_ptr(), SCRATCH=at + laid, SCRATCH_BYTES=own,
    )  # fmt: skip
    _run(plan.theta, threads, arguments)
    del held
    return dtheta, arguments[_NOT_FINITE] == 0


def _height(columns: int, size: int) -> int:
    return max(ROWS, BLOCK // (columns * size) // 64 * 64)


def _blocks(theta: Tensor, bits: Tensor, rows: int, columns: int) -> Any:
    """Generate blocks of rows of the weight, each with the numbers of its first row and of the row after it."""
    height = min(_height(columns, theta.element_size()), rows)
    memory = kept((height, columns), theta)
    for first in range(0, rows, height):
        end = min(first + height, rows)
        block = memory[: end - first]
        _sign(theta[first * columns : end * columns], block, bits, first, columns)
        yield first, end, block


def _sign(source: Tensor, target: Tensor, bits: Tensor, first: int, columns: int) -> bool:
    """Set the target to the source with the signs of the rows from ``first`` on. Return whether all numbers are finite."""
    from lightning_deepr.kernels.cpu.full import sign_kernel

    size, row = target.element_size(), -(-columns // 8)
    arguments = _fill(
        ROWS=target.shape[0], COLUMNS=columns, X=source.data_ptr(), Y=target.data_ptr(), BITS=bits.data_ptr() + first * row,
        BITS_ROW=row,
    )  # fmt: skip
    sign_kernel(size, _vectors(size)[0])(arguments, _threads(target.numel()))
    return arguments[_NOT_FINITE] == 0
