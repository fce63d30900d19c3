"""The records that a callback keeps for each of its optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_deepr.algorithm.optimizer_state import StartingState
from lightning_deepr.training.scaled_steps import ScaledSteps
from lightning_deepr.training.tracked import State, Stepped, TrackedTensor


class Run:
    """The records of a callback for one optimizer.

    Attributes:
        hooks: the registered hooks of the optimizer's steps.
        starting: the starting values of the optimizer's state.
        tables: the kernels' tables, by their tensors. They hold memory addresses.
        scaled: the thetas whose steps ``lr_scale`` multiplies; None: not determined yet, or forgotten.
        took_step: whether the optimizer really took a step that Fabric has not reported yet (GradScaler may skip a step).
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = weakref.ref(optimizer)  # Python may reuse the id of a deleted optimizer; the reference shows that
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
        """List the tensors whose theta the optimizer holds, each with the index of its parameter group."""
        groups = optimizer.param_groups
        size = sum([len(group["params"]) for group in groups])
        if size != self._size:
            where = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
            self._matched = [(tensor, where[id(tensor.theta)]) for tensor in tensors if id(tensor.theta) in where]
            self._size = size
        return self._matched

    def forget_tensors(self) -> None:
        """Forget the matched tensors: the callback's tensors have changed."""
        self._size, self._matched, self.scaled = -1, [], None

    def states(self, item: Stepped) -> list[State]:
        """List every state tensor that has theta's shape, with its starting value."""
        optimizer = self.optimizer()
        assert optimizer is not None
        return self.starting.tensors(optimizer, item.group_index, item.tensor.theta)

    def starts(self, item: Stepped) -> dict[str, float]:
        """Map the name of each state tensor to its starting value."""
        optimizer = self.optimizer()
        assert optimizer is not None
        return self.starting.of(optimizer, item.group_index, item.tensor.theta)

    def unhook(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


class Runs:
    """The runs of a callback, by optimizer. A copy of the callback starts with no runs."""

    def __init__(self) -> None:
        self._by_id: dict[int, Run] = {}

    def of(self, optimizer: Optimizer) -> Run:
        """Return the optimizer's run, or make one."""
        run = self._by_id.get(id(optimizer))
        if run is None or run.optimizer() is not optimizer:
            self._by_id = {key: one for key, one in self._by_id.items() if one.optimizer() is not None}
            run = self._by_id[id(optimizer)] = Run(optimizer)
        return run

    def __iter__(self) -> Iterator[Run]:
        return iter(list(self._by_id.values()))

    def hooked(self) -> list[Run]:
        """List the runs whose optimizer calls the callback after each step."""
        return [run for run in self if run.is_hooked and run.optimizer() is not None]

    def __deepcopy__(self, memo: dict[int, Any]) -> Runs:
        return Runs()

    def __reduce__(self) -> Any:
        return Runs, ()
