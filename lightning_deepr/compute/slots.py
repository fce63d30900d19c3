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

    @property
    def count(self) -> int: ...

    @property
    def order(self) -> Order | None: ...

    def ordered(self) -> Order: ...

    def has_kernel(self, theta: Tensor) -> bool: ...

    def dense(self, theta: Tensor) -> Tensor: ...

    def weight_of(self, part: Tensor) -> Tensor: ...
