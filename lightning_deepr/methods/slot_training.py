"""The base of the methods that work on K slots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_deepr.algorithm import rewiring
from lightning_deepr.compute import check_compute
from lightning_deepr.conversion.convert import convert
from lightning_deepr.conversion.selection import Candidate
from lightning_deepr.conversion.start import start
from lightning_deepr.training import backends
from lightning_deepr.training.arguments import ScaledArguments
from lightning_deepr.training.callback import SparseTraining
from lightning_deepr.training.tracked import Stepped
from lightning_deepr.weights.find import Converted
from lightning_deepr.weights.k_slots import KSlots


@dataclass(kw_only=True, eq=False, repr=False)
class SlotTraining(ScaledArguments, SparseTraining):
    """Base of the methods that work on K slots: exactly K connections at every step, and no tensor larger than K.

    A method overrides :meth:`after_step` and calls :meth:`rebirth` for the slots whose connections it drops.

    Args:
        compute: "auto" | "dense" | "sparse"; see :func:`lightning_deepr.sparsify`.
    """

    compute: str = "auto"

    def __post_init__(self) -> None:
        check_compute(self.compute)
        super().__post_init__()

    def rebirth(self, item: Stepped, slots: Tensor, places: Tensor | None = None) -> None:
        """Drop the connections of some slots and give these slots new places.

        theta becomes 0 and the sign becomes the sign of the new place. The births, the orders of sparse compute, the averages
        and the optimizer's state (its starting values) are updated. Call it at most once per tensor and step.

        Args:
            item: the tensor.
            slots: the slots to drop, int64 [R], all different.
            places: the places of the new connections (flat indices into the weight), int64 [R], all different, and not the
                place of any other slot. None: uniform draws from all dormant places, including those of ``slots``, as in DEEP
                R.
        """
        if slots.numel() == 0:
            return
        if places is None:
            (places,) = rewiring.new_places([item.tensor.slots], [slots], self.seed, item.tensor.step)
        backends.rebirth(item, slots, places, self.newborn_since(item.tensor.step))

    def first_places(self, candidate: Candidate, count: int, index: int) -> Tensor | None:
        """Choose the places where a tensor's connections start.

        Args:
            candidate: the weight.
            count: K, the number of connections.
            index: the tensor's number; with ``seed`` it makes a random choice repeatable.

        Returns:
            the places, int64 [K], all different. None: ``init`` decides (uniformly at random, or the largest weights).
        """
        return None

    @override
    def convert(self, module: nn.Module, new: list[Candidate], counts: Mapping[str, int]) -> list[Converted]:
        def begin(candidate: Candidate, count: int, index: int, **options: Any) -> tuple[Tensor, KSlots]:
            places = self.first_places(candidate, count, index)
            if places is not None:
                places = places.to(options["device"])
            return start(candidate, count, index, places=places, **options)

        return convert(module, new, counts, init=self.init, seed=self.seed, compute=self.compute, begin=begin)

    @override
    def check_kind(self, name: str, slots: Any) -> None:
        if not isinstance(slots, KSlots):
            raise ValueError(
                f"`{name}` has a theta for every potential connection ({type(slots).__name__}): {type(self).__name__} expects "
                "K slots. Call densify(module) and convert it again."
            )
        if slots.shares and self.scope != "global":
            instead = 'Give scope="global", or call' if hasattr(self, "reactivation") else "Call"
            raise ValueError(
                f'`{name}` shares one K with other layers (scope="global"), but {type(self).__name__} works with K per tensor '
                f'(scope="layer"). {instead} densify(module) and convert it again.'
            )
