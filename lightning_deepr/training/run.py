"""The records that a callback keeps for each of its optimizers."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_deepr.algorithm.inner_optimizers import attribute_tensors, chain_of, group_of, partition_of, slot_tensors
from lightning_deepr.algorithm.newborns import State
from lightning_deepr.algorithm.optimizer_state import StartingState
from lightning_deepr.algorithm.second_moments import SecondMoments
from lightning_deepr.training.scaled_steps import ScaledSteps
from lightning_deepr.training.tracked import Stepped, TrackedTensor


class Run:
    """The records of a callback for one optimizer.

    Attributes:
        process: the process in which the optimizer was wired.
        hooks: the registered hooks of the optimizer's steps.
        starting: the starting values of the optimizer's state.
        second_moments: its states of which a neutral newborn gets the mean.
        tables: the kernels' tables, by their tensors. They hold memory addresses.
        scaled: the thetas whose steps ``lr_scale`` multiplies; None: not determined yet, or forgotten.
        held: the thetas that the optimizer holds, by the names of their tensors.
        joined: the tensors whose theta was given to the optimizer in the middle of a training.
        took_step: whether the optimizer really took a step that Fabric has not reported yet (GradScaler may skip a step).
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = weakref.ref(optimizer)  # Python may reuse the id of a deleted optimizer; the reference shows that
        self.hooks: list[Any] = []
        self.process = os.getpid()
        self.starting = StartingState()
        self.second_moments = SecondMoments()
        self.tables: dict[Any, Any] = {}
        self.scaled: ScaledSteps | None = None
        self.took_step = False
        self.rank_steps = 0  # for the check of training/ranks.py
        self._size, self._matched = -1, list[tuple[TrackedTensor, int]]()
        self.held: dict[str, Tensor] = {}
        self.fit: Any = None  # what training/fitness.py has compared
        self.joined: list[TrackedTensor] = []
        self.is_plain = False  # whether the optimizer is one of torch's own, which hold no other; known after ``chain``
        self._inner: list[Any] | None = None  # the optimizers that the optimizer holds; None: not looked for yet

    @property
    def is_hooked(self) -> bool:
        return bool(self.hooks)

    def matched(self, optimizer: Optimizer, tensors: Sequence[TrackedTensor]) -> list[tuple[TrackedTensor, int]]:
        """List the tensors whose theta the optimizer holds, each with the index of its parameter group."""
        groups = optimizer.param_groups
        size = sum([len(group["params"]) for group in groups])
        if size != self._size:
            known = {id(tensor) for tensor, _ in self._matched}
            where = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
            # Under Fabric every optimizer of the process is asked about, also after the network was made dense.
            there = [tensor for tensor in tensors if tensor.converted.is_there]
            self._matched = [(tensor, where[id(tensor.theta)]) for tensor in there if id(tensor.theta) in where]
            self.held = {tensor.name: tensor.theta for tensor, _ in self._matched}
            if self._size >= 0:
                self.joined += [tensor for tensor, _ in self._matched if id(tensor) not in known]
            self._size, self.fit = size, None
        return self._matched

    def forget_tensors(self) -> None:
        """Forget the matched tensors: the callback's tensors have changed."""
        self._size, self._matched, self.scaled, self.joined, self.fit = -1, [], None, [], None

    def chain(self, optimizer: Optimizer) -> list[Any]:
        """List the optimizer and those that it holds, see :func:`~lightning_deepr.algorithm.inner_optimizers.chain_of`."""
        if self._inner is None:
            self._inner = chain_of(optimizer)[1:]
            # torch's own optimizers keep everything in their state: they are looked at no further, which is quicker
            self.is_plain = not self._inner and type(optimizer).__module__.startswith("torch.optim.")
        return [optimizer, *self._inner]

    def keeper(self, optimizer: Optimizer, group_index: int, theta: Tensor) -> tuple[Optimizer, int]:
        """Return the innermost optimizer that holds theta, and the index of theta's parameter group there.

        ZeroRedundancyOptimizer gives each theta to one rank. On the other ranks this is the optimizer of the same kind there,
        which keeps no state for theta: all ranks find the same kind and the same options.

        Args:
            optimizer: the optimizer of this run.
            group_index: the index of theta's parameter group there.
            theta: the parameter.
        """
        for one in reversed(self.chain(optimizer)[1:]):
            index = group_of(one, theta)
            if index is not None:
                return one, index
        part = partition_of(optimizer)
        if part is not None and group_index < len(part.param_groups):
            return part, group_index  # another rank has theta's state; here are its options
        return optimizer, group_index

    def states(self, item: Stepped, neutral: bool = False) -> list[State]:
        """List every tensor with an entry per slot that the optimizer, or one that it holds, keeps for theta."""
        optimizer, theta = self.optimizer(), item.parameter
        assert optimizer is not None
        if self.is_plain:
            if not optimizer.state.get(theta):
                return []  # SGD without momentum
            if neutral:
                return self.second_moments.mark(self.starting, optimizer, item.group_index, theta)
            return self.starting.tensors(optimizer, item.group_index, theta)
        chain = self.chain(optimizer)
        keeper, group = self.keeper(optimizer, item.group_index, theta) if len(chain) > 1 else (optimizer, item.group_index)
        if neutral:
            found = self.second_moments.mark(self.starting, keeper, group, theta)
        else:
            found = self.starting.tensors(keeper, group, theta)
        return found + self._further(chain, keeper, theta)

    def neutral_states(self, item: Stepped) -> list[State]:
        """List the same tensors for ``newborn="neutral"``: second moments of newborns start at the mean of the living."""
        return self.states(item, neutral=True)

    @staticmethod
    def _further(chain: Sequence[Any], keeper: Optimizer, theta: Tensor) -> list[State]:
        """List the tensors outside of the keeper's state: slow weights and the like, which start at 0 as theta does."""
        found: list[State] = []
        seen = {id(keeper.state)}
        for one in chain:
            if id(one.state) not in seen:  # wrappers often have the state of the optimizer that they hold
                seen.add(id(one.state))
                found += [State(name, value, 0.0) for name, value in slot_tensors(one.state.get(theta) or {}, theta.shape)]
            found += [State(name, value, 0.0) for name, value in attribute_tensors(one, theta)]
        return found

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
