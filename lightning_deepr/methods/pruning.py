"""Two methods that start dense and end sparse, for comparison.

The paper compares DEEP R with both: pruning with retraining (Han, Pool, Tran and Dally, "Learning both weights and connections
for efficient neural networks", NeurIPS 2015) and l1-shrinkage (Collins and Kohli, "Memory bounded deep convolutional
networks", arXiv:1412.1442, 2014). The paper does not say how it set them up; the docstrings mark our own choices.
Signs are free, and the network is dense while it trains: the mask saves neither memory nor time.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr.conversion import restrictions
from lightning_deepr.conversion.selection import Candidate
from lightning_deepr.methods.dense_training import DenseTraining
from lightning_deepr.training import invariants
from lightning_deepr.training.arguments import check_count, check_fraction, check_word
from lightning_deepr.training.schedules import LinearDecay, check_l1
from lightning_deepr.training.statistics import connectivity_of
from lightning_deepr.training.tracked import Stepped, TrackedTensor
from lightning_deepr.weights.dense_theta import MaskedTheta
from lightning_deepr.weights.find import Converted

THRESHOLDS = ("layer", "network")


class _Masking(DenseTraining):
    """Base of both methods: a weight with a mask that only loses connections."""

    kind = MaskedTheta

    @override
    def after_step(self, stepped: Sequence[Stepped], optimizer: Optimizer) -> None:
        self.act(stepped)
        for item in stepped:
            slots = _masked(item)
            if slots.fixed or slots.allowed is not None:  # neither momentum nor weight decay may bring a connection back
                item.theta.masked_fill_(~slots.mask, 0.0)
            slots.steps = item.tensor.step + 1
            if slots.averages:
                slots.align_averages()

    @abstractmethod
    def act(self, stepped: Sequence[Stepped]) -> None:
        """Prune or shrink the tensors that took a step."""

    def step_at(self, fraction: float) -> int:
        """Return the step, counted from 1, that ends this fraction of the training."""
        assert self.total_steps is not None
        return max(1, round(fraction * self.total_steps))

    def needs_length(self) -> str:
        """Name the arguments that depend on the length of the training, followed by "is"; empty if there are none."""
        return ""

    @override
    def _check_schedules(self, what_to_do: str) -> None:
        super()._check_schedules(what_to_do)
        needs = self.needs_length()
        if needs and self.total_steps is None:
            raise ValueError(
                f"{needs} a fraction of the training, but its length is not known: expected a number of steps, found none. "
                f"{what_to_do}"
            )

    @override
    def _of_network(self) -> dict[str, float]:
        found = super()._of_network()
        found.pop("turnover", None)  # nothing is reborn
        return found | {"connectivity": connectivity_of(self.tracked)}

    @override
    def _of_tensors(self) -> dict[str, float]:
        for tensor in self.tracked:
            tensor.turnover.take()
        return {f"{t.name}/connectivity": t.slots.count / t.slots.total for t in self.tracked}

    @override
    def check(self, item: Stepped, optimizer: Optimizer) -> None:
        slots, theta = _masked(item), item.theta
        require = invariants.requirement(item.tensor)
        require(theta.shape == slots.shape, f"expected theta of shape {tuple(slots.shape)}, found {tuple(theta.shape)}")
        require(bool(torch.isfinite(theta).all()), "theta is not finite")
        unmasked = bool(slots.mask.all()) or slots.allowed is not None
        require(slots.fixed or unmasked, "connections are masked, but the mask is not fixed")
        require(not theta[~slots.mask].any(), "a connection outside the mask has a weight")


@dataclass(kw_only=True, eq=False, repr=False)
class MagnitudePruning(_Masking):
    """Pruning with retraining (Han et al. 2015): train a dense network, remove the smallest weights, and train the rest.

    This method exists for comparison. A step before the first pruning is a step of dense training. Memory and time are those of
    the dense network throughout.

    These choices are ours: an exact number of connections instead of a threshold in standard deviations per layer; several
    prunings within one training instead of several trainings, with the geometric densities p^(1/n), p^(2/n), ... p; a pruning
    changes neither the optimizer's state nor the learning rate.

    Args:
        connectivity: the connections that remain in the end: float in (0, 1] | int | dict {pattern: float | int}; None: the
            network is converted already.
        prune_from: the fraction of the training before the first pruning.
        prune_until: the fraction of the training before the last pruning, which leaves exactly K connections. Then retraining
            begins.
        prunings: the number of prunings, evenly spaced; 1 if ``prune_from`` equals ``prune_until``.
        threshold: "layer": K per tensor, by ``distribution``. "network": one threshold for all tensors; each tensor keeps at
            least its largest weight.
        init: "module" and "largest": the module's own dense weight | "deepr": |N(0, 1)| / sqrt(fan-in) with random signs.
        seed: the seed of ``init="deepr"``, and of the signs in :func:`lightning_deepr.save_sparse`.

    Raises:
        TypeError, ValueError: an argument is invalid, it does not fit the model, or ``attach`` in a plain loop has no
            ``total_steps``.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_deepr import MagnitudePruning
        >>> pruning = MagnitudePruning(0.05, prune_from=0.5, prune_until=0.5, prunings=1)
        >>> trainer = Trainer(callbacks=[pruning], logger=False, enable_checkpointing=False)
    """

    prune_from: float = 0.3
    prune_until: float = 0.6
    prunings: int = 4
    threshold: str = "layer"
    _catches_up = False

    def __post_init__(self) -> None:
        super().__post_init__()
        prune_from, prune_until, prunings = self.prune_from, self.prune_until, self.prunings
        check_fraction("prune_from", prune_from)
        check_fraction("prune_until", prune_until)
        if prune_from > prune_until:
            raise ValueError(f"prune_until: expected at least prune_from = {prune_from}, found {prune_until}.")
        check_count("prunings", prunings)
        if prunings == 1 and prune_from != prune_until:
            raise ValueError(
                f"prunings: expected at least 2 between prune_from = {prune_from} and prune_until = {prune_until}, found 1. "
                "Give equal fractions for one pruning."
            )
        check_word("threshold", self.threshold, THRESHOLDS)
        self.prunings = 1 if prune_from == prune_until else prunings

    @override
    def needs_length(self) -> str:
        return "prune_from and prune_until are each"

    def schedule(self) -> dict[int, float]:
        """Return {step, counted from 1: exponent e}. After that step K^e * N^(1 - e) connections remain."""
        each = (self.prune_until - self.prune_from) / max(self.prunings - 1, 1)
        return {self.step_at(self.prune_from + i * each): (i + 1) / self.prunings for i in range(self.prunings)}

    @override
    def begin(self, tensors: Sequence[TrackedTensor]) -> None:
        # In a training that goes on with fewer steps than it was to have, a pruning may lie in the past and not be done.
        self._catches_up = any(tensor.done for tensor in tensors)

    @override
    def act(self, stepped: Sequence[Stepped]) -> None:
        schedule = self.schedule()
        due = [(item, schedule.get(item.tensor.step - item.tensor.start + 1)) for item in stepped]
        if self._catches_up:
            self._catches_up = False
            due = [(item, max((e for s, e in schedule.items() if s <= item.tensor.done + 1), default=None)) for item in stepped]
        if all(exponent is None for _, exponent in due):
            return
        if self.threshold == "layer":
            for item, exponent in due:
                if exponent is not None:
                    _keep_largest([item], _left(_masked(item).wanted, _masked(item).total, exponent))
            return
        if len(stepped) != len(self.tracked) or len({exponent for _, exponent in due}) > 1:
            missing = [t.name for t in self.tracked if all(t is not item.tensor for item in stepped)]
            raise RuntimeError(
                'threshold="network" compares all tensors in one step of one optimizer: expected all of them, but '
                f'{", ".join(missing) or "some"} did not take part in as many steps. Use threshold="layer".'
            )
        wanted = sum(_masked(item).wanted for item in stepped)
        total = sum(_masked(item).total for item in stepped)
        _keep_largest(stepped, _left(wanted, total, due[0][1] or 1.0))

    @override
    def check(self, item: Stepped, optimizer: Optimizer) -> None:
        super().check(item, optimizer)
        slots, done = _masked(item), item.tensor.step - item.tensor.start + 1
        if self.threshold == "layer" and done >= max(self.schedule()):
            allowed = int(slots.mask.sum())
            if allowed != slots.wanted:
                raise RuntimeError(
                    f"check_invariants: `{item.tensor.name}`, step {item.tensor.step}: expected {slots.wanted} connections "
                    f"after the last pruning, found {allowed}."
                )


@dataclass(kw_only=True, eq=False, repr=False)
class L1Shrinkage(_Masking):
    """l1-shrinkage (Collins and Kohli 2014): after each step every weight moves towards 0 by eta * alpha, and stops at 0.

    w <- sign(w) * max(|w| - eta * alpha, 0), with the plain learning rate of the weight's parameter group. A weight at 0 still
    has a gradient and can become nonzero again. This method exists for comparison. Memory and time are those of the dense
    network throughout.

    Our own choice is how the method meets the wanted number of connections. At ``freeze_at`` it removes the smallest weights
    beyond K, keeps weights at 0 there, and trains the rest without l1. If fewer than K connections remain, it keeps them all.
    With ``connectivity=None`` it neither removes nor freezes connections: l1 alone determines the connectivity.

    Args:
        connectivity: float in (0, 1] | int | dict {pattern: float | int}; None: l1 alone determines the connectivity.
        l1: alpha, required; float | dict {pattern: float} | LinearDecay(start, end) | function of the progress.
        freeze_at: the fraction of the training after which the connectivity is fixed, if ``connectivity`` is given.
        init: "module" and "largest": the module's own dense weight | "deepr": |N(0, 1)| / sqrt(fan-in) with random signs.
        seed: the seed of ``init="deepr"``, and of the signs in :func:`lightning_deepr.save_sparse`.

    Raises:
        TypeError, ValueError: an argument is invalid, it does not fit the model, or ``attach`` in a plain loop has no
            ``total_steps``.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_deepr import L1Shrinkage
        >>> trainer = Trainer(callbacks=[L1Shrinkage(0.05, l1=1e-3)], logger=False, enable_checkpointing=False)
    """

    l1: float | LinearDecay | dict[str, float | LinearDecay] | Callable = field()  # required
    freeze_at: float = 0.7

    def __post_init__(self) -> None:
        if self.l1 is None:
            raise TypeError(
                "l1: expected a float, a dict, LinearDecay or a function of the progress, found None: shrinkage has no default."
            )
        check_l1(self.l1)
        super().__post_init__()
        check_fraction("freeze_at", self.freeze_at)
        self.freezes = self.connectivity is not None
        if self.connectivity is None:
            self.connectivity = 1.0

    @override
    def needs_length(self) -> str:
        return "freeze_at is" if self.freezes else ""

    @override
    def convert(self, module: nn.Module, new: list[Candidate], counts: Mapping[str, int]) -> list[Converted]:
        if not self.freezes:  # all that is allowed
            names = {candidate.name for candidate in new}
            allowed = restrictions.allowed_of(new, restrictions.part(self.candidates, new, names))
            counts = {name: min(count, allowed[name].count) if name in allowed else count for name, count in counts.items()}
        return super().convert(module, new, counts)

    @override
    def act(self, stepped: Sequence[Stepped]) -> None:
        for item in stepped:
            slots, theta = _masked(item), item.theta
            if slots.fixed:
                continue
            # w <- sign(w) * max(|w| - eta * alpha, 0)
            theta.copy_(F.softshrink(theta, float(item.lr * item.alpha)))
            if self.freezes and item.tensor.step - item.tensor.start + 1 >= self.step_at(self.freeze_at):
                slots.keep(theta != 0, theta)
                _keep_largest([item], slots.wanted)


def _masked(item: Stepped) -> MaskedTheta:
    found = item.tensor.weight
    assert isinstance(found, MaskedTheta)
    return found


def _left(wanted: int, total: int, exponent: float) -> int:
    """Return the number of connections that a pruning leaves."""
    return wanted if exponent == 1 else round(math.exp((1 - exponent) * math.log(total) + exponent * math.log(wanted)))


def _keep_largest(stepped: Sequence[Stepped], count: int) -> None:
    """Prune these tensors to their ``count`` largest weights together. Each tensor keeps at least its largest weight.

    If fewer than ``count`` weights remain, all of them stay.
    """
    masks = [_masked(item).mask for item in stepped]
    flat = torch.cat([item.theta.abs().masked_fill(~mask, -1.0).view(-1) for item, mask in zip(stepped, masks, strict=True)])
    first = 0
    for mask in masks:
        flat[first + flat[first : first + mask.numel()].argmax()] = math.inf
        first += mask.numel()
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(max(count, len(masks)), sorted=False).indices] = True
    parts: list[Tensor] = list(kept.split([mask.numel() for mask in masks]))
    for item, part in zip(stepped, parts, strict=True):
        _masked(item).keep(part.view(_masked(item).shape), item.theta)
