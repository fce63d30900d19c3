"""A sparse tensor and the order of its connections, as the kernels see them."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from lightning_deepr.algorithm.rewiring import SlotTensor

State = tuple[Tensor, float]  # a state tensor of theta's shape, and its starting value in the optimizer


class Slots(SlotTensor, Protocol):
    """A tensor as a step sees it (see :class:`lightning_deepr.weights.k_slots.KSlots`)."""

    exceptions: Tensor  # int64, ascending: the places whose sign is opposite to the hashed one
    sign_seed: int


class SlotOrder(Protocol):
    """The connections by row and by column (see :class:`lightning_deepr.compute.order.Order`)."""

    buffer: Tensor
    addresses: list[int]
    rows: int
    columns: int

    def is_stale(self, places: Tensor) -> bool: ...

    def note(self, places: Tensor) -> None: ...


class OrderedSlots(Slots, Protocol):
    """A tensor that may keep its connections in order."""

    rows: int
    columns: int

    @property
    def order(self) -> SlotOrder | None: ...

    def refresh_order(self) -> Any: ...
