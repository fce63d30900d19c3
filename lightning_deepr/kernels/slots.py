"""A sparse tensor and the order of its connections, as the kernels see them."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from lightning_deepr.algorithm.rewiring import SlotTensor
from lightning_deepr.algorithm.signs import SignTable

PLAIN = (Tensor, nn.Parameter)  # the types of tensors that have memory of their own


class Slots(SlotTensor, Protocol):
    """A tensor as a step sees it (see :class:`lightning_deepr.weights.k_slots.KSlots`)."""

    exceptions: Tensor  # int64, ascending: the places whose sign is opposite to the hashed one
    sign_seed: int
    name: str  # in the network, for messages
    sign_table: SignTable | None  # the signs of the places; None: their hashes
    notes: Any  # what is noted about births (see :class:`lightning_deepr.monitoring.record.TensorRecord`); None: nothing
    passed: Any  # what the gate has compared (see :func:`lightning_deepr.kernels.gate.check`); None: nothing yet
    trusted: Any  # the places that it knows to be valid, with their address, number and version; None: none


class SlotOrder(Protocol):
    """The connections by row and by column (see :class:`lightning_deepr.compute.order.Order`)."""

    buffer: Tensor
    addresses: list[int]
    rows: int
    columns: int

    def is_stale(self, places: Tensor) -> bool: ...

    def note_as(self, mark: tuple[Tensor, int, int, int]) -> None: ...


class OrderedSlots(Slots, Protocol):
    """A tensor that may keep its connections in order."""

    rows: int
    columns: int

    @property
    def order(self) -> SlotOrder | None: ...

    def refresh_order(self) -> Any: ...
