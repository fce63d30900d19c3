"""What belongs to one optimizer on which a callback is at work."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_deepr.algorithm.optimizer_state import StartingState
from lightning_deepr.training.scaled_steps import ScaledSteps
from lightning_deepr.training.tracked import State, Stepped, TrackedTensor


class Run:
    """A callback at work on one optimizer.

    Attributes:
        hooks: of the optimizer's steps, while they are registered.
        starting: what the optimizer's state starts with.
        tables: the kernels' tables, by their tensors. They hold addresses.
        scaled: what ``lr_scale`` has to do here; None: it has not been asked, or was forgotten.
        took_step: whether a step was really taken of which Fabric has not told yet (GradScaler may skip one).
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = weakref.ref(optimizer)  # an id is free again when its optimizer is gone: this tells
        self.hooks: list[Any] = []
        self.starting = StartingState()
        self.tables: dict[Any, Any] = {}
        self.scaled: ScaledSteps | None = None
        self.took_step = False
        self._size, self._matched = -1, list[tuple[TrackedTensor, int]]()

    @property
    def is_hooked(self) -> bool:
        return bool(self.hooks)

    def matched(self, optimizer: Optimizer, tensors: Sequence[TrackedTensor]) -> list[tuple[TrackedTensor, int]]:
        """The tensors whose theta the optimizer holds, with the index of their parameter group."""
        groups = optimizer.param_groups
        size = sum([len(group["params"]) for group in groups])
        if size != self._size:
            where = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
            self._matched = [(tensor, where[id(tensor.theta)]) for tensor in tensors if id(tensor.theta) in where]
            self._size = size
        return self._matched

    def forget_tensors(self) -> None:
        """The callback's tensors are others now."""
        self._size, self._matched, self.scaled = -1, [], None

    def states(self, item: Stepped) -> list[State]:
        """Every state tensor that has theta's shape, with its starting value."""
        optimizer = self.optimizer()
        assert optimizer is not None
        return self.starting.tensors(optimizer, item.group_index, item.tensor.theta)

    def starts(self, item: Stepped) -> dict[str, float]:
        """The starting value of each state tensor, by name."""
        optimizer = self.optimizer()
        assert optimizer is not None
        return self.starting.of(optimizer, item.group_index, item.tensor.theta)

    def unhook(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


class Runs:
    """The runs of a callback, by optimizer. A copy of the callback is at work on none."""

    def __init__(self) -> None:
        self._by_id: dict[int, Run] = {}

    def of(self, optimizer: Optimizer) -> Run:
        """The optimizer's run; a new one where it has none."""
        run = self._by_id.get(id(optimizer))
        if run is None or run.optimizer() is not optimizer:
            self._by_id = {key: one for key, one in self._by_id.items() if one.optimizer() is not None}
            run = self._by_id[id(optimizer)] = Run(optimizer)
        return run

    def __iter__(self) -> Iterator[Run]:
        return iter(list(self._by_id.values()))

    def hooked(self) -> list[Run]:
        """Those whose optimizer calls the callback after each step."""
        return [run for run in self if run.is_hooked and run.optimizer() is not None]

    def __deepcopy__(self, memo: dict[int, Any]) -> Runs:
        return Runs()

    def __reduce__(self) -> Any:
        return Runs, ()
