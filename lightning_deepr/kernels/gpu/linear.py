"""Sparse compute of linear layers in Triton: the products of :mod:`lightning_deepr.compute.sparse` for GPUs.

The batch is the last dimension of the activations: a connection is a row of one matrix times a number, and neighbouring threads
read neighbouring numbers. Sums are taken in a fixed order: the result depends only on the arguments.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(
    x, y, theta, signs, starts, others, slots, batch, WIDE: tl.constexpr, CONNECTIONS: tl.constexpr, BATCH: tl.constexpr
):
    """Compute y [lines, B] from x [others, B]: line i is the sum of theta * sign * x[other] over its connections.

    A program computes one line for BATCH elements of the batch. By row this is the forward pass, by column the gradient of the
    input.

    Args:
        starts: int64 [lines + 1], the position at which the connections of each line begin.
        others, slots: int64 [K], the other end of each connection and its slot.
        WIDE: the type of the sums.
    """
    tiles = tl.cdiv(batch, BATCH)
    line = tl.program_id(0).to(tl.int64) // tiles
    elements = (tl.program_id(0) - line * tiles) * BATCH + tl.arange(0, BATCH)
    within = elements < batch
    first, end = tl.load(starts + line), tl.load(starts + line + 1)
    total = tl.zeros([BATCH], WIDE)
    while first < end:
        at = first + tl.arange(0, CONNECTIONS)
        there = at < end
        slot = tl.load(slots + at, mask=there, other=0)
        weight = tl.load(theta + slot, mask=there, other=0.0).to(WIDE) * tl.load(signs + slot, mask=there, other=0.0).to(WIDE)
        other = tl.load(others + at, mask=there, other=0)
        seen = tl.load(x + other[:, None] * batch + elements[None, :], mask=there[:, None] & within[None, :], other=0.0)
        total += tl.sum(weight[:, None] * seen.to(WIDE), axis=0)
        first += CONNECTIONS
    tl.store(y + line * batch + elements, total.to(y.dtype.element_ty), mask=within)


@triton.jit
def sampled(
    x, dy, dtheta, signs, places, slots, count, columns, batch,
    WIDE: tl.constexpr, CONNECTIONS: tl.constexpr, BATCH: tl.constexpr
):  # fmt: skip
    """Compute the gradient of theta [K]: sign * <dy[row], x[column]>, for x [columns, B] and dy [rows, B].

    Args:
        places, slots: int64 [K], the places in ascending order and the slot of each. Neighbours often read the same row of dy.
        WIDE: the type of the sums.
    """
    at = tl.program_id(0).to(tl.int64) * CONNECTIONS + tl.arange(0, CONNECTIONS)
    there = at < count
    place = tl.load(places + at, mask=there, other=0)
    row = place // columns
    column = place - row * columns
    slot = tl.load(slots + at, mask=there, other=0)
    total = tl.zeros([CONNECTIONS], WIDE)
    for first in range(0, batch, BATCH):
        elements = first + tl.arange(0, BATCH)
        inside = there[:, None] & (elements < batch)[None, :]
        a = tl.load(dy + row[:, None] * batch + elements[None, :], mask=inside, other=0.0).to(WIDE)
        b = tl.load(x + column[:, None] * batch + elements[None, :], mask=inside, other=0.0).to(WIDE)
        total += tl.sum(a * b, axis=1)
    total = total * tl.load(signs + slot, mask=there, other=0.0).to(WIDE)
    tl.store(dtheta + slot, total.to(dtheta.dtype.element_ty), mask=there)
