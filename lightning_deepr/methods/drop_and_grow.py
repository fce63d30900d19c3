"""The base of the methods that periodically drop the weakest connections and grow as many elsewhere."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr.algorithm import rewiring
from lightning_deepr.algorithm.signs import Dale
from lightning_deepr.methods.slot_training import SlotTraining
from lightning_deepr.training import invariants
from lightning_deepr.training.arguments import check_count, check_until
from lightning_deepr.training.tracked import Stepped


@dataclass(kw_only=True, eq=False, repr=False)
class DropAndGrow(SlotTraining):
    """Base of the methods that periodically drop the weakest connections and grow as many elsewhere.

    Signs are free by default: theta may be negative, and |theta| is a connection's strength. A grown connection starts at 0,
    with the optimizer's starting state. There is no L1 and no noise.

    Args:
        drop_fraction: the fraction of each tensor's K connections that an update drops, in [0, 1).
        rewire_every_n_steps: the number of steps between updates.
        rewire_until: a step (int) or a fraction of the training (float). Then the connectivity is frozen.
        signs: "free" | "place" | Dale(excitatory) | a tensor of signs | dict {pattern: one of the last three}. Unless they are
            free, theta < 0 becomes 0 after each step, as in DEEP R without rewiring.
    """

    signs: str | Dale | dict[str, str | Dale] = "free"
    sign_words = ("free", "place")

    drop_fraction: float = 0.3
    rewire_every_n_steps: int = 100
    rewire_until: int | float | None = 0.75
    without_turnover = "It has no L1: drop_fraction says how many are reborn. Leave l1 out."

    def __post_init__(self) -> None:
        if isinstance(self.drop_fraction, bool) or not isinstance(self.drop_fraction, (int, float)):
            raise TypeError(f"drop_fraction: expected a float in [0, 1), found {self.drop_fraction!r}.")
        if not 0 <= self.drop_fraction < 1:
            raise ValueError(f"drop_fraction: expected a fraction in [0, 1), found {self.drop_fraction}.")
        check_count("rewire_every_n_steps", self.rewire_every_n_steps)
        check_until(self.rewire_until)
        super().__post_init__()

    def fraction(self, item: Stepped) -> float:
        """Return the fraction of a tensor's connections that this update drops."""
        return self.drop_fraction

    def can_update(self, item: Stepped) -> bool:
        """Whether a tensor takes part in this update."""
        return True

    @abstractmethod
    def grow(self, items: Sequence[Stepped], weakest: Sequence[Tensor]) -> None:
        """Call :meth:`rebirth` for each tensor.

        Args:
            items: the tensors of this update.
            weakest: the slots to drop, int64 and ascending, for each tensor.
        """

    @override
    def newborn_since(self, step: int) -> int:
        return max(super().newborn_since(step), 0)  # the connections of the start are no newborns

    @override
    def after_step(self, stepped: Sequence[Stepped], optimizer: Optimizer) -> None:
        bound = [item.theta for item in stepped if not self.has_free_signs(item)]
        if bound:
            rewiring.keep_active(bound)
        updated = [item for item in stepped if item.rewires and self.can_update(item)]
        if updated:
            self.grow(updated, [self._weakest(item) for item in updated])

    def _weakest(self, item: Stepped) -> Tensor:
        count = min(round(self.fraction(item) * item.theta.numel()), item.tensor.slots.total - 1)
        return item.theta.abs().topk(count, largest=False, sorted=False).indices.sort().values

    @override
    def check(self, item: Stepped, optimizer: Optimizer) -> None:
        invariants.check_invariants(item, signed=self.has_free_signs(item))
