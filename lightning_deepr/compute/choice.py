"""``compute="auto"``: dense or sparse, by a measured break-even."""

from __future__ import annotations

import math

import torch

NOMINAL_BATCH = 128  # until the first batch has been seen

# Microseconds per unit of work, in the order of the terms below: what `benchmarks/break_even.py --fit` prints.
SPARSE = (55.0, 2.7e-4, 8.2e-4, 4.8e-3)
DENSE = (90.0, 8.8e-4, 8.4e-5, 5.6e-3)


def prefers_sparse(rows: int, columns: int, count: int, batch: int, dtype: torch.dtype, device: str) -> bool:
    """Whether the sparse kernels are expected to be faster than the transient dense weight, forward and backward.

    Either time is a sum of amounts of work, each times a constant that was fitted to measured times (``benchmarks/README.md`` has the
    table, and how often the rule is right). Only the ratio of the two is meant.
    """
    if device != "cpu":
        return False
    sparse, dense = (
        terms[0] * constants[0] + scale * sum(a * b for a, b in zip(terms[1:], constants[1:], strict=True))
        for terms, constants, scale in (
            (sparse_terms(rows, columns, count, batch), SPARSE, 2.0 if dtype == torch.float64 else 1.0),
            (dense_terms(rows, columns, count, batch), DENSE, 2.0 if dtype == torch.float64 else 1.0),
        )
    )
    return sparse < dense


def sparse_terms(rows: int, columns: int, count: int, batch: int) -> tuple[float, ...]:
    """A call; a multiplication and addition per connection; the transposes of input and output; reading the connections."""
    padded = 8 * math.ceil(batch / 8)  # the kernels work on whole vectors
    return 1, padded * count, padded * (rows + columns), count + rows + columns


def dense_terms(rows: int, columns: int, count: int, batch: int) -> tuple[float, ...]:
    """A call; building the weight and its gradient; a multiplication and addition per place; scattering and gathering."""
    total = rows * columns
    return 1, total, batch * total, count


# The same for convolutions (`benchmarks/convolution.py`): per call, connection and pixel, pixel of input and output, connection, channel;
# and per call, place and pixel, pixel of input and output, place.
SPARSE_CONV = (32.0, 7.9e-5, 1.57e-3, 1.3e-3, 0.29)
DENSE_CONV = (344.0, 3.94e-5, 1.09e-3, 4e-3)


def prefers_sparse_conv(shape: torch.Size, count: int, batch: int, pixels_in: int, pixels_out: int) -> bool:
    """As :func:`prefers_sparse`, of a two-dimensional convolution.

    Args:
        shape: the weight's, [channels out, channels in, height, width].
        count: K.
        batch: number of images.
        pixels_in, pixels_out: of one channel.
    """
    padded = 10 if batch <= 8 else 16 * math.ceil(batch / 16)
    both = shape[1] * pixels_in + shape[0] * pixels_out
    a, b, c, d, e = SPARSE_CONV
    sparse = a + padded * (b * count * pixels_out + c * both + d * count) + e * (shape[0] + shape[1])
    a, b, c, d = DENSE_CONV
    return sparse < a + batch * (b * shape.numel() * pixels_out + c * both) + d * shape.numel()


def prefers_sparse_conv_at_all(density: float) -> bool:
    """A guess before the first image: it was right at a batch of at least 16."""
    return density <= 0.2
