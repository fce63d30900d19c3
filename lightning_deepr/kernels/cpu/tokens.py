"""The sparse linear layer on the CPU for an input of many rows (the tokens of a transformer).

The kernels of :mod:`.linear` bring the whole input into another layout first. Here a *block* of W rows (W = lanes * vectors) is
transposed to [in, W], multiplied and transposed back while all of it is in a core's own cache. A connection is one
multiplication of W floats by a scalar, and the sums of an output stay in registers.

The values of the connections are gathered once per call, in the order of the rows (backward: of the columns). theta's gradient
is summed in that order and scattered once, at the end. Threads share out the blocks (forward) or *groups* of blocks (backward).
Each group has sums of its own, which are added up in their order. The number of groups depends on the sizes alone, so the
result does not depend on the number of threads.
"""

from __future__ import annotations

from functools import cache

import llvmlite.binding
from numba import njit

from lightning_deepr.kernels.cpu.fields import TokenArguments as A
from lightning_deepr.kernels.cpu.fields import TokenPhase
from lightning_deepr.kernels.cpu.linear import SLOT, from_block, gather_values
from lightning_deepr.kernels.cpu.native import (
    Kernel,
    fetch_add,
    fill_row,
    load_float,
    load_int32,
    load_int64,
    stack_space,
    store_float,
    store_int64,
    sum_row,
    transpose_edge,
)
from lightning_deepr.kernels.cpu.near import (
    accumulate_and_add_dots,
    accumulate_near,
    add_dots,
    is_marked,
    mark_vector,
    transpose_and_mark,
)

PIECE = 4096  # connections that a task gathers or scatters


@njit(inline="never")
def to_block(
    x: int, block: int, batch: int, features: int, number: int, marks: int, vectors: int, size: int, lanes: int,
) -> None:  # fmt: skip
    """Copy a block of x [batch, features] to [features, W]. Values beyond the batch are 0.

    Args:
        x, block: addresses.
        batch, features: the shape of x.
        number: the number of the block.
        marks: the address of ``lanes`` floats that tell whether all numbers are finite (:mod:`.near`).
        vectors, size, lanes: vectors of a row of the block, bytes of a float, floats of a vector.
    """
    width = lanes * vectors
    for column in range(0, features, lanes):
        for part in range(vectors):
            b = number * width + part * lanes
            source = x + (b * features + column) * size
            target = block + (column * width + part * lanes) * size
            if b + lanes <= batch and column + lanes <= features:
                transpose_and_mark(source, features * size, target, width * size, marks, size, lanes)
            else:
                inside = min(lanes, features - column)
                transpose_edge(source, features * size, batch - b, inside, target, width * size, inside, lanes, size, lanes)
                for i in range(inside):
                    mark_vector(target + i * width * size, marks, size, lanes)


@njit(inline="always")
def gather_pieces(a: int, slots: int, size: int) -> None:
    """Gather the values of all connections in the order of ``slots``."""
    count, theta, values = load_int64(a + 8 * A.COUNT), load_int64(a + 8 * A.THETA), load_int64(a + 8 * A.VALUES)
    while True:
        first = fetch_add(a + 8 * A.TASK, 1) * PIECE
        if first >= count:
            break
        gather_values(theta, slots + 4 * first, min(PIECE, count - first), values + first * size, size)


@cache
def forward_kernel(size: int, lanes: int, vectors: int) -> Kernel:
    """Make the kernel of y [B, rows] = x [B, columns] W^T + b."""
    width = lanes * vectors
    block_bytes, vector_bytes = lanes * width * size, lanes * size

    def forward(a: int) -> None:
        row_start, row_column, row_slot = (
            load_int64(a + 8 * A.ROW_START),
            load_int64(a + 8 * A.ROW_COLUMN),
            load_int64(a + 8 * A.ROW_SLOT),
        )
        if load_int64(a + 8 * A.PHASE) == TokenPhase.GATHER:
            gather_pieces(a, row_slot, size)
            return
        batch, blocks = load_int64(a + 8 * A.BATCH), load_int64(a + 8 * A.BLOCKS)
        rows, columns = load_int64(a + 8 * A.ROWS), load_int64(a + 8 * A.COLUMNS)
        x, y, bias, values = (
            load_int64(a + 8 * A.X),
            load_int64(a + 8 * A.Y),
            load_int64(a + 8 * A.BIAS),
            load_int64(a + 8 * A.VALUES),
        )
        worker = fetch_add(a + 8 * A.WORKER, 1)
        block = load_int64(a + 8 * A.SCRATCH) + worker * load_int64(a + 8 * A.SCRATCH_BYTES)
        out, marks = stack_space(block_bytes), stack_space(vector_bytes)
        fill_row(marks, 0.0, size, lanes, 1)
        while True:
            number = fetch_add(a + 8 * A.TASK, 1)
            if number >= blocks:
                break
            to_block(x, block, batch, columns, number, marks, vectors, size, lanes)
            begin = load_int32(row_start)
            for first in range(0, rows, lanes):
                count = min(lanes, rows - first)
                for r in range(count):
                    sums = out + r * width * size
                    fill_row(sums, load_float(bias + (first + r) * size, size) if bias != 0 else 0.0, size, lanes, vectors)
                    end = load_int32(row_start + (first + r + 1) * 4)
                    accumulate_near(
                        sums, end - begin, row_column + begin * 4, values + begin * size, block, size, lanes, vectors
                    )
                    begin = end
                from_block(out, y, batch, rows, first, count, number, vectors, size, lanes)
        if is_marked(marks, size, lanes) != 0:
            store_int64(a + 8 * A.NOT_FINITE, 1)

    return Kernel(forward)


@cache
def backward_kernel(size: int, lanes: int, vectors: int) -> Kernel:
    """Make the kernel of dx [B, columns] = dy W, dtheta [K] = s * (dy^T x) at the places, and db [rows] = sum of dy.

    It computes each of them if its address is not 0. The values and the sums are in the order of the columns, or without dx in
    the order of the rows.
    """
    width = lanes * vectors
    block_bytes, vector_bytes = lanes * width * size, lanes * size

    def backward(a: int) -> None:
        phase = load_int64(a + 8 * A.PHASE)
        batch, blocks, groups = load_int64(a + 8 * A.BATCH), load_int64(a + 8 * A.BLOCKS), load_int64(a + 8 * A.GROUPS)
        rows, columns, number_of = load_int64(a + 8 * A.ROWS), load_int64(a + 8 * A.COLUMNS), load_int64(a + 8 * A.COUNT)
        dx, dtheta, dbias = load_int64(a + 8 * A.DX), load_int64(a + 8 * A.DTHETA), load_int64(a + 8 * A.DBIAS)
        all_sums, all_bias = load_int64(a + 8 * A.SUMS), load_int64(a + 8 * A.SUMS_BIAS)
        start, other, slots, lines = (
            load_int64(a + 8 * A.COLUMN_START),
            load_int64(a + 8 * A.COLUMN_ROW),
            load_int64(a + 8 * A.COLUMN_SLOT),
            columns,
        )
        if dx == 0:
            start, other, slots, lines = (
                load_int64(a + 8 * A.ROW_START),
                load_int64(a + 8 * A.ROW_COLUMN),
                load_int64(a + 8 * A.ROW_SLOT),
                rows,
            )
        if phase == TokenPhase.GATHER:
            gather_pieces(a, slots, size)
            return
        if phase == TokenPhase.REDUCE:
            while True:
                task = fetch_add(a + 8 * A.TASK, 1)
                if task == 0 and dbias != 0:
                    for r in range(rows):
                        total = load_float(all_bias + r * size, size)
                        for group in range(1, groups):
                            total += load_float(all_bias + (group * rows + r) * size, size)
                        store_float(dbias + r * size, total, size)
                if dtheta == 0 or task * PIECE >= number_of:
                    break
                for i in range(task * PIECE, min(task * PIECE + PIECE, number_of)):
                    total = load_float(all_sums + i * size, size)
                    for group in range(1, groups):
                        total += load_float(all_sums + (group * number_of + i) * size, size)
                    slot = load_int32(slots + i * 4)
                    store_float(dtheta + (slot & SLOT) * size, -total if slot < 0 else total, size)
            return
        x, dy, values = load_int64(a + 8 * A.X), load_int64(a + 8 * A.Y), load_int64(a + 8 * A.VALUES)
        worker = fetch_add(a + 8 * A.WORKER, 1)
        dy_block = load_int64(a + 8 * A.SCRATCH) + worker * load_int64(a + 8 * A.SCRATCH_BYTES)
        x_block = dy_block + rows * width * size
        out, marks, unread = stack_space(block_bytes), stack_space(vector_bytes), stack_space(vector_bytes)
        fill_row(marks, 0.0, size, lanes, 1)
        fill_row(unread, 0.0, size, lanes, 1)
        while True:
            group = fetch_add(a + 8 * A.TASK, 1)
            if group >= groups:
                break
            sums, sums_bias = all_sums + group * number_of * size, all_bias + group * rows * size
            if dtheta != 0:
                for i in range(number_of):
                    store_float(sums + i * size, 0.0, size)
            if dbias != 0:
                for r in range(rows):
                    store_float(sums_bias + r * size, 0.0, size)
            for number in range(group * blocks // groups, (group + 1) * blocks // groups):
                to_block(dy, dy_block, batch, rows, number, marks, vectors, size, lanes)
                if dtheta != 0:
                    to_block(x, x_block, batch, columns, number, unread, vectors, size, lanes)
                if dbias != 0:
                    for r in range(rows):
                        at = sums_bias + r * size
                        total = sum_row(dy_block + r * width * size, size, lanes, vectors)
                        store_float(at, load_float(at, size) + total, size)
                begin = load_int32(start)
                if dx == 0:
                    for r in range(lines):
                        end = load_int32(start + (r + 1) * 4)
                        own, at = dy_block + r * width * size, sums + begin * size
                        add_dots(end - begin, other + begin * 4, x_block, own, at, size, lanes, vectors)
                        begin = end
                    continue
                for first in range(0, lines, lanes):
                    count = min(lanes, lines - first)
                    for c in range(count):
                        mine = out + c * width * size
                        fill_row(mine, 0.0, size, lanes, vectors)
                        end = load_int32(start + (first + c + 1) * 4)
                        where, factors = other + begin * 4, values + begin * size
                        if dtheta == 0:
                            accumulate_near(mine, end - begin, where, factors, dy_block, size, lanes, vectors)
                        else:
                            own, at = x_block + (first + c) * width * size, sums + begin * size
                            accumulate_and_add_dots(mine, end - begin, where, factors, dy_block, own, at, size, lanes, vectors)
                        begin = end
                    from_block(out, dx, batch, columns, first, count, number, vectors, size, lanes)
        if is_marked(marks, size, lanes) != 0:
            store_int64(a + 8 * A.NOT_FINITE, 1)

    return Kernel(backward)


NEAR = 3 << 18  # the most bytes of the block whose rows the connections visit: it has to stay in a core's own cache


def tile_of(size: int, features: int, backward: bool = False) -> tuple[int, int]:
    """Choose (lanes, vectors) of a block.

    The longest vectors of the processor, as many as its registers hold: the forward kernel keeps two sums of a row in them, the
    backward kernel a sum and a row of x. A long row spreads the cost of a connection over more numbers, but a block that does
    not fit into the cache costs more.

    Args:
        size: the bytes of a float.
        features: the number of rows of the block that the connections visit: columns of the weight, backward its rows.
        backward: whether the block is for the backward kernel.
    """
    length, vectors = (64, 8 if backward else 4) if has_long_vectors() else (32, 4)
    while vectors > 1 and features * vectors * length > NEAR:
        vectors //= 2
    return length // size, vectors


@cache
def has_long_vectors() -> bool:
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))
