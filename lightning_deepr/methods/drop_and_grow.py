"""The base of the methods that drop the weakest connections now and then, and grow as many elsewhere."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr.training import invariants
from lightning_deepr.training.callback import SparseTraining
from lightning_deepr.training.tracked import Reborn, Stepped
from lightning_deepr.weights.averages import restart_averages


def nothing_reborn(theta: Tensor) -> Reborn:
    """A step that left a tensor's connections where they are."""
    return Reborn(0, 0, theta.new_empty(0, dtype=torch.long))


class DropAndGrow(SparseTraining):
    """Base of the methods that now and then drop the weakest connections and grow as many elsewhere.

    Signs are free: theta may be negative, and |theta| is a connection's strength. A grown connection starts at 0, with the
    optimizer's starting state. Without L1 and noise.

    Args:
        drop_fraction: of the K connections of each tensor, at an update; in [0, 1).
        rewire_every_n_steps: steps between updates.
        rewire_until: a step (int) or a fraction of the training (float), then the connectivity is frozen.
        connectivity, target_modules, exclude_modules, distribution, init, seed, compute, check_invariants, log_every_n_steps: as
            for :class:`~lightning_deepr.DeepR`.
    """

    def __init__(
        self,
        connectivity: int | float | dict[str, int | float] | None = None,
        *,
        drop_fraction: float = 0.3,
        rewire_every_n_steps: int = 100,
        rewire_until: int | float | None = 0.75,
        target_modules: str | list[str] | Callable = "all",
        exclude_modules: str | Iterable[str] | Callable = (),
        distribution: str | Callable = "erdos_renyi",
        init: str = "module",
        seed: int = 0,
        compute: str = "auto",
        check_invariants: bool = False,
        log_every_n_steps: int = 50,
    ) -> None:
        if isinstance(drop_fraction, bool) or not isinstance(drop_fraction, (int, float)):
            raise TypeError(f"drop_fraction: expected a float in [0, 1), found {drop_fraction!r}.")
        if not 0 <= drop_fraction < 1:
            raise ValueError(f"drop_fraction: expected a fraction in [0, 1), found {drop_fraction}.")
        super().__init__(
            connectivity,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            distribution=distribution,
            l1=0.0,
            init=init,
            rewire_every_n_steps=rewire_every_n_steps,
            rewire_until=rewire_until,
            seed=seed,
            compute=compute,
            check_invariants=check_invariants,
            log_every_n_steps=log_every_n_steps,
        )
        self.drop_fraction = drop_fraction

    def fraction(self, item: Stepped) -> float:
        """Which fraction of a tensor's connections this update drops."""
        return self.drop_fraction

    def can_update(self, item: Stepped) -> bool:
        """Whether a tensor's connectivity is updated in this step, in which it is its turn."""
        return True

    @abstractmethod
    def grow(self, items: Sequence[Stepped], weakest: Sequence[Tensor]) -> list[Tensor]:
        """Give slots new places (theta 0, sign and birth follow).

        Args:
            items: the tensors of this update.
            weakest: int64 for each, ascending: the slots that are dropped.

        Returns:
            for each the slots that were reborn.
        """

    @override
    def after_step(self, stepped: Sequence[Stepped], optimizer: Optimizer) -> list[Reborn]:
        updated = [item for item in stepped if item.rewires and self.can_update(item)]
        if not updated:
            return [nothing_reborn(item.theta) for item in stepped]
        weakest = []
        for item in updated:
            count = min(round(self.fraction(item) * item.theta.numel()), item.tensor.slots.total - 1)
            weakest.append(item.theta.abs().topk(count, largest=False, sorted=False).indices.sort().values)
        births = [item.tensor.slots.born.clone() for item in updated]
        reborn: dict[int, Reborn] = {}
        for item, slots, born in zip(updated, self.grow(updated, weakest), births, strict=True):
            newborns = int((born[slots] >= max(item.tensor.step - self.rewire_every_n_steps, 0)).sum())
            reborn[id(item)] = Reborn(slots.numel(), newborns, slots)
            if slots.numel():
                item.tensor.slots.places_changed()
                self._starting_state.reset(optimizer, item.group_index, item.tensor.theta, slots)
                if item.tensor.slots.averages:
                    restart_averages(item.tensor.slots, slots)
        return [reborn[id(item)] if id(item) in reborn else nothing_reborn(item.theta) for item in stepped]

    @override
    def check(self, item: Stepped, born: Reborn, optimizer: Optimizer) -> None:
        invariants.check_invariants(item.tensor, item, born.slots, optimizer, self._starting_state, signed=True)
