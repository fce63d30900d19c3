"""Counts of a step that stay on a device until somebody wants to see them: looking costs a host synchronization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_deepr.training.tracked import TrackedTensor

MOST_STEPS = 50  # that are kept; the watch for a collapse is late by as many


class _Entry(NamedTuple):
    counts: Tensor  # int64 [tensors, 2]: births, and how many of the reborn had been newborns
    position: int
    tensor: TrackedTensor
    alpha: Any  # that held in the step


class Ledger:
    """Steps whose births have not been counted yet, in their order."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._steps = 0

    def note(self, counts: Tensor, position: int, tensor: TrackedTensor, alpha: Any) -> None:
        """Keep one tensor's step, which rewired.

        Args:
            counts: int64 [tensors, 2], not to be written to again.
            position: the tensor's row.
            tensor: whose :class:`lightning_deepr.algorithm.statistics.Turnover` it is for.
            alpha: for the message of a collapse.
        """
        if not self._entries or self._entries[-1].counts is not counts:
            self._steps += 1
        self._entries.append(_Entry(counts, position, tensor, alpha))

    @property
    def is_full(self) -> bool:
        return self._steps >= MOST_STEPS

    def settle(self) -> Iterator[tuple[TrackedTensor, Any]]:
        """Count all that is kept, with one transfer from each device.

        Yields:
            tensors that have collapsed, and their alpha.
        """
        entries, self._entries, self._steps = self._entries, [], 0
        by_device: dict[torch.device, dict[int, Tensor]] = {}
        for entry in entries:
            by_device.setdefault(entry.counts.device, {})[id(entry.counts)] = entry.counts
        found: dict[int, list[list[int]]] = {}
        for tables in by_device.values():
            rows = torch.cat(list(tables.values())).tolist()
            for key, table in tables.items():
                found[key], rows = rows[: len(table)], rows[len(table) :]
        for entry in entries:
            births, newborns = found[id(entry.counts)][entry.position]
            turnover, steering = entry.tensor.turnover, entry.tensor.steering
            if steering is not None:
                steering.add(births, turnover.count)
            if turnover.add(births, newborns):
                yield entry.tensor, entry.alpha
