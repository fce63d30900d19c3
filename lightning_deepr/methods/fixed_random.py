"""Fixed random connectivity, the control of the paper: "no rewiring"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr.algorithm import rewiring
from lightning_deepr.algorithm.signs import Dale
from lightning_deepr.methods.slot_training import SlotTraining
from lightning_deepr.training import guards, invariants
from lightning_deepr.training.tracked import Stepped, TrackedTensor


@dataclass(kw_only=True, eq=False, repr=False)
class FixedRandom(SlotTraining):
    """Fixed random connectivity: K connections at random places that never change. This is the paper's control "no rewiring".

    There is no L1 and no noise.

    Args:
        signs: "fixed" | "free" | Dale(excitatory) | a tensor of signs | dict of these by pattern. "fixed":
            theta < 0 becomes 0, so every connection keeps the sign of its place, as in DEEP R without rewiring; the same holds
            for signs that are given. "free": ordinary weights under a fixed mask; this gives the better results.

    Example::

        >>> import torch
        >>> from lightning_deepr import FixedRandom, sparsify
        >>> net = sparsify(torch.nn.Linear(100, 10), 0.05)
        >>> rewiring = FixedRandom().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    """

    signs: str | Dale | dict[str, str | Dale] = "fixed"
    sign_words = ("fixed", "free", "place")
    rewire_until = 0
    without_turnover = "It has no L1 and no rebirths: leave l1 out."

    @override
    def begin(self, tensors: Sequence[TrackedTensor]) -> None:
        if self.signs != "free":
            guards.warn_of_free_signs(type(self).__name__, tensors, "they become 0")

    @override
    def after_step(self, stepped: Sequence[Stepped], optimizer: Optimizer) -> None:
        bound = [item.theta for item in stepped if not self.has_free_signs(item)]
        if bound:
            rewiring.keep_active(bound)

    @override
    def check(self, item: Stepped, optimizer: Optimizer) -> None:
        invariants.check_invariants(item, signed=self.has_free_signs(item))
