"""An LSTM layer in one direction over a whole sequence, on the CPU: all time steps in one call, from the connections alone.

Step t of batch element b is row n = t * P + b of matrices with one row per step and element, where P is the batch size, padded to whole
parts of W elements. Such a matrix is laid out in tiles [features, V] of V rows, as for the linear layer (:mod:`.linear`), V a multiple
of W: so the input product is one product over all steps, and the gradients of both weights are one pass at the end, with
long vectors. A part of the batch never needs another: each thread takes a part through the whole sequence, without waiting for others.

Before the steps, ``gates`` holds input product and biases; a step adds the recurrent product, and leaves the gates in
its place. The hidden state and the gates' gradients of the step at work are also kept in [features, W], close together.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_deepr.kernels.linear import CHUNK, from_block, gather_values, scatter_dots, to_tiles
from lightning_deepr.kernels.native import (
    Kernel,
    _Tile,
    accumulate_and_dot,
    accumulate_rows,
    dot_rows,
    fetch_add,
    fill_row,
    load_float,
    load_int32,
    load_int64,
    stack_space,
    store_float,
    sum_row,
)

# -- the cell -----------------------------------------------------------------------------------------------------------------


class _Math:
    """exp, sigmoid and tanh of vectors, accurate to some units in the last place; NaN stays NaN."""

    def __init__(self, builder: Any, tile: _Tile) -> None:
        self.builder, self.tile = builder, tile
        single = tile.size == 4
        self.integer = ir.VectorType(ir.IntType(8 * tile.size), tile.lanes)
        self.digits, self.bias = (23, 127) if single else (52, 1023)
        # ln 2 = high + low, high with few enough digits that n * high is exact
        self.high, self.low = (0.693359375, -2.12194440054690583e-4) if single else (0.693145751953125, 1.4286068203094173e-6)
        self.order = 7 if single else 13  # of the Taylor polynomial of exp up to ln(2) / 2
        self.largest = 87.0 if single else 708.0
        self.flat = 20.0 if single else 40.0  # tanh(x / 2) is 1 from here on

    def constant(self, value: float) -> Any:
        return ir.Constant(self.tile.vector, [value] * self.tile.lanes)

    def integers(self, value: int) -> Any:
        return ir.Constant(self.integer, [value] * self.tile.lanes)

    # (not "fast": rounding by adding a large number would be simplified away; a multiplication and an addition may become one)
    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=("contract",))

    def subtract(self, a: Any, b: Any) -> Any:
        return self.builder.fsub(a, b, flags=("contract",))

    def multiply(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=("contract",))

    def one_minus(self, a: Any) -> Any:
        return self.subtract(self.constant(1.0), a)

    def clamp(self, x: Any, bound: float) -> Any:
        for limit, compared in ((bound, ">"), (-bound, "<")):
            beyond = self.builder.fcmp_ordered(compared, x, self.constant(limit))
            x = self.builder.select(beyond, self.constant(limit), x)
        return x

    def _reduced(self, x: Any) -> tuple[Any, Any]:
        """s = 2^n and p with exp(x) = s (1 + p), |p| < 0.42."""
        rounding = self.constant(1.5 * 2.0**self.digits)  # its last digit counts ones: the sum's low bits are n
        shifted = self.builder.fadd(self.builder.fmul(x, self.constant(1 / math.log(2))), rounding)
        n = self.builder.fsub(shifted, rounding)
        r = self.subtract(x, self.multiply(n, self.constant(self.high)))
        r = self.subtract(r, self.multiply(n, self.constant(self.low)))
        q = self.constant(1 / math.factorial(self.order))
        for k in range(self.order - 1, 1, -1):
            q = self.add(self.multiply(q, r), self.constant(1 / math.factorial(k)))
        p = self.add(self.multiply(self.multiply(r, r), q), r)
        bits = self.builder.add(self.builder.bitcast(shifted, self.integer), self.integers(self.bias))
        return self.builder.bitcast(self.builder.shl(bits, self.integers(self.digits)), self.tile.vector), p

    def sigmoid(self, x: Any) -> Any:
        s, p = self._reduced(self.clamp(self.builder.fneg(x), self.largest))
        return self.builder.fdiv(self.constant(1.0), self.add(self.constant(1.0), self.add(self.multiply(s, p), s)))

    def tanh(self, x: Any) -> Any:
        s, p = self._reduced(self.clamp(self.add(x, x), self.flat))
        e = self.add(self.multiply(s, p), self.subtract(s, self.constant(1.0)))  # exp(2x) - 1, exact near 0
        return self.builder.fdiv(e, self.add(e, self.constant(2.0)))


@intrinsic(prefer_literal=True)
def cell(typingctx, gates, stride, c, new_c, h, kept_h, size, lanes, vectors):
    """One unit of W batch elements: its four gates (``stride`` bytes apart) from their sums, in place; the new cell and hidden state."""
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context, builder, signature, args):
        tile = _Tile(builder, *shape)
        m = _Math(builder, tile)
        places = _gates(builder, args[0], args[1])
        for v in range(tile.vectors):
            sums = [tile.load(place, v) for place in places]
            i, f, g, o = (m.tanh(x) if k == 2 else m.sigmoid(x) for k, x in enumerate(sums))
            state = m.add(m.multiply(f, tile.load(args[2], v)), m.multiply(i, g))
            out = m.multiply(o, m.tanh(state))
            for place, value in zip([*places, *args[3:6]], [i, f, g, o, state, out, out], strict=True):
                tile.store(value, place, v)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(int64, int64, int64, int64, int64, int64, size, lanes, vectors), codegen


@intrinsic(prefer_literal=True)
def cell_gradient(typingctx, gates, stride, c, new_c, dy, dh, dc, dgates, dstride, kept, size, lanes, vectors):
    """The gradients of one unit's sums, to ``dgates`` (``dstride`` bytes apart) and ``kept``; dc becomes that of the step before."""
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context, builder, signature, args):
        tile = _Tile(builder, *shape)
        m = _Math(builder, tile)
        places, first, second = (
            _gates(builder, args[0], args[1]),
            _gates(builder, args[7], args[8]),
            _gates(builder, args[9], args[1]),
        )
        for v in range(tile.vectors):
            i, f, g, o = (tile.load(place, v) for place in places)
            c, new_c, dy, dh, dc = (tile.load(place, v) for place in args[2:7])
            t = m.tanh(new_c)
            dh = m.add(dy, dh)
            dc = m.add(dc, m.multiply(m.multiply(dh, o), m.one_minus(m.multiply(t, t))))
            di = m.multiply(m.multiply(dc, g), m.multiply(i, m.one_minus(i)))
            df = m.multiply(m.multiply(dc, c), m.multiply(f, m.one_minus(f)))
            dg = m.multiply(m.multiply(dc, i), m.one_minus(m.multiply(g, g)))
            do = m.multiply(m.multiply(dh, t), m.multiply(o, m.one_minus(o)))
            tile.store(m.multiply(dc, f), args[6], v)
            for k, value in enumerate((di, df, dg, do)):
                tile.store(value, first[k], v)
                tile.store(value, second[k], v)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(*[int64] * 10, size, lanes, vectors), codegen


def _gates(builder: Any, address: Any, stride: Any) -> list[Any]:
    return [builder.add(address, builder.mul(stride, ir.Constant(ir.IntType(64), k))) for k in range(4)]


@intrinsic(prefer_literal=True)
def accumulate_near(typingctx, sums, count, indices, values, source, size, lanes, vectors):
    """As :func:`.native.accumulate_rows` for a source in a near cache: nothing is asked for ahead (which takes as many loads as
    the work itself), and every other connection goes to a second sum (a multiplication need not wait for the one before)."""
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context, builder, signature, args):
        into, number, index, value, origin = args[:5]
        tile, int32, int64 = _Tile(builder, *shape), ir.IntType(32), ir.IntType(64)
        zero = ir.Constant(tile.vector, [0.0] * tile.lanes)
        held = [[cgutils.alloca_once_value(builder, tile.load(into, v)) for v in range(tile.vectors)]]
        held.append([cgutils.alloca_once_value(builder, zero) for _ in range(tile.vectors)])

        def scaled(base: Any, i: Any, factor: int) -> Any:
            return builder.add(base, builder.mul(i, ir.Constant(int64, factor)))

        def take(i: Any, registers: list[Any]) -> None:
            row = builder.load(builder.inttoptr(scaled(index, i, 4), int32.as_pointer()))
            row = scaled(origin, builder.zext(row, int64), tile.size * tile.lanes * tile.vectors)
            factor = builder.load(builder.inttoptr(scaled(value, i, tile.size), tile.scalar.as_pointer()))
            factor = tile.broadcast(factor)
            for v, register in enumerate(registers):
                builder.store(tile.multiply_add(factor, tile.load(row, v), builder.load(register)), register)

        one = ir.Constant(int64, 1)
        with cgutils.for_range(builder, builder.lshr(number, one)) as loop:
            i = builder.shl(loop.index, one)
            take(i, held[0])
            take(builder.add(i, one), held[1])
        with builder.if_then(builder.icmp_signed("!=", builder.and_(number, one), ir.Constant(int64, 0))):
            take(builder.sub(number, one), held[0])
        for v, (a, b) in enumerate(zip(*held, strict=True)):
            tile.store(builder.fadd(builder.load(a), builder.load(b)), into, v)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(int64, int64, int64, int64, int64, size, lanes, vectors), codegen


@intrinsic(prefer_literal=True)
def copy_row(typingctx, source, target, size, lanes, vectors):
    """W floats from one address to another."""
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context, builder, signature, args):
        tile = _Tile(builder, *shape)
        for v in range(tile.vectors):
            tile.store(tile.load(args[0], v), args[1], v)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, size, lanes, vectors), codegen


# -- before and after the steps -----------------------------------------------------------------------------------------------
# Arguments of these kernels, by position. ORDER: starts, indices and slots by row or by column.
TASK, PHASE, COUNT, TILES, SHARES, ROWS, COLUMNS, X, XT, YT, THETA, BIAS, START, INDEX, SLOTS, DX, DTHETA, DBIAS = range(18)
TRANSPOSE, MULTIPLY = 0, 1  # phases


@cache
def product_kernel(size: int, lanes: int, vectors: int) -> Kernel:
    """x W^T + b by row, for x [COUNT, COLUMNS]; x and the result stay in tiles of V = lanes * vectors rows."""
    row_bytes, chunk_bytes = lanes * vectors * size, CHUNK * size

    def product(a):
        tiles, rows, columns = load_int64(a + 8 * TILES), load_int64(a + 8 * ROWS), load_int64(a + 8 * COLUMNS)
        x, xt, yt, count = load_int64(a + 8 * X), load_int64(a + 8 * XT), load_int64(a + 8 * YT), load_int64(a + 8 * COUNT)
        if load_int64(a + 8 * PHASE) == TRANSPOSE:
            blocks = (columns + 127) // 128
            while True:
                task = fetch_add(a, 1)
                if task >= blocks * tiles:
                    break
                first = (task % blocks) * 128
                to_tiles(x, xt, count, columns, first, min(first + 128, columns), task // blocks, vectors, size, lanes)
            return
        theta, bias = load_int64(a + 8 * THETA), load_int64(a + 8 * BIAS)
        start, index, slots = load_int64(a + 8 * START), load_int64(a + 8 * INDEX), load_int64(a + 8 * SLOTS)
        values = stack_space(chunk_bytes)
        groups = (rows + 63) // 64
        while True:
            task = fetch_add(a, 1)
            if task >= groups * tiles:
                break
            tile, first = task // groups, (task % groups) * 64
            source = xt + tile * columns * row_bytes
            for r in range(first, min(first + 64, rows)):
                sums = yt + (tile * rows + r) * row_bytes
                fill_row(sums, load_float(bias + r * size, size) if bias != 0 else 0.0, size, lanes, vectors)
                begin, end = load_int32(start + r * 4), load_int32(start + r * 4 + 4)
                while begin < end:
                    n = min(CHUNK, end - begin)
                    gather_values(theta, slots + begin * 4, n, values, size)
                    accumulate_rows(sums, n, index + begin * 4, values, source, size, lanes, vectors)
                    begin += n

    return Kernel(product)


# Each of SHARES tasks has its rows or columns, and takes one tile after the other: the tile stays in a near cache, and nobody
# else adds to the same gradients.


@cache
def theta_kernel(size: int, lanes: int, vectors: int) -> Kernel:
    """dtheta = s * (dy^T x) at the places and, where asked for, db = sum of dy, both in tiles; by row."""
    row_bytes, chunk_bytes = lanes * vectors * size, CHUNK * size

    def of_theta(a):
        tiles, rows, columns = load_int64(a + 8 * TILES), load_int64(a + 8 * ROWS), load_int64(a + 8 * COLUMNS)
        xt, yt, shares = load_int64(a + 8 * XT), load_int64(a + 8 * YT), load_int64(a + 8 * SHARES)
        start, index, slots = load_int64(a + 8 * START), load_int64(a + 8 * INDEX), load_int64(a + 8 * SLOTS)
        dtheta, dbias = load_int64(a + 8 * DTHETA), load_int64(a + 8 * DBIAS)
        dots = stack_space(chunk_bytes)
        while True:
            share = fetch_add(a, 1)
            if share >= shares:
                break
            for tile in range(tiles):
                source = xt + tile * columns * row_bytes
                for r in range(rows * share // shares, rows * (share + 1) // shares):
                    own = yt + (tile * rows + r) * row_bytes
                    if dbias != 0:
                        total, where = sum_row(own, size, lanes, vectors), dbias + r * size
                        store_float(where, total if tile == 0 else total + load_float(where, size), size)
                    begin, end = load_int32(start + r * 4), load_int32(start + r * 4 + 4)
                    while begin < end and dtheta != 0:
                        n = min(CHUNK, end - begin)
                        dot_rows(n, index + begin * 4, source, own, dots, size, lanes, vectors)
                        scatter_dots(dtheta, slots + begin * 4, n, dots, tile != 0, size)
                        begin += n

    return Kernel(of_theta)


@cache
def input_kernel(size: int, lanes: int, vectors: int) -> Kernel:
    """dx [COUNT, COLUMNS] = dy W for dy in tiles and, where asked for, dtheta in the same pass; by column."""
    row_bytes, chunk_bytes = lanes * vectors * size, CHUNK * size
    block_bytes = lanes * row_bytes

    def of_input(a):
        tiles, rows, columns = load_int64(a + 8 * TILES), load_int64(a + 8 * ROWS), load_int64(a + 8 * COLUMNS)
        xt, yt, shares = load_int64(a + 8 * XT), load_int64(a + 8 * YT), load_int64(a + 8 * SHARES)
        start, index, slots = load_int64(a + 8 * START), load_int64(a + 8 * INDEX), load_int64(a + 8 * SLOTS)
        theta, dtheta = load_int64(a + 8 * THETA), load_int64(a + 8 * DTHETA)
        dx, count = load_int64(a + 8 * DX), load_int64(a + 8 * COUNT)
        block, values, dots = stack_space(block_bytes), stack_space(chunk_bytes), stack_space(chunk_bytes)
        groups = (columns + lanes - 1) // lanes
        while True:
            share = fetch_add(a, 1)
            if share >= shares:
                break
            for tile in range(tiles):
                source = yt + tile * rows * row_bytes
                for group in range(groups * share // shares, groups * (share + 1) // shares):
                    first = group * lanes
                    last = min(first + lanes, columns)
                    for c in range(first, last):
                        sums = block + (c - first) * row_bytes
                        own = xt + (tile * columns + c) * row_bytes
                        fill_row(sums, 0.0, size, lanes, vectors)
                        begin, end = load_int32(start + c * 4), load_int32(start + c * 4 + 4)
                        while begin < end:
                            n = min(CHUNK, end - begin)
                            where = index + begin * 4
                            gather_values(theta, slots + begin * 4, n, values, size)
                            if dtheta == 0:
                                accumulate_rows(sums, n, where, values, source, size, lanes, vectors)
                            else:
                                accumulate_and_dot(sums, n, where, values, source, own, dots, size, lanes, vectors)
                                scatter_dots(dtheta, slots + begin * 4, n, dots, tile != 0, size)
                            begin += n
                    from_block(block, dx, count, columns, first, last - first, tile, vectors, size, lanes)

    return Kernel(of_input)


# -- the steps ----------------------------------------------------------------------------------------------------------------
# Further arguments, of both kernels. V is that of the tiles, W = lanes * vectors that of the parts; COUNT: of the connections.
STEPS, BATCH, PARTS, HIDDEN, REVERSE, V, VECTORS, VALUES = range(18, 26)
GATES, CELLS, CELL_STEP, SCRATCH, H_FIRST, C_FIRST, H_LAST, C_LAST, Y, KEPT = range(26, 36)
ARGUMENTS = 36
GATHER, RUN = 0, 1  # phases


@njit(inline="never")
def gather_all(counter, theta, slots, count, values, size):
    """Signed values in the order of rows or columns, 4096 at a task: every step reads them."""
    while True:
        first = 4096 * fetch_add(counter, 1)
        if first >= count:
            break
        gather_values(theta, slots + first * 4, min(4096, count - first), values + first * size, size)


@njit(inline="never")
def read_part(x, part, tiled, batch, features, vectors, size, lanes):
    """One part of x [batch, features] -> [features, W]; zeros where there is no x."""
    width = lanes * vectors
    if x != 0:
        to_tiles(x, tiled - part * features * width * size, batch, features, 0, features, part, vectors, size, lanes)
    else:
        for i in range(features * width):
            store_float(tiled + i * size, 0.0, size)


@njit(inline="never")
def write_part(tiled, part, y, batch, features, vectors, size, lanes):
    """The opposite; nowhere where there is no y."""
    if y != 0:
        for first in range(0, features, lanes):
            block = tiled + first * lanes * vectors * size
            from_block(block, y, batch, features, first, min(lanes, features - first), part, vectors, size, lanes)


@cache
def forward_kernel(size: int, lanes: int, vectors: int) -> Kernel:
    """Gates, cell states and y of all steps; h before each step to KEPT, in tiles. CELL_STEP: bytes from one step's cell states
    to the next, 0 where nobody needs the past.

    START, INDEX and SLOTS are by row; FIRST is before the first step, LAST after the last. SCRATCH: [PARTS, 2, hidden, W].
    """
    row_bytes = lanes * vectors * size

    def forward(a):
        count, values = load_int64(a + 8 * COUNT), load_int64(a + 8 * VALUES)
        if load_int64(a + 8 * PHASE) == GATHER:
            gather_all(a, load_int64(a + 8 * THETA), load_int64(a + 8 * SLOTS), count, values, size)
            return
        steps, batch, parts = load_int64(a + 8 * STEPS), load_int64(a + 8 * BATCH), load_int64(a + 8 * PARTS)
        hidden, reverse, wide = load_int64(a + 8 * HIDDEN), load_int64(a + 8 * REVERSE), load_int64(a + 8 * V)
        start, index, runtime_vectors = load_int64(a + 8 * START), load_int64(a + 8 * INDEX), load_int64(a + 8 * VECTORS)
        gates, cells, cell_step = load_int64(a + 8 * GATES), load_int64(a + 8 * CELLS), load_int64(a + 8 * CELL_STEP)
        scratch, kept_all, y = load_int64(a + 8 * SCRATCH), load_int64(a + 8 * KEPT), load_int64(a + 8 * Y)
        stride, state_bytes = wide * size, hidden * row_bytes
        while True:
            part = fetch_add(a, 1)
            if part >= parts:
                break
            h = scratch + part * 2 * state_bytes
            new_h = h + state_bytes
            c = cells + part * (cell_step * steps + state_bytes)
            read_part(load_int64(a + 8 * H_FIRST), part, h, batch, hidden, runtime_vectors, size, lanes)
            read_part(load_int64(a + 8 * C_FIRST), part, c, batch, hidden, runtime_vectors, size, lanes)
            for step in range(steps):
                t = steps - 1 - step if reverse != 0 else step
                n = (t * parts + part) * (lanes * vectors)
                here = gates + ((n // wide) * 4 * hidden * wide + n % wide) * size
                if step == 0 and kept_all != 0:
                    kept = kept_all + ((n // wide) * hidden * wide + n % wide) * size
                    for unit in range(hidden):
                        copy_row(h + unit * row_bytes, kept + unit * stride, size, lanes, vectors)
                kept, kept_stride = new_h, row_bytes
                if kept_all != 0 and step + 1 < steps:
                    later = n - parts * (lanes * vectors) if reverse != 0 else n + parts * (lanes * vectors)
                    kept = kept_all + ((later // wide) * hidden * wide + later % wide) * size
                    kept_stride = stride
                for first in range(0, hidden, lanes):
                    last = min(first + lanes, hidden)
                    for unit in range(first, last):
                        for gate in range(4):
                            row = gate * hidden + unit
                            begin = load_int32(start + row * 4)
                            number = load_int32(start + row * 4 + 4) - begin
                            accumulate_near(
                                here + row * stride, number, index + begin * 4, values + begin * size, h, size, lanes, vectors
                            )
                        cell(
                            here + unit * stride, hidden * stride, c + unit * row_bytes, c + cell_step + unit * row_bytes,
                            new_h + unit * row_bytes, kept + unit * kept_stride, size, lanes, vectors
                        )  # fmt: skip
                    out = y + t * batch * hidden * size
                    from_block(
                        new_h + first * row_bytes, out, batch, hidden, first, last - first, part, runtime_vectors, size, lanes
                    )
                c += cell_step
                h, new_h = new_h, h
            write_part(h, part, load_int64(a + 8 * H_LAST), batch, hidden, runtime_vectors, size, lanes)
            write_part(c, part, load_int64(a + 8 * C_LAST), batch, hidden, runtime_vectors, size, lanes)

    return Kernel(forward)


@cache
def backward_kernel(size: int, lanes: int, vectors: int) -> Kernel:
    """The gradients of the gates' sums to KEPT, in tiles, and of the first states.

    Y is dy; FIRST and LAST are gradients; START, INDEX and SLOTS are by column. SCRATCH: [PARTS, 7, hidden, W].
    """
    row_bytes = lanes * vectors * size

    def backward(a):
        count, values = load_int64(a + 8 * COUNT), load_int64(a + 8 * VALUES)
        if load_int64(a + 8 * PHASE) == GATHER:
            gather_all(a, load_int64(a + 8 * THETA), load_int64(a + 8 * SLOTS), count, values, size)
            return
        steps, batch, parts = load_int64(a + 8 * STEPS), load_int64(a + 8 * BATCH), load_int64(a + 8 * PARTS)
        hidden, reverse, wide = load_int64(a + 8 * HIDDEN), load_int64(a + 8 * REVERSE), load_int64(a + 8 * V)
        start, index, runtime_vectors = load_int64(a + 8 * START), load_int64(a + 8 * INDEX), load_int64(a + 8 * VECTORS)
        gates, cells, cell_step = load_int64(a + 8 * GATES), load_int64(a + 8 * CELLS), load_int64(a + 8 * CELL_STEP)
        scratch, kept_all, y = load_int64(a + 8 * SCRATCH), load_int64(a + 8 * KEPT), load_int64(a + 8 * Y)
        stride, state_bytes = wide * size, hidden * row_bytes
        while True:
            part = fetch_add(a, 1)
            if part >= parts:
                break
            dgates = scratch + part * 7 * state_bytes
            dh = dgates + 4 * state_bytes
            dc, dy = dh + state_bytes, dh + 2 * state_bytes
            c = cells + part * (cell_step * steps + state_bytes) + cell_step * steps
            read_part(load_int64(a + 8 * H_LAST), part, dh, batch, hidden, runtime_vectors, size, lanes)
            read_part(load_int64(a + 8 * C_LAST), part, dc, batch, hidden, runtime_vectors, size, lanes)
            for step in range(steps):
                t = step if reverse != 0 else steps - 1 - step
                n = (t * parts + part) * (lanes * vectors)
                where = ((n // wide) * 4 * hidden * wide + n % wide) * size
                here, kept = gates + where, kept_all + where
                read_part(y + t * batch * hidden * size, part, dy, batch, hidden, runtime_vectors, size, lanes)
                for unit in range(hidden):
                    own = unit * row_bytes
                    cell_gradient(
                        here + unit * stride, hidden * stride, c - cell_step + own, c + own, dy + own, dh + own, dc + own,
                        dgates + own, state_bytes, kept + unit * stride, size, lanes, vectors
                    )  # fmt: skip
                for unit in range(hidden):
                    begin = load_int32(start + unit * 4)
                    number = load_int32(start + unit * 4 + 4) - begin
                    into = dh + unit * row_bytes
                    fill_row(into, 0.0, size, lanes, vectors)
                    accumulate_near(into, number, index + begin * 4, values + begin * size, dgates, size, lanes, vectors)
                c -= cell_step
            write_part(dh, part, load_int64(a + 8 * H_FIRST), batch, hidden, runtime_vectors, size, lanes)
            write_part(dc, part, load_int64(a + 8 * C_FIRST), batch, hidden, runtime_vectors, size, lanes)

    return Kernel(backward)


def parts_of(batch: int, threads: int, size: int) -> tuple[int, int, int]:
    """(parts, lanes, vectors): how a batch is shared out among threads, in parts of W = lanes * vectors elements."""
    lanes, each = 64 // size, -(-batch // threads)
    if each <= lanes // 2:
        lanes, vectors = lanes // 2, 1
    else:
        vectors = 1 if each <= lanes else 2 if each <= 2 * lanes else 4
    return -(-batch // (lanes * vectors)), lanes, vectors
