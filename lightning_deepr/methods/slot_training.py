"""The base of the methods that work on K slots."""

# no `from __future__ import annotations`: see training/arguments.py

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from typing_extensions import override

from lightning_deepr.algorithm import newborns, rewiring
from lightning_deepr.algorithm.signs import Dale
from lightning_deepr.algorithm.signs import check as check_signs
from lightning_deepr.compute import check_compute
from lightning_deepr.conversion import adapting
from lightning_deepr.conversion.convert import convert
from lightning_deepr.conversion.restrictions import part
from lightning_deepr.conversion.selection import Candidate
from lightning_deepr.conversion.start import start
from lightning_deepr.training import backends
from lightning_deepr.training.arguments import ScaledArguments, check_word
from lightning_deepr.training.callback import SparseTraining
from lightning_deepr.training.tracked import Stepped
from lightning_deepr.weights.find import Converted
from lightning_deepr.weights.k_slots import KSlots


@dataclass(kw_only=True, eq=False, repr=False)
class SlotTraining(ScaledArguments, SparseTraining):
    """Base of the methods that work on K slots: exactly K connections at every step, and no tensor larger than K.

    A method overrides :meth:`after_step` and calls :meth:`rebirth` for the slots whose connections it drops.

    Args:
        compute: "auto" | "dense" | "sparse" | "tune"; see :func:`lightning_deepr.sparsify`.
        signs: the constant signs of the places: "place" (a hash of the place) | Dale(excitatory): one sign for each input
            unit | a tensor of signs | dict {pattern: one of these}.
        newborn: a reborn slot's state in the optimizer: "start" | "neutral". "start": what the optimizer starts with. Under
            one that normalizes its gradients (Adam's family, RMSprop) a newborn's first step is then several times the
            learning rate. "neutral": a state that behaves like a second moment starts at the mean over the living slots of its
            tensor, all other states as under "start". A probe of the optimizer finds these states.
        of: "weight" | "difference". "difference": the weights stay as they are, frozen, and the connections are a difference to
            them that starts at 0: a sparse adapter of a pretrained network. Everything else is frozen, too.
        trainable: what is trained beside the difference: "biases" | "norms" | names of layers or tensors, as a list.
    """

    compute: str = "auto"
    signs: str | Dale | dict[str, str | Dale] = "place"
    sign_words: ClassVar[tuple[str, ...]] = ("place",)
    lr_scale: float | dict[str, float | str] | str = "auto"
    newborn: str = "neutral"
    of: str = "weight"
    trainable: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_compute(self.compute)
        check_signs(self.signs, words=self.sign_words)
        adapting.check_of(self.of, self.init)
        adapting.check_trainable(self.trainable, self.of)
        check_word("newborn", self.newborn, newborns.WORDS)
        super().__post_init__()

    def rebirth(self, item: Stepped, slots: Tensor, places: Tensor | None = None) -> None:
        """Drop the connections of some slots and give these slots new places.

        theta becomes 0 and the sign becomes the sign of the new place. The births, the orders of sparse compute, the averages
        and the optimizer's state (as ``newborn`` says) are updated. Call it at most once per tensor and step.

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
            (places,) = rewiring.new_places([item.tensor.slots], [slots], cast("int", self.seed), item.tensor.step)
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
        names = {candidate.name for candidate in new}
        upon = names if self.of == "difference" else ()
        begin_with: Any = adapting.difference_start if upon else start

        def begin(candidate: Candidate, count: int, index: int, **options: Any) -> tuple[Tensor, KSlots]:
            places = None if "given" in options else self.first_places(candidate, count, index)
            if places is not None:
                places = places.to(options["device"])
            return begin_with(candidate, count, index, places=places, **options)

        return convert(
            module,
            new,
            counts,
            init=self.init,
            seed=cast("int", self.seed),
            compute=self.compute,
            begin=begin,
            upon=upon,
            given=getattr(counts, "given", None),
            restriction=part(self.candidates, new, names),
            signs=part(self.signs, new, names),
        )

    def has_free_signs(self, item: Stepped) -> bool:
        """Whether theta of a tensor may be negative. Signs of a table (Dale's law) are kept under every method."""
        return self.signs == "free" and item.tensor.slots.sign_table is None

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
