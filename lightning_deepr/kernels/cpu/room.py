"""The most working memory that a kernel takes, in bytes, and the allocation of it (see :mod:`.scratch`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALL = 1 << 20  # bytes that a table keeps from one step to the next
LINE = 64  # each array begins at a cache line
MANY = 1 << 20  # from this number of draws on, their table is half as large
LISTED = 512  # places whose hashes ``rewire.list_below`` computes together
MARKED = 16  # up to this number of places per connection, a tensor has a bitmap of its places
COUNTERS = 9 * 8 << 9  # of a sort, at most: 8 passes and one more, with digits of 9 bits


def arrays(*sizes: int) -> int:
    """Add up arrays of these bytes, each with its alignment."""
    return sum(sizes) + LINE * len(sizes)


def capacity_bits(draws: int) -> int:
    """Compute the bits of a cell's number in the table of some draws."""
    bits = 8
    while (1 << bits) < (4 if draws < MANY else 2) * draws:
        bits += 1
    return bits


def rejection(draws: int) -> int:
    """For ``rewire.draw_by_rejection``, with at most this number of draws."""
    most = 0
    for number in {draws, min(draws, MANY - 1)}:  # a table is the largest just before it is halved
        bits = capacity_bits(number)
        words = 8 << max(2, min(17, bits - 4))
        most = max(most, arrays(8 << bits, 1 << bits, words, 8 * number, 8 * (max(number, 64) + 64)))
    return most


def sorting(count: int) -> int:
    """For ``sorting.sort_with``, which may sort twice."""
    return 2 * arrays(8 * count, 4 * count, COUNTERS)


def listing(total: int) -> int:
    """For the choice among the dormant places of a list."""
    return arrays(4 * (total + LISTED), 8 * (total + LISTED)) + sorting(total)


def listing_allowed(count: int, allowed: int) -> int:
    """For the choice among the dormant places of those that are allowed."""
    table = 8 * max(16, 4 * count)
    return arrays(table, 8 * allowed, 4 * allowed, 8 * allowed) + sorting(allowed)


def has_marks(count: int, total: int, allowed: int | None = None) -> bool:
    """Tell whether a tensor of K of N connections keeps a bitmap of its places. It takes at most 16 bits per connection."""
    return allowed is None and total <= MARKED * count


def arranging(total: int) -> int:
    """For the sort of drawn places by a bitmap."""
    return arrays(8 * ((total + 63) >> 6))


def rewiring(count: int, total: int, allowed: int | None = None, ranked: bool = False) -> int:
    """For the step of a tensor of K of N connections, or of K of the places that are allowed."""
    return _drawing(count, total, allowed) + (arranging(total) if ranked else 0)


def _drawing(count: int, total: int, allowed: int | None) -> int:
    if has_marks(count, total, allowed) and 2 * count <= total:
        return arrays(8 * count, 4 * count)
    if 2 * count <= (total if allowed is None else allowed):
        return arrays(8 * count) + rejection(count)
    return arrays(8 * count) + (listing(total) if allowed is None else listing_allowed(count, allowed))


def follow(count: int, lines: int) -> int:
    """For the update of one order, by rows or by columns."""
    births = arrays(8 * count, 4 * count, 4 * (count // 32 + 1)) + sorting(count)
    pieces = (count >> 6) + 1
    return births + arrays(4 * (lines + 1), 8 * pieces, 4 * pieces)


def order_anew(count: int, rows: int, columns: int) -> int:
    """For both orders of a small or new tensor."""
    return arrays(4 * count, 4 * count, 4 * count, 4 * (rows + 1), 4 * (columns + 1))


def shared(count: int, layers: int, network: int) -> int:
    """For a rewiring with one K for a network of this number of places."""
    table = 8 * max(16, 4 * (count + 1))
    own = arrays(table, 8 * count, 8 * count, 8 * count, 8 * (layers + 1), 8 * count, 8 * count)
    return own + arrays(8 * count, 8 * layers) + listing(min(network, 4 * count + 4))


def empty(size: int) -> Tensor:
    """Allocate working memory.

    Raises:
        RuntimeError: there is not enough memory.
    """
    try:
        return torch.empty((size + LINE + 7) // 8, dtype=torch.int64, device="cpu")
    except RuntimeError as error:
        raise RuntimeError(
            f"There is no memory for the kernels to work in: expected {size / 2**20:.3g} MiB more. Nothing was changed. Free "
            "memory, use fewer connections, or call the step again later."
        ) from error


def total_of(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Return where each of several pieces begins, and the size of all."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += size + LINE
    return starts, end
