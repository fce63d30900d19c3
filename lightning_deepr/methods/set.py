"""Sparse evolutionary training: it drops by magnitude and grows at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from lightning_deepr.methods.drop_and_grow import DropAndGrow
from lightning_deepr.training.tracked import Stepped


@dataclass(kw_only=True, eq=False, repr=False)
class SET(DropAndGrow):
    """Sparse evolutionary training: drop the smallest weights, grow as many at random (Mocanu et al. 2018).

    These choices are ours: the smallest magnitudes are dropped (the paper drops the smallest positive and the largest negative
    weights), a grown connection starts at 0, and an update comes every ``rewire_every_n_steps`` steps (in the paper: each
    epoch) during the first three quarters of the training.

    Example::

        >>> import torch
        >>> from lightning_deepr import SET, sparsify
        >>> net = sparsify(torch.nn.Linear(100, 10), 0.05)
        >>> rewiring = SET().attach(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=1000)
    """

    @override
    def grow(self, items: Sequence[Stepped], weakest: Sequence[Tensor]) -> None:
        for item, slots in zip(items, weakest, strict=True):
            self.rebirth(item, slots)
