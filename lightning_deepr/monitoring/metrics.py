"""What rewiring does to a network, as metrics of torchmetrics, for training loops and modules of one's own.

Each metric looks at a network when it is updated, and keeps none of its tensors. ``self.log(name, metric)`` of a
LightningModule, ``MetricCollection`` and ``MetricTracker`` take them like any other metric. All ranks of a training hold the
same network, so that every rank computes the same value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_deepr.monitoring.dead_units import dead_units
from lightning_deepr.weights.find import converted_tensors

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError("lightning_deepr.monitoring.metrics needs torchmetrics: `pip install torchmetrics`.") from error


def places_of(network: nn.Module) -> dict[str, Tensor]:
    """Return the places of the connections of each converted tensor, ascending: {name: int64 [K] on the CPU}.

    Raises:
        ValueError: the network has no converted tensor.
    """
    found = {one.name: one.slots.active(one.theta)[0].cpu().sort().values for one in converted_tensors(network)}
    if not found:
        raise ValueError(
            f"Expected a network with converted tensors (sparsify, DeepR, load_sparse), found {type(network).__name__} "
            "without one."
        )
    return found


def _common(places: dict[str, Tensor], others: dict[str, Tensor]) -> int:
    """Count the places that both have, tensor by tensor."""
    if places.keys() != others.keys():
        differing = sorted(places.keys() ^ others.keys())
        raise ValueError(
            f"Expected the tensors of the network before, found others: {', '.join(differing[:4])} in one of both."
        )
    return sum(int(torch.isin(found, others[name], assume_unique=True).sum()) for name, found in places.items())


class _OfNetwork(Metric):
    """A share of something: two sums that are added up over updates and ranks."""

    full_state_update = False
    is_differentiable = False
    part: Tensor
    whole: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("part", "whole"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def compute(self) -> Tensor:
        """Return the share, a float; NaN if there was nothing to compare yet."""
        return self.part.double() / self.whole.double()


class ConnectionTurnover(_OfNetwork):
    """The share of connections that are at a place without one at the update before: the mean over the updates since a reset.

    Per step (``update`` after every optimizer step) it is the turnover of Algorithm 1: reborn connections over K, but for a
    slot that was reborn at its old place.

    Args:
        options: those of ``torchmetrics.Metric``.

    Example::

        >>> import torch
        >>> from lightning_deepr import DeepR, sparsify
        >>> from lightning_deepr.monitoring.metrics import ConnectionTurnover
        >>> net = sparsify(nn.Linear(100, 10), 0.05, seed=0)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> rewiring, turnover = DeepR(l1=0.05).attach(net, optimizer), ConnectionTurnover()
        >>> for _ in range(3):
        ...     turnover.update(net)
        ...     optimizer.zero_grad()
        ...     net(torch.ones(4, 100)).square().sum().backward()
        ...     optimizer.step()
        >>> 0 < float(turnover.compute()) < 1
        True
    """

    higher_is_better = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._last: dict[str, Tensor] | None = None

    def update(self, network: nn.Module) -> None:
        """Compare the connections with those of the last update.

        Raises:
            ValueError: there is no converted tensor, or another network was given before.
        """
        now = places_of(network)
        if self._last is not None:
            count = sum(places.numel() for places in now.values())
            self.part += count - _common(now, self._last)
            self.whole += count
        self._last = now


class ConnectionOverlap(_OfNetwork):
    """The share of the present connections whose places have a connection in a reference: the mean over the updates.

    Two independent connectivities of density p overlap by p. A topology that training keeps overlaps more.

    Args:
        reference: a converted network; its connections of now are kept. None: those of the first update.
        options: those of ``torchmetrics.Metric``.

    Raises:
        ValueError: the reference has no converted tensor.

    Example::

        >>> from lightning_deepr import sparsify
        >>> from lightning_deepr.monitoring.metrics import ConnectionOverlap
        >>> one, other = (sparsify(nn.Linear(100, 100), 0.1, seed=seed) for seed in (0, 1))
        >>> overlap = ConnectionOverlap(one)
        >>> float(overlap(one)), 0 < float(overlap(other)) < 0.2
        (1.0, True)
    """

    higher_is_better = None

    def __init__(self, reference: nn.Module | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._reference = None if reference is None else places_of(reference)

    def update(self, network: nn.Module) -> None:
        """Compare the connections with those of the reference.

        Raises:
            ValueError: there is no converted tensor, or the reference has other tensors.
        """
        now = places_of(network)
        if self._reference is None:
            self._reference = now
        self.part += _common(now, self._reference)
        self.whole += sum(places.numel() for places in now.values())


class DeadUnitShare(_OfNetwork):
    """The share of units on no path from an input to an output (:func:`lightning_deepr.dead_units`): the mean over the updates.

    Args:
        options: those of ``torchmetrics.Metric``.

    Example::

        >>> from lightning_deepr import sparsify
        >>> from lightning_deepr.monitoring.metrics import DeadUnitShare
        >>> net = sparsify(nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10)), 0.002, seed=0)
        >>> share = DeadUnitShare()
        >>> 0 < float(share(net)) < 1
        True
    """

    higher_is_better = False

    def update(self, network: nn.Module) -> None:
        """Count the units of a network."""
        total = dead_units(network).total
        self.part += total["dead"]
        self.whole += total["units"]
