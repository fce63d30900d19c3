"""The steps of an LSTM or GRU layer in one direction, on the CPU: all steps in one call, from the connections alone.

Step t of batch element b is row n = t * P + b of matrices with one row per step and element. P is the batch size, padded to
whole parts of W elements. Such a matrix is stored in tiles [features, V] of V rows, and V is a multiple of W. The input
product is then one product over all steps, and the gradients of both weights are one pass at the end, with long vectors
(:mod:`.products`). A part of the batch never needs another part: each thread takes a part through the whole sequence and waits
for no other thread.

Before the steps, ``gates`` holds the input product and the biases, in 4 blocks of hidden-size rows. A step adds the recurrent
product and replaces the sums by the gates. The hidden state and the gradients of the gates of the current step are also kept in
[features, W], close together.
"""

from __future__ import annotations

from functools import cache

from numba import njit

from lightning_deepr.kernels.cpu.fields import RecurrentArguments as A
from lightning_deepr.kernels.cpu.gru import gru_cell, gru_gradient
from lightning_deepr.kernels.cpu.linear import from_block, gather_values, to_tiles
from lightning_deepr.kernels.cpu.lstm import lstm_cell, lstm_gradient
from lightning_deepr.kernels.cpu.native import Kernel, copy_row, fetch_add, fill_row, load_int32, load_int64, store_float
from lightning_deepr.kernels.cpu.near import accumulate_near

LSTM, GRU = 4, 3  # the kinds of layers: each is the number of blocks of rows in its weights


@cache
def gather_kernel(size: int) -> Kernel:
    """Make the kernel that gathers the signed values in the order of rows or columns, 4096 per task. Every step reads them."""

    def gather(a: int) -> None:
        theta, slots, count = load_int64(a + 8 * A.THETA), load_int64(a + 8 * A.SLOTS), load_int64(a + 8 * A.COUNT)
        values = load_int64(a + 8 * A.VALUES)
        while True:
            first = 4096 * fetch_add(a + 8 * A.TASK, 1)
            if first >= count:
                break
            gather_values(theta, slots + first * 4, min(4096, count - first), values + first * size, size)

    return Kernel(gather)


@njit(inline="always")
def common_arguments(a: int) -> tuple[int, ...]:
    return (
        load_int64(a + 8 * A.STEPS), load_int64(a + 8 * A.BATCH), load_int64(a + 8 * A.PARTS), load_int64(a + 8 * A.HIDDEN),
        load_int64(a + 8 * A.REVERSE), load_int64(a + 8 * A.V), load_int64(a + 8 * A.VECTORS), load_int64(a + 8 * A.START),
        load_int64(a + 8 * A.INDEX), load_int64(a + 8 * A.VALUES), load_int64(a + 8 * A.GATES), load_int64(a + 8 * A.CELLS),
        load_int64(a + 8 * A.CELL_STEP), load_int64(a + 8 * A.SCRATCH), load_int64(a + 8 * A.KEPT), load_int64(a + 8 * A.Y),
    )  # fmt: skip


@njit(inline="always")
def in_tiles(n: int, features: int, wide: int) -> int:
    """Compute where row n begins in tiles [features, V], in floats."""
    return (n // wide) * features * wide + n % wide


@njit(inline="never")
def read_part(x: int, part: int, tiled: int, batch: int, features: int, vectors: int, size: int, lanes: int) -> None:
    """Copy one part of x [batch, features] to [features, W], or zeros if there is no x."""
    width = lanes * vectors
    if x != 0:
        to_tiles(x, tiled - part * features * width * size, batch, features, 0, features, part, vectors, size, lanes)
    else:
        for i in range(features * width):
            store_float(tiled + i * size, 0.0, size)


@njit(inline="never")
def write_part(tiled: int, part: int, y: int, batch: int, features: int, vectors: int, size: int, lanes: int) -> None:
    """Copy [features, W] to one part of y [batch, features], if there is a y."""
    if y != 0:
        for first in range(0, features, lanes):
            block = tiled + first * lanes * vectors * size
            from_block(block, y, batch, features, first, min(lanes, features - first), part, vectors, size, lanes)


@cache
def forward_kernel(kind: int, size: int, lanes: int, vectors: int) -> Kernel:
    """Make the kernel of the gates, the cell states (of an LSTM) and y of all steps.

    If KEPT is not 0, h before each step goes there, in tiles. CELL_STEP is the number of bytes from the cell states of one
    step to those of the next, or 0 if the past is not needed. START, INDEX and VALUES are by row. H_FIRST and C_FIRST are the
    states before the first step, H_LAST and C_LAST those after the last. SCRATCH is [PARTS, 2, hidden, W].
    """
    row_bytes = lanes * vectors * size

    def forward(a: int) -> None:
        (
            steps, batch, parts, hidden, reverse, wide, runtime_vectors, start, index, values,
            gates, cells, cell_step, scratch, kept_all, y,
        ) = common_arguments(a)  # fmt: skip
        stride, state_bytes = wide * size, hidden * row_bytes
        while True:
            part = fetch_add(a + 8 * A.TASK, 1)
            if part >= parts:
                break
            h = scratch + part * 2 * state_bytes
            new_h = h + state_bytes
            c = cells + part * (cell_step * steps + state_bytes)
            read_part(load_int64(a + 8 * A.H_FIRST), part, h, batch, hidden, runtime_vectors, size, lanes)
            if kind == LSTM:
                read_part(load_int64(a + 8 * A.C_FIRST), part, c, batch, hidden, runtime_vectors, size, lanes)
            for step in range(steps):
                t = steps - 1 - step if reverse != 0 else step
                n = (t * parts + part) * (lanes * vectors)
                here = gates + in_tiles(n, 4 * hidden, wide) * size
                if step == 0 and kept_all != 0:
                    kept = kept_all + in_tiles(n, hidden, wide) * size
                    for unit in range(hidden):
                        copy_row(h + unit * row_bytes, kept + unit * stride, size, lanes, vectors)
                kept, kept_stride = new_h, row_bytes
                if kept_all != 0 and step + 1 < steps:
                    later = n - parts * (lanes * vectors) if reverse != 0 else n + parts * (lanes * vectors)
                    kept = kept_all + in_tiles(later, hidden, wide) * size
                    kept_stride = stride
                for first in range(0, hidden, lanes):
                    last = min(first + lanes, hidden)
                    for unit in range(first, last):
                        own, sums = unit * row_bytes, here + unit * stride
                        for block in range(kind):
                            row = block * hidden + unit
                            begin = load_int32(start + row * 4)
                            number = load_int32(start + row * 4 + 4) - begin
                            into = block + 1 if kind == GRU and block == 2 else block
                            accumulate_near(
                                sums + into * hidden * stride, number, index + begin * 4, values + begin * size, h,
                                size, lanes, vectors
                            )  # fmt: skip
                        to, also = new_h + own, kept + unit * kept_stride
                        if kind == LSTM:
                            lstm_cell(sums, hidden * stride, c + own, c + cell_step + own, to, also, size, lanes, vectors)
                        else:
                            gru_cell(sums, hidden * stride, h + own, to, also, size, lanes, vectors)
                    out = y + t * batch * hidden * size
                    from_block(
                        new_h + first * row_bytes, out, batch, hidden, first, last - first, part, runtime_vectors, size, lanes
                    )
                c += cell_step
                h, new_h = new_h, h
            write_part(h, part, load_int64(a + 8 * A.H_LAST), batch, hidden, runtime_vectors, size, lanes)
            if kind == LSTM:
                write_part(c, part, load_int64(a + 8 * A.C_LAST), batch, hidden, runtime_vectors, size, lanes)

    return Kernel(forward)


@cache
def backward_kernel(kind: int, size: int, lanes: int, vectors: int) -> Kernel:
    """Make the kernel of the gradients of the gates' sums and of the first states.

    The gradients of the sums go to KEPT, in tiles. Y is dy, and H_FIRST, C_FIRST, H_LAST and C_LAST are gradients. START,
    INDEX and VALUES are by column. For a GRU, CELLS is h before each step, in tiles. SCRATCH is [PARTS, 7, hidden, W].
    """
    row_bytes = lanes * vectors * size

    def backward(a: int) -> None:
        (
            steps, batch, parts, hidden, reverse, wide, runtime_vectors, start, index, values,
            gates, cells, cell_step, scratch, kept_all, y,
        ) = common_arguments(a)  # fmt: skip
        stride, state_bytes = wide * size, hidden * row_bytes
        while True:
            part = fetch_add(a + 8 * A.TASK, 1)
            if part >= parts:
                break
            dgates = scratch + part * 7 * state_bytes
            dh = dgates + 4 * state_bytes
            dc, dy = dh + state_bytes, dh + 2 * state_bytes
            c = cells + part * (cell_step * steps + state_bytes) + cell_step * steps
            read_part(load_int64(a + 8 * A.H_LAST), part, dh, batch, hidden, runtime_vectors, size, lanes)
            if kind == LSTM:
                read_part(load_int64(a + 8 * A.C_LAST), part, dc, batch, hidden, runtime_vectors, size, lanes)
            for step in range(steps):
                t = step if reverse != 0 else steps - 1 - step
                n = (t * parts + part) * (lanes * vectors)
                where = in_tiles(n, 4 * hidden, wide) * size
                here, kept, h = gates + where, kept_all + where, cells + in_tiles(n, hidden, wide) * size
                read_part(y + t * batch * hidden * size, part, dy, batch, hidden, runtime_vectors, size, lanes)
                for unit in range(hidden):
                    own, far = unit * row_bytes, unit * stride
                    if kind == LSTM:
                        lstm_gradient(
                            here + far, hidden * stride, c - cell_step + own, c + own, dy + own, dh + own, dc + own,
                            dgates + own, state_bytes, kept + far, size, lanes, vectors
                        )  # fmt: skip
                    else:
                        gru_gradient(
                            here + far, hidden * stride, h + far, dy + own, dh + own, dgates + own, state_bytes, kept + far,
                            size, lanes, vectors
                        )  # fmt: skip
                for unit in range(hidden):
                    begin = load_int32(start + unit * 4)
                    number = load_int32(start + unit * 4 + 4) - begin
                    into = dh + unit * row_bytes
                    if kind == LSTM:
                        fill_row(into, 0.0, size, lanes, vectors)
                    accumulate_near(into, number, index + begin * 4, values + begin * size, dgates, size, lanes, vectors)
                c -= cell_step
            write_part(dh, part, load_int64(a + 8 * A.H_FIRST), batch, hidden, runtime_vectors, size, lanes)
            if kind == LSTM:
                write_part(dc, part, load_int64(a + 8 * A.C_FIRST), batch, hidden, runtime_vectors, size, lanes)

    return Kernel(backward)


def parts_of(batch: int, threads: int, size: int) -> tuple[int, int, int]:
    """Divide a batch among threads: return (parts, lanes, vectors). A part has W = lanes * vectors elements."""
    lanes, each = 64 // size, -(-batch // threads)
    if each <= lanes // 2:
        lanes, vectors = lanes // 2, 1
    else:
        vectors = 1 if each <= lanes else 2 if each <= 2 * lanes else 4
    return -(-batch // (lanes * vectors)), lanes, vectors
