"""Linear layers whose *input* is a sparse tensor (COO, CSR, CSC, BSR, BSC) or a nested one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from lightning_deepr.compute import gather
from lightning_deepr.compute.slots import SparseSlots

LARGEST = 1 << 24  # the most entries of an input that is made dense


@dataclass
class _Part:
    """The connections of some columns, see :class:`lightning_deepr.compute.slots.Connections`."""

    rows: int
    columns: int
    places: Tensor
    signs: Tensor


def linear(x: Tensor, theta: Tensor, bias: Tensor | None, slots: SparseSlots, ordinary: Callable[..., Tensor]) -> Tensor:
    """Compute ``F.linear`` for a sparse or nested input. The kernels can't read it: they take addresses of strided memory.

    A sparse input is made dense. If it would be too large, only the columns with entries are, and only their connections
    multiply: O(entries + K + columns), beside a batch of these columns. A nested input multiplies the dense weight.

    Args:
        x: [B, columns], sparse, or a nested tensor.
        theta: [K].
        bias: [rows] or None.
        slots: the connections.
        ordinary: the function that takes a strided input.
    """
    if x.is_nested or x.layout is torch.jagged:
        return torch_linear(x, slots.weight_of(theta), bias)
    fits = (
        x.dim() == 2
        and x.shape[1] == slots.columns
        and x.dtype == theta.dtype
        and slots.narrow is None
        and x.device == theta.device
    )
    if x.numel() <= LARGEST or not fits or torch.is_autocast_enabled(x.device.type):
        return ordinary(x.to_dense(), theta, bias, slots)
    x = x.to_sparse_coo().coalesce()
    row, column = x.indices()
    used, where = column.unique(return_inverse=True)
    compact = x.values().new_zeros((x.shape[0], used.numel())).index_put((row, where), x.values())
    number = torch.full((slots.columns,), -1, dtype=torch.int64, device=x.device)
    number[used] = torch.arange(used.numel(), device=x.device)
    at = number[slots.places % slots.columns]
    mine = (at >= 0).nonzero().view(-1)
    places = slots.places[mine] // slots.columns * max(used.numel(), 1) + at[mine]
    part = _Part(slots.rows, max(used.numel(), 1), places, slots.signs[mine])
    return gather.linear(compact, theta[mine], bias, part)  # type: ignore[arg-type] # it reads these four only
