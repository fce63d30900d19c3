"""The choice of ``compute="auto"`` between dense and sparse, by a measured break-even."""

from __future__ import annotations

import math
from functools import cache

import torch

NOMINAL_BATCH = 128  # assumed until the first batch arrives

TOKENS = 512  # rows of an input from which on linear layers have other kernels (:mod:`lightning_deepr.compute.tokens`)

# Microseconds per unit of work, in the order of the terms below, as `benchmarks/break_even.py --fit` prints them: those of
# sparse and of dense compute, for inputs with few rows, and for those with many.
Constants = tuple[tuple[float, ...], tuple[float, ...]]
FLOAT32: tuple[Constants, Constants] = (
    ((55.0, 2.7e-4, 8.2e-4, 4.8e-3), (90.0, 8.8e-4, 8.4e-5, 5.6e-3)),
    ((55.0, 2.7e-4, 8.2e-4, 4.8e-3), (90.0, 8.8e-4, 8.4e-5, 5.6e-3)),
)
BFLOAT16: tuple[Constants, Constants] = (
    ((55.0, 2.7e-4, 8.2e-4, 4.8e-3), (90.0, 8.8e-4, 8.4e-5, 5.6e-3)),
    ((55.0, 2.7e-4, 8.2e-4, 4.8e-3), (90.0, 8.8e-4, 8.4e-5, 5.6e-3)),
)


def prefers_sparse(rows: int, columns: int, count: int, batch: int, dtype: torch.dtype, device: str) -> bool:
    """Tell whether the sparse kernels should be faster than the transient dense weight, forward and backward together.

    Each of the two times is a sum of amounts of work, multiplied by constants that were fitted to measured times.
    ``benchmarks/README.md`` has the table and says how often the rule is right. Only the ratio of the two times is
    meaningful, not their values.

    Args:
        rows, columns: the shape of the weight.
        count: K, the number of connections.
        batch: the number of rows of the input.
        dtype: the dtype in which the dense layer would compute. The kernels compute in theta's, float32 at least.
        device: the type of the device.
    """
    if device != "cpu":
        return False
    constants = (BFLOAT16 if multiplies_fast(dtype) else FLOAT32)[batch >= TOKENS]
    sparse, dense = (
        terms[0] * rule[0] + scale * sum(a * b for a, b in zip(terms[1:], rule[1:], strict=True))
        for terms, rule, scale in (
            (sparse_terms(rows, columns, count, batch), constants[0], 2.0 if dtype == torch.float64 else 1.0),
            (dense_terms(rows, columns, count, batch), constants[1], 2.0 if dtype == torch.float64 else 1.0),
        )
    )
    return sparse < dense


@cache
def multiplies_fast(dtype: torch.dtype) -> bool:
    """Tell whether this CPU has instructions for products of a dtype of 16 bits.

    Without them, dense products of 16 bits are at best as fast as those of float32.
    """
    asked: tuple[str, ...]
    if dtype == torch.bfloat16:
        asked = "_is_amx_tile_supported", "_is_avx512_bf16_supported"
    elif dtype == torch.float16:
        asked = ("_is_amx_fp16_supported",)
    else:
        return False
    return any(bool(getattr(torch.cpu, name, bool)()) for name in asked)


def sparse_terms(rows: int, columns: int, count: int, batch: int) -> tuple[float, ...]:
    """Count the work of sparse compute: calls, multiply-adds, entries of input and output to transpose, connections to read."""
    padded = 8 * math.ceil(batch / 8)  # the kernels work on whole vectors
    return 1, padded * count, padded * (rows + columns), count + rows + columns


def dense_terms(rows: int, columns: int, count: int, batch: int) -> tuple[float, ...]:
    """Count the work of dense compute: calls, places to build, multiply-adds, connections to scatter and gather."""
    total = rows * columns
    return 1, total, batch * total, count


def prefers_sum(rows: int, columns: int, count: int, batch: int) -> bool:
    """Tell whether a linear layer upon a frozen weight is faster with the sum than with two products.

    Two products: per connection, row and column, for each element of the batch. The sum: the product of a dense gradient, and
    two copies of the weight. The constants were fitted to layers of 384 x 384 to 1024 x 1024 with batches of 128 to 4,096.
    """
    return 40 * (count + rows + columns) > rows * columns * (1 + 60 / max(batch, 1))


# The same for convolutions, in microseconds: see the terms.
SPARSE_CONV = (32.0, 7.9e-5, 1.57e-3, 1.3e-3, 0.29)
DENSE_CONV = (344.0, 3.94e-5, 1.09e-3, 4e-3)


def prefers_sparse_conv(
    shape: torch.Size, count: int, batch: int, pixels_in: int, pixels_out: int, stretch: float = 1.0
) -> bool:
    """Answer the question of :func:`prefers_sparse` for a two-dimensional convolution.

    Args:
        shape: the shape of the weight, [channels out, channels in, height, width].
        count: K, the number of connections.
        batch: the number of images.
        pixels_in, pixels_out: the number of pixels of one channel of the input and of the output.
        stretch: the pixels of a padded channel, divided by those with the padding of a kernel that is not dilated. The kernels
            lay out whole padded channels: with a dilation of 36, 4 x 4 pixels become 76 x 76.
    """
    setting = shape, count, batch, pixels_in, pixels_out, stretch
    sparse, dense = (
        sum(a * b for a, b in zip(terms, constants, strict=True))
        for terms, constants in ((sparse_conv_terms(*setting), SPARSE_CONV), (dense_conv_terms(*setting), DENSE_CONV))
    )
    return sparse < dense


def sparse_conv_terms(
    shape: torch.Size, count: int, batch: int, pixels_in: int, pixels_out: int, stretch: float
) -> tuple[float, ...]:
    """Count: calls, connections times pixels, pixels to lay out, connections per image, channels."""
    padded = 10 if batch <= 8 else 16 * math.ceil(batch / 16)
    both = shape[1] * pixels_in + shape[0] * pixels_out
    return 1, padded * count * pixels_out, padded * both * stretch, padded * count, shape[0] + shape[1]


def dense_conv_terms(
    shape: torch.Size, count: int, batch: int, pixels_in: int, pixels_out: int, stretch: float
) -> tuple[float, ...]:
    """Count: calls, places times pixels, pixels of input and output, places."""
    both = shape[1] * pixels_in + shape[0] * pixels_out
    return 1, batch * shape.numel() * pixels_out, batch * both, shape.numel()


def prefers_sparse_conv_at_all(density: float) -> bool:
    """Guess the choice before the first image. For batches of at least 16, measurements agreed with the guess."""
    return density <= 0.2
