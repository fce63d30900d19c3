"""The sparse linear layer on the CPU: y = x W^T + b and the gradients of x, theta and b, from the K connections alone.

The batch is the inner dimension. x [B, in] is stored as tiles [in, W] of W batch elements (W = lanes * vectors, padded with 0).
A connection (row, column) is then one multiplication of W floats with a scalar. The forward pass visits the connections by row:
the sums of a row stay in registers, and blocks of finished rows are transposed into y. The backward pass visits the connections
by column and gets both gradients from one load of dy: dx[column] += w * dy[row], dw = dy[row] . x[column].

An entry of ``slots`` holds the number of the slot. Its top bit is set if the sign of the connection is negative.
"""

from __future__ import annotations

from functools import cache

from numba import njit

from lightning_deepr.kernels.cpu.fields import LinearArguments as A
from lightning_deepr.kernels.cpu.fields import LinearPhase
from lightning_deepr.kernels.cpu.native import (
    Kernel,
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
    store_int64,
    sum_row,
    transpose_block,
    transpose_edge,
)

CHUNK = 256  # connections whose values are gathered at a time
SLOT = 0x7FFFFFFF
CACHE = 3 << 19  # the most bytes of a tile of more than 4 vectors: it has to fit into a core's own cache


@njit(inline="never")
def to_tiles(
    x: int, tiled: int, batch: int, features: int, first: int, last: int, tile: int, vectors: int, size: int, lanes: int,
) -> None:  # fmt: skip
    """Copy the columns from ``first`` to before ``last`` of one batch tile of x [batch, features] to tiled [features, W].

    Values beyond the batch are 0.
    """
    width = lanes * vectors
    start = tile * width
    for column in range(first, last, lanes):
        for part in range(vectors):
            b = start + part * lanes
            source = x + (b * features + column) * size
            target = tiled + ((tile * features + column) * width + part * lanes) * size
            if b + lanes <= batch and column + lanes <= last:
                transpose_block(source, features * size, target, width * size, size, lanes)
            else:
                inside = min(lanes, last - column)
                transpose_edge(source, features * size, batch - b, inside, target, width * size, inside, lanes, size, lanes)


@njit(inline="never")
def from_block(
    block: int, y: int, batch: int, features: int, first: int, count: int, tile: int, vectors: int, size: int, lanes: int,
) -> None:  # fmt: skip
    """Copy ``count`` finished rows of W floats to y [batch, features], to the columns from ``first`` on."""
    width = lanes * vectors
    for part in range(vectors):
        b = tile * width + part * lanes
        if count == lanes and b + lanes <= batch:
            transpose_block(
                block + part * lanes * size, width * size, y + (b * features + first) * size, features * size, size, lanes
            )
        else:
            transpose_edge(
                block + part * lanes * size,
                width * size,
                count,
                lanes,
                y + (b * features + first) * size,
                features * size,
                batch - b,
                count,
                size,
                lanes,
            )


@njit(inline="always")
def gather_values(theta: int, slots: int, count: int, values: int, size: int) -> None:
    for i in range(count):
        slot = load_int32(slots + i * 4)
        value = load_float(theta + (slot & SLOT) * size, size)
        store_float(values + i * size, -value if slot < 0 else value, size)


@njit(inline="always")
def scatter_dots(dtheta: int, slots: int, count: int, dots: int, add: bool, size: int) -> None:
    for i in range(count):
        slot = load_int32(slots + i * 4)
        value = load_float(dots + i * size, size)
        value = -value if slot < 0 else value
        where = dtheta + (slot & SLOT) * size
        if add:
            value += load_float(where, size)
        store_float(where, value, size)


@cache
def forward_kernel(size: int, lanes: int, vectors: int) -> Kernel:
    """Make the kernel of y [B, rows] = x [B, columns] W^T + b, by row."""
    width = lanes * vectors
    block_bytes, chunk_bytes = lanes * width * size, CHUNK * size

    def forward(a: int) -> None:
        phase, batch, tiles = load_int64(a + 8 * A.PHASE), load_int64(a + 8 * A.BATCH), load_int64(a + 8 * A.TILES)
        rows, columns, parts = load_int64(a + 8 * A.ROWS), load_int64(a + 8 * A.COLUMNS), load_int64(a + 8 * A.PARTS)
        xt, y, theta, bias = (
            load_int64(a + 8 * A.XT),
            load_int64(a + 8 * A.Y),
            load_int64(a + 8 * A.THETA),
            load_int64(a + 8 * A.BIAS),
        )
        counter = a + 8 * A.TASK
        if phase == LinearPhase.ALL:  # one thread does everything, and its arguments may be read-only
            counter = stack_space(8)
            store_int64(counter, 0)
        if phase != LinearPhase.MULTIPLY:
            x = load_int64(a + 8 * A.X)
            blocks = (columns + 127) // 128
            while True:
                task = fetch_add(counter, 1)
                if task >= blocks * tiles:
                    break
                first = (task % blocks) * 128
                to_tiles(x, xt, batch, columns, first, min(first + 128, columns), task // blocks, parts, size, lanes)
        if phase == LinearPhase.TRANSPOSE:
            return
        if phase == LinearPhase.ALL:
            store_int64(counter, 0)
        row_start, row_column, row_slot = (
            load_int64(a + 8 * A.ROW_START),
            load_int64(a + 8 * A.ROW_COLUMN),
            load_int64(a + 8 * A.ROW_SLOT),
        )
        block, values = stack_space(block_bytes), stack_space(chunk_bytes)
        groups = (rows + lanes - 1) // lanes
        while True:
            task = fetch_add(counter, 4)
            if task >= groups * tiles:
                break
            for group in range(task, min(task + 4, groups * tiles)):
                tile, first = group // groups, (group % groups) * lanes
                source = xt + tile * columns * width * size
                count = min(lanes, rows - first)
                begin = load_int32(row_start + first * 4)
                for r in range(count):
                    sums = block + r * width * size
                    start = load_float(bias + (first + r) * size, size) if bias != 0 else 0.0
                    fill_row(sums, start, size, lanes, vectors)
                    end = load_int32(row_start + (first + r + 1) * 4)
                    while begin < end:
                        n = min(CHUNK, end - begin)
                        gather_values(theta, row_slot + begin * 4, n, values, size)
                        accumulate_rows(sums, n, row_column + begin * 4, values, source, size, lanes, vectors)
                        begin += n
                from_block(block, y, batch, rows, first, count, tile, parts, size, lanes)

    return Kernel(forward)


@njit
def dots_by_row(
    a: int, counter: int, batch: int, tiles: int, rows: int, columns: int, parts: int, xt: int, dy: int, dtheta: int,
    dbias: int, block: int, dots: int, size: int, lanes: int, vectors: int,
) -> None:  # fmt: skip
    """Compute dtheta and db only, by row. One block of dy at a time is transposed, on the stack."""
    row_start, row_column, row_slot = (
        load_int64(a + 8 * A.ROW_START),
        load_int64(a + 8 * A.ROW_COLUMN),
        load_int64(a + 8 * A.ROW_SLOT),
    )
    width = lanes * vectors
    groups = (rows + lanes - 1) // lanes
    while True:
        task = fetch_add(counter, 4)
        if task >= groups:
            break
        for group in range(task, min(task + 4, groups)):
            first = group * lanes
            count = min(lanes, rows - first)
            for tile in range(tiles):
                source = xt + tile * columns * width * size
                # the address is shifted so that the tiles of these columns begin at ``block``
                to_tiles(
                    dy,
                    block - (tile * rows + first) * width * size,
                    batch,
                    rows,
                    first,
                    first + count,
                    tile,
                    parts,
                    size,
                    lanes,
                )
                begin = load_int32(row_start + first * 4)
                for r in range(count):
                    own = block + r * width * size
                    if dbias != 0:
                        total = sum_row(own, size, lanes, vectors)
                        if tile != 0:
                            total += load_float(dbias + (first + r) * size, size)
                        store_float(dbias + (first + r) * size, total, size)
                    end = load_int32(row_start + (first + r + 1) * 4)
                    while begin < end:
                        n = min(CHUNK, end - begin)
                        dot_rows(n, row_column + begin * 4, source, own, dots, size, lanes, vectors)
                        scatter_dots(dtheta, row_slot + begin * 4, n, dots, tile != 0, size)
                        begin += n


@cache
def backward_kernel(size: int, lanes: int, vectors: int) -> Kernel:
    """Make the kernel of dx [B, columns] = dy W, dtheta [K] = s * (dy^T x) at the places, and db [rows] = sum of dy.

    It computes each of them if its address is not 0. It makes xt from x if the address of x is not 0. Without dx, it visits the
    connections by row.
    """
    width = lanes * vectors
    block_bytes, chunk_bytes = lanes * width * size, CHUNK * size

    def backward(a: int) -> None:
        phase, batch, tiles = load_int64(a + 8 * A.PHASE), load_int64(a + 8 * A.BATCH), load_int64(a + 8 * A.TILES)
        rows, columns, parts = load_int64(a + 8 * A.ROWS), load_int64(a + 8 * A.COLUMNS), load_int64(a + 8 * A.PARTS)
        x, xt, dy, yt = load_int64(a + 8 * A.X), load_int64(a + 8 * A.XT), load_int64(a + 8 * A.Y), load_int64(a + 8 * A.YT)
        theta, dx = load_int64(a + 8 * A.THETA), load_int64(a + 8 * A.DX)
        dtheta, dbias = load_int64(a + 8 * A.DTHETA), load_int64(a + 8 * A.DBIAS)
        counter = a + 8 * A.TASK
        if phase == LinearPhase.ALL:
            counter = stack_space(8)
            store_int64(counter, 0)
        if phase != LinearPhase.MULTIPLY:
            blocks = (rows + 127) // 128 if dx != 0 else 0
            more = ((columns + 127) // 128) * tiles if x != 0 else 0
            while True:
                task = fetch_add(counter, 1)
                if task >= blocks + more:
                    break
                if task >= blocks:
                    task -= blocks
                    first = (task // tiles) * 128
                    to_tiles(x, xt, batch, columns, first, min(first + 128, columns), task % tiles, parts, size, lanes)
                    continue
                first = task * 128
                last = min(first + 128, rows)
                for tile in range(tiles):
                    to_tiles(dy, yt, batch, rows, first, last, tile, parts, size, lanes)
                if dbias != 0:
                    for r in range(first, last):
                        total = sum_row(yt + r * width * size, size, lanes, vectors)
                        for tile in range(1, tiles):
                            total += sum_row(yt + (tile * rows + r) * width * size, size, lanes, vectors)
                        store_float(dbias + r * size, total, size)
        if phase == LinearPhase.TRANSPOSE:
            return
        if phase == LinearPhase.ALL:
            store_int64(counter, 0)
        block, values, dots = stack_space(block_bytes), stack_space(chunk_bytes), stack_space(chunk_bytes)
        if dx == 0:
            dots_by_row(
                a, counter, batch, tiles, rows, columns, parts, xt, dy, dtheta, dbias, block, dots, size, lanes, vectors
            )
            return
        column_start, column_row = load_int64(a + 8 * A.COLUMN_START), load_int64(a + 8 * A.COLUMN_ROW)
        column_slot = load_int64(a + 8 * A.COLUMN_SLOT)
        groups = (columns + lanes - 1) // lanes
        # One tile after the other: one tile of dy fits into a nearer cache than all, and no two threads add to the same dtheta.
        for tile in range(load_int64(a + 8 * A.TILE), tiles if phase == LinearPhase.ALL else load_int64(a + 8 * A.TILE) + 1):
            if phase == LinearPhase.ALL:
                store_int64(counter, 0)
            source = yt + tile * rows * width * size
            while True:
                task = fetch_add(counter, 4)
                if task >= groups:
                    break
                for group in range(task, min(task + 4, groups)):
                    first = group * lanes
                    count = min(lanes, columns - first)
                    begin = load_int32(column_start + first * 4)
                    for c in range(count):
                        sums = block + c * width * size
                        own = xt + (tile * columns + first + c) * width * size
                        fill_row(sums, 0.0, size, lanes, vectors)
                        end = load_int32(column_start + (first + c + 1) * 4)
                        while begin < end:
                            n = min(CHUNK, end - begin)
                            index, slots = column_row + begin * 4, column_slot + begin * 4
                            gather_values(theta, slots, n, values, size)
                            if dtheta == 0:
                                accumulate_rows(sums, n, index, values, source, size, lanes, vectors)
                            else:
                                accumulate_and_dot(sums, n, index, values, source, own, dots, size, lanes, vectors)
                                scatter_dots(dtheta, slots, n, dots, tile != 0, size)
                            begin += n
                    from_block(block, dx, batch, columns, first, count, tile, parts, size, lanes)

    return Kernel(backward)


def tile_of(batch: int, size: int, features: int = 0) -> tuple[int, int]:
    """Choose (lanes, vectors) of the tile for a batch: the smallest tile that holds it, of at most 8 vectors of 64 bytes.

    Args:
        batch: the number of rows of x.
        size: the bytes of a float.
        features: the larger of rows and columns. If a tile would exceed a core's own cache, half a tile is faster.
    """
    lanes = 64 // size
    if batch <= lanes // 2:
        return lanes // 2, 1
    vectors = 1
    while vectors < 8 and lanes * vectors < batch:
        vectors *= 2
    while vectors > 4 and features * vectors * 64 > CACHE:
        vectors //= 2
    return lanes, vectors
