"""``compute="auto"``: dense or sparse, by a measured break-even."""

from __future__ import annotations

import math

import torch

NOMINAL_BATCH = 128  # until the first batch has been seen


def prefers_sparse(rows: int, columns: int, count: int, batch: int, dtype: torch.dtype, device: str) -> bool:
    """Whether the sparse kernels are expected to be faster than a dense layer, forward and backward.

    The constants are fitted to ``benchmarks/break_even.py`` (its table is in ``benchmarks/README.md``).
    """
    return device == "cpu" and sparse_time(rows, columns, count, batch, dtype) < dense_time(rows, columns, count, batch, dtype)


def sparse_time(rows: int, columns: int, count: int, batch: int, dtype: torch.dtype) -> float:
    """Microseconds, of one forward and backward pass on two cores of the machine in ``benchmarks/README.md``."""
    scale = 2.0 if dtype == torch.float64 else 1.0
    padded = 8 * math.ceil(batch / 8)
    return 30 + scale * padded * (1.5e-4 * count + 6e-4 * (rows + columns))


def dense_time(rows: int, columns: int, count: int, batch: int, dtype: torch.dtype) -> float:
    """As :func:`sparse_time`, with the building of the transient weight and its gradient's."""
    scale = 2.0 if dtype == torch.float64 else 1.0
    total = rows * columns
    return 60 + scale * total * (4e-4 + 3e-5 * batch) + 6e-3 * count
