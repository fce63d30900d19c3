"""What kernels have to know of a sparse tensor and of the order of its connections."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from lightning_deepr.algorithm.rewiring import SlotTensor

State = tuple[Tensor, float]  # a state tensor of theta's shape, and what the optimizer starts it with


class Slots(SlotTensor, Protocol):
    """What a step has to know of a tensor (see :class:`lightning_deepr.weights.k_slots.KSlots`)."""

    exceptions: Tensor  # int64, ascending: places whose sign is the opposite of the hashed one
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
    """A tensor whose connections may be kept in order."""

    rows: int
    columns: int

    @property
    def order(self) -> SlotOrder | None: ...

    def refresh_order(self) -> Any: ...
