"""The records that a step works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from lightning_deepr.algorithm.statistics import Turnover
from lightning_deepr.weights.find import Converted

if TYPE_CHECKING:
    from collections.abc import Callable

State = tuple[Tensor, float]  # a state tensor of theta's shape, and what the optimizer starts it with


@dataclass
class TrackedTensor:
    """A tensor at work: the converted weight and what the callback keeps about it."""

    converted: Converted
    turnover: Turnover
    alpha: Any = None  # l1's entry for it; None: by the optimizer
    temperature: Any = 0.0  # temperature's entry for it
    lr_scale: Any = 1.0  # lr_scale's entry for it
    scale: float | None = None  # what its steps are multiplied by; None: not known before an optimizer is
    step: int = 0  # optimizer steps that it took part in
    start: int = 0  # ... at which the present training began

    @property
    def name(self) -> str:
        return self.converted.name

    @property
    def slots(self) -> Any:
        return self.converted.slots

    @property
    def theta(self) -> nn.Parameter:
        return self.converted.theta

    @property
    def done(self) -> int:
        """Steps of the present training."""
        return self.step - self.start


class Reborn(NamedTuple):
    """What a step did to a tensor."""

    births: int
    newborns: int  # how many of the slots had been reborn in the rewiring before, too
    numbers: Tensor | None = None  # int64: the first ``births`` are the slots that were reborn; valid until the next step
    moved: int = 0  # how many more connections died than were born: they are born in other layers (scope="global")
    # births and newborns stay on the device: int64 [tensors, 2] and the row of this tensor; ``numbers`` is None then
    pending: tuple[Tensor, int] | None = None

    @property
    def slots(self) -> Tensor | None:
        return None if self.numbers is None else self.numbers[: self.births]


NOTHING = Reborn(0, 0)


@dataclass(slots=True)
class Stepped:
    """A tensor that has just taken an optimizer step, with what holds in this step."""

    tensor: TrackedTensor
    theta: Tensor  # detached: written in place
    group_index: int
    lr: Any
    alpha: Any
    temperature: Any
    rewires: bool  # False: theta < 0 is set to 0
    states_of: Callable[[Stepped], list[State]]
    reborn: Reborn = NOTHING  # written by the algorithm

    @property
    def slots(self) -> Any:
        return self.tensor.slots

    @property
    def step(self) -> int:
        return self.tensor.step

    def states(self) -> list[State]:
        """Every state tensor of the optimizer that has theta's shape, with its starting value."""
        return self.states_of(self)
