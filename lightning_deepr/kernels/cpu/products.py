"""The products of a recurrent layer that do not depend on its steps. Each covers all steps, from the connections alone.

The product with the input comes before the steps. The products for all gradients except that of the hidden state come after
them.

Matrices have one row per step and batch element (:mod:`.recurrent`) and are stored in tiles [features, V], as for the linear
layer (:mod:`.linear`). The sums of the gates stay in such tiles of ROWS features. The weight has a row for each sum except
SKIPPED ones, which begin at SKIP. In a GRU, the weight of the input has no rows for the fourth block of sums (SKIP is then the
number of its rows), and the weight of the hidden state has none for the third block.
"""

from __future__ import annotations

from functools import cache

from numba import njit

from lightning_deepr.kernels.cpu.fields import ProductArguments as A
from lightning_deepr.kernels.cpu.fields import ProductPhase
from lightning_deepr.kernels.cpu.linear import CHUNK, from_block, gather_values, scatter_dots, to_tiles
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
    sum_row,
)


@cache
def product_kernel(size: int, lanes: int, vectors: int) -> Kernel:
    """Make the kernel of x W^T + b by row, for x [COUNT, COLUMNS].

    The kernel leaves both x and the result in tiles of V = lanes * vectors rows.
    """
    row_bytes, chunk_bytes = lanes * vectors * size, CHUNK * size

    def product(a: int) -> None:
        tiles, rows, columns = load_int64(a + 8 * A.TILES), load_int64(a + 8 * A.ROWS), load_int64(a + 8 * A.COLUMNS)
        x, xt, yt, count = (
            load_int64(a + 8 * A.X),
            load_int64(a + 8 * A.XT),
            load_int64(a + 8 * A.YT),
            load_int64(a + 8 * A.COUNT),
        )
        if load_int64(a + 8 * A.PHASE) == ProductPhase.TRANSPOSE:
            blocks = (columns + 127) // 128
            while True:
                task = fetch_add(a + 8 * A.TASK, 1)
                if task >= blocks * tiles:
                    break
                first = (task % blocks) * 128
                to_tiles(x, xt, count, columns, first, min(first + 128, columns), task // blocks, vectors, size, lanes)
            return
        theta, bias = load_int64(a + 8 * A.THETA), load_int64(a + 8 * A.BIAS)
        start, index, slots = load_int64(a + 8 * A.START), load_int64(a + 8 * A.INDEX), load_int64(a + 8 * A.SLOTS)
        connected = rows - load_int64(a + 8 * A.SKIPPED)
        values = stack_space(chunk_bytes)
        groups = (rows + 63) // 64
        while True:
            task = fetch_add(a + 8 * A.TASK, 1)
            if task >= groups * tiles:
                break
            tile, first = task // groups, (task % groups) * 64
            source = xt + tile * columns * row_bytes
            for r in range(first, min(first + 64, rows)):
                sums = yt + (tile * rows + r) * row_bytes
                fill_row(sums, load_float(bias + r * size, size) if bias != 0 else 0.0, size, lanes, vectors)
                if r >= connected:
                    continue
                begin, end = load_int32(start + r * 4), load_int32(start + r * 4 + 4)
                while begin < end:
                    n = min(CHUNK, end - begin)
                    gather_values(theta, slots + begin * 4, n, values, size)
                    accumulate_rows(sums, n, index + begin * 4, values, source, size, lanes, vectors)
                    begin += n

    return Kernel(product)


@njit(inline="always")
def add_sum(row: int, where: int, add: bool, size: int, lanes: int, vectors: int) -> None:
    total = sum_row(row, size, lanes, vectors)
    store_float(where, total + load_float(where, size) if add else total, size)


# Each of SHARES tasks has its own rows or columns and takes one tile after the other. The tile stays in a near cache, and no
# other task adds to the same gradients.


@cache
def theta_kernel(size: int, lanes: int, vectors: int) -> Kernel:
    """Make the kernel of dtheta = s * (dy^T x) at the places and of db = sum of dy, by row, for x and dy in tiles.

    It computes each of them if its address is not 0.
    """
    row_bytes, chunk_bytes = lanes * vectors * size, CHUNK * size

    def of_theta(a: int) -> None:
        tiles, rows, columns = load_int64(a + 8 * A.TILES), load_int64(a + 8 * A.ROWS), load_int64(a + 8 * A.COLUMNS)
        xt, yt, shares = load_int64(a + 8 * A.XT), load_int64(a + 8 * A.YT), load_int64(a + 8 * A.SHARES)
        start, index, slots = load_int64(a + 8 * A.START), load_int64(a + 8 * A.INDEX), load_int64(a + 8 * A.SLOTS)
        dtheta, dbias = load_int64(a + 8 * A.DTHETA), load_int64(a + 8 * A.DBIAS)
        skip, skipped = load_int64(a + 8 * A.SKIP), load_int64(a + 8 * A.SKIPPED)
        connected = rows - skipped
        dots = stack_space(chunk_bytes)
        while True:
            share = fetch_add(a + 8 * A.TASK, 1)
            if share >= shares:
                break
            for tile in range(tiles):
                source = xt + tile * columns * row_bytes
                for row in range(connected * share // shares, connected * (share + 1) // shares):
                    r = row + skipped if row >= skip else row
                    own = yt + (tile * rows + r) * row_bytes
                    if dbias != 0:
                        add_sum(own, dbias + r * size, tile != 0, size, lanes, vectors)
                        if r != row:  # this weight has no row for the sum `row`
                            add_sum(yt + (tile * rows + row) * row_bytes, dbias + row * size, tile != 0, size, lanes, vectors)
                    begin, end = load_int32(start + row * 4), load_int32(start + row * 4 + 4)
                    while begin < end and dtheta != 0:
                        n = min(CHUNK, end - begin)
                        dot_rows(n, index + begin * 4, source, own, dots, size, lanes, vectors)
                        scatter_dots(dtheta, slots + begin * 4, n, dots, tile != 0, size)
                        begin += n

    return Kernel(of_theta)


@cache
def input_kernel(size: int, lanes: int, vectors: int) -> Kernel:
    """Make the kernel of dx [COUNT, COLUMNS] = dy W by column, for dy in tiles.

    It computes dtheta in the same pass if the address of dtheta is not 0.
    """
    row_bytes, chunk_bytes = lanes * vectors * size, CHUNK * size
    block_bytes = lanes * row_bytes

    def of_input(a: int) -> None:
        tiles, rows, columns = load_int64(a + 8 * A.TILES), load_int64(a + 8 * A.ROWS), load_int64(a + 8 * A.COLUMNS)
        xt, yt, shares = load_int64(a + 8 * A.XT), load_int64(a + 8 * A.YT), load_int64(a + 8 * A.SHARES)
        start, index, slots = load_int64(a + 8 * A.START), load_int64(a + 8 * A.INDEX), load_int64(a + 8 * A.SLOTS)
        theta, dtheta = load_int64(a + 8 * A.THETA), load_int64(a + 8 * A.DTHETA)
        dx, count = load_int64(a + 8 * A.DX), load_int64(a + 8 * A.COUNT)
        block, values, dots = stack_space(block_bytes), stack_space(chunk_bytes), stack_space(chunk_bytes)
        groups = (columns + lanes - 1) // lanes
        while True:
            share = fetch_add(a + 8 * A.TASK, 1)
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
