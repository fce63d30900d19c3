"""The work of a callback after an optimizer step, the same for the Trainer, Fabric and a plain loop.

:class:`Stepper` finds the tensors that took the step, evaluates the values of the step (learning rate, alpha, T, whether to
rewire), calls the method, and counts.
"""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_deepr.algorithm import lr_scale
from lightning_deepr.algorithm.lr_scale import DEEPR, Exponents
from lightning_deepr.algorithm.statistics import collapse_message
from lightning_deepr.algorithm.steering import Steering
from lightning_deepr.packages.messages import rank_zero_warn
from lightning_deepr.training import fitness, guards, invariants, processes
from lightning_deepr.training.averaging_optimizers import refuse_averaging_optimizers
from lightning_deepr.training.decay_check import warn_of_lost_decay
from lightning_deepr.training.ledger import Ledger
from lightning_deepr.training.run import Run, Runs
from lightning_deepr.training.scaled_steps import AUTO, ScaledSteps, kept_first
from lightning_deepr.training.schedules import default_l1, evaluate, is_steered
from lightning_deepr.training.statistics import LEVELS, Observer, everything, log_name, of_network
from lightning_deepr.training.step_ends import Before, StepEnds
from lightning_deepr.training.tracked import Stepped, TrackedTensor
from lightning_deepr.training.updates_check import warn_of_few_updates

_set_gradients = torch._C._set_grad_enabled


class Stepper(ABC):
    """The part of a callback that needs no Trainer.

    A method overrides :meth:`after_step` and, if it needs them, the other verbs: :meth:`begin`, :meth:`before_step`,
    :meth:`end`, :meth:`check`, :meth:`statistics`, :meth:`extra_state` and :meth:`load_extra_state`. ``docs/extending.md`` has
    examples.

    Attributes:
        tracked: the tensors that the callback trains.
        total_steps: the number of steps of the present training; None: unknown.
        watches_for_collapse: whether to warn when most of a tensor is reborn in every step; the advice applies to DEEP R.
        lr_exponents: the exponents of ``lr_scale="auto"``, chosen by measurement for each method.
        without_turnover: why the turnover can't steer alpha in this method, and which l1 to give instead; "": it can.
    """

    # the defaults of a method without these arguments: no L1, no noise, a rewiring after every step
    l1: Any = 0.0
    temperature: Any = 0.0
    lr_scale: Any = 1.0
    newborn: str = "start"
    rewire_every_n_steps: int = 1
    rewire_until: int | float | None = None
    seed: int = 0
    check_invariants: bool = False
    log_every_n_steps: int = 50
    log_statistics: str = "network"
    log_name: ClassVar[str] = ""  # the first part of the logged keys; "": the name of the class in snake case
    _rank_check: Any = None  # see training/ranks.py
    watches_for_collapse = False
    lr_exponents: ClassVar[Exponents] = DEEPR
    without_turnover = ""

    def __post_init__(self) -> None:
        if self.without_turnover and is_steered(self.l1):
            raise TypeError(f"{type(self).__name__}: l1={self.l1!r} is steered by the turnover. {self.without_turnover}")
        self.tracked: list[TrackedTensor] = []
        self.total_steps: float | None = None
        self._runs = Runs()
        self._ledger = Ledger()
        self._observer = None if self.log_statistics == "none" else Observer(self.log_statistics)
        self._continues = False  # whether a loaded training continues, instead of a new one
        self._told: set[str] = set()
        self._advice = "Give the Trainer max_epochs or max_steps, or attach(..., total_steps=...)."
        self._resumed_newborn: str | None = None  # how newborns start in a training that continues from a checkpoint

    # -- the verbs of a method --------------------------------------------------------------------------------------------

    @abstractmethod
    def after_step(self, stepped: Sequence[Stepped], optimizer: Optimizer) -> None:
        """Act in place on the tensors that took an optimizer step, and set ``item.reborn`` of each tensor that was rewired."""

    def begin(self, tensors: Sequence[TrackedTensor]) -> None:  # noqa: B027
        """Prepare for the training of some tensors, which begins or continues from a loaded state.

        Args:
            tensors: all of :attr:`tracked`. If a callback at work takes charge of a further network: only its tensors.
        """

    def before_step(self, items: Sequence[Stepped], optimizer: Optimizer) -> None:  # noqa: B027
        """Act just before an optimizer changes these thetas. The gradients may not exist yet."""

    def end(self) -> None:  # noqa: B027
        """Clean up when the callback stops, also after an exception."""

    def extra_state(self) -> dict[str, Any]:
        """Return the method's own state for the checkpoint: tensors and Python's built-in types."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Load the state that :meth:`extra_state` returned. :attr:`tracked` is filled by then."""
        if state:
            raise ValueError(f"The checkpoint is of another method: {type(self).__name__} keeps no {', '.join(state)}.")

    def check(self, item: Stepped, optimizer: Optimizer) -> None:
        """Check the invariants of a tensor after a step (``check_invariants``)."""
        invariants.check_invariants(item)

    def statistics(self, level: str = "tensors") -> dict[str, float]:
        """Return the statistics of the connections. Means are over the steps since the last call or log.

        The keys begin with the method's name: ``deepr/``, ``set/``, ``rigl/``, ``fixed_random/``, ``magnitude_pruning/``,
        ``l1_shrinkage/`` (soft-DEEP R has ``deepr/``). Their cost is O(K). Before the first step there is no turnover and no
        alpha.

        For the network (``level="network"``, the default of ``log_statistics``):

        - ``turnover``: the share of all connections that was reborn per step, the mean over the steps
        - ``newborns``: the share of the connections that have not survived a rewiring yet
        - ``alpha``: alpha in the last step, the mean over the connections; methods without L1 have none
        - ``explored``: the share of all (allowed) places that had a connection at any time since the training began; of a
          tensor with more than 1024 K places (and 2^20) it is estimated from every so-manieth place
        - ``units_without_input``, ``units_without_output``: units of the layers that no connection enters, or that no
          connection leaves and no output shows, see :func:`lightning_deepr.dead_units`. A dense weight connects all with all
        - ``connections_to_nowhere``: the connections into a unit without a path to an output
        - ``connectivity``: K / N, for methods that change it

        For each tensor (``level="tensors"`` adds them), as ``deepr/<tensor>/...``:

        - ``turnover``: the share of the tensor's connections that was reborn per step
        - ``newborn_deaths``, ``mature_deaths``: deaths per step of connections that had not survived a rewiring yet, and of
          the others
        - ``l1``: the present alpha, if the turnover steers it
        - ``connectivity``: K / N, for methods that change it and under ``scope="global"``
        - ``births``, ``deaths``: per step, for soft-DEEP R

        With ``level="all"`` also these, for each tensor and (but for degrees and share) for the network:

        - ``newborns``, ``alpha``, ``explored``: as for the network, for each tensor
        - ``births``: births per step. Under ``scope="global"`` a tensor has other numbers of births than of deaths
        - ``age_mean``, ``ages/<n>``: the mean number of steps since a connection's birth, and the share of the ages from n to
          2 n - 1 (n = 0: born in the last step); connections of the start count from the start
        - ``survival/<n>``: the share of the connections that live more than n steps (Kaplan-Meier, over bins that end at 1, 2,
          4, ...), of those that were born since the record began
        - ``overlap_start``, ``overlap_last``: the share of the present connections whose places had one when the record began,
          and at the last call with this level or log (n steps ago)
        - ``in_degrees/<n>``, ``out_degrees/<n>``: how many output units, or input units, have n to 2 n - 1 connections
        - ``zeros``, ``theta/<edge>``: the share of connections at exactly 0, and with abs(theta) from this edge (0, 1e-4, 1e-3,
          .01, .1, 1) to the next
        - ``share``: the tensor's share of all connections, which changes under ``scope="global"``

        Args:
            level: "network" | "tensors" | "all". "all" needs ``log_statistics="all"``, which notes how long connections live.

        Raises:
            ValueError: the level is unknown, or nothing was noted for it.
            RuntimeError: the callback has no network yet.
        """
        self._check_level(level)
        self._settle()
        found = self._of_network()
        if level == "all":
            assert self._observer is not None
            found |= everything(self._observer, self.tracked, self.newborn_since)
        taken = self._of_tensors()
        if level != "network":
            found |= taken
        return {f"{log_name(self)}/{key}": value for key, value in found.items()}

    def _check_level(self, level: str) -> None:
        method = type(self).__name__
        if level not in LEVELS[1:]:
            raise ValueError(f"{method}.statistics: level: expected one of {', '.join(LEVELS[1:])}, found {level!r}.")
        if level == "all" and (self._observer is None or self._observer.level != "all"):
            raise ValueError(
                f'{method}.statistics: level "all" needs what is noted after each step: expected '
                f'{method}(..., log_statistics="all"), found {self.log_statistics!r}.'
            )
        if not self.tracked:
            raise RuntimeError(
                f"{method}.statistics: expected a network, found none: the callback gets it in a fit, by "
                "`attach(net, optimizer)` or by Fabric's setup."
            )

    def _of_network(self) -> dict[str, float]:
        """Return the values of the whole network, by the last part of their keys."""
        return of_network(self._observer, self.tracked, self.newborn_since)

    def _of_tensors(self) -> dict[str, float]:
        """Take the counts of each tensor since the last call. Keys: <tensor>/what."""
        found = {f"{t.name}/{key}": value for t in self.tracked for key, value in t.turnover.take().items()}
        for tensor in self.tracked:
            if tensor.steering is not None and tensor.steering.alpha is not None:
                found[f"{tensor.name}/l1"] = tensor.steering.alpha
        return found

    def rewires(self, done: int) -> bool:
        """Whether a step rewires.

        Args:
            done: the number of steps of this training before it.
        """
        until = self.rewire_until
        if until is None:
            return (done + 1) % self.rewire_every_n_steps == 0
        if isinstance(until, float):
            assert self.total_steps is not None
            until = until * self.total_steps
        return (done + 1) % self.rewire_every_n_steps == 0 and done < until

    def newborn_since(self, step: int) -> int:
        """Return the first birth step of newborns: a connection born then or later has not survived a rewiring yet."""
        return step - self.rewire_every_n_steps

    def on_after_optimizer_step(self, strategy: Any = None, optimizer: Optimizer | None = None) -> None:
        """Act after an optimizer step. A hook on the optimizer or Fabric calls this method."""
        assert optimizer is not None
        self._after_optimizer_step(optimizer)

    # -- one step ---------------------------------------------------------------------------------------------------------

    def _after_optimizer_step(self, optimizer: Optimizer) -> None:
        run = self._runs.of(optimizer)
        with_gradients = torch.is_grad_enabled()
        _set_gradients(False)  # (the decorator `torch.no_grad()` takes ten times as long)
        try:
            self._act(optimizer, run)
            if self._rank_check is not None:
                self._rank_check.after_step(run, [tensor for tensor, _ in run.matched(optimizer, self.tracked)])
        finally:
            _set_gradients(with_gradients)

    def _act(self, optimizer: Optimizer, run: Run) -> None:
        stepped = []
        matched = run.matched(optimizer, self.tracked)
        if run.joined:
            self._welcome(run, optimizer)
        for tensor, group_index in matched:
            theta = tensor.converted.theta
            if theta.grad is None or not theta.requires_grad:
                tensor.missed += 1
                if not theta.requires_grad and tensor.weight.shares:
                    self._tell_of_frozen_pool(tensor)
                continue
            stepped.append(self._stepped(tensor, theta, optimizer, group_index, run))
        if run.process != os.getpid():
            processes.refuse_other_process([item.tensor for item in stepped], type(self).__name__)
        fitness.check(run, stepped)  # before anything is written
        scaled = run.scaled
        if not run.is_plain:
            scaled = kept_first([self._runs.of(one).scaled for one in run.chain(optimizer)])
        if scaled is not None:  # before L1 and noise, which keep the group's learning rate
            scaled.stretch()
        if not stepped:
            return
        self.after_step(stepped, optimizer)
        steered: list[tuple[TrackedTensor, Steering]] = []
        checks = self.check_invariants
        for item in stepped:
            tensor, steering = item.tensor, item.tensor.steering
            seen = vars(tensor.converted.slots)  # a module's setattr is slow
            seen["seen_version"], seen["unseen_changes"] = item.theta._version, 0  # (a detached tensor shares the version)
            seen["last_step"] = tensor.step
            if checks:
                self.check(item, optimizer)
            tensor.step += 1
            tensor.last_alpha = item.alpha
            if steering is not None and not steering.rests:
                steered.append((tensor, steering))
            births, newborns, _, moved, pending = item.reborn
            if pending is not None:
                self._ledger.note(*pending, tensor, item.alpha)
                continue
            if moved:
                births += moved  # deaths
                tensor.turnover.moved += moved
            if steering is not None and item.rewires:
                steering.add(births, tensor.slots.count + moved)  # K as it was before the step
            if tensor.turnover.add(births, newborns, item.rewires):
                self._tell_of_collapse(tensor, item.alpha)
        if self._ledger.is_full:
            self._settle()
        if steered:
            self._steer(steered)

    def _welcome(self, run: Run, optimizer: Optimizer, steps: int = 0) -> None:
        """Let tensors that an optimizer got in the middle of a training stand where the training stands.

        Args:
            run: the optimizer's run; ``run.joined`` are the tensors.
            steps: the number of steps before this one, if the optimizer had none of the tensors before.
        """
        new, run.joined = run.joined, []
        others = [tensor.elapsed for tensor, _ in run.matched(optimizer, self.tracked) if all(tensor is not one for one in new)]
        for tensor in new:
            tensor.missed += max(max(others, default=steps) - tensor.elapsed, 0)
        self._note_l1(optimizer)

    def _tell_of_frozen_pool(self, tensor: TrackedTensor) -> None:
        if "frozen pool" not in self._told:
            self._told.add("frozen pool")
            names = ", ".join(f"`{name}`" for name in tensor.weight.shares)
            rank_zero_warn(
                f'{type(self).__name__}: with scope="global" {names} have one parameter, theta, which was frozen '
                "(requires_grad=False), perhaps in one of the layers: none of them is trained until it is unfrozen. "
                'Layers that are frozen one by one need scope="layer".'
            )

    def _settle(self) -> None:
        """Count the births that are still on a device. Call this before the counts are read."""
        for tensor, alpha in self._ledger.settle():
            self._tell_of_collapse(tensor, alpha)

    def _tell_of_collapse(self, tensor: TrackedTensor, alpha: Any) -> None:
        if self.watches_for_collapse:
            rank_zero_warn(collapse_message(tensor.name, alpha, steered=tensor.is_steered))

    def _steer(self, steered: Sequence[tuple[TrackedTensor, Steering]]) -> None:
        """Change the alphas of the tensors whose interval ends with this step.

        Args:
            steered: the steered tensors that have just taken a step.
        """
        if self.total_steps is None and "length" not in self._told:
            self._told.add("length")
            if any(steering.target.shape != "constant" for _, steering in steered):
                rank_zero_warn(
                    f"{type(self).__name__}: the length of the training is not known, so that the share of reborn connections "
                    f"that l1 is steered to stays where it starts. {self._advice}"
                )
        # layers that share a theta share a steering: close it once
        due = {id(steering): (tensor, steering) for tensor, steering in steered if tensor.done % steering.target.interval == 0}
        if due:
            self._settle()
            for tensor, steering in due.values():
                steering.close(self._progress(tensor.elapsed))
            for tensor, _ in steered:
                tensor.note_steered_alpha()

    def _progress(self, done: int) -> float:
        """Return the progress of the present training, from 0 to 1; 0 if its length is unknown."""
        return min(done / self.total_steps, 1.0) if self.total_steps else 0.0

    def _stepped(
        self, tensor: TrackedTensor, parameter: nn.Parameter, optimizer: Optimizer, group_index: int, run: Run
    ) -> Stepped:
        group = optimizer.param_groups[group_index]
        lr, done = group["lr"], tensor.step - tensor.start
        alpha, temperature, steering = tensor.alpha, tensor.temperature, tensor.steering
        if steering is not None:
            alpha = steering.alpha
        if alpha is None:
            keeper, index = run.keeper(optimizer, group_index, parameter)
            alpha, _ = default_l1(keeper, keeper.param_groups[index])  # in every step: a scheduler may change the momentum
            if steering is not None and not steering.rests:
                # L1 keeps the group's learning rate; what it works against does not. Where nothing is rewired, it has no work
                alpha = 0.0 if tensor.weight.rests else alpha * (tensor.scale or 1.0)
                steering.begin(alpha)
                for one in self.tracked:
                    if one.steering is steering:
                        one.note_steered_alpha()
        if type(alpha) is not float:
            alpha = evaluate(alpha, self._progress(tensor.elapsed), f"l1 of `{tensor.name}`")
        if type(temperature) is not float:
            where = f"temperature of `{tensor.name}`" if isinstance(self.temperature, Mapping) else "temperature"
            temperature = evaluate(temperature, lr, where)
        states_of = run.neutral_states if (self._resumed_newborn or self.newborn) == "neutral" else run.states
        rewires = self.rewires(done) and not tensor.converted.slots.rests
        if tensor.missed and rewires and type(self.rewire_until) is float:  # a fraction of the training, not of its own steps
            rewires = self._progress(tensor.elapsed) < self.rewire_until
        theta = tensor.converted.slots.own(parameter.detach())
        return Stepped(tensor, parameter, theta, group_index, lr, alpha, temperature, rewires, states_of)

    def _call_before_step(self, optimizer: Optimizer) -> None:
        if self._has_before_step:
            self._tell_before_step(optimizer)
        self._scaled_steps(optimizer).keep()

    @torch.no_grad()
    def _tell_before_step(self, optimizer: Optimizer) -> None:
        run = self._runs.of(optimizer)
        items = [
            self._stepped(tensor, tensor.theta, optimizer, group_index, run)
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
        """Return the thetas of an optimizer whose steps are multiplied. It is determined once."""
        run = self._runs.of(optimizer)
        matched = run.matched(optimizer, self.tracked)
        if run.scaled is None or run.scaled.matched is not matched:
            warn_of_lost_decay(optimizer, matched, self._told)
            kinds: dict[int, bool | None] = {}
            run.scaled = ScaledSteps(matched, [self._scale_of(tensor, optimizer, group, kinds) for tensor, group in matched])
        return run.scaled

    def _scale_of(self, tensor: TrackedTensor, optimizer: Optimizer, group_index: int, kinds: dict[int, bool | None]) -> float:
        """Determine the factor of a tensor's steps, and record it.

        Args:
            kinds: whether the optimizer normalizes its gradients, by the index of the parameter group. Groups are added.
        """
        scale = tensor.scale if tensor.lr_scale == AUTO else float(tensor.lr_scale)
        if scale is None:
            ratio, normalizing = tensor.slots.places_per_connection, None
            if ratio > 1:
                if group_index not in kinds:
                    keeper, index = self._runs.of(optimizer).keeper(optimizer, group_index, tensor.theta)
                    kinds[group_index] = lr_scale.normalizes(keeper, keeper.param_groups[index], tensor.theta.device)
                normalizing = kinds[group_index]
                if normalizing is None:
                    self._warn_of_unknown(optimizer)
            scale = 1.0 if normalizing is None else lr_scale.automatic(ratio, normalizing, self.lr_exponents)
        tensor.scale = tensor.slots.lr_scale_taken = scale
        return scale

    def _take_over_scales(self, recorded: Mapping[str, Mapping[str, Any]]) -> None:
        """Continue with the scales of a checkpoint where ``lr_scale`` is "auto"."""
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
                f"{method}: the checkpoint is of a version without lr_scale: {', '.join(old)} go on with lr_scale=1, as in "
                "that training. Give a number for another scale."
            )
        if others:
            rank_zero_warn(f"{method}: lr_scale differs from the checkpoint's: {', '.join(others)}.")

    def _take_over_newborn(self, recorded: str | None) -> None:
        """Continue as a checkpoint's newborns started; None: the checkpoint is of a version without ``newborn``."""
        self._resumed_newborn = recorded or "start"
        if self._resumed_newborn != self.newborn:
            why = "is of a version without newborn" if recorded is None else f'has newborn="{recorded}"'
            rank_zero_warn(
                f'{type(self).__name__}: the checkpoint {why}: reborn connections go on as under "{self._resumed_newborn}", as '
                f"in that training. A new training has newborn={self.newborn!r}."
            )

    def _warn_of_unknown(self, optimizer: Optimizer) -> None:
        line = (
            f'{type(self).__name__}: lr_scale="auto" is 1 under {type(optimizer).__name__}: whether it normalizes its '
            "gradients could not be found out (a second optimizer could not take a step on its own parameter). Give a number."
        )
        if line not in self._told:
            self._told.add(line)
            rank_zero_warn(line)

    def _before_plain_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # With a closure, the gradients of this step do not exist yet. The gradients of a fused optimizer under GradScaler may
        # hold infinities; then it skips the step. (`args[0]` is the optimizer itself.)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        self._refuse_non_finite(optimizer, gradients=closure is None and getattr(optimizer, "found_inf", None) is None)

    def _refuse_non_finite(self, optimizer: Optimizer, gradients: bool) -> None:
        matched = self._runs.of(optimizer).matched(optimizer, self.tracked)
        if not matched:
            return
        guards.refuse_negative_rates(optimizer, matched)
        first = matched[0][0]
        if not first.theta.is_cpu and not self.check_invariants and first.step % self.log_every_n_steps:
            return  # a check costs a host synchronization
        guards.refuse_non_finite([tensor for tensor, _ in matched], gradients)

    # -- the beginning and the end of a training ------------------------------------------------------------------------------

    def _wire(self, optimizer: Optimizer, check_before: bool = False, waits: bool = False) -> bool:
        """Hook an optimizer if it holds any tracked theta, or if it may get one later. Returns whether it holds one."""
        run = self._runs.of(optimizer)
        matched = run.matched(optimizer, self.tracked)
        if not matched and not waits:
            return False
        chain = run.chain(optimizer)
        if any(isinstance(one, LBFGS) for one in chain):
            raise ValueError("LBFGS keeps a history over all parameters, and rewiring would falsify it: use another optimizer.")
        refuse_averaging_optimizers(chain, type(self).__name__)
        if run.is_hooked:
            return bool(matched)
        others = [other for one in self._runs.hooked() if (other := one.optimizer()) is not None]
        guards.refuse_sharing(optimizer, others, self.tracked)

        self._note_l1(optimizer)
        self._scaled_steps(optimizer)  # now, so that the report has the scales and a warning comes before the first step
        at = weakref.ref(optimizer)
        before: list[Before] = []
        # "auto" needs the hook even if its scale is 1 now: a checkpoint that is loaded later may have another scale
        if self._has_before_step or any(tensor.lr_scale != 1.0 for tensor in self.tracked):
            before.append(lambda args, kwargs: self._call_before_step(at()))  # type: ignore[arg-type]
        if check_before:
            before.append(lambda args, kwargs: self._before_plain_step(at(), args, kwargs))  # type: ignore[arg-type]
        needs_inner = bool(matched) and all(run.keeper(optimizer, i, tensor.theta)[0] is not optimizer for tensor, i in matched)
        run.hooks = [StepEnds(chain, needs_inner, before, lambda: self.on_after_optimizer_step(optimizer=at()))]
        return bool(matched)

    def _note_l1(self, optimizer: Optimizer) -> None:
        """Record each tensor's alpha for the report, and warn if alpha is a guess."""
        for tensor, group_index in self._runs.of(optimizer).matched(optimizer, self.tracked):
            alpha = tensor.alpha
            if alpha is None or tensor.steering is not None:
                keeper, index = self._runs.of(optimizer).keeper(optimizer, group_index, tensor.theta)
                alpha, line = default_l1(keeper, keeper.param_groups[index])
                if line is not None and line not in self._told and not tensor.is_steered:
                    self._told.add(line)
                    rank_zero_warn(line)
            tensor.slots.l1_rule = None
            if tensor.is_steered:
                tensor.note_steered_alpha()
            else:
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
        """Begin a training. In a new one the progress starts at 0; the step counts, and with them the draws, continue."""
        # A checkpoint of another method has weights but no state of this callback: the step count moves past the last birth, so
        # that no draw is repeated.
        ahead = max((1 + tensor.slots.last_birth() - tensor.step for tensor in self.tracked), default=0)
        for tensor in self.tracked:
            tensor.step += max(ahead, 0)
        if not self._continues:
            self._resumed_newborn = None
            self._settle()  # the new training does not count the births of the last one
            for tensor in self.tracked:
                tensor.start, tensor.missed = tensor.step, 0
                tensor.scale = None  # the optimizer may be of another kind
                if tensor.steering is not None:
                    tensor.steering.reset()
            self._forget_matches()
        anew, self._continues = not self._continues, False
        warn_of_few_updates(self)
        if self._observer is not None:
            self._observer.begin(self.tracked, anew)
        self.begin(self.tracked)

    @property
    def _follows_progress(self) -> bool:
        """Whether anything changes with the progress of the training."""
        changes = any(callable(t.alpha) or (t.is_steered and t.steering.target.shape != "constant") for t in self.tracked)  # type: ignore[union-attr]
        return changes or isinstance(self.rewire_until, float)

    def _check_schedules(self, what_to_do: str) -> None:
        needs = [tensor.name for tensor in self.tracked if callable(tensor.alpha)]
        if self.total_steps is None and (needs or isinstance(self.rewire_until, float)):
            raise ValueError(
                f"{'l1 changes' if needs else 'rewire_until is a fraction: it ends'} with the progress of the training, but "
                f"its length is not known. {what_to_do}"
            )
