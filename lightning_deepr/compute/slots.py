"""What sparse compute has to know of a converted weight."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lightning_deepr.compute.order import Order
from lightning_deepr.kernels.slots import OrderedSlots


class Connections(Protocol):
    """Where the connections of a weight [rows, columns] are, and their signs."""

    rows: int
    columns: int
    places: Tensor  # int64 [K]
    signs: Tensor  # [K]


class SparseSlots(OrderedSlots, Protocol):
    """A converted weight (see :class:`lightning_deepr.weights.k_slots.KSlots`)."""

    shape: torch.Size
    keeps_no_writes: bool
    used: str  # what became of ``layer.weight``: "sparse" (``F.linear`` took it), "dense" (it was built), "" (nothing yet)

    adapts: bool  # whether the connections are added to a frozen weight
    base: torch.nn.Parameter  # this weight

    narrow: torch.dtype | None  # the weight's dtype where it has fewer bits than theta

    @property
    def in_place_order(self) -> bool: ...

    @property
    def may_sum(self) -> bool: ...

    @property
    def is_large(self) -> bool: ...

    @property
    def count(self) -> int: ...

    @property
    def order(self) -> Order | None: ...

    def ordered(self) -> Order: ...

    def has_kernel(self, theta: Tensor) -> bool: ...

    def dense(self, theta: Tensor) -> Tensor: ...

    def weight_of(self, part: Tensor) -> Tensor: ...

    def lost_write(self, operation: str) -> str: ...
