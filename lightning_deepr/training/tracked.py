"""The records that a step works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_deepr.algorithm.statistics import Turnover
from lightning_deepr.weights.find import Converted


@dataclass
class TrackedTensor:
    """A tensor at work: the converted weight and what the callback keeps about it."""

    converted: Converted
    turnover: Turnover
    alpha: Any = None  # l1's entry for it; None: by the optimizer
    temperature: Any = 0.0  # temperature's entry for it
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


class Reborn(NamedTuple):
    """What a step did to a tensor."""

    births: int
    newborns: int  # how many of the slots had been reborn in the rewiring before, too
    numbers: Tensor  # int64: the first ``births`` are the slots that were reborn; valid until the next step
    moved: int = 0  # how many more connections died than were born: they are born in other layers (scope="global")
    # births and newborns stay on the device: int64 [tensors, 2] and the row of this tensor; ``numbers`` is empty then
    pending: tuple[Tensor, int] | None = None

    @property
    def slots(self) -> Tensor:
        return self.numbers[: self.births]
