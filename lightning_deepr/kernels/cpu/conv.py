"""The sparse 2-d convolution on the CPU: its value and the gradients of input, theta and bias, from the K connections alone.

As in :mod:`lightning_deepr.kernels.cpu.linear` the batch is the inner dimension. An image [B, C, H, W] is stored as planes
[C, rows, columns, lanes] for each tile of ``lanes`` batch elements: one vector register per pixel. Each plane has a margin of
zeros, so no loop has to check for borders. A connection (o; c, kh, kw) is then a shift: y[o] += w * x[c], moved by (kh, kw).
A block of ``down`` x ``across`` pixels of one plane stays in registers while all connections of the plane pass by. Each
connection takes one load and one multiplication per pixel. The forward pass visits the connections by output channel. The
backward pass visits them by input channel and gets both gradients from one load of dy: dx[c] += w * dy[o], dw = dy[o] . x[c].

With a stride s > 1, only every s-th row and column of x meets a given kernel position. The backward pass takes these s x s sets
of pixels ("phases") one after the other, each with the connections that it meets.

Planes are computed in bands of rows: all values of x or dy that one band reads stay in the second-level cache.

An entry of ``slots`` holds the number of the slot. Its top bit is set if the sign of the connection is negative.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_deepr.kernels.cpu.fields import ConvArguments as A
from lightning_deepr.kernels.cpu.fields import ConvPhase
from lightning_deepr.kernels.cpu.linear import SLOT
from lightning_deepr.kernels.cpu.native import (
    Kernel,
    _Tile,
    fetch_add,
    fill_row,
    load_float,
    load_int32,
    load_int64,
    stack_space,
    store_float,
    store_int64,
    transpose_block,
    transpose_edge,
)

CHUNK = 128  # connections that a kernel prepares at a time
BLOCK = 12  # pixels of a block: the backward pass holds 12 sums and 12 pixels of x in 32 vector registers

_INT64 = ir.IntType(64)


def _constant(value: int) -> Any:
    return ir.Constant(_INT64, value)


# -- vectors --------------------------------------------------------------------------------------------------------------


class _Block:
    """A block of ``down`` x ``across`` pixels in registers. A pixel is one vector."""

    def __init__(self, builder: Any, size: int, lanes: int, across: int, down: int) -> None:
        self.builder, self.across, self.down = builder, across, down
        self.tile = _Tile(builder, size, lanes, 1)
        self.bytes = size * lanes

    def places(self, address: Any, row: Any, step: Any) -> Any:
        """Yield the addresses of the pixels.

        Args:
            address: the address of the first pixel.
            row: the bytes from one row to the next.
            step: the way from one pixel to the next: a value in bytes, or an int in pixels that the compiler knows.
        """
        for _ in range(self.down):
            for i in range(self.across):
                shift = _constant(i * step * self.bytes) if isinstance(step, int) else self.builder.mul(step, _constant(i))
                yield self.builder.add(address, shift)
            address = self.builder.add(address, row)

    def load(self, address: Any, row: Any, step: Any) -> list[Any]:
        return [self.tile.load(place, 0) for place in self.places(address, row, step)]


def _at(builder: Any, address: Any, i: Any, size: int, kind: Any) -> Any:
    i = builder.sext(i, _INT64) if i.type != _INT64 else i
    return builder.inttoptr(builder.add(address, builder.mul(i, _constant(size))), kind.as_pointer())


@intrinsic(prefer_literal=True)
def accumulate_block(
    typingctx: Any, sums: Any, sums_row: Any, sums_step: Any, count: Any, offsets: Any, values: Any, source: Any,
    source_row: Any, size: Any, lanes: Any, across: Any, down: Any, step: Any,
) -> Any:  # fmt: skip
    """Add values[i] * (source + offsets[i])[block] to sums[block], for all i < count.

    ``sums_row``, ``sums_step`` and ``source_row`` are in bytes, ``step`` is in pixels.
    """
    shape = [literal.literal_value for literal in (size, lanes, across, down)]
    pixels = step.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        into, row, stride, number, offset, value, origin, origin_row = args[:8]
        block = _Block(builder, *shape)
        tile = block.tile
        targets = list(block.places(into, row, stride))
        held = [cgutils.alloca_once_value(builder, tile.load(target, 0)) for target in targets]
        with cgutils.for_range(builder, number) as loop:
            start = builder.add(origin, builder.load(_at(builder, offset, loop.index, 8, _INT64)))
            factor = tile.broadcast(builder.load(_at(builder, value, loop.index, tile.size, tile.scalar)))
            for register, place in zip(held, block.places(start, origin_row, pixels), strict=True):
                builder.store(tile.multiply_add(factor, tile.load(place, 0), builder.load(register)), register)
        for register, target in zip(held, targets, strict=True):
            tile.store(builder.load(register), target, 0)
        return context.get_dummy_value()

    n = types.int64
    return types.void(n, n, n, n, n, n, n, n, size, lanes, across, down, step), codegen


@intrinsic(prefer_literal=True)
def differentiate_block(
    typingctx: Any, sums: Any, sums_row: Any, own: Any, own_row: Any, step: Any, count: Any, offsets: Any, values: Any,
    dots: Any, source: Any, source_row: Any, size: Any, lanes: Any, across: Any, down: Any, need_x: Any, need_theta: Any,
) -> Any:  # fmt: skip
    """Add to the gradients of x (if ``need_x``) and of theta (if ``need_theta``) for one block.

    The gradient of x grows as in :func:`accumulate_block`. For the gradient of theta, the vector dots[i] grows by the sum of
    (source + offsets[i])[block] * own[block] over the pixels. ``step`` is in bytes and holds for sums and own.
    """
    shape = [literal.literal_value for literal in (size, lanes, across, down)]
    adds, multiplies = need_x.literal_value, need_theta.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        into, row, mine, mine_row, stride, number, offset, value, products, origin, origin_row = args[:11]
        block = _Block(builder, *shape)
        tile = block.tile
        count = block.across * block.down
        own_part = block.load(mine, mine_row, stride) if multiplies else [None] * count
        targets = list(block.places(into, row, stride)) if adds else [None] * count
        held = [cgutils.alloca_once_value(builder, tile.load(target, 0)) for target in targets] if adds else targets
        with cgutils.for_range(builder, number) as loop:
            start = builder.add(origin, builder.load(_at(builder, offset, loop.index, 8, _INT64)))
            if adds:
                factor = tile.broadcast(builder.load(_at(builder, value, loop.index, tile.size, tile.scalar)))
            if multiplies:
                product = builder.ptrtoint(_at(builder, products, loop.index, block.bytes, tile.vector), _INT64)
                partial = [tile.load(product, 0), None]
            for i, place in enumerate(block.places(start, origin_row, 1)):
                other = tile.load(place, 0)
                if adds:
                    builder.store(tile.multiply_add(factor, other, builder.load(held[i])), held[i])
                if multiplies:
                    previous = partial[i % 2]
                    if previous is None:
                        partial[i % 2] = builder.fmul(other, own_part[i], flags=("fast",))
                    else:
                        partial[i % 2] = tile.multiply_add(other, own_part[i], previous)
            if multiplies:
                total = partial[0] if partial[1] is None else builder.fadd(*partial, flags=("fast",))
                tile.store(total, product, 0)
        if adds:
            for register, target in zip(held, targets, strict=True):
                tile.store(builder.load(register), target, 0)
        return context.get_dummy_value()

    n = types.int64
    return types.void(n, n, n, n, n, n, n, n, n, n, n, size, lanes, across, down, need_x, need_theta), codegen


@intrinsic(prefer_literal=True)
def move_row(typingctx: Any, source: Any, target: Any, size: Any, lanes: Any, adds: Any) -> Any:
    """Copy one vector to the target, or add it there if ``adds``."""
    shape = (size.literal_value, lanes.literal_value, 1)
    is_sum = adds.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(builder, *shape)
        value = tile.load(args[0], 0)
        tile.store(builder.fadd(value, tile.load(args[1], 0)) if is_sum else value, args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, size, lanes, adds), codegen


@intrinsic(prefer_literal=True)
def sum_of_row(typingctx: Any, source: Any, target: Any, size: Any, lanes: Any) -> Any:
    """Add the lanes of one vector and store the sum as one float."""
    shape = (size.literal_value, lanes.literal_value, 1)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(builder, *shape)
        builder.store(tile.sum(tile.load(args[0], 0)), builder.inttoptr(args[1], tile.scalar.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, size, lanes), codegen


# -- layout ---------------------------------------------------------------------------------------------------------------


@njit(inline="never")
def to_plane(
    image: int, features: int, first: int, height: int, width: int, plane: int, rows: int, columns: int, top: int,
    left: int, batch: int, start: int, block: int, total: int, size: int, lanes: int,
) -> None:  # fmt: skip
    """Copy one channel of ``lanes`` images, from image ``start`` on, to a plane [rows, columns, lanes].

    Pixel (0, 0) goes to (top, left). Pixels that do not fit in the plane are left out, and the rest of the plane is 0.

    Args:
        image: the address of [batch, features]. The channel begins at feature ``first``.
        total: the address of a vector for the sum of all pixels, or 0.
        block: the address of space for lanes x lanes floats.
    """
    pixel = lanes * size
    for i in range(rows * columns):
        fill_row(plane + i * pixel, 0.0, size, lanes, 1)
    if total != 0:
        fill_row(total, 0.0, size, lanes, 1)
    row, column = top, left
    for f in range(0, height * width, lanes):
        count = min(lanes, height * width - f)
        source = image + (start * features + first + f) * size
        if count == lanes and start + lanes <= batch:
            transpose_block(source, features * size, block, pixel, size, lanes)
        else:
            transpose_edge(source, features * size, batch - start, count, block, pixel, count, lanes, size, lanes)
        for i in range(count):
            if 0 <= row < rows and 0 <= column < columns:
                move_row(block + i * pixel, plane + (row * columns + column) * pixel, size, lanes, False)
            if total != 0:
                move_row(block + i * pixel, total, size, lanes, True)
            column += 1
            if column == left + width:
                row, column = row + 1, left


@njit(inline="never")
def from_plane(
    plane: int, columns: int, image: int, features: int, first: int, width: int, count: int, batch: int, start: int,
    block: int, size: int, lanes: int,
) -> None:  # fmt: skip
    """Copy ``count`` pixels of a plane to an image [batch, features], to the features from ``first`` on.

    The pixels are taken from (0, 0) on, in rows of ``width``.
    """
    pixel = lanes * size
    row, column = 0, 0
    for f in range(0, count, lanes):
        n = min(lanes, count - f)
        for i in range(n):
            move_row(plane + (row * columns + column) * pixel, block + i * pixel, size, lanes, False)
            column += 1
            if column == width:
                row, column = row + 1, 0
        target = image + (start * features + first + f) * size
        if n == lanes and start + lanes <= batch:
            transpose_block(block, pixel, target, features * size, size, lanes)
        else:
            transpose_edge(block, pixel, n, lanes, target, features * size, batch - start, n, size, lanes)


# -- kernels --------------------------------------------------------------------------------------------------------------


@cache
def forward_kernel(size: int, lanes: int, across: int, down: int, step: int) -> Kernel:
    """Make the kernel of y [B, O, H', W'] from x [B, C, H, W], by output channel. ``step`` is the stride across."""
    pixel = lanes * size
    block_bytes, values_bytes, offsets_bytes = lanes * pixel, CHUNK * size, CHUNK * 8

    def forward(a: int) -> None:
        batch, tiles = load_int64(a + 8 * A.BATCH), load_int64(a + 8 * A.TILES)
        inputs, outputs = load_int64(a + 8 * A.CHANNELS_IN), load_int64(a + 8 * A.CHANNELS_OUT)
        xp, rows, columns = load_int64(a + 8 * A.XP), load_int64(a + 8 * A.X_ROWS), load_int64(a + 8 * A.X_COLUMNS)
        block = stack_space(block_bytes)
        if load_int64(a + 8 * A.PHASE) == ConvPhase.LAYOUT:
            x, height, width = load_int64(a + 8 * A.X), load_int64(a + 8 * A.HEIGHT), load_int64(a + 8 * A.WIDTH)
            top, left, pixels = load_int64(a + 8 * A.TOP), load_int64(a + 8 * A.LEFT), height * width
            while True:
                task = fetch_add(a + 8 * A.TASK, 1)
                if task >= tiles * inputs:
                    return
                plane, first = xp + task * rows * columns * pixel, (task % inputs) * pixels
                start = (task // inputs) * lanes
                to_plane(
                    x,
                    inputs * pixels,
                    first,
                    height,
                    width,
                    plane,
                    rows,
                    columns,
                    top,
                    left,
                    batch,
                    start,
                    block,
                    0,
                    size,
                    lanes,
                )
        y, theta, bias, shift = (
            load_int64(a + 8 * A.Y),
            load_int64(a + 8 * A.THETA),
            load_int64(a + 8 * A.BIAS),
            load_int64(a + 8 * A.SHIFT),
        )
        row_start, row_column, row_slot = (
            load_int64(a + 8 * A.ROW_START),
            load_int64(a + 8 * A.ROW_COLUMN),
            load_int64(a + 8 * A.ROW_SLOT),
        )
        height, width, stride = (
            load_int64(a + 8 * A.OUT_HEIGHT),
            load_int64(a + 8 * A.OUT_WIDTH),
            load_int64(a + 8 * A.STRIDE_DOWN),
        )
        last, band, bands = load_int64(a + 8 * A.LAST_ROW), load_int64(a + 8 * A.BAND), load_int64(a + 8 * A.BANDS)
        sums_columns = load_int64(a + 8 * A.SCRATCH_COLUMNS)
        sums = load_int64(a + 8 * A.SCRATCH) + fetch_add(a + 8 * A.WORKER, 1) * load_int64(a + 8 * A.SCRATCH_BYTES)
        values, offsets = stack_space(values_bytes), stack_space(offsets_bytes)
        features = outputs * height * width
        while True:
            task = fetch_add(a + 8 * A.TASK, 1)
            if task >= tiles * bands * outputs:
                return
            tile, part, o = task // (bands * outputs), task // outputs % bands, task % outputs
            upper, lower = part * band, min(part * band + band, last)
            value = load_float(bias + o * size, size) if bias != 0 else 0.0
            for i in range((lower - upper) * sums_columns):
                fill_row(sums + i * pixel, value, size, lanes, 1)
            source = xp + tile * inputs * rows * columns * pixel
            begin, end = load_int32(row_start + o * 4), load_int32(row_start + (o + 1) * 4)
            while begin < end:
                n = min(CHUNK, end - begin)
                for i in range(n):
                    slot = load_int32(row_slot + (begin + i) * 4)
                    value = load_float(theta + (slot & SLOT) * size, size)
                    store_float(values + i * size, -value if slot < 0 else value, size)
                    store_int64(offsets + i * 8, load_int64(shift + load_int32(row_column + (begin + i) * 4) * 8))
                for r in range(upper, lower, down):
                    for c in range(0, sums_columns, across):
                        accumulate_block(
                            sums + ((r - upper) * sums_columns + c) * pixel, sums_columns * pixel, pixel, n, offsets, values,
                            source + (r * stride * columns + c * step) * pixel, stride * columns * pixel,
                            size, lanes, across, down, step
                        )  # fmt: skip
                begin += n
            first, count = o * height * width + upper * width, (min(lower, height) - upper) * width
            from_plane(sums, sums_columns, y, features, first, width, count, batch, tile * lanes, block, size, lanes)

    return Kernel(forward)


@cache
def backward_kernel(size: int, lanes: int, across: int, down: int, need_x: bool, need_theta: bool) -> Kernel:
    """Make the kernel of dx, dtheta and db from dy and the planes of x, by input channel.

    ``need_x`` and ``need_theta`` ask for the first two. The kernel computes db if its address is not 0.
    """
    pixel = lanes * size
    block_bytes, values_bytes, offsets_bytes, dots_bytes = lanes * pixel, CHUNK * size, CHUNK * 8, CHUNK * lanes * size

    def backward(a: int) -> None:
        phase, batch, tiles, total = (
            load_int64(a + 8 * A.PHASE),
            load_int64(a + 8 * A.BATCH),
            load_int64(a + 8 * A.TILES),
            load_int64(a + 8 * A.COUNT),
        )
        inputs, outputs = load_int64(a + 8 * A.CHANNELS_IN), load_int64(a + 8 * A.CHANNELS_OUT)
        yp, rows, columns = load_int64(a + 8 * A.YP), load_int64(a + 8 * A.Y_ROWS), load_int64(a + 8 * A.Y_COLUMNS)
        partial, bands = load_int64(a + 8 * A.PARTIAL), load_int64(a + 8 * A.BANDS)
        dtheta, dbias, partial_bias = (
            load_int64(a + 8 * A.DTHETA),
            load_int64(a + 8 * A.DBIAS),
            load_int64(a + 8 * A.PARTIAL_BIAS),
        )
        column_start, column_row, column_slot = (
            load_int64(a + 8 * A.COLUMN_START),
            load_int64(a + 8 * A.COLUMN_ROW),
            load_int64(a + 8 * A.COLUMN_SLOT),
        )
        block, vector = stack_space(block_bytes), stack_space(64)
        if phase == ConvPhase.LAYOUT:
            dy, height, width = load_int64(a + 8 * A.Y), load_int64(a + 8 * A.OUT_HEIGHT), load_int64(a + 8 * A.OUT_WIDTH)
            top, left, pixels = load_int64(a + 8 * A.OUT_TOP), load_int64(a + 8 * A.OUT_LEFT), height * width
            while True:
                task = fetch_add(a + 8 * A.TASK, 1)
                if task >= tiles * outputs:
                    return
                plane, first = yp + task * rows * columns * pixel, (task % outputs) * pixels
                start = (task // outputs) * lanes
                added = vector if dbias != 0 else 0
                to_plane(
                    dy, outputs * pixels, first, height, width, plane, rows, columns, top, left, batch, start, block, added,
                    size, lanes
                )  # fmt: skip
                if dbias != 0:
                    sum_of_row(vector, partial_bias + task * size, size, lanes)
        if phase == ConvPhase.REDUCE:
            tasks = (total + 1023) // 1024 if need_theta else 0
            while True:
                task = fetch_add(a + 8 * A.TASK, 1)
                if task > tasks:
                    return
                if task == tasks:
                    if dbias != 0:
                        for o in range(outputs):
                            value = load_float(partial_bias + o * size, size)
                            for tile in range(1, tiles):
                                value += load_float(partial_bias + (tile * outputs + o) * size, size)
                            store_float(dbias + o * size, value, size)
                    continue
                for i in range(task * 1024, min(task * 1024 + 1024, total)):
                    value = load_float(partial + i * size, size)
                    for part in range(1, tiles * bands):
                        value += load_float(partial + (part * total + i) * size, size)
                    slot = load_int32(column_slot + i * 4)
                    store_float(dtheta + (slot & SLOT) * size, -value if slot < 0 else value, size)
        xp, x_rows, x_columns = load_int64(a + 8 * A.XP), load_int64(a + 8 * A.X_ROWS), load_int64(a + 8 * A.X_COLUMNS)
        theta, dx, shift, meets = (
            load_int64(a + 8 * A.THETA),
            load_int64(a + 8 * A.DX),
            load_int64(a + 8 * A.SHIFT),
            load_int64(a + 8 * A.MEETS),
        )
        height, width, positions = load_int64(a + 8 * A.HEIGHT), load_int64(a + 8 * A.WIDTH), load_int64(a + 8 * A.KERNEL)
        down_stride, across_stride = load_int64(a + 8 * A.STRIDE_DOWN), load_int64(a + 8 * A.STRIDE_ACROSS)
        top, left = load_int64(a + 8 * A.TOP), load_int64(a + 8 * A.LEFT)
        last, band = load_int64(a + 8 * A.LAST_ROW), load_int64(a + 8 * A.BAND)
        sums_columns = load_int64(a + 8 * A.SCRATCH_COLUMNS)
        sums = load_int64(a + 8 * A.SCRATCH) + fetch_add(a + 8 * A.WORKER, 1) * load_int64(a + 8 * A.SCRATCH_BYTES)
        values, offsets, numbers = stack_space(values_bytes), stack_space(offsets_bytes), stack_space(offsets_bytes)
        dots = stack_space(dots_bytes)
        features, own_step = inputs * height * width, across_stride * pixel
        while True:
            task = fetch_add(a + 8 * A.TASK, 1)
            if task >= tiles * bands * inputs:
                return
            tile, part, channel = task // (bands * inputs), task // inputs % bands, task % inputs
            upper, lower = part * band, min(part * band + band, last)
            if need_x:
                for i in range((lower - upper) * down_stride * sums_columns):
                    fill_row(sums + i * pixel, 0.0, size, lanes, 1)
            source = yp + tile * outputs * rows * columns * pixel
            own = xp + ((tile * inputs + channel) * x_rows + top) * x_columns * pixel + left * pixel
            products = partial + (tile * bands + part) * total * size
            for set_of_pixels in range(down_stride * across_stride):
                row_phase, column_phase = set_of_pixels // across_stride, set_of_pixels % across_stride
                k = 0
                at = load_int32(column_start + channel * positions * 4)
                while k < positions:
                    n = 0
                    while k < positions and n < CHUNK:
                        stop = load_int32(column_start + (channel * positions + k + 1) * 4)
                        if load_int64(meets + k * 8) != set_of_pixels:
                            at = stop
                        while at < stop and n < CHUNK:
                            if need_x:
                                slot = load_int32(column_slot + at * 4)
                                value = load_float(theta + (slot & SLOT) * size, size)
                                store_float(values + n * size, -value if slot < 0 else value, size)
                            row = load_int32(column_row + at * 4)
                            store_int64(offsets + n * 8, load_int64(shift + k * 8) + row * rows * columns * pixel)
                            store_int64(numbers + n * 8, at)
                            at += 1
                            n += 1
                        if at == stop:
                            k += 1
                    if n == 0:
                        break
                    if need_theta:
                        for i in range(n):
                            fill_row(dots + i * pixel, 0.0, size, lanes, 1)
                    for r in range(upper, lower, down):
                        for c in range(0, sums_columns // across_stride, across):
                            x_row, x_column = r * down_stride + row_phase, c * across_stride + column_phase
                            differentiate_block(
                                sums + ((x_row - upper * down_stride) * sums_columns + x_column) * pixel,
                                down_stride * sums_columns * pixel,
                                own + (x_row * x_columns + x_column) * pixel, down_stride * x_columns * pixel, own_step,
                                n, offsets, values, dots, source + (r * columns + c) * pixel, columns * pixel,
                                size, lanes, across, down, need_x, need_theta
                            )  # fmt: skip
                    if need_theta:
                        for i in range(n):
                            sum_of_row(dots + i * pixel, products + load_int64(numbers + i * 8) * size, size, lanes)
            if need_x:
                first, rows_done = (
                    channel * height * width + upper * down_stride * width,
                    min(lower * down_stride, height) - upper * down_stride,
                )
                from_plane(
                    sums, sums_columns, dx, features, first, width, rows_done * width, batch, tile * lanes, block, size, lanes
                )

    return Kernel(backward)
