"""Keep the counts of recent steps on their device until the host needs them. A read costs a host synchronization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_deepr.training.tracked import TrackedTensor

MOST_STEPS = 50  # steps that are kept; the warning of a collapse can be this many steps late


class _Entry(NamedTuple):
    counts: Tensor  # int64 [tensors, 2]: reborn slots, and how many of them were newborns when they died
    position: int
    tensor: TrackedTensor
    alpha: Any  # alpha of the step


class Ledger:
    """The steps whose births are not counted yet, in order."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._steps = 0

    def note(self, counts: Tensor, position: int, tensor: TrackedTensor, alpha: Any) -> None:
        """Keep one tensor's rewiring step.

        Args:
            counts: int64 [tensors, 2]. Nobody may write to it afterwards.
            position: the tensor's row in ``counts``.
            tensor: the tensor; its :class:`lightning_deepr.algorithm.statistics.Turnover` receives the counts later.
            alpha: alpha of the step, for the warning of a collapse.
        """
        if not self._entries or self._entries[-1].counts is not counts:
            self._steps += 1
        self._entries.append(_Entry(counts, position, tensor, alpha))

    @property
    def is_full(self) -> bool:
        return self._steps >= MOST_STEPS

    def settle(self) -> Iterator[tuple[TrackedTensor, Any]]:
        """Count all kept steps, with one transfer from each device.

        Yields:
            each tensor that has collapsed, and its alpha.
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
