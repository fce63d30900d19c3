"""What a callback of the family does when an optimizer has stepped, whoever calls: Trainer, Fabric or a plain loop.

:class:`Stepper` finds the tensors that took the step, works out what holds in it (learning rate, alpha, T, whether to rewire),
lets the algorithm act, and counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_deepr.algorithm import lr_scale
from lightning_deepr.algorithm.statistics import collapse_message
from lightning_deepr.training import guards, invariants
from lightning_deepr.training.ledger import Ledger
from lightning_deepr.training.run import Run, Runs
from lightning_deepr.training.scaled_steps import AUTO, ScaledSteps
from lightning_deepr.training.schedules import default_l1, evaluate
from lightning_deepr.training.tracked import Stepped, TrackedTensor


class Stepper(ABC):
    """The part of a callback that needs no Trainer.

    A method overrides :meth:`after_step` and, where it needs them, the other verbs: :meth:`begin`, :meth:`before_step`,
    :meth:`end`, :meth:`check`, :meth:`statistics`, :meth:`extra_state` and :meth:`load_extra_state`. ``docs/extending.md`` has examples.

    Attributes:
        tracked: the tensors at work.
        total_steps: of the present training; None: not known.
        watches_for_collapse: whether to warn when a tensor is reborn over and over; the advice is DEEP R's.
    """

    # what a method has whose arguments do not say otherwise: no L1, no noise, a rewiring after every step
    l1: Any = 0.0
    temperature: Any = 0.0
    lr_scale: Any = 1.0
    rewire_every_n_steps: int = 1
    rewire_until: int | float | None = None
    seed: int = 0
    check_invariants: bool = False
    log_every_n_steps: int = 50
    watches_for_collapse = False

    def __post_init__(self) -> None:
        self.tracked: list[TrackedTensor] = []
        self.total_steps: float | None = None
        self._runs = Runs()
        self._ledger = Ledger()
        self._continues = False  # a state was loaded: what begins is no new training
        self._told: set[str] = set()

    # -- the verbs of a method --------------------------------------------------------------------------------------------

    @abstractmethod
    def after_step(self, stepped: Sequence[Stepped], optimizer: Optimizer) -> None:
        """What follows an optimizer step, for the tensors that took it. In place; ``item.reborn`` says what was reborn."""

    def begin(self, tensors: Sequence[TrackedTensor]) -> None:  # noqa: B027
        """The training of some tensors begins, or goes on with a state that was loaded.

        Args:
            tensors: all of :attr:`tracked`, but for a further network that a callback takes charge of while it is at work.
        """

    def before_step(self, items: Sequence[Stepped], optimizer: Optimizer) -> None:  # noqa: B027
        """Just before an optimizer changes these thetas; the gradients may not exist yet."""

    def end(self) -> None:  # noqa: B027
        """The callback is no longer at work; also after an exception."""

    def extra_state(self) -> dict[str, Any]:
        """What a method keeps beside its tensors, for the checkpoint: tensors and Python's own types."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`extra_state` gave; the tensors are there."""
        if state:
            raise ValueError(f"The checkpoint is of another method: {type(self).__name__} keeps no {', '.join(state)}.")

    def check(self, item: Stepped, optimizer: Optimizer) -> None:
        """Everything that must hold after every step (``check_invariants``)."""
        invariants.check_invariants(item, optimizer, self._runs.of(optimizer).starts)

    def statistics(self) -> dict[str, float]:
        """Means per step since the last call: ``deepr/<tensor>/turnover``, ``.../newborn_deaths``, ``.../mature_deaths``."""
        self._settle()
        return {f"deepr/{t.name}/{key}": value for t in self.tracked for key, value in t.turnover.take().items()}

    def rewires(self, done: int) -> bool:
        """Whether a step rewires, by how many steps of this training came before it."""
        until = self.rewire_until
        if isinstance(until, float):
            assert self.total_steps is not None
            until = until * self.total_steps
        return (done + 1) % self.rewire_every_n_steps == 0 and (until is None or done < until)

    def newborn_since(self, step: int) -> int:
        """A connection that was born in this step or later has not survived a rewiring yet."""
        return step - self.rewire_every_n_steps

    def on_after_optimizer_step(self, strategy: Any = None, optimizer: Optimizer | None = None) -> None:
        """What follows an optimizer step. A hook on the optimizer calls it, and Fabric by itself."""
        assert optimizer is not None
        self._after_optimizer_step(optimizer)

    # -- one step ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _after_optimizer_step(self, optimizer: Optimizer) -> None:
        run = self._runs.of(optimizer)
        if run.scaled is not None:
            run.scaled.stretch()
        stepped = []
        for tensor, group_index in run.matched(optimizer, self.tracked):
            theta = tensor.theta
            if theta.grad is None or not theta.requires_grad:
                continue
            stepped.append(self._stepped(tensor, tensor.slots.own(theta.detach()), optimizer, group_index, run))
        if not stepped:
            return
        self.after_step(stepped, optimizer)
        for item in stepped:
            tensor, born = item.tensor, item.reborn
            if self.check_invariants:
                self.check(item, optimizer)
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

    def _stepped(self, tensor: TrackedTensor, theta: Tensor, optimizer: Optimizer, group_index: int, run: Run) -> Stepped:
        group = optimizer.param_groups[group_index]
        lr, done = group["lr"], tensor.step - tensor.start
        alpha, temperature = tensor.alpha, tensor.temperature
        if alpha is None:
            alpha, _ = default_l1(optimizer, group)  # the momentum may be on a schedule
        if type(alpha) is not float:
            progress = done / self.total_steps if self.total_steps else 0.0
            alpha = evaluate(alpha, min(progress, 1.0), f"l1 of `{tensor.name}`")
        if type(temperature) is not float:
            where = f"temperature of `{tensor.name}`" if isinstance(self.temperature, Mapping) else "temperature"
            temperature = evaluate(temperature, lr, where)
        return Stepped(tensor, theta, group_index, lr, alpha, temperature, self.rewires(done), run.states)

    def _call_before_step(self, optimizer: Optimizer) -> None:
        if self._has_before_step:
            self._tell_before_step(optimizer)
        self._scaled_steps(optimizer).keep()

    @torch.no_grad()
    def _tell_before_step(self, optimizer: Optimizer) -> None:
        run = self._runs.of(optimizer)
        items = [
            self._stepped(tensor, tensor.slots.own(tensor.theta.detach()), optimizer, group_index, run)
            for tensor, group_index in run.matched(optimizer, self.tracked)
            if tensor.theta.requires_grad
        ]
        if items:
            self.before_step(items, optimizer)

    @property
    def _has_before_step(self) -> bool:
        return type(self).before_step is not Stepper.before_step

    # -- lr_scale -----------------------------------------------------------------------------------------------------------

    def _scaled_steps(self, optimizer: Optimizer) -> ScaledSteps:
        """The steps of an optimizer that are multiplied; found out once."""
        run = self._runs.of(optimizer)
        matched = run.matched(optimizer, self.tracked)
        if run.scaled is None or run.scaled.matched is not matched:
            kinds: dict[int, bool | None] = {}
            run.scaled = ScaledSteps(matched, [self._scale_of(tensor, optimizer, group, kinds) for tensor, group in matched])
        return run.scaled

    def _scale_of(self, tensor: TrackedTensor, optimizer: Optimizer, group_index: int, kinds: dict[int, bool | None]) -> float:
        """What a tensor's steps are multiplied by. ``kinds``: of the parameter groups, as far as they are known."""
        scale = tensor.scale if tensor.lr_scale == AUTO else float(tensor.lr_scale)
        if scale is None:
            ratio, normalizing = tensor.slots.places_per_connection, None
            if ratio > 1:
                if group_index not in kinds:
                    group = optimizer.param_groups[group_index]
                    kinds[group_index] = lr_scale.normalizes(optimizer, group, tensor.theta.device)
                normalizing = kinds[group_index]
                if normalizing is None:
                    self._warn_of_unknown(optimizer)
            scale = 1.0 if normalizing is None else lr_scale.automatic(ratio, normalizing)
        tensor.scale = tensor.slots.lr_scale_taken = scale
        return scale

    def _take_over_scales(self, recorded: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on with the scales that a checkpoint records, where they were not given as numbers."""
        others, old = [], []
        for tensor in self.tracked:
            scale = recorded[tensor.name].get("lr_scale", 1.0)
            if tensor.lr_scale == AUTO:
                tensor.scale = tensor.slots.lr_scale_taken = scale
                if "lr_scale" not in recorded[tensor.name]:
                    old.append(f"`{tensor.name}`")
            elif scale is not None and scale != tensor.lr_scale:
                others.append(f"`{tensor.name}` ({scale:g} before, {tensor.lr_scale:g} now)")
        self._forget_matches()
        method = type(self).__name__
        if old:
            rank_zero_warn(
                f"{method}: the checkpoint is of a version without lr_scale: {', '.join(old)} go on with lr_scale=1, as they were "
                "trained. Give a number for another scale."
            )
        if others:
            rank_zero_warn(f"{method}: lr_scale is another than in the checkpoint: {', '.join(others)}.")

    def _warn_of_unknown(self, optimizer: Optimizer) -> None:
        line = (
            f'{type(self).__name__}: lr_scale="auto" is 1 under {type(optimizer).__name__}: whether it normalizes its gradients could '
            "not be found out (a second one could not take a step on a parameter of its own). Give a number."
        )
        if line not in self._told:
            self._told.add(line)
            rank_zero_warn(line)

    def _before_plain_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # With a closure the gradients of this step do not exist yet; those of a fused optimizer under GradScaler may hold
        # infinities for which it is going to skip the step. (The first of `args` is the optimizer itself.)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        self._refuse_non_finite(optimizer, gradients=closure is None and getattr(optimizer, "found_inf", None) is None)

    def _refuse_non_finite(self, optimizer: Optimizer, gradients: bool) -> None:
        matched = self._runs.of(optimizer).matched(optimizer, self.tracked)
        if not matched:
            return
        first = matched[0][0]
        if first.theta.device.type != "cpu" and not self.check_invariants and first.step % self.log_every_n_steps:
            return  # looking costs a host synchronization
        guards.refuse_non_finite([tensor for tensor, _ in matched], gradients)

    # -- the beginning and the end of a training ------------------------------------------------------------------------------

    def _wire(self, optimizer: Optimizer, check_before: bool = False) -> bool:
        """Hook an optimizer that holds some of our thetas. Returns whether it does."""
        run = self._runs.of(optimizer)
        if not run.matched(optimizer, self.tracked):
            return False
        if isinstance(optimizer, LBFGS):
            raise ValueError("LBFGS keeps a history over all parameters, which rewiring would falsify: use another optimizer.")
        if run.is_hooked:
            return True
        others = [other for one in self._runs.hooked() if (other := one.optimizer()) is not None]
        guards.refuse_sharing(optimizer, others, self.tracked)

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # a fused optimizer calls its hooks also when GradScaler has made it skip the step
            if not guards.was_skipped(optimizer):
                self.on_after_optimizer_step(optimizer=optimizer)

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._call_before_step(optimizer)

        self._note_l1(optimizer)
        self._scaled_steps(optimizer)  # for the report, and to say at once what there is to say
        # `torch.compile(optimizer.step)` must not trace what the hooks do: a traced rewiring came to other results
        untraced = torch.compiler.disable
        run.hooks = [optimizer.register_step_post_hook(untraced(after))]
        # (what is 1 now may be another number once a checkpoint is loaded, but for a number that was given)
        if self._has_before_step or any(tensor.lr_scale != 1.0 for tensor in self.tracked):
            run.hooks.append(optimizer.register_step_pre_hook(untraced(before)))
        if check_before:
            run.hooks.append(optimizer.register_step_pre_hook(untraced(self._before_plain_step)))
        return True

    def _note_l1(self, optimizer: Optimizer) -> None:
        """For the report: which alpha each tensor has, and a line where it is a guess."""
        for tensor, group_index in self._runs.of(optimizer).matched(optimizer, self.tracked):
            alpha = tensor.alpha
            if alpha is None:
                alpha, line = default_l1(optimizer, optimizer.param_groups[group_index])
                if line is not None and line not in self._told:
                    self._told.add(line)
                    rank_zero_warn(line)
            tensor.slots.l1_taken = repr(alpha) if callable(alpha) else float(alpha)

    def _unhook(self) -> None:
        for run in self._runs:
            run.unhook()
            run.forget_tensors()

    def _forget_matches(self) -> None:
        for run in self._runs:
            run.forget_tensors()

    def _watch(self, watching: bool) -> None:
        for tensor in self.tracked:
            tensor.slots.watch(watching)

    def _begin_training(self) -> None:
        """A new training (not the continuation of one): the progress starts at 0, draws and steps go on."""
        # A checkpoint of another method brings weights and no state of this callback: it goes on after them and repeats no draw.
        ahead = max((1 + tensor.slots.last_birth() - tensor.step for tensor in self.tracked), default=0)
        for tensor in self.tracked:
            tensor.step += max(ahead, 0)
        if not self._continues:
            for tensor in self.tracked:
                tensor.start = tensor.step
                tensor.scale = None  # the optimizer may be of another kind
            self._forget_matches()
        self._continues = False
        self.begin(self.tracked)

    def _check_schedules(self, what_to_do: str) -> None:
        needs = [tensor.name for tensor in self.tracked if callable(tensor.alpha)]
        if self.total_steps is None and (needs or isinstance(self.rewire_until, float)):
            raise ValueError(
                f"{'l1 changes' if needs else 'rewire_until is a fraction: it ends'} with the progress of the training, but its "
                f"length is not known. {what_to_do}"
            )
