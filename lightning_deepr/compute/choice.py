"""The choice of ``compute="auto"`` between dense and sparse, by a measured break-even."""

from __future__ import annotations

import math
from functools import cache

import torch

from lightning_deepr.compute import tokens

NOMINAL_BATCH = 128  # assumed until the first batch arrives

MANY = 512  # rows of an input from which on dense compute has the second constants

# Microseconds per unit of work, in the order of the terms below, as `benchmarks/break_even.py --fit` prints them: (few, many).
# For sparse compute, many rows are those for which :mod:`lightning_deepr.compute.tokens` has kernels.
Constants = tuple[tuple[float, ...], tuple[float, ...]]
SPARSE: Constants = ((46, 7.9e-5, 8.4e-4, 5.5e-3), (33, 8.1e-5, 1.2e-3, 1.1e-2))
DENSE: Constants = ((90, 9.9e-4, 4.3e-5, 3e-3, 5.6e-4), (75, 4.7e-4, 3.6e-5, 3.3e-3, 9.7e-4))
# on a CPU with instructions for bfloat16
SPARSE_BFLOAT16: Constants = ((86, 6.6e-5, 1.9e-3, 8.9e-3), (4.6, 1e-4, 2.6e-3, 1.1e-2))
DENSE_BFLOAT16: Constants = ((160, 1.3e-3, 1.5e-6, 2.9e-3, 1.7e-3), (220, 0, 7.7e-6, 3.4e-3, 4.8e-4))


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
    fast = multiplies_fast(dtype)
    of_sparse = (SPARSE_BFLOAT16 if fast else SPARSE)[tokens.suits(batch, rows, columns, count, 4)]
    of_dense = (DENSE_BFLOAT16 if fast else DENSE)[batch >= MANY]
    sparse, dense = (
        terms[0] * rule[0] + scale * sum(a * b for a, b in zip(terms[1:], rule[1:], strict=True))
        for terms, rule, scale in (
            (sparse_terms(rows, columns, count, batch), of_sparse, 2.0 if dtype == torch.float64 else 1.0),
            (dense_terms(rows, columns, count, batch), of_dense, 2.0 if dtype == torch.float64 else 1.0),
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
    """Count the work of dense compute: calls, places to build, multiply-adds, connections to move, entries of x and y."""
    total = rows * columns
    return 1, total, batch * total, count, batch * (rows + columns)


def prefers_sum(rows: int, columns: int, count: int, batch: int) -> bool:
    """Tell whether a linear layer upon a frozen weight is faster with the sum than with two products.

    Two products: per connection, row and column, for each element of the batch. The sum: the product of a dense gradient, and
    two copies of the weight. The constants were fitted to layers of 384 x 384 to 1024 x 1024 with batches of 128 to 4,096.
    """
    return 40 * (count + rows + columns) > rows * columns * (1 + 60 / max(batch, 1))


# The same for convolutions, in microseconds: see the terms.
SPARSE_CONV = (110.0, 7e-5, 1.3e-3, 1.3e-3, 4.9e-4)
DENSE_CONV = (250.0, 2.7e-5, 3.2e-3, 3.6e-3, 9.1e-4)
SPARSE_CONV_BFLOAT16 = (140.0, 8.3e-5, 1.7e-3, 8.6e-4, 4.6e-4)
DENSE_CONV_BFLOAT16 = (370.0, 7.6e-6, 1.5e-3, 3.8e-3, 4.1e-4)


def prefers_sparse_conv(
    shape: torch.Size,
    count: int,
    batch: int,
    pixels_in: int,
    pixels_out: int,
    stretch: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> bool:
    """Answer the question of :func:`prefers_sparse` for a two-dimensional convolution.

    Args:
        shape: the shape of the weight, [channels out, channels in, height, width].
        count: K, the number of connections.
        batch: the number of images.
        pixels_in, pixels_out: the number of pixels of one channel of the input and of the output.
        stretch: the pixels of a padded channel, divided by those with the padding of a kernel that is not dilated. The kernels
            lay out whole padded channels: with a dilation of 36, 4 x 4 pixels become 76 x 76.
        dtype: the dtype in which the dense layer would compute.
    """
    setting, fast = (shape, count, batch, pixels_in, pixels_out, stretch), multiplies_fast(dtype)
    sparse, dense = (
        sum(a * b for a, b in zip(terms, constants, strict=True))
        for terms, constants in (
            (sparse_conv_terms(*setting), SPARSE_CONV_BFLOAT16 if fast else SPARSE_CONV),
            (dense_conv_terms(*setting), DENSE_CONV_BFLOAT16 if fast else DENSE_CONV),
        )
    )
    return sparse < dense


def sparse_conv_terms(
    shape: torch.Size, count: int, batch: int, pixels_in: int, pixels_out: int, stretch: float
) -> tuple[float, ...]:
    """Count: calls, connections times pixels, pixels to lay out, pixels of large paddings, connections per image."""
    padded = 10 if batch <= 8 else 16 * math.ceil(batch / 16)
    both = padded * (shape[1] * pixels_in + shape[0] * pixels_out)
    return 1, padded * count * pixels_out, both, both * (stretch - 1), padded * count


def dense_conv_terms(
    shape: torch.Size, count: int, batch: int, pixels_in: int, pixels_out: int, stretch: float
) -> tuple[float, ...]:
    """Count: calls, places times pixels, pixels of input and output, places, places per image under a large padding.

    oneDNN fills up the channels to vectors of 16, and computes a kernel that is larger than its image one image at a time.
    """
    both = shape[1] * pixels_in + shape[0] * pixels_out
    filled = shape[2:].numel() * math.prod(16 * math.ceil(channels / 16) for channels in shape[:2])
    return 1, batch * filled * pixels_out, batch * both, shape.numel(), batch * shape.numel() * (stretch > 4)


def prefers_sparse_conv_at_all(density: float) -> bool:
    """Guess the choice before the first image. For batches of at least 16, measurements agreed with the guess."""
    return density <= 0.2
