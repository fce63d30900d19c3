"""Places as gaps: a compact code for the increasing places of a tensor.

The code is the number of free places before each connection, in units of ``bits`` bits. A unit of all ones adds its value and
continues the gap; any other unit adds its value and ends the gap. One parameter covers every density: 8 bits suit 1 %, 3 bits
suit 20 %, and 1 bit is a bitmap. For random places this takes at most a tenth more than the entropy at any density from 0.1 to
50 %. Decoding can't give a place twice or out of order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WIDEST = 40  # the most bits of a unit
LARGEST_TOTAL = 1 << 48  # the largest N of a tensor: no sum of gaps overflows
_CHUNK = 1 << 15  # the units that are decoded together: a multiple of 8, so that each chunk begins at a byte

Places = NDArray[np.int64]


class FormatError(ValueError):
    """The error for a file that is damaged, hostile or of another format."""


def best_width(places: Places) -> int:
    """Find the number of bits per unit that gives the fewest bytes; on a tie, the smallest."""
    gaps = _gaps(places)
    sizes = {}
    for bits in range(1, WIDEST + 1):
        sizes[bits] = bits * (places.size + int((gaps // ((1 << bits) - 1)).sum()))
        if bits * places.size > min(sizes.values()):  # wider units can't do better
            break
    return min(sizes, key=lambda bits: (-(-sizes[bits] // 8), bits))


def encode(places: Places, bits: int) -> bytes:
    """Write increasing places as units of ``bits`` bits, the lowest bit first, and fill the last byte with zeros.

    Example::

        >>> encode(np.array([0, 3, 20]), 4).hex(), decode(encode(np.array([0, 3, 20]), 4), 3, 4, total=21).tolist()
        ('201f', [0, 3, 20])
    """
    gaps = _gaps(places)
    going_on = (1 << bits) - 1
    more = gaps // going_on
    ends = np.cumsum(more + 1) - 1
    units = np.full(int(ends[-1]) + 1 if ends.size else 0, going_on, dtype=np.int64)
    units[ends] = gaps - more * going_on
    stream = bytearray()
    for begin in range(0, units.size, _CHUNK):
        part = units[begin : begin + _CHUNK, None] >> np.arange(bits) & 1
        stream += np.packbits(part.astype(np.uint8), bitorder="little").tobytes()
    return bytes(stream)


def decode(stream: memoryview | bytes, count: int, bits: int, *, total: int) -> Places:
    """Read the places that :func:`encode` wrote.

    Args:
        stream: all bytes of the code.
        count: K, the number of places.
        bits: the number of bits per unit.
        total: N; all places are below it.

    Raises:
        FormatError: there are not K places, a place is out of range, or bytes are left over.
    """
    if not 1 <= bits <= WIDEST or not 0 <= count <= total <= LARGEST_TOTAL or count * bits > 8 * len(stream):
        raise FormatError(
            f"expected K <= N <= 2^48 places in units of 1 to {WIDEST} bits, found K = {count}, N = {total}, {bits} bits and "
            f"{len(stream)} bytes."
        )
    raw = np.frombuffer(stream, np.uint8)
    places = np.empty(count, np.int64)
    weights = np.left_shift(1, np.arange(bits), dtype=np.int64)
    going_on = (1 << bits) - 1
    units, found, last = 8 * raw.size // bits, 0, -1
    used = 0
    for begin in range(0, units, _CHUNK):
        part = raw[begin * bits // 8 : (begin + _CHUNK) * bits // 8]
        flat = np.unpackbits(part, bitorder="little", count=min(_CHUNK, units - begin) * bits)
        unit = flat.reshape(-1, bits) @ weights
        ends = np.flatnonzero(unit != going_on)[: count - found]
        reached = np.cumsum(unit)
        here = reached[ends] + np.arange(1, ends.size + 1) + last
        if here.size and here[-1] >= total:
            raise FormatError(f"expected places below {total}, found {int(here[-1])}.")
        places[found : found + ends.size] = here
        found += ends.size
        if found == count:
            used = begin + (int(ends[-1]) + 1 if ends.size else 0)
            break
        last += int(reached[-1]) + ends.size
        if last >= total:
            raise FormatError(f"expected places below {total}, found {last + 1} or more.")
    if found != count:
        raise FormatError(f"expected {count} places, found {found}.")
    padding = 8 * raw.size - used * bits
    if padding >= 8 or (padding and raw[-1] >> (8 - padding)):
        raise FormatError(f"expected {count} places and zeros up to the end of the byte, found {padding} bits after them.")
    return places


def _gaps(places: Places) -> Places:
    return np.diff(places, prepend=-1) - 1
