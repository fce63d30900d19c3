"""RigL: growth where the dense gradient is largest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_deepr.methods.gradient_growth import GradientGrowth
from lightning_deepr.training.tracked import Stepped


@dataclass(kw_only=True, eq=False, repr=False)
class RigL(GradientGrowth):
    """RigL: drop the smallest weights, grow where the dense gradient is largest (Evci et al. 2020, "Rigging the lottery").

    The dropped fraction falls as a cosine from ``drop_fraction`` to 0 at ``rewire_until`` (None: at the end of the training; if
    its length is unknown, the fraction is constant). In a step that rewires, the layers compute with dense weights, and the
    gradients of these weights are kept until the step is over. Everything else has size K. The gradients of several
    ranks are summed. RigL does not work under ``torch.compile``.

    Args:
        distribution: the distribution of the connections; "erk" is the choice of the RigL paper.

    Raises:
        RuntimeError: no gradient of a dense weight was seen in an update.

    Example::

        >>> import torch
        >>> from lightning_deepr import RigL, sparsify
        >>> net = sparsify(torch.nn.Linear(100, 10), 0.05)
        >>> rewiring = RigL().attach(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=1000)
    """

    log_name = "rigl"

    @override
    def fraction(self, item: Stepped) -> float:
        until = self.rewire_until
        end = self.total_steps if until is None else until * (self.total_steps or 0.0) if isinstance(until, float) else until
        done = item.tensor.elapsed
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * min(done / end, 1.0))) if end else self.drop_fraction

    @override
    def grow(self, items: Sequence[Stepped], weakest: Sequence[Tensor]) -> None:
        for item, dropped in zip(items, weakest, strict=True):
            gradient = self.gradient_of(item)
            if self.has_free_signs(item):
                self.regrow(item, dropped, gradient.abs_())
                continue
            # with constant signs only a gradient that makes theta positive helps
            slots = item.tensor.slots
            signs = slots.signs_at(torch.arange(slots.total, device=gradient.device), gradient.dtype)
            self.regrow(item, dropped, gradient.neg_().mul_(signs.view_as(gradient)).clamp_(min=0))
