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
