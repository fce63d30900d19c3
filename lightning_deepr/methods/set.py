"""What DEEP R is compared with, on the same K slots: fixed random connectivity, and SET.

They are here so that a comparison runs through one code path; none of them is recommended over :class:`~lightning_deepr.DeepR`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from lightning_deepr.algorithm import rewiring
from lightning_deepr.methods.drop_and_grow import DropAndGrow
from lightning_deepr.training.tracked import Stepped


class SET(DropAndGrow):
    """Sparse evolutionary training: drops the smallest weights, grows as many at random (Mocanu et al. 2018).

    Our choices: the smallest magnitudes go (the paper takes the smallest positive and the largest negative ones), a grown
    connection starts at 0, and an update comes every ``rewire_every_n_steps`` steps (the paper: each epoch), until three quarters
    of the training are over.

    Example::

        >>> import torch
        >>> from lightning_deepr import SET, sparsify
        >>> net = sparsify(torch.nn.Linear(100, 10), 0.05)
        >>> rewiring = SET().attach(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=1000)
    """

    @override
    def grow(self, items: Sequence[Stepped], weakest: Sequence[Tensor]) -> list[Tensor]:
        for step in {item.tensor.step for item in items}:
            mine = [(item, slots) for item, slots in zip(items, weakest, strict=True) if item.tensor.step == step]
            thetas, tensors = [item.theta for item, _ in mine], [item.tensor.slots for item, _ in mine]
            rewiring.reactivate(thetas, tensors, [slots for _, slots in mine], self.seed, step)
        return list(weakest)
