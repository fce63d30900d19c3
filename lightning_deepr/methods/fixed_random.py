"""Fixed random connectivity, the control of the paper: "no rewiring"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr.algorithm import rewiring
from lightning_deepr.methods.slot_training import SlotTraining
from lightning_deepr.training import guards, invariants
from lightning_deepr.training.tracked import Stepped, TrackedTensor


@dataclass(kw_only=True, eq=False, repr=False)
class FixedRandom(SlotTraining):
    """Fixed random connectivity: K connections at random places that never change. This is the paper's control "no rewiring".

    There is no L1 and no noise.

    Args:
        signs: "fixed" | "free". "fixed": theta < 0 becomes 0, so every connection keeps the sign of its place, as in DEEP R
            without rewiring. "free": ordinary weights under a fixed mask; this gives the better results.

    Example::

        >>> import torch
        >>> from lightning_deepr import FixedRandom, sparsify
        >>> net = sparsify(torch.nn.Linear(100, 10), 0.05)
        >>> rewiring = FixedRandom().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    """

    signs: str = "fixed"
    rewire_until = 0
    without_turnover = "It has no L1 and no rebirths: leave l1 out."

    def __post_init__(self) -> None:
        if self.signs not in ("fixed", "free"):
            raise ValueError(f'signs: expected "fixed" or "free", found {self.signs!r}.')
        super().__post_init__()

    @override
    def begin(self, tensors: Sequence[TrackedTensor]) -> None:
        if self.signs == "fixed":
            guards.warn_of_free_signs(type(self).__name__, tensors, "they become 0")

    @override
    def after_step(self, stepped: Sequence[Stepped], optimizer: Optimizer) -> None:
        if self.signs == "fixed":
            rewiring.keep_active([item.theta for item in stepped])

    @override
    def check(self, item: Stepped, optimizer: Optimizer) -> None:
        invariants.check_invariants(item, optimizer, self._runs.of(optimizer).starts, signed=self.signs == "free")
