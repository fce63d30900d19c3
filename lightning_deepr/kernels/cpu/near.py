"""Operations of kernels on rows of W floats that lie in a near cache.

Nothing is prefetched: that would take as many loads as the work itself.
``size``, ``lanes`` and ``vectors`` are literals, as in :mod:`.native`.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lightning_deepr.kernels.cpu.native import _by_fours, _entry, _int64, _store_dots, _Tile, _transposed


@intrinsic(prefer_literal=True)
def accumulate_near(
    typingctx: Any, sums: Any, count: Any, indices: Any, values: Any, source: Any, size: Any, lanes: Any, vectors: Any,
) -> Any:  # fmt: skip
    """Do the work of :func:`.native.accumulate_rows` for a source in a near cache.

    Nothing is prefetched: that would take as many loads as the work itself. Every other connection goes to a second sum, so a
    multiplication does not wait for the one before.
    """
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
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

        one = _int64(1)
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
def accumulate_and_add_dots(
    typingctx: Any, sums: Any, count: Any, indices: Any, values: Any, source: Any, own: Any, dots: Any, size: Any,
    lanes: Any, vectors: Any,
) -> Any:  # fmt: skip
    """Add values[i] * source[indices[i], :] to sums[:] and source[indices[i], :] . own[:] to dots[i], for all i < count.

    A row of the source is loaded once for both.
    """
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        into, number, index, value, origin, mine, products = args[:7]
        tile = _Tile(builder, *shape)
        held = [cgutils.alloca_once_value(builder, tile.load(into, i)) for i in range(tile.vectors)]
        own_part = [tile.load(mine, i) for i in range(tile.vectors)]

        def visit(first: Any, several: int) -> None:
            entries = [_entry(builder, tile, builder.add(first, _int64(k)), index, value, origin, 0) for k in range(several)]
            partial: list[Any] = [None] * several
            for i, register in enumerate(held):
                total = builder.load(register)
                for k, (row, factor) in enumerate(entries):
                    other = tile.load(row, i)
                    total = tile.multiply_add(factor, other, total)
                    partial[k] = tile.multiply_add(other, own_part[i], partial[k])
                builder.store(total, register)
            _store_dots(builder, tile, partial, products, first, add=True)

        _by_fours(builder, number, visit)
        for i, register in enumerate(held):
            tile.store(builder.load(register), into, i)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(int64, int64, int64, int64, int64, int64, int64, size, lanes, vectors), codegen


@intrinsic(prefer_literal=True)
def add_dots(
    typingctx: Any, count: Any, indices: Any, source: Any, own: Any, dots: Any, size: Any, lanes: Any, vectors: Any,
) -> Any:  # fmt: skip
    """Add source[indices[i], :] . own[:] to dots[i], for all i < count."""
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number, index, origin, mine, products = args[:5]
        tile = _Tile(builder, *shape)
        held = [tile.load(mine, i) for i in range(tile.vectors)]

        def visit(first: Any, several: int) -> None:
            rows = [_entry(builder, tile, builder.add(first, _int64(k)), index, None, origin, 0)[0] for k in range(several)]
            partial: list[Any] = [None] * several
            for i, own_part in enumerate(held):
                for k, row in enumerate(rows):
                    partial[k] = tile.multiply_add(tile.load(row, i), own_part, partial[k])
            _store_dots(builder, tile, partial, products, first, add=True)

        _by_fours(builder, number, visit)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(int64, int64, int64, int64, int64, size, lanes, vectors), codegen


# -- numbers that are not finite -------------------------------------------------------------------------------------------
# x * 0 is 0 for a finite x, and NaN for infinity and NaN. The sum of these products over many numbers tells whether all are
# finite. (The arithmetic has no flags that let the compiler assume so.)


def _mark(builder: Any, tile: _Tile, marks: Any, rows: list[Any]) -> None:
    zero = ir.Constant(tile.vector, [0.0] * tile.lanes)
    total: Any = tile.load(marks, 0)
    for row in rows:
        total = builder.fadd(builder.fmul(row, zero, flags=("contract",)), total, flags=("contract",))
    tile.store(total, marks, 0)


@intrinsic(prefer_literal=True)
def transpose_and_mark(
    typingctx: Any, source: Any, source_stride: Any, target: Any, target_stride: Any, marks: Any, size: Any, lanes: Any,
) -> Any:  # fmt: skip
    """Do the work of :func:`.native.transpose_block`, and make a number at ``marks`` NaN if one of the block is not finite.

    Args:
        marks: the address of ``lanes`` floats.
    """
    shape = (size.literal_value, lanes.literal_value, 1)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(builder, *shape)

        def row(base: Any, stride: Any, i: int) -> Any:
            return builder.add(base, builder.mul(stride, _int64(i)))

        rows = [tile.load(row(args[0], args[1], i), 0) for i in range(tile.lanes)]
        _mark(builder, tile, args[4], rows)
        for i, value in enumerate(_transposed(builder, rows)):
            tile.store(value, row(args[2], args[3], i), 0)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(int64, int64, int64, int64, int64, size, lanes), codegen


@intrinsic(prefer_literal=True)
def mark_vector(typingctx: Any, address: Any, marks: Any, size: Any, lanes: Any) -> Any:
    """Make a number at ``marks`` NaN if one of the ``lanes`` floats at an address is not finite."""
    shape = (size.literal_value, lanes.literal_value, 1)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(builder, *shape)
        _mark(builder, tile, args[1], [tile.load(args[0], 0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, size, lanes), codegen


@intrinsic(prefer_literal=True)
def is_marked(typingctx: Any, marks: Any, size: Any, lanes: Any) -> Any:
    """Return 1 if one of the numbers at ``marks`` is NaN, else 0."""
    shape = (size.literal_value, lanes.literal_value, 1)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(builder, *shape)
        found = tile.load(args[0], 0)
        word = builder.bitcast(builder.fcmp_unordered("uno", found, found), ir.IntType(tile.lanes))
        none = ir.Constant(ir.IntType(tile.lanes), 0)
        return builder.zext(builder.icmp_unsigned("!=", word, none), ir.IntType(64))

    return types.int64(types.int64, size, lanes), codegen
