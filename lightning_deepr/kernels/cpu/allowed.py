"""Draws from the places where connections may be, compiled; :mod:`lightning_deepr.algorithm.allowed` has the rules.

The kernels read an :class:`Allowed` as an array of words (:class:`.fields.AllowedWords`), of which ``d`` is the address here.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from lightning_deepr.algorithm import allowed as rules
from lightning_deepr.kernels.cpu.fields import FORM_WORDS
from lightning_deepr.kernels.cpu.fields import AllowedWords as W
from lightning_deepr.kernels.cpu.fields import SignWords as S
from lightning_deepr.kernels.cpu.hashing import LARGEST, bits
from lightning_deepr.kernels.cpu.native import load_int64, prefetch

WHOLE, BAND, BLOCKS, LOCAL, LISTED = rules.WHOLE, rules.BAND, rules.BLOCKS, rules.LOCAL, rules.LISTED
NOSELF, BITMAP = rules.NOSELF, rules.BITMAP


@njit(inline="always")
def quotient(a: int, b: int) -> int:
    """Divide whole numbers that are not negative; the compiler need not care for signs."""
    return np.int64(np.uint64(a) // np.uint64(b))


@njit(inline="always")
def remainder(a: int, b: int) -> int:
    return np.int64(np.uint64(a) % np.uint64(b))


@njit
def column_at(form: int, row: int, offset: int, rows: int, columns: int) -> int:
    """Return the column at an offset in the stretch or the window of a row, or -1."""
    kind, number = load_int64(form), load_int64(form + 8)
    if kind == BAND:
        column = quotient((2 * row + 1) * columns, 2 * rows) - number + offset
        return column if 0 <= column < columns else np.int64(-1)
    if kind == BLOCKS:
        block = quotient(row * number, rows)
        column = quotient(block * columns + number - 1, number) + offset
        return column if quotient(column * number, columns) == block else np.int64(-1)
    height, width = number, load_int64(form + 16)
    high, wide, reach, squared = (
        load_int64(form + 24),
        load_int64(form + 32),
        load_int64(form + 40),
        load_int64(form + 48),
    )
    side = 2 * reach + 1
    channel, spot = quotient(offset, side * side), remainder(offset, side * side)
    down, across = quotient(spot, side) - reach, remainder(spot, side) - reach
    y = quotient((2 * quotient(remainder(row, high * wide), wide) + 1) * height, 2 * high) + down
    x = quotient((2 * remainder(row, wide) + 1) * width, 2 * wide) + across
    if y < 0 or y >= height or x < 0 or x >= width or down * down + across * across > squared:
        return np.int64(-1)
    return (channel * height + y) * width + x


@njit
def permits(form: int, row: int, column: int, rows: int, columns: int) -> bool:
    """Tell whether a form with a rule allows a pair of units."""
    kind, number = load_int64(form), load_int64(form + 8)
    if kind == BAND:
        return abs(column - quotient((2 * row + 1) * columns, 2 * rows)) <= number
    if kind == BLOCKS:
        return quotient(row * number, rows) == quotient(column * number, columns)
    if kind == NOSELF:
        return row != column
    height, width = number, load_int64(form + 16)
    high, wide, squared = load_int64(form + 24), load_int64(form + 32), load_int64(form + 48)
    y, x = quotient(remainder(row, high * wide), wide), remainder(row, wide)
    down = quotient(remainder(column, height * width), width) - quotient((2 * y + 1) * height, 2 * high)
    across = remainder(column, width) - quotient((2 * x + 1) * width, 2 * wide)
    return down * down + across * across <= squared


@njit
def place_of(d: int, code: int) -> int:
    """Return the place of a code; -1 if it stands for none or for one that is not allowed."""
    kind, forms = load_int64(d + 8 * W.FIRST_FORM), load_int64(d + 8 * W.FORMS)
    if kind == LISTED:
        return load_int64(load_int64(d + 8 * W.ITEMS) + 8 * code)
    rows, columns = load_int64(d + 8 * W.ROWS), load_int64(d + 8 * W.COLUMNS)
    inner, minors, majors = load_int64(d + 8 * W.INNER), load_int64(d + 8 * W.MINORS), load_int64(d + 8 * W.MAJORS)
    place, row, column = code, np.int64(-1), np.int64(-1)
    if kind != WHOLE:
        stretch = load_int64(d + 8 * W.STRETCH)
        entry, position = quotient(code, inner), remainder(code, inner)
        line, offset = quotient(entry, stretch), remainder(entry, stretch)
        group, row = quotient(line, rows), remainder(line, rows)
        column = column_at(d + 8 * W.FIRST_FORM, row, offset, rows, columns)
        if column < 0:
            return np.int64(-1)
        if load_int64(d + 8 * W.TRANSPOSED) != 0:
            place = ((group * majors + column) * minors + row) * inner + position
        else:
            place = ((group * majors + row) * minors + column) * inner + position
    for i in range(1, forms):
        form = d + 8 * (W.FIRST_FORM + FORM_WORDS * i)
        if load_int64(form) == BITMAP:
            if not (load_int64(load_int64(d + 8 * W.ITEMS) + 8 * (place >> 6)) >> (place & 63)) & 1:
                return np.int64(-1)
            continue
        if row < 0:
            entry = quotient(place, inner)
            minor, major = remainder(entry, minors), remainder(quotient(entry, minors), majors)
            row, column = (minor, major) if load_int64(d + 8 * W.TRANSPOSED) != 0 else (major, minor)
        if not permits(form, row, column, rows, columns):
            return np.int64(-1)
    return place


@njit
def draw_allowed(d: int, word: np.uint64) -> int:
    """Draw an allowed place (``Allowed.draw``)."""
    space, limit = np.uint64(load_int64(d + 8 * W.SPACE)), np.uint64(load_int64(d + 8 * W.LIMIT))
    tried, attempt = word, np.uint64(0)
    while True:
        draw = tried & LARGEST
        if draw <= limit:
            place = place_of(d, np.int64(draw % space))
            if place >= 0:
                return place
        attempt += np.uint64(1)
        tried = bits(word, attempt)


@njit
def fetch_allowed(d: int, word: np.uint64) -> None:
    """Fetch what the first try of :func:`draw_allowed` will read: an entry of the list, or a word of the bitmap."""
    kind, forms = load_int64(d + 8 * W.FIRST_FORM), load_int64(d + 8 * W.FORMS)
    listed = kind == LISTED
    if listed or (kind == WHOLE and forms > 1 and load_int64(d + 8 * (W.FIRST_FORM + FORM_WORDS)) == BITMAP):
        code = np.int64((word & LARGEST) % np.uint64(load_int64(d + 8 * W.SPACE)))
        prefetch(load_int64(d + 8 * W.ITEMS) + 8 * (code if listed else code >> 6))


@njit(inline="always")
def negative_in_table(s: int, place: int) -> bool:
    """Tell whether the sign of a place is -1 (``SignTable.are_negative``)."""
    inner, length = load_int64(s + 8 * S.INNER), load_int64(s + 8 * S.LENGTH)
    entry = remainder(quotient(place, inner), length) + length * quotient(place, load_int64(s + 8 * S.BLOCK))
    return (load_int64(load_int64(s + 8 * S.BITS) + 8 * (entry >> 6)) >> (entry & 63)) & 1 == 1
