"""The linear layer whose connections are at all places, with its slots in their order: products with a signed matrix.

The weight is theta with signs, K = N. To write it to memory, and to read it and its gradient once more, would take as long as a
third of the products with a small batch. These kernels give the values their signs where they are in the nearest cache anyway:

- forward, a panel of ``DOWN`` rows of the weight is copied with its signs, and multiplied with the transposed input;
- backward for the input, a panel of W columns of the weight (W = lanes * vectors) is copied with its signs;
- backward for theta, the products get their signs when they leave the registers.

All three are one loop: ``DOWN`` times ``vectors`` sums stay in registers while rows of W floats and ``DOWN`` scalars pass by.
The signs are bits, a line of bytes for each row. Threads share out rows (of theta's gradient, of y) or columns (of dx). The
result does not depend on the number of threads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_deepr.kernels.cpu.fields import FullArguments as A
from lightning_deepr.kernels.cpu.fields import FullPhase
from lightning_deepr.kernels.cpu.linear import from_block
from lightning_deepr.kernels.cpu.native import (
    Kernel,
    _int64,
    _prefetch,
    _Tile,
    copy_row,
    fetch_add,
    fill_row,
    load_float,
    load_int64,
    prefetch,
    stack_space,
    store_float,
    store_int64,
)
from lightning_deepr.kernels.cpu.near import is_marked, mark_vector
from lightning_deepr.kernels.cpu.tokens import to_block

DOWN = 6  # rows of sums that stay in registers
GROUP = 48  # rows of a task: a multiple of DOWN and of the lanes of a vector
AHEAD = 12  # rows of the weight that are prefetched
SPARE = 8  # bytes after the last sign, which are read with it


def _signed(builder: Any, tile: _Tile, value: Any, bits: Any, column: Any) -> Any:
    """Negate the lanes of a vector whose bits are set. ``column`` is the number of the first bit."""
    at = builder.inttoptr(builder.add(bits, builder.lshr(column, _int64(3))), ir.IntType(32).as_pointer())
    word = builder.lshr(builder.load(at, align=1), builder.trunc(builder.and_(column, _int64(7)), ir.IntType(32)))
    mask = builder.bitcast(builder.trunc(word, ir.IntType(tile.lanes)), ir.VectorType(ir.IntType(1), tile.lanes))
    return builder.select(mask, builder.fneg(value), value)


@intrinsic(prefer_literal=True)
def copy_signed(
    typingctx: Any, source: Any, target: Any, bits: Any, column: Any, size: Any, lanes: Any, vectors: Any,
) -> Any:  # fmt: skip
    """Copy W floats, with the signs of ``bits`` from bit ``column`` on."""
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(builder, *shape)
        for v in range(tile.vectors):
            at = builder.add(args[3], _int64(v * tile.lanes))
            tile.store(_signed(builder, tile, tile.load(args[0], v), args[2], at), args[1], v)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(int64, int64, int64, int64, size, lanes, vectors), codegen


@intrinsic(prefer_literal=True)
def multiply(
    typingctx: Any, factors: Any, factor_step: Any, factor_row: Any, source: Any, count: Any, start: Any, target: Any,
    target_row: Any, bits: Any, bits_row: Any, column: Any, marks: Any, size: Any, lanes: Any, vectors: Any, signed: Any,
) -> Any:  # fmt: skip
    """Set target[r, :] = start[r] + sum over i < count of factors[r, i] * source[i, :], for r < DOWN. Rows have W floats.

    Args:
        factors: the address of factors[0, 0]; ``factor_step`` bytes lead to the next i, ``factor_row`` bytes to the next r.
        source: the address of ``count`` rows without gaps.
        start: the address of DOWN floats; with ``signed``, nothing is added.
        target: the address of the result; ``target_row`` bytes lead to its next row.
        bits, bits_row, column: with ``signed``, the address of the signs of the row 0, the bytes to those of the next row, and
            the number of the first bit.
        marks: with ``signed``, the address of ``lanes`` floats that become NaN if a result is not finite.
        signed: a literal, 0 or 1.
    """
    shape, has_signs = (size.literal_value, lanes.literal_value, vectors.literal_value), signed.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, a_step, a_row, b, number, begin, out, out_row, sign, sign_row, first, mark = args[:12]
        tile = _Tile(builder, *shape)

        def scalar(address: Any) -> Any:
            return tile.broadcast(builder.load(builder.inttoptr(address, tile.scalar.as_pointer())))

        def further(address: Any, step: Any, r: int) -> Any:
            return builder.add(address, builder.mul(step, _int64(r)))

        if has_signs:  # the lines of the result arrive while the products are summed
            for r in range(DOWN):
                for line in range(0, tile.size * tile.lanes * tile.vectors, 64):
                    _prefetch(builder, builder.add(further(out, out_row, r), _int64(line)))
        held = []
        for r in range(DOWN):
            value = ir.Constant(tile.vector, [0.0] * tile.lanes)
            if not has_signs:
                value = scalar(builder.add(begin, _int64(r * tile.size)))
            held.append([cgutils.alloca_once_value(builder, value) for _ in range(tile.vectors)])
        width = tile.size * tile.lanes * tile.vectors
        with cgutils.for_range(builder, number) as loop:
            row = builder.add(b, builder.mul(loop.index, _int64(width)))
            at = builder.add(a, builder.mul(loop.index, a_step))
            vectors_of_row = [tile.load(row, v) for v in range(tile.vectors)]
            for r in range(DOWN):
                factor = scalar(further(at, a_row, r))
                for v, register in enumerate(held[r]):
                    # (no "fast": with it the compiler takes every sum for finite, and leaves out the search for others)
                    product = builder.fmul(factor, vectors_of_row[v], flags=("contract",))
                    builder.store(builder.fadd(product, builder.load(register), flags=("contract",)), register)
        totals: list[Any] = [tile.load(mark, 0) if has_signs else None] + [None] * (
            tile.vectors - 1
        )  # (several, so that none waits for the one before)
        zero = ir.Constant(tile.vector, [0.0] * tile.lanes)
        for r in range(DOWN):
            into, its_bits = further(out, out_row, r), further(sign, sign_row, r)
            for v, register in enumerate(held[r]):
                value = builder.load(register)
                if has_signs:
                    times = builder.fmul(value, zero, flags=("contract",))
                    totals[v] = times if totals[v] is None else builder.fadd(times, totals[v], flags=("contract",))
                    value = _signed(builder, tile, value, its_bits, builder.add(first, _int64(v * tile.lanes)))
                tile.store(value, into, v)
        if has_signs:
            for total in totals[1:]:
                totals[0] = builder.fadd(totals[0], total)
            tile.store(totals[0], mark, 0)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 12, size, lanes, vectors, signed), codegen


@njit(inline="always")
def first_of(first: int, step: int, end: int) -> int:
    """Move the last of several pieces back, so that it ends with the others: what it shares with them is computed twice."""
    return min(first, end - step)


@cache
def forward_kernel(size: int, lanes: int, vectors: int) -> Kernel:
    """Make the kernel of y [B, rows] = x [B, columns] (s * theta)^T + b."""
    width = lanes * vectors
    vector_bytes, start_bytes = lanes * size, DOWN * size

    def forward(a: int) -> None:
        batch, rows, columns = load_int64(a + 8 * A.BATCH), load_int64(a + 8 * A.ROWS), load_int64(a + 8 * A.COLUMNS)
        x, xt, y, tiles = (
            load_int64(a + 8 * A.X),
            load_int64(a + 8 * A.XT),
            load_int64(a + 8 * A.Y),
            load_int64(a + 8 * A.TILES),
        )
        phase = load_int64(a + 8 * A.PHASE)
        if phase != FullPhase.MULTIPLY:
            marks = stack_space(vector_bytes)
            fill_row(marks, 0.0, size, lanes, 1)
            while True:
                tile = fetch_add(a + 8 * A.TASK, 1)
                if tile >= tiles:
                    break
                to_block(x, xt + tile * columns * width * size, batch, columns, tile, marks, vectors, size, lanes)
            if phase == FullPhase.LAYOUT:
                return
            store_int64(a + 8 * A.TASK, 0)
        theta, bias = load_int64(a + 8 * A.THETA), load_int64(a + 8 * A.BIAS)
        bits, bits_row = load_int64(a + 8 * A.BITS), load_int64(a + 8 * A.BITS_ROW)
        worker = fetch_add(a + 8 * A.WORKER, 1)
        panel = load_int64(a + 8 * A.SCRATCH) + worker * load_int64(a + 8 * A.SCRATCH_BYTES)
        sums = panel + DOWN * columns * size
        sums += -sums & 63
        start = stack_space(start_bytes)
        for r in range(DOWN):
            store_float(start + r * size, 0.0, size)
        while True:
            begin = fetch_add(a + 8 * A.TASK, 1) * GROUP
            if begin >= rows:
                break
            end = min(begin + GROUP, rows)
            for piece in range(begin, end, DOWN):
                first = first_of(piece, DOWN, end) if end - begin >= DOWN else first_of(piece, DOWN, rows)
                for r in range(DOWN):
                    source, target = theta + (first + r) * columns * size, panel + r * columns * size
                    signs = bits + (first + r) * bits_row
                    for column in range(0, columns, lanes):
                        c = first_of(column, lanes, columns)
                        copy_signed(source + c * size, target + c * size, signs, c, size, lanes, 1)
                at = bias + first * size if bias != 0 else start
                for tile in range(tiles):
                    multiply(
                        panel, size, columns * size, xt + tile * columns * width * size, columns, at,
                        sums + ((first - begin + DOWN) + tile * (GROUP + DOWN)) * width * size, width * size, 0, 0, 0, 0, size,
                        lanes, vectors, 0,
                    )  # fmt: skip
            for tile in range(tiles):
                for first in range(begin, end, lanes):
                    block = sums + ((first - begin + DOWN) + tile * (GROUP + DOWN)) * width * size
                    from_block(block, y, batch, rows, first, min(lanes, end - first), tile, vectors, size, lanes)

    return Kernel(forward)


@cache
def input_kernel(size: int, lanes: int, vectors: int) -> Kernel:
    """Make the kernel of dx [B, columns] = dy [B, rows] (s * theta)."""
    width = lanes * vectors
    start_bytes = DOWN * size

    def backward(a: int) -> None:
        batch, rows, columns = load_int64(a + 8 * A.BATCH), load_int64(a + 8 * A.ROWS), load_int64(a + 8 * A.COLUMNS)
        theta, dy, dx = load_int64(a + 8 * A.THETA), load_int64(a + 8 * A.Y), load_int64(a + 8 * A.DX)
        bits, bits_row = load_int64(a + 8 * A.BITS), load_int64(a + 8 * A.BITS_ROW)
        worker = fetch_add(a + 8 * A.WORKER, 1)
        panel = load_int64(a + 8 * A.SCRATCH) + worker * load_int64(a + 8 * A.SCRATCH_BYTES)
        start = stack_space(start_bytes)
        for r in range(DOWN):
            store_float(start + r * size, 0.0, size)
        whole = columns // width
        parts = whole + (columns - whole * width + lanes - 1) // lanes
        while True:
            part = fetch_add(a + 8 * A.TASK, 1)
            if part >= parts:
                break
            if part < whole:
                c = part * width
                for r in range(rows):
                    source = theta + (r * columns + c) * size
                    copy_signed(source, panel + r * width * size, bits + r * bits_row, c, size, lanes, vectors)
                    for line in range(0, width * size, 64):
                        prefetch(source + AHEAD * columns * size + line)
                for piece in range(0, batch, DOWN):
                    b = first_of(piece, DOWN, batch)
                    multiply(
                        dy + b * rows * size, size, rows * size, panel, rows, start, dx + (b * columns + c) * size,
                        columns * size, 0, 0, 0, 0, size, lanes, vectors, 0,
                    )  # fmt: skip
            else:
                c = first_of(whole * width + (part - whole) * lanes, lanes, columns)
                for r in range(rows):
                    source = theta + (r * columns + c) * size
                    copy_signed(source, panel + r * lanes * size, bits + r * bits_row, c, size, lanes, 1)
                for piece in range(0, batch, DOWN):
                    b = first_of(piece, DOWN, batch)
                    multiply(
                        dy + b * rows * size, size, rows * size, panel, rows, start, dx + (b * columns + c) * size,
                        columns * size, 0, 0, 0, 0, size, lanes, 1, 0,
                    )  # fmt: skip

    return Kernel(backward)


@cache
def theta_kernel(size: int, lanes: int, vectors: int) -> Kernel:
    """Make the kernel of dtheta [rows, columns] = s * (dy [B, rows]^T x [B, columns])."""
    width = lanes * vectors
    vector_bytes = lanes * size

    def backward(a: int) -> None:
        batch, rows, columns = load_int64(a + 8 * A.BATCH), load_int64(a + 8 * A.ROWS), load_int64(a + 8 * A.COLUMNS)
        x, panels, dy = load_int64(a + 8 * A.X), load_int64(a + 8 * A.XT), load_int64(a + 8 * A.Y)
        whole = columns // width
        parts = whole + (columns - whole * width + lanes - 1) // lanes
        phase = load_int64(a + 8 * A.PHASE)
        if phase != FullPhase.MULTIPLY:
            while True:
                part = fetch_add(a + 8 * A.TASK, 1)
                if part >= parts:
                    break
                if part < whole:
                    target = panels + part * batch * width * size
                    for b in range(batch):
                        source = x + (b * columns + part * width) * size
                        copy_row(source, target + b * width * size, size, lanes, vectors)
                else:
                    target = panels + (whole * width + (part - whole) * lanes) * batch * size
                    c = first_of(whole * width + (part - whole) * lanes, lanes, columns)
                    for b in range(batch):
                        copy_row(x + (b * columns + c) * size, target + b * lanes * size, size, lanes, 1)
            if phase == FullPhase.LAYOUT:
                return
            store_int64(a + 8 * A.TASK, 0)
        dtheta = load_int64(a + 8 * A.DTHETA)
        bits, bits_row = load_int64(a + 8 * A.BITS), load_int64(a + 8 * A.BITS_ROW)
        worker = fetch_add(a + 8 * A.WORKER, 1)
        factors = load_int64(a + 8 * A.SCRATCH) + worker * load_int64(a + 8 * A.SCRATCH_BYTES)
        marks = stack_space(vector_bytes)
        fill_row(marks, 0.0, size, lanes, 1)
        while True:
            begin = fetch_add(a + 8 * A.TASK, 1) * GROUP
            if begin >= rows:
                break
            end = min(begin + GROUP, rows)
            begin = min(begin, max(end - DOWN, 0))
            for b in range(batch):
                source, target = dy + (b * rows + begin) * size, factors + b * GROUP * size
                if end - begin == GROUP:
                    for r in range(0, GROUP, lanes):
                        copy_row(source + r * size, target + r * size, size, lanes, 1)
                else:
                    for r in range(end - begin):
                        store_float(target + r * size, load_float(source + r * size, size), size)
            for piece in range(begin, end, DOWN):
                first = first_of(piece, DOWN, end)
                at, signs = factors + (first - begin) * size, bits + first * bits_row
                for part in range(whole):
                    c = part * width
                    multiply(
                        at, GROUP * size, size, panels + part * batch * width * size, batch, 0,
                        dtheta + (first * columns + c) * size, columns * size, signs, bits_row, c, marks, size, lanes, vectors,
                        1,
                    )  # fmt: skip
                for part in range(parts - whole):
                    c = first_of(whole * width + part * lanes, lanes, columns)
                    multiply(
                        at, GROUP * size, size, panels + (whole * width + part * lanes) * batch * size, batch, 0,
                        dtheta + (first * columns + c) * size, columns * size, signs, bits_row, c, marks, size, lanes, 1, 1,
                    )  # fmt: skip
        if is_marked(marks, size, lanes) != 0:
            store_int64(a + 8 * A.NOT_FINITE, 1)

    return Kernel(backward)


@cache
def sign_kernel(size: int, lanes: int) -> Kernel:
    """Make the kernel of target [rows, columns] = s * source, which may be the same. It notes a number that is not finite."""
    vector_bytes = lanes * size

    def sign(a: int) -> None:
        rows, columns = load_int64(a + 8 * A.ROWS), load_int64(a + 8 * A.COLUMNS)
        source, target = load_int64(a + 8 * A.X), load_int64(a + 8 * A.Y)
        bits, bits_row = load_int64(a + 8 * A.BITS), load_int64(a + 8 * A.BITS_ROW)
        marks, edge = stack_space(vector_bytes), stack_space(vector_bytes)
        fill_row(marks, 0.0, size, lanes, 1)
        whole = columns // lanes * lanes
        while True:
            r = fetch_add(a + 8 * A.TASK, 1)
            if r >= rows:
                break
            at, to, signs = source + r * columns * size, target + r * columns * size, bits + r * bits_row
            for c in range(0, whole, lanes):
                mark_vector(at + c * size, marks, size, lanes)
                copy_signed(at + c * size, to + c * size, signs, c, size, lanes, 1)
            if whole < columns:  # nothing may be read twice: the target may be the source
                fill_row(edge, 0.0, size, lanes, 1)
                for c in range(columns - whole):
                    store_float(edge + c * size, load_float(at + (whole + c) * size, size), size)
                mark_vector(edge, marks, size, lanes)
                copy_signed(edge, edge, signs, whole, size, lanes, 1)
                for c in range(columns - whole):
                    store_float(to + (whole + c) * size, load_float(edge + c * size, size), size)
        if is_marked(marks, size, lanes) != 0:
            store_int64(a + 8 * A.NOT_FINITE, 1)

    return Kernel(sign)
