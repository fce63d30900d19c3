"""Fast calls of numba kernels on PyTorch's own threads, and the operations of kernels on addresses and on vectors in registers.

A kernel is a C function of one argument: the address of an array of int64 with its arguments, which are addresses of tensors
and sizes (:mod:`lightning_deepr.kernels.cpu.fields` lists them). numba compiles it with its own LLVM, so nobody has to install
a compiler, and the result is kept on disk. Calls go through ctypes, which releases Python's lock, and take a fraction of a
microsecond. A second pool of threads would compete with PyTorch's for the cores. A kernel with work for several threads
therefore runs on the OpenMP runtime that PyTorch has loaded.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from lightning_deepr.kernels.cpu.disk_cache import KernelCache, said_why

log = logging.getLogger("lightning_deepr")

_SIGNATURE = types.void(types.intp)
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_int64)
_ON_CONSTANTS = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_lock = threading.Lock()
_announced = False


class Kernel:
    """A compiled kernel.

    Args:
        function: nopython code that takes the address of its arguments. It gets its next task by ``fetch_add`` on argument 0.
    """

    def __init__(self, function: Callable[[Any], None]) -> None:
        with _lock:
            self._compiled = _compile(function)
        self.address = self._compiled.address
        self._call = _FUNCTION(self.address)
        self.alone = _ON_CONSTANTS(self.address)  # on one thread, with packed arguments that the kernel only reads

    def __call__(self, arguments: ctypes.Array[ctypes.c_int64], threads: int = 1) -> None:
        where = ctypes.addressof(arguments)
        if threads > 1 and _parallel is not None:
            _parallel(self.address, where, threads, 0)
        else:
            self._call(where)


def _compile(function: Callable[[Any], None]) -> CFunc:
    timer = threading.Timer(0.5, _announce)
    timer.daemon = True
    try:
        compiled = CFunc(function, (_SIGNATURE.args, _SIGNATURE.return_type), {}, {"nopython": True, "error_model": "numpy"})
        compiled._cache = KernelCache(function, missing=timer.start)  # a kernel that is only read takes no note
        compiled.compile()
    finally:
        timer.cancel()
    return compiled


def _announce() -> None:
    global _announced
    if not _announced and not said_why():
        _announced = True
        log.warning("lightning_deepr compiles its CPU kernels (some seconds, once on this machine).")


def _openmp() -> Any:
    """Return ``GOMP_parallel(function, argument, threads, flags)`` of PyTorch's OpenMP runtime, or None if it has none."""
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    names = [name for name in os.listdir(folder) if name.startswith(("libgomp", "libomp"))] if os.path.isdir(folder) else []
    for name in sorted(names):
        try:
            # RTLD_NOLOAD: another copy of the runtime would be a second pool of threads
            function = ctypes.CDLL(os.path.join(folder, name), mode=getattr(os, "RTLD_NOLOAD", 4)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        function.restype = None
        return function
    return None


_parallel = _openmp()


def threads_for(work: int, grain: int = 1 << 17) -> int:
    """Choose the number of threads for some work: one below ``grain`` operations (a parallel region takes microseconds)."""
    if work < grain or _parallel is None:
        return 1
    return min(torch.get_num_threads(), 1 + work // grain)


# -- addresses ------------------------------------------------------------------------------------------------------------
# Kernels compute with addresses, as C does. numba's arrays check for negative indices, and then loops are not vectorized.

_INT32, _INT64, _FLOAT, _DOUBLE = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()


def _load(value_type: Any, result: Any) -> Any:
    def typing(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(builder.inttoptr(args[0], value_type.as_pointer()))

        return result(types.int64), codegen

    return intrinsic(typing)


def _store(value_type: Any, kind: Any) -> Any:
    def typing(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[1], builder.inttoptr(args[0], value_type.as_pointer()))
            return context.get_dummy_value()

        return types.void(types.int64, kind), codegen

    return intrinsic(typing)


load_int32 = _load(_INT32, types.int32)
load_int64 = _load(_INT64, types.int64)
load_byte = _load(ir.IntType(8), types.uint8)
store_int32 = _store(_INT32, types.int32)
store_int64 = _store(_INT64, types.int64)
store_byte = _store(ir.IntType(8), types.uint8)


@intrinsic
def load_short(typingctx: Any, address: Any) -> Any:
    """Load 16 bits without a sign."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.load(builder.inttoptr(args[0], ir.IntType(16).as_pointer())), _INT64)

    return types.int64(types.int64), codegen


@intrinsic
def store_short(typingctx: Any, address: Any, value: Any) -> Any:
    """Store the lowest 16 bits of an int64."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(builder.trunc(args[1], ir.IntType(16)), builder.inttoptr(args[0], ir.IntType(16).as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _scalar(size: int) -> tuple[Any, Any]:
    return (_FLOAT, types.float32) if size == 4 else (_DOUBLE, types.float64)


@intrinsic(prefer_literal=True)
def load_float(typingctx: Any, address: Any, size: Any) -> Any:
    """Load the float of ``size`` bytes (a literal, 4 or 8) at an address."""
    value_type, kind = _scalar(size.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], value_type.as_pointer()))

    return kind(types.int64, size), codegen


@intrinsic(prefer_literal=True)
def store_float(typingctx: Any, address: Any, value: Any, size: Any) -> Any:
    """Store a float of ``size`` bytes (a literal, 4 or 8) at an address."""
    value_type, kind = _scalar(size.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], value_type.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, kind, size), codegen


@intrinsic
def pointer(typingctx: Any, address: Any) -> Any:
    """Convert an address to the pointer that ``numba.carray`` takes."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@intrinsic
def fetch_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at an address in one indivisible step, and return the value before. Threads get their tasks this way."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(args[0], _INT64.as_pointer()), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


if sys.platform.startswith("linux"):
    _madvise = types.ExternalFunction("madvise", types.int32(types.int64, types.int64, types.int32))

    @njit
    def advise_huge_pages(address: int, size: int) -> None:
        """Ask for large pages for a large array. Random access to it would spend most of its time on looking up pages."""
        if size >= 1 << 22:
            start = (address + 4095) & ~np.int64(4095)
            _madvise(start, address + size - start, 14)  # MADV_HUGEPAGE

else:

    @njit
    def advise_huge_pages(address: int, size: int) -> None:
        pass


@intrinsic(prefer_literal=True)
def subtract_from_64(typingctx: Any, address: Any, less: Any, marks: Any, size: Any) -> Any:
    """Subtract ``less`` from 64 floats at an address, and return a word whose bit i tells whether the i-th is then below 0.

    Args:
        marks: the address of 64 floats that become NaN where one of the floats is not finite.
    """
    value_type, kind = _scalar(size.literal_value)
    count, align = 64, size.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(value_type, count)
        where = builder.inttoptr(args[0], vector.as_pointer())
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), args[1], ir.Constant(_INT32, 0))
        mask = ir.Constant(ir.VectorType(_INT32, count), [0] * count)
        every = builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), mask)
        found = builder.fsub(builder.load(where, align=align), every)
        builder.store(found, where, align=align)
        return _below_zero(builder, found, args[2], align)

    return types.int64(types.int64, kind, types.int64, size), codegen


def _below_zero(builder: Any, found: Any, marks: Any, align: int) -> Any:
    zero = ir.Constant(found.type, [0.0] * found.type.count)
    at = builder.inttoptr(marks, found.type.as_pointer())
    times = builder.fmul(found, zero, flags=("contract",))
    builder.store(builder.fadd(times, builder.load(at, align=align), flags=("contract",)), at, align=align)
    return builder.bitcast(builder.fcmp_ordered("<", found, zero), _INT64)


@intrinsic(prefer_literal=True)
def negative_of_64(typingctx: Any, address: Any, marks: Any, size: Any) -> Any:
    """Return a word whose bit i tells whether the i-th of 64 floats at an address is below 0. See :func:`subtract_from_64`."""
    value_type, _ = _scalar(size.literal_value)
    count, align = 64, size.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(value_type, count)
        found = builder.load(builder.inttoptr(args[0], vector.as_pointer()), align=align)
        return _below_zero(builder, found, args[1], align)

    return types.int64(types.int64, types.int64, size), codegen


@intrinsic
def trailing_zeros(typingctx: Any, word: Any) -> Any:
    """Return the position of the lowest bit of an int64, which is not 0."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), codegen


AHEAD = 4  # loops over connections prefetch the row of the connection that comes this many later


def _prefetch(builder: Any, address: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, _INT32, _INT32, _INT32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    constants = [ir.Constant(_INT32, value) for value in (0, 3, 1)]  # read, keep, data
    builder.call(function, [builder.inttoptr(address, cgutils.voidptr_t), *constants])


@intrinsic
def prefetch(typingctx: Any, address: Any) -> Any:
    """Prefetch the cache line at an address."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _prefetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic(prefer_literal=True)
def stack_space(typingctx: Any, size: Any) -> Any:
    """Reserve ``size`` bytes (a literal) on the stack until the function returns. Their address is that of a cache line."""
    count = size.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        with builder.goto_entry_block():  # (cgutils.alloca_once would fill it with zeros, byte by byte)
            space = builder.alloca(ir.ArrayType(ir.IntType(8), count))
        space.align = 64
        return builder.ptrtoint(space, _INT64)

    return types.int64(size), codegen


# -- vectors --------------------------------------------------------------------------------------------------------------
# W = lanes * vectors floats of a batch tile stay in registers while a list of connections passes by. A float has `size` bytes,
# and a vector has lanes * size bytes (64, or 32 for the smallest tiles). `size`, `lanes` and `vectors` are literals.


class _Tile:
    def __init__(self, builder: Any, size: int, lanes: int, vectors: int) -> None:
        self.builder, self.size, self.lanes, self.vectors = builder, size, lanes, vectors
        self.scalar = _scalar(size)[0]
        self.vector = ir.VectorType(self.scalar, lanes)

    def load(self, address: Any, i: int) -> Any:
        place = self.builder.add(address, ir.Constant(_INT64, i * self.lanes * self.size))
        return self.builder.load(self.builder.inttoptr(place, self.vector.as_pointer()), align=self.size)

    def store(self, value: Any, address: Any, i: int) -> None:
        place = self.builder.add(address, ir.Constant(_INT64, i * self.lanes * self.size))
        self.builder.store(value, self.builder.inttoptr(place, self.vector.as_pointer()), align=self.size)

    def broadcast(self, value: Any) -> Any:
        one = self.builder.insert_element(ir.Constant(self.vector, ir.Undefined), value, ir.Constant(_INT32, 0))
        mask = ir.Constant(ir.VectorType(_INT32, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(one, ir.Constant(self.vector, ir.Undefined), mask)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """Compute a * b + c. If c is None, it counts as 0."""
        if c is None:
            return self.builder.fmul(a, b, flags=("fast",))
        return self.builder.fadd(self.builder.fmul(a, b, flags=("fast",)), c, flags=("fast",))

    def sum(self, value: Any) -> Any:
        """Add the lanes of a vector, by halves."""
        width = self.lanes
        while width > 1:
            width //= 2
            undefined = ir.Constant(value.type, ir.Undefined)
            halves = [
                self.builder.shuffle_vector(
                    value, undefined, ir.Constant(ir.VectorType(_INT32, width), list(range(s, s + width)))
                )
                for s in (0, width)
            ]
            value = self.builder.fadd(*halves, flags=("fast",))
        return self.builder.extract_element(value, ir.Constant(_INT32, 0))


@intrinsic(prefer_literal=True)
def accumulate_rows(
    typingctx: Any, sums: Any, count: Any, indices: Any, values: Any, source: Any, size: Any, lanes: Any, vectors: Any,
) -> Any:  # fmt: skip
    """Add values[i] * source[indices[i], :] to sums[:], for all i < count. Rows have W floats."""
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        into, number, index, value, origin = args[:5]
        tile = _Tile(builder, *shape)
        held = [cgutils.alloca_once_value(builder, tile.load(into, i)) for i in range(tile.vectors)]
        with cgutils.for_range(builder, number) as loop:
            row, factor = _entry(builder, tile, loop.index, index, value, origin)
            for i, register in enumerate(held):
                builder.store(tile.multiply_add(factor, tile.load(row, i), builder.load(register)), register)
        for i, register in enumerate(held):
            tile.store(builder.load(register), into, i)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(int64, int64, int64, int64, int64, size, lanes, vectors), codegen


@intrinsic(prefer_literal=True)
def accumulate_and_dot(
    typingctx: Any, sums: Any, count: Any, indices: Any, values: Any, source: Any, own: Any, dots: Any, size: Any,
    lanes: Any, vectors: Any,
) -> Any:  # fmt: skip
    """Do the work of :func:`accumulate_rows`, and set dots[i] = source[indices[i], :] . own[:] in the same pass."""
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        into, number, index, value, origin, mine, products = args[:7]
        tile = _Tile(builder, *shape)
        held = [cgutils.alloca_once_value(builder, tile.load(into, i)) for i in range(tile.vectors)]
        own_part = [tile.load(mine, i) for i in range(tile.vectors)] if tile.vectors <= 4 else None

        def visit(first: Any, several: int) -> None:
            entries = [_entry(builder, tile, builder.add(first, _int64(k)), index, value, origin) for k in range(several)]
            partial: list[Any] = [None] * several
            for i, register in enumerate(held):
                mine_now = tile.load(mine, i) if own_part is None else own_part[i]
                total = builder.load(register)
                for k, (row, factor) in enumerate(entries):
                    other = tile.load(row, i)
                    total = tile.multiply_add(factor, other, total)
                    partial[k] = tile.multiply_add(other, mine_now, partial[k])
                builder.store(total, register)
            _store_dots(builder, tile, partial, products, first)

        _by_fours(builder, number, visit)
        for i, register in enumerate(held):
            tile.store(builder.load(register), into, i)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(int64, int64, int64, int64, int64, int64, int64, size, lanes, vectors), codegen


@intrinsic(prefer_literal=True)
def dot_rows(
    typingctx: Any, count: Any, indices: Any, source: Any, own: Any, dots: Any, size: Any, lanes: Any, vectors: Any,
) -> Any:  # fmt: skip
    """Set dots[i] = source[indices[i], :] . own[:], for all i < count."""
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number, index, origin, mine, products = args[:5]
        tile = _Tile(builder, *shape)
        held = [tile.load(mine, i) for i in range(tile.vectors)]

        def visit(first: Any, several: int) -> None:
            rows = [_entry(builder, tile, builder.add(first, _int64(k)), index, None, origin)[0] for k in range(several)]
            partial: list[Any] = [None] * several
            for i, own_part in enumerate(held):
                for k, row in enumerate(rows):
                    partial[k] = tile.multiply_add(tile.load(row, i), own_part, partial[k])
            _store_dots(builder, tile, partial, products, first)

        _by_fours(builder, number, visit)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(int64, int64, int64, int64, int64, size, lanes, vectors), codegen


def _int64(value: int) -> Any:
    return ir.Constant(_INT64, value)


def _by_fours(builder: Any, number: Any, visit: Callable[[Any, int], None]) -> None:
    """Call ``visit(first, 4)`` for each four of ``number`` entries, then ``visit(i, 1)`` for each that is left."""
    fours = builder.lshr(number, _int64(2))
    with cgutils.for_range(builder, fours) as loop:
        visit(builder.shl(loop.index, _int64(2)), 4)
    done = builder.shl(fours, _int64(2))
    with cgutils.for_range(builder, builder.sub(number, done)) as loop:
        visit(builder.add(done, loop.index), 1)


def _store_dots(builder: Any, tile: _Tile, partial: list[Any], products: Any, first: Any, add: bool = False) -> None:
    """Store the sum of the lanes of one vector, or of four vectors together. Together each takes half of the instructions.

    With ``add`` they are added to what is there.
    """
    where = builder.add(products, builder.mul(first, _int64(tile.size)))
    if len(partial) == 1:
        at = builder.inttoptr(where, tile.scalar.as_pointer())
        total = tile.sum(partial[0])
        builder.store(builder.fadd(builder.load(at), total) if add else total, at)
        return
    masks = _interleaving(tile.lanes)

    def both(a: Any, b: Any) -> Any:  # partial sums of a and of b in turn
        return builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks), flags=("fast",))

    together = both(both(partial[0], partial[2]), both(partial[1], partial[3]))  # 0 1 2 3 0 1 2 3 ...
    width = tile.lanes
    while width > 4:
        width //= 2
        undefined = ir.Constant(together.type, ir.Undefined)
        halves = [
            builder.shuffle_vector(together, undefined, ir.Constant(ir.VectorType(_INT32, width), list(range(s, s + width))))
            for s in (0, width)
        ]
        together = builder.fadd(*halves, flags=("fast",))
    at = builder.inttoptr(where, together.type.as_pointer())
    builder.store(builder.fadd(builder.load(at, align=tile.size), together) if add else together, at, align=tile.size)


def _entry(builder: Any, tile: _Tile, i: Any, index: Any, value: Any, origin: Any, ahead_by: int = AHEAD) -> tuple[Any, Any]:
    """Return the address of the i-th listed row, and its factor in all lanes. Prefetch a later row (``ahead_by`` 0: do not)."""
    i = builder.sext(i, _INT64) if i.type != _INT64 else i
    where = builder.add(index, builder.mul(i, ir.Constant(_INT64, 4)))
    width = tile.size * tile.lanes * tile.vectors
    if ahead_by:
        ahead = builder.add(where, ir.Constant(_INT64, 4 * ahead_by))
        later = builder.zext(builder.load(builder.inttoptr(ahead, _INT32.as_pointer())), _INT64)
        later = builder.add(origin, builder.mul(later, ir.Constant(_INT64, width)))
        for line in range(0, width, 64):
            _prefetch(builder, builder.add(later, ir.Constant(_INT64, line)))
    row = builder.zext(builder.load(builder.inttoptr(where, _INT32.as_pointer())), _INT64)
    row = builder.add(origin, builder.mul(row, ir.Constant(_INT64, tile.size * tile.lanes * tile.vectors)))
    if value is None:
        return row, None
    where = builder.add(value, builder.mul(i, ir.Constant(_INT64, tile.size)))
    return row, tile.broadcast(builder.load(builder.inttoptr(where, tile.scalar.as_pointer())))


@intrinsic(prefer_literal=True)
def copy_row(typingctx: Any, source: Any, target: Any, size: Any, lanes: Any, vectors: Any) -> Any:
    """Copy W floats from one address to another."""
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(builder, *shape)
        for v in range(tile.vectors):
            tile.store(tile.load(args[0], v), args[1], v)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, size, lanes, vectors), codegen


@intrinsic(prefer_literal=True)
def fill_row(typingctx: Any, address: Any, value: Any, size: Any, lanes: Any, vectors: Any) -> Any:
    """Set W floats at an address to ``value``."""
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(builder, *shape)
        vector = tile.broadcast(args[1])
        for i in range(tile.vectors):
            tile.store(vector, args[0], i)
        return context.get_dummy_value()

    return types.void(types.int64, _scalar(shape[0])[1], size, lanes, vectors), codegen


@intrinsic(prefer_literal=True)
def sum_row(typingctx: Any, address: Any, size: Any, lanes: Any, vectors: Any) -> Any:
    """Add the W floats at an address."""
    shape = (size.literal_value, lanes.literal_value, vectors.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(builder, *shape)
        total = tile.load(args[0], 0)
        for i in range(1, tile.vectors):
            total = builder.fadd(total, tile.load(args[0], i), flags=("fast",))
        return tile.sum(total)

    return _scalar(shape[0])[1](types.int64, size, lanes, vectors), codegen


def _interleaving(count: int) -> list[Any]:
    """Return the two shuffles that interleave the lower halves and the upper halves of two vectors."""
    low = [position for i in range(count // 2) for position in (i, i + count)]
    return [ir.Constant(ir.VectorType(_INT32, count), mask) for mask in (low, [position + count // 2 for position in low])]


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    # Interleaving row i with row i + L/2 moves one bit of the row number into the column number. log2(L) rounds move all bits.
    count = len(rows)
    masks = _interleaving(count)
    for _ in range(count.bit_length() - 1):
        rows = [builder.shuffle_vector(rows[i], rows[i + count // 2], mask) for i in range(count // 2) for mask in masks]
    return rows


@intrinsic(prefer_literal=True)
def transpose_block(
    typingctx: Any, source: Any, source_stride: Any, target: Any, target_stride: Any, size: Any, lanes: Any,
) -> Any:  # fmt: skip
    """Transpose a block of lanes x lanes floats in registers. The strides between rows are in bytes."""
    shape = (size.literal_value, lanes.literal_value, 1)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(builder, *shape)

        def row(base: Any, stride: Any, i: int) -> Any:
            return builder.add(base, builder.mul(stride, ir.Constant(_INT64, i)))

        rows = [tile.load(row(args[0], args[1], i), 0) for i in range(tile.lanes)]
        for i, value in enumerate(_transposed(builder, rows)):
            tile.store(value, row(args[2], args[3], i), 0)
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(int64, int64, int64, int64, size, lanes), codegen


@intrinsic(prefer_literal=True)
def transpose_edge(
    typingctx: Any, source: Any, source_stride: Any, rows_in: Any, columns_in: Any, target: Any, target_stride: Any,
    rows_out: Any, columns_out: Any, size: Any, lanes: Any,
) -> Any:  # fmt: skip
    """Transpose a block at an edge: read rows_in x columns_in floats (0 beyond them) and write rows_out x columns_out."""
    shape = (size.literal_value, lanes.literal_value, 1)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        tile = _Tile(builder, *shape)
        count, bit = tile.lanes, ir.IntType(1)
        lane = ir.Constant(ir.VectorType(_INT64, count), list(range(count)))
        at, masks = tile.vector.as_pointer(), ir.VectorType(bit, count)
        suffix = f"v{count}f{8 * tile.size}.p0v{count}f{8 * tile.size}"
        load_type = ir.FunctionType(tile.vector, [at, _INT32, masks, tile.vector])
        store_type = ir.FunctionType(ir.VoidType(), [tile.vector, at, _INT32, masks])
        load = cgutils.get_or_insert_function(builder.module, load_type, f"llvm.masked.load.{suffix}")
        store = cgutils.get_or_insert_function(builder.module, store_type, f"llvm.masked.store.{suffix}")

        def mask(i: int, rows: Any, columns: Any) -> Any:
            inside = builder.icmp_signed("<", ir.Constant(_INT64, i), rows)
            width = builder.select(inside, columns, ir.Constant(_INT64, 0))
            one = builder.insert_element(ir.Constant(lane.type, ir.Undefined), width, ir.Constant(_INT32, 0))
            splat = ir.Constant(ir.VectorType(_INT32, count), [0] * count)
            return builder.icmp_signed("<", lane, builder.shuffle_vector(one, ir.Constant(lane.type, ir.Undefined), splat))

        def row(base: Any, stride: Any, i: int) -> Any:
            return builder.inttoptr(builder.add(base, builder.mul(stride, ir.Constant(_INT64, i))), at)

        align, zero = ir.Constant(_INT32, tile.size), ir.Constant(tile.vector, [0.0] * count)
        rows = [builder.call(load, [row(args[0], args[1], i), align, mask(i, args[2], args[3]), zero]) for i in range(count)]
        for i, value in enumerate(_transposed(builder, rows)):
            builder.call(store, [value, row(args[4], args[5], i), align, mask(i, args[6], args[7])])
        return context.get_dummy_value()

    int64 = types.int64
    return types.void(int64, int64, int64, int64, int64, int64, int64, int64, size, lanes), codegen


__all__ = ["Kernel", "carray", "threads_for"]
