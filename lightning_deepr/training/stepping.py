"""What a callback of the family does when an optimizer has stepped, whoever calls: Trainer, Fabric or a plain loop.

:class:`Stepper` finds the tensors that took the step, works out what holds in it (learning rate, alpha, T, whether to rewire),
lets the algorithm act, and counts.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_deepr.algorithm.optimizer_state import StartingState
from lightning_deepr.algorithm.statistics import collapse_message
from lightning_deepr.training import guards, invariants
from lightning_deepr.training.ledger import Ledger
from lightning_deepr.training.schedules import default_l1, evaluate
from lightning_deepr.training.tracked import Reborn, Stepped, TrackedTensor


class _Tables(dict[Any, Any]):
    """The kernels' tables, by tensors. They hold addresses: a copy of the callback makes its own."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tables:
        return _Tables()

    def __reduce__(self) -> Any:
        return _Tables, ()


class Stepper(ABC):
    """The part of a callback that needs no Trainer.

    Attributes:
        watches_for_collapse: whether to warn when a tensor is reborn over and over; the advice is DEEP R's.

    Args:
        temperature, rewire_every_n_steps, rewire_until, seed, check_invariants, log_every_n_steps: see :class:`DeepR`.
    """

    watches_for_collapse = False

    def __init__(
        self,
        *,
        temperature: Any,
        rewire_every_n_steps: int,
        rewire_until: int | float | None,
        seed: int,
        check_invariants: bool,
        log_every_n_steps: int,
    ) -> None:
        self.temperature = temperature
        self.rewire_every_n_steps = rewire_every_n_steps
        self.rewire_until = rewire_until
        self.seed = seed
        self.check_invariants = check_invariants
        self.log_every_n_steps = log_every_n_steps

        self._tensors: list[TrackedTensor] = []
        self._total_steps: float | None = None  # of the present training; None: not known
        # By id(optimizer). An id is free again when its optimizer is gone: the first keeps the optimizer, the second tells.
        self._hooks: dict[int, tuple[Optimizer, list[Any]]] = {}
        self._matches: dict[int, tuple[weakref.ref[Optimizer], int, list[tuple[TrackedTensor, int]]]] = {}
        self._starting_state = StartingState()
        self._tables = _Tables()
        self._ledger = Ledger()
        self._continues = False  # a state was loaded: what begins is no new training
        self._told: set[str] = set()

    # -- the algorithm ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def after_step(self, stepped: Sequence[Stepped], optimizer: Optimizer) -> list[Reborn]:
        """What follows an optimizer step, for the tensors that took it. In place.

        Returns:
            for each tensor what was reborn.
        """

    def before_step(self, tensors: Sequence[TrackedTensor], optimizer: Optimizer) -> None:  # noqa: B027
        """Just before an optimizer changes these thetas; the gradients may not exist yet."""

    def check(self, item: Stepped, born: Reborn, optimizer: Optimizer) -> None:
        """Everything that must hold after every step (``check_invariants``)."""
        invariants.check_invariants(item.tensor, item, born.slots, optimizer, self._starting_state)

    def on_after_optimizer_step(self, strategy: Any = None, optimizer: Optimizer | None = None) -> None:
        """What follows an optimizer step. A hook on the optimizer calls it, and Fabric by itself."""
        assert optimizer is not None
        self._after_optimizer_step(optimizer)

    # -- one step ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _after_optimizer_step(self, optimizer: Optimizer) -> None:
        stepped = []
        for tensor, group_index in self._match(optimizer):
            theta = tensor.theta
            if theta.grad is None or not theta.requires_grad:
                continue
            stepped.append(self._stepped(tensor, tensor.slots.own(theta.detach()), optimizer, group_index))
        if not stepped:
            return
        reborn = self.after_step(stepped, optimizer)
        for item, born in zip(stepped, reborn, strict=True):
            tensor = item.tensor
            if self.check_invariants:
                self.check(item, born, optimizer)
            tensor.step += 1
            if born.pending is not None:
                self._ledger.note(*born.pending, tensor, item.alpha)
                continue
            collapsed = tensor.turnover.add(born.births + born.moved, born.newborns, item.rewires)
            if collapsed and self.watches_for_collapse:
                rank_zero_warn(collapse_message(tensor.name, item.alpha))
        if self._ledger.is_full:
            self._settle()

    def _settle(self) -> None:
        """Count the births that lie on a device still, before somebody reads the counts."""
        for tensor, alpha in self._ledger.settle():
            if self.watches_for_collapse:
                rank_zero_warn(collapse_message(tensor.name, alpha))

    def _stepped(self, tensor: TrackedTensor, theta: Tensor, optimizer: Optimizer, group_index: int) -> Stepped:
        group = optimizer.param_groups[group_index]
        lr, done = group["lr"], tensor.step - tensor.start
        alpha, temperature = tensor.alpha, tensor.temperature
        if alpha is None:
            alpha, _ = default_l1(optimizer, group)  # the momentum may be on a schedule
        if type(alpha) is not float:
            progress = done / self._total_steps if self._total_steps else 0.0
            alpha = evaluate(alpha, min(progress, 1.0), f"l1 of `{tensor.name}`")
        if type(temperature) is not float:
            temperature = evaluate(temperature, lr, self._temperature_of(tensor))
        return Stepped(tensor, theta, group_index, lr, alpha, temperature, self.rewires(done))

    def rewires(self, done: int) -> bool:
        """Whether a step rewires, by how many steps of this training came before it."""
        until = self.rewire_until
        if isinstance(until, float):
            assert self._total_steps is not None
            until = until * self._total_steps
        return (done + 1) % self.rewire_every_n_steps == 0 and (until is None or done < until)

    def _temperature_of(self, tensor: TrackedTensor) -> str:
        return f"temperature of `{tensor.name}`" if isinstance(self.temperature, Mapping) else "temperature"

    @torch.no_grad()
    def _call_before_step(self, optimizer: Optimizer) -> None:
        tensors = [tensor for tensor, _ in self._match(optimizer)]
        if tensors:
            self.before_step(tensors, optimizer)

    def _before_plain_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # With a closure the gradients of this step do not exist yet; those of a fused optimizer under GradScaler may hold
        # infinities for which it is going to skip the step. (The first of `args` is the optimizer itself.)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        self._refuse_non_finite(optimizer, gradients=closure is None and getattr(optimizer, "found_inf", None) is None)

    def _refuse_non_finite(self, optimizer: Optimizer, gradients: bool) -> None:
        matched = self._match(optimizer)
        if not matched:
            return
        theta = matched[0][0].theta
        step = matched[0][0].step
        if theta.device.type != "cpu" and not self.check_invariants and step % self.log_every_n_steps:
            return  # looking costs a host synchronization
        guards.refuse_non_finite([tensor for tensor, _ in matched], gradients)

    def _match(self, optimizer: Optimizer) -> list[tuple[TrackedTensor, int]]:
        """The tensors whose theta an optimizer holds, with the index of their parameter group."""
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._matches.get(id(optimizer))
        if known is None or known[0]() is not optimizer or known[1] != size:
            where = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
            matched = [(tensor, where[id(tensor.theta)]) for tensor in self._tensors if id(tensor.theta) in where]
            known = self._matches[id(optimizer)] = (weakref.ref(optimizer), size, matched)
        return known[2]

    def _wire(self, optimizer: Optimizer, check_before: bool = False) -> bool:
        """Hook an optimizer that holds some of our thetas. Returns whether it does."""
        if not self._match(optimizer):
            return False
        if isinstance(optimizer, LBFGS):
            raise ValueError("LBFGS keeps a history over all parameters, which rewiring would falsify: use another optimizer.")
        if id(optimizer) in self._hooks:
            return True
        guards.refuse_sharing(optimizer, [held for held, _ in self._hooks.values()], self._tensors)

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # a fused optimizer calls its hooks also when GradScaler has made it skip the step
            if not guards.was_skipped(optimizer):
                self.on_after_optimizer_step(optimizer=optimizer)

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._call_before_step(optimizer)

        self._note_l1(optimizer)
        hooks = [optimizer.register_step_post_hook(after)]
        if type(self).before_step is not Stepper.before_step:
            hooks.append(optimizer.register_step_pre_hook(before))
        if check_before:
            hooks.append(optimizer.register_step_pre_hook(self._before_plain_step))
        self._hooks[id(optimizer)] = (optimizer, hooks)
        return True

    def _note_l1(self, optimizer: Optimizer) -> None:
        """For the report: which alpha each tensor has, and a line where it is a guess."""
        for tensor, group_index in self._match(optimizer):
            alpha = tensor.alpha
            if alpha is None:
                alpha, line = default_l1(optimizer, optimizer.param_groups[group_index])
                if line is not None and line not in self._told:
                    self._told.add(line)
                    rank_zero_warn(line)
            tensor.slots.l1_taken = repr(alpha) if callable(alpha) else float(alpha)

    def _unhook(self, key: int | None = None) -> None:
        for one in list(self._hooks) if key is None else [key]:
            for hook in self._hooks.pop(one, (None, []))[1]:
                hook.remove()
            self._matches.pop(one, None)

    def _watch(self, watching: bool) -> None:
        for tensor in self._tensors:
            tensor.slots.watch(watching)

    def _begin_training(self) -> None:
        """A new training (not the continuation of one): the progress starts at 0, draws and steps go on."""
        # A checkpoint of another method brings weights and no state of this callback: it goes on after them and repeats no draw.
        ahead = max((1 + tensor.slots.last_birth() - tensor.step for tensor in self._tensors), default=0)
        for tensor in self._tensors:
            tensor.step += max(ahead, 0)
        if not self._continues:
            for tensor in self._tensors:
                tensor.start = tensor.step
        self._continues = False

    def _check_schedules(self, what_to_do: str) -> None:
        needs = [tensor.name for tensor in self._tensors if callable(tensor.alpha)]
        if self._total_steps is None and (needs or isinstance(self.rewire_until, float)):
            raise ValueError(
                f"{'l1 changes' if needs else 'rewire_until is a fraction: it ends'} with the progress of the training, but its "
                f"length is not known. {what_to_do}"
            )

    def statistics(self) -> dict[str, float]:
        """Means per step since the last call: ``deepr/<tensor>/turnover``, ``.../newborn_deaths``, ``.../mature_deaths``."""
        self._settle()
        return {f"deepr/{t.name}/{key}": value for t in self._tensors for key, value in t.turnover.take().items()}
