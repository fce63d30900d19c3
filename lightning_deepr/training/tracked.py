"""The records that one training step reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from lightning_deepr.algorithm.newborns import State
from lightning_deepr.algorithm.statistics import Turnover
from lightning_deepr.algorithm.steering import Steering
from lightning_deepr.weights.base import Parametrization
from lightning_deepr.weights.find import Converted
from lightning_deepr.weights.k_slots import KSlots

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass
class TrackedTensor:
    """A converted weight and the callback's records of it."""

    converted: Converted
    turnover: Turnover
    alpha: Any = None  # this tensor's value of l1; None: the optimizer decides
    temperature: Any = 0.0  # this tensor's value of temperature
    lr_scale: Any = 1.0  # this tensor's value of lr_scale
    scale: float | None = None  # the factor of this tensor's steps; None: not known before there is an optimizer
    step: int = 0  # number of optimizer steps that the tensor has taken
    start: int = 0  # value of ``step`` at which the present training began
    missed: int = 0  # steps of the present training that it took no part in: it was frozen, or had no gradient
    last_alpha: Any = None  # alpha of the last step; None: there was none yet
    steering: Steering | None = None  # of alpha, if ``alpha`` is a target; layers that share a theta may share it

    @property
    def name(self) -> str:
        return self.converted.name

    @property
    def weight(self) -> Parametrization:
        """What the weight was converted into."""
        return self.converted.slots

    @property
    def slots(self) -> KSlots:
        """The same, for a method on K slots: ``check_kind`` has seen to it."""
        return self.converted.slots  # type: ignore[return-value]

    @property
    def theta(self) -> nn.Parameter:
        return self.converted.theta

    @property
    def done(self) -> int:
        """Number of steps of the present training."""
        return self.step - self.start

    @property
    def elapsed(self) -> int:
        """Number of steps of the present training so far, also of those that the tensor took no part in."""
        return self.step - self.start + self.missed

    @property
    def is_steered(self) -> bool:
        """Whether alpha follows the turnover."""
        return self.steering is not None and not self.steering.rests

    def note_steered_alpha(self) -> None:
        """Record the target and the present alpha, for the report and for files."""
        assert self.steering is not None
        alpha = self.steering.alpha
        self.slots.l1_taken = "turnover" if alpha is None else f"turnover {alpha:.4g}"
        self.slots.l1_rule = repr(self.steering.target) if alpha is None else f"{self.steering.target!r} at {alpha!r}"


class Reborn(NamedTuple):
    """The slots of a tensor that a step rewired."""

    births: int
    newborns: int  # how many of these slots were also reborn in the previous rewiring
    numbers: Tensor | None = None  # int64: the first ``births`` entries are the reborn slots; valid until the next step
    moved: int = 0  # deaths minus births: these connections are born in other layers (scope="global")
    # counts that are still on the device: int64 [tensors, 2] and this tensor's row. Then ``numbers`` is None.
    pending: tuple[Tensor, int] | None = None

    @property
    def slots(self) -> Tensor | None:
        return None if self.numbers is None else self.numbers[: self.births]


NOTHING = Reborn(0, 0)


@dataclass(slots=True)
class Stepped:
    """A tensor that has just taken an optimizer step, with the values of this step."""

    tensor: TrackedTensor
    parameter: nn.Parameter  # theta, of all layers that share it
    theta: Tensor  # the tensor's own part, detached; methods write to it in place
    group_index: int
    lr: Any
    alpha: Any
    temperature: Any
    rewires: bool  # False: theta < 0 is set to 0
    states_of: Callable[[Stepped], list[State]]
    reborn: Reborn = NOTHING  # the algorithm writes this

    @property
    def slots(self) -> KSlots:
        return self.tensor.slots

    @property
    def step(self) -> int:
        return self.tensor.step

    def states(self) -> list[State]:
        """List every state tensor of the optimizer that has theta's shape, with what a newborn gets there."""
        return self.states_of(self)
