"""The update of the orders by rows and by columns (``lightning_deepr.compute.order``) after a rewiring.

A small tensor with many births is put in order anew. In any other tensor, each of the two orders is updated in place. The cost
hardly depends on the number of lines (rows or columns). Most lines of a very large layer hold one connection or none, and a
loop over the connections of each line would cost one wrongly predicted branch per line. The code therefore loops over all
connections or over all lines, never over the connections of each line:

1. The births are sorted.
2. A pass over the connections drops the dead ones and records for each 64 connections which have stayed.
3. A pass over the lines finds where each line begins: at the new position of its first connection (from a count of bits), plus
   the births in the lines before it.
4. Each birth finds its position in its line. The connections between two births move as a whole, the last ones first.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_deepr.kernels.cpu.fields import ROW_WORDS, CpuRow, Row
from lightning_deepr.kernels.cpu.fields import StepArguments as A
from lightning_deepr.kernels.cpu.native import (
    Kernel,
    fetch_add,
    load_int32,
    load_int64,
    pointer,
    stack_space,
    store_int32,
    store_int64,
)
from lightning_deepr.kernels.cpu.rewire import SLOT
from lightning_deepr.kernels.cpu.scratch import CELL_BYTES, int32s, int64s, uint64s
from lightning_deepr.kernels.cpu.sorting import sort_with

SMALL, BASE, PER_BIRTH = 1 << 12, 700, 11  # connections; measured
BLOCK = 16  # connections that are compared or moved at a time
_INT32 = ir.IntType(32)


@intrinsic
def count_bits(typingctx: Any, word: Any) -> Any:
    """Count the bits of an int64 that are set."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.int64(types.int64), codegen


@intrinsic
def move_block(typingctx: Any, source: Any, shift: Any) -> Any:
    """Copy ``BLOCK`` int32 values to the address ``shift`` bytes further on. All are read before the first is written."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _move(builder, args[0], args[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def move_and_compare(typingctx: Any, source: Any, shift: Any, bound: Any) -> Any:
    """Do the work of :func:`move_block`, and return how many values come after the last one that is at most ``bound``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = _move(builder, args[0], args[1])
        undefined = ir.Constant(values.type, ir.Undefined)
        one = builder.insert_element(undefined, args[2], ir.Constant(_INT32, 0))
        bounds = builder.shuffle_vector(one, undefined, ir.Constant(values.type, [0] * BLOCK))
        not_above = builder.bitcast(builder.icmp_signed("<=", values, bounds), ir.IntType(BLOCK))
        bits = builder.shl(builder.zext(not_above, _INT32), ir.Constant(_INT32, 32 - BLOCK))
        bits = builder.or_(bits, ir.Constant(_INT32, 1 << (31 - BLOCK)))  # at least one bit is set
        return builder.zext(builder.ctlz(bits, ir.Constant(ir.IntType(1), 1)), ir.IntType(64))

    return types.int64(types.int64, types.int64, types.int32), codegen


def _move(builder: Any, source: Any, shift: Any) -> Any:
    block = ir.VectorType(_INT32, BLOCK).as_pointer()
    values = builder.load(builder.inttoptr(source, block), align=4)
    builder.store(values, builder.inttoptr(builder.add(source, shift), block), align=4)
    return values


def _compresses() -> bool:
    """Tell whether this CPU moves the chosen lanes of a vector together in one instruction (AVX-512)."""
    machine = platform.machine().lower() in ("x86_64", "amd64")
    return machine and bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))


COMPRESSES = _compresses()


@intrinsic
def drop_dead_of_block(typingctx: Any, other: Any, slots: Any, reborn: Any, to: Any) -> Any:
    """Move the connections of a block that have stayed to the front of another one, and return a bit for each that has.

    Args:
        other, slots: the addresses of ``BLOCK`` entries each.
        reborn: the address of a bit per slot.
        to: how many bytes the place for them is before these entries. What comes after them there has any value.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector, bits = ir.VectorType(_INT32, BLOCK), ir.VectorType(ir.IntType(1), BLOCK)
        wide = ir.VectorType(ir.IntType(64), BLOCK)

        def all_of(value: int, kind: Any = vector) -> Any:
            return ir.Constant(kind, [value] * BLOCK)

        def load(address: Any) -> Any:
            return builder.load(builder.inttoptr(address, vector.as_pointer()), align=4)

        slot, across = load(args[1]), load(args[0])
        number = builder.and_(slot, all_of(0x7FFFFFFF))
        undefined = ir.Constant(wide, ir.Undefined)
        base = builder.shuffle_vector(builder.insert_element(undefined, args[2], ir.Constant(_INT32, 0)), undefined, all_of(0))
        offset = builder.shl(builder.zext(builder.lshr(number, all_of(5)), wide), all_of(2, wide))
        pointers = builder.inttoptr(builder.add(base, offset), ir.VectorType(_INT32.as_pointer(), BLOCK))
        kind = ir.FunctionType(vector, [pointers.type, _INT32, bits, vector])
        gather = cgutils.get_or_insert_function(builder.module, kind, f"llvm.masked.gather.v{BLOCK}i32.v{BLOCK}p0i32")
        every = ir.Constant(bits, [1] * BLOCK)
        words = builder.call(gather, [pointers, ir.Constant(_INT32, 4), every, all_of(0)])
        dead = builder.and_(builder.lshr(words, builder.and_(number, all_of(31))), all_of(1))
        stays = builder.icmp_signed("==", dead, all_of(0))
        kind = ir.FunctionType(vector, [vector, vector, bits])
        compress = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.compress.v16i32")
        for address, value in ((args[0], across), (args[1], slot)):
            where = builder.inttoptr(builder.sub(address, args[3]), vector.as_pointer())
            builder.store(builder.call(compress, [value, all_of(0), stays]), where, align=4)
        return builder.zext(builder.bitcast(stays, ir.IntType(BLOCK)), ir.IntType(64))

    return types.int64(types.int64, types.int64, types.int64, types.int64), codegen


@njit
def drop_dead(other: int, slots: int, count: int, reborn: int, stayed: int, before: int) -> int:
    """Close the gaps between the connections that have stayed, and return their number.

    The results ``stayed`` and ``before`` have an entry for each 64 connections, and one for an empty piece at the end.

    Args:
        other, slots: the addresses of the order.
        count: K.
        reborn: the address of a bit per slot.
        stayed: the address of int64 results: a bit for each connection that has stayed.
        before: the address of int32 results: the number of earlier connections that have stayed.
    """
    written = 0
    for piece in range((count >> 6) + 1):
        first = piece << 6
        store_int32(before + 4 * piece, np.int32(written))
        bits = np.int64(0)
        if COMPRESSES and first + 64 <= count:
            for i in range(0, 64, BLOCK):
                at = first + i
                stay = drop_dead_of_block(other + 4 * at, slots + 4 * at, reborn, 4 * (at - written))
                bits |= stay << i
                written += count_bits(stay)
            store_int64(stayed + 8 * piece, bits)
            continue
        for i in range(min(64, count - first)):
            slot = load_int32(slots + 4 * (first + i))
            number = slot & SLOT
            stays = np.int64(~(load_int32(reborn + 4 * (number >> 5)) >> (number & 31)) & 1)
            store_int32(other + 4 * written, load_int32(other + 4 * (first + i)))
            store_int32(slots + 4 * written, slot)
            bits |= stays << i
            written += stays
        store_int64(stayed + 8 * piece, bits)
    return written


@njit
def move_starts(start: int, lines: int, stayed: int, before: int, births_before: int) -> None:
    """Compute where each line begins.

    Args:
        start: the address of the begins, which change in place.
        lines: the number of lines.
        stayed, before: the addresses of the results of :func:`drop_dead`.
        births_before: the address of an int32 for each line and one more. It holds the births in the previous line, and then
            the births in all previous lines.
    """
    births = np.int32(0)
    for line in range(1, lines + 1):
        entry = np.int64(load_int32(start + 4 * line))
        piece, rest = entry >> 6, entry & 63
        bits = load_int64(stayed + 8 * piece) & ((np.int64(1) << rest) - 1)
        births += load_int32(births_before + 4 * line)
        store_int32(births_before + 4 * line, births)
        store_int32(start + 4 * line, load_int32(before + 4 * piece) + np.int32(count_bits(bits)) + births)


@njit
def insert(
    start: int, other: int, slots: int, births_before: int, stayed: int, lines_across: int, born_slots: int, births: int,
) -> None:  # fmt: skip
    """Put the births at their positions, the last ones first: so nothing is overwritten before it has moved.

    Args:
        start, other, slots: the addresses of the order.
        births_before: the address of the births in all previous lines, of each line and one more.
        stayed: the number of connections that have stayed.
        lines_across: the address of an int64 for each birth, sorted: its line in the upper half, the place across in the lower.
        born_slots: the address of the slots of the births, in the same order.
        births: the number of births.
    """
    end = stayed  # the connections from here on have moved
    for i in range(births - 1, -1, -1):
        key, shift = load_int64(lines_across + 8 * i), 4 * (i + 1)
        across, at, ahead = np.int32(key), start + 4 * (key >> 32), births_before + 4 * (key >> 32)
        # the connections of the line are now from line_begin to line_end
        line_begin = np.int64(load_int32(at) - load_int32(ahead))
        line_end = np.int64(load_int32(at + 4) - load_int32(ahead + 4))
        if i + 1 >= BLOCK:
            # Whole blocks move. They also copy values from before the line's end or the birth's position. These copies do not
            # reach the values that have yet to move, and the right values overwrite them later.
            if end > line_end:
                while end > line_end:
                    end -= BLOCK
                    move_block(other + 4 * end, shift)
                    move_block(slots + 4 * end, shift)
                end = line_end
            after = np.int64(BLOCK)
            while after == BLOCK:
                block = end - BLOCK
                move_block(slots + 4 * block, shift)
                after = min(move_and_compare(other + 4 * block, shift, across), end - line_begin)
                end -= after
        else:
            while end > line_begin and (end > line_end or load_int32(other + 4 * (end - 1)) > across):
                end -= 1
                store_int32(other + 4 * end + shift, load_int32(other + 4 * end))
                store_int32(slots + 4 * end + shift, load_int32(slots + 4 * end))
        store_int32(other + 4 * (end + i), across)
        store_int32(slots + 4 * (end + i), load_int32(born_slots + 4 * i))


@njit
def follow(t: int, side: int) -> None:
    """Update one order of a tensor (side 0: by rows, 1: by columns) after its rewiring."""
    count, places = load_int64(t + 8 * Row.COUNT), load_int64(t + 8 * Row.PLACES)
    births, reborn = load_int64(t + 8 * CpuRow.REBORN_COUNT), load_int64(t + 8 * CpuRow.REBORN)
    rows, columns = load_int64(t + 8 * CpuRow.ROWS), load_int64(t + 8 * CpuRow.COLUMNS)
    signs, size = load_int64(t + 8 * Row.SIGNS), load_int64(t + 8 * CpuRow.SIZE)
    inverse = 1.0 / columns
    scratch = stack_space(CELL_BYTES)
    store_int64(scratch, load_int64(t + 8 * CpuRow.SCRATCH) + side * load_int64(t + 8 * CpuRow.SCRATCH_SIDE))
    keys, born_slots = uint64s(scratch, births), int32s(scratch, births)
    flags = int32s(scratch, count // 32 + 1)
    flags[:] = 0
    for i in range(births):
        slot = load_int64(reborn + 8 * i)
        place = load_int64(places + 8 * slot)
        if side == 1:
            row = row_of(place, columns, inverse)
            place = (place - row * columns) * rows + row
        keys[i] = np.uint64(place)
        # the sign bit of a little-endian float is the top bit of its last four bytes
        negative = load_int32(signs + (slot + 1) * size - 4) < 0
        born_slots[i] = np.int32(slot - (SLOT + 1)) if negative else np.int32(slot)
        flags[slot >> 5] |= np.int32(np.int64(1) << (slot & 31))
    keys, born_slots = sort_with(keys, born_slots, np.uint64(rows * columns - 1), scratch)

    lines, width = (rows, columns) if side == 0 else (columns, rows)
    start = load_int64(t + 8 * (CpuRow.ROW_START if side == 0 else CpuRow.COLUMN_START))
    other = load_int64(t + 8 * (CpuRow.ROW_COLUMN if side == 0 else CpuRow.COLUMN_ROW))
    slots = load_int64(t + 8 * (CpuRow.ROW_SLOT if side == 0 else CpuRow.COLUMN_SLOT))
    births_before = int32s(scratch, lines + 1)
    births_before[:] = 0
    inverse = 1.0 / width
    for i in range(births):
        line = row_of(np.int64(keys[i]), width, inverse)
        births_before[line + 1] += np.int32(1)
        keys[i] = np.uint64((line << 32) | (np.int64(keys[i]) - line * width))
    stayed, before = int64s(scratch, (count >> 6) + 1), int32s(scratch, (count >> 6) + 1)
    stayed_at, before_at, births_at = (
        np.int64(stayed.ctypes.data),
        np.int64(before.ctypes.data),
        np.int64(births_before.ctypes.data),
    )
    number = drop_dead(other, slots, count, np.int64(flags.ctypes.data), stayed_at, before_at)
    move_starts(start, lines, stayed_at, before_at, births_at)
    insert(start, other, slots, births_at, number, np.int64(keys.ctypes.data), np.int64(born_slots.ctypes.data), births)


@njit(inline="always")
def row_of(place: int, columns: int, inverse: float) -> int:
    """Compute place // columns by a multiplication, which is off by one at most, instead of a division."""
    row = np.int64(np.float64(place) * inverse)
    across = place - row * columns
    return row + np.int64(across >= columns) - np.int64(across < 0)


@njit
def order_anew(t: int) -> None:
    """Make both orders of a small or entirely new tensor from its places, by three stable counting sorts.

    No branch of these sorts depends on where a line ends.
    """
    count, rows, columns = load_int64(t + 8 * Row.COUNT), load_int64(t + 8 * CpuRow.ROWS), load_int64(t + 8 * CpuRow.COLUMNS)
    signs, size = load_int64(t + 8 * Row.SIGNS), load_int64(t + 8 * CpuRow.SIZE)
    places = carray(pointer(load_int64(t + 8 * Row.PLACES)), count, np.int64)
    scratch = stack_space(CELL_BYTES)
    store_int64(scratch, load_int64(t + 8 * CpuRow.SCRATCH))
    row_of, column_of, by_column = int32s(scratch, count), int32s(scratch, count), int32s(scratch, count)
    inverse = 1.0 / columns
    for k in range(count):  # a multiplication, which is off by one at most, instead of a division
        row = np.int64(np.float64(places[k]) * inverse)
        across = places[k] - row * columns
        row += np.int64(across >= columns) - np.int64(across < 0)
        row_of[k] = row
        column_of[k] = places[k] - row * columns
    row_start, column_start = load_int64(t + 8 * CpuRow.ROW_START), load_int64(t + 8 * CpuRow.COLUMN_START)
    row_next, column_next = int32s(scratch, rows + 1), int32s(scratch, columns + 1)
    row_next[:] = 0
    column_next[:] = 0
    rows_at, columns_at = np.int64(row_next.ctypes.data), np.int64(column_next.ctypes.data)
    row_at, column_at = np.int64(row_of.ctypes.data), np.int64(column_of.ctypes.data)
    for k in range(count):
        take_next(rows_at, load_int32(row_at + 4 * k) + 1)
        take_next(columns_at, load_int32(column_at + 4 * k) + 1)
    for line in range(rows):
        row_next[line + 1] += row_next[line]
    for line in range(columns):
        column_next[line + 1] += column_next[line]
    for line in range(rows + 1):
        store_int32(row_start + 4 * line, row_next[line])
    for line in range(columns + 1):
        store_int32(column_start + 4 * line, column_next[line])
    sorted_at = np.int64(by_column.ctypes.data)
    for k in range(count):
        store_int32(sorted_at + 4 * take_next(columns_at, load_int32(column_at + 4 * k)), np.int32(k))
    other, order = load_int64(t + 8 * CpuRow.ROW_COLUMN), load_int64(t + 8 * CpuRow.ROW_SLOT)
    for i in range(count):
        k = load_int32(sorted_at + 4 * i)
        position = take_next(rows_at, load_int32(row_at + 4 * k))
        negative = load_int32(signs + (k + 1) * size - 4) < 0
        store_int32(other + 4 * position, load_int32(column_at + 4 * k))
        store_int32(order + 4 * position, np.int32(k - (SLOT + 1)) if negative else np.int32(k))
    for line in range(columns + 1):
        column_next[line] = load_int32(column_start + 4 * line)
    across_at, across_order = load_int64(t + 8 * CpuRow.COLUMN_ROW), load_int64(t + 8 * CpuRow.COLUMN_SLOT)
    for i in range(count):
        slot = load_int32(order + 4 * i)
        position = take_next(columns_at, load_int32(other + 4 * i))
        store_int32(across_at + 4 * position, load_int32(row_at + 4 * (slot & SLOT)))
        store_int32(across_order + 4 * position, slot)


@njit(inline="always")
def take_next(counters: int, line: int) -> int:
    value = load_int32(counters + 4 * line)
    store_int32(counters + 4 * line, value + np.int32(1))
    return value


@cache
def update_kernel() -> Kernel:
    """Make the kernel that updates the orders of all tensors in the table. A task is one order of one tensor."""

    def update(a: int) -> None:
        tensors, table = load_int64(a + 8 * A.TENSORS), load_int64(a + 8 * A.TABLE)
        while True:
            task = fetch_add(a + 8 * A.TASK, 1)
            if task >= 2 * tensors:
                break
            t = table + (task // 2) * ROW_WORDS * 8
            births, start = load_int64(t + 8 * CpuRow.REBORN_COUNT), load_int64(t + 8 * CpuRow.ROW_START)
            if births == 0 or start == 0:
                continue
            lines = load_int64(t + 8 * CpuRow.ROWS) + load_int64(t + 8 * CpuRow.COLUMNS)
            count = load_int64(t + 8 * Row.COUNT)
            if births == count or (count <= min(SMALL, BASE + PER_BIRTH * births) and lines <= SMALL):
                if task % 2 == 0:
                    order_anew(t)
                continue
            follow(t, task % 2)

    return Kernel(update)
