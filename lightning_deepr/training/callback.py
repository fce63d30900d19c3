"""DEEP R as a Lightning callback, for the Trainer, for Fabric and for a plain PyTorch loop.

:class:`SparseTraining` is the base of all methods: it converts, notices when an optimizer has stepped, saves and logs. A method
overrides :meth:`SparseTraining.after_step`, which receives the tensors that have just taken a step.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr.conversion.selection import Candidate
from lightning_deepr.packages.classes import Callback
from lightning_deepr.packages.messages import rank_zero_info, rank_zero_warn
from lightning_deepr.packages.names import is_a, overrides
from lightning_deepr.packages.seeds import seed_everything_seed, seed_or_default
from lightning_deepr.training import (
    cli_optimizers,
    fabric_hooks,
    finetuning,
    fitness,
    guarded_loggers,
    guards,
    length,
    markers,
    processes,
    run_config,
    state_keys,
)
from lightning_deepr.training.arguments import SharedArguments
from lightning_deepr.training.claim import claim
from lightning_deepr.training.precision import cast_early
from lightning_deepr.training.ranks import SameOnAllRanks
from lightning_deepr.training.schedules import is_documented
from lightning_deepr.weights.averages import follow
from lightning_deepr.weights.base import nobody
from lightning_deepr.weights.find import Converted, converted_tensors

if TYPE_CHECKING:
    import lightning.pytorch as pl


STATE_VERSION = 2  # of a callback's state in a checkpoint; 1: before alpha was steered by the turnover
OF_TRAINER = 50  # the default of ``log_every_n_steps``: the Trainer's own interval


@dataclass
class Rewiring:
    """The handle that :meth:`SparseTraining.attach` returns: a callback at work on an optimizer of a plain loop."""

    callback: SparseTraining
    _remove: Callable[[], None] = field(repr=False)

    def remove(self) -> None:
        """Stop rewiring: the connections stay where they are, and only the optimizer changes theta."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the callback's state (step counters, seed), for your own checkpoint."""
        return self.callback.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where :meth:`state_dict` was taken. Load the module and the optimizer as well."""
        self.callback.load_state_dict(state_dict)


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """Return the torch optimizer without the wrapper of Fabric or the Trainer."""
    wrapped = is_a(optimizer, "core.optimizer", "LightningOptimizer") or is_a(
        optimizer, "wrappers", "_FabricOptimizer", fabric=True
    )
    return optimizer.optimizer if wrapped else optimizer  # type: ignore[attr-defined]


class SparseTraining(SameOnAllRanks, SharedArguments, Callback):
    """Base of the callbacks that train a sparse network: it converts, notices when an optimizer has stepped, saves and logs.

    A method on K slots derives from :class:`lightning_deepr.methods.SlotTraining` and overrides :meth:`after_step`.

    Attributes:
        keeps_history: whether a fit keeps what it logs in ``history``; :class:`lightning_deepr.pictures.Pictures` sets it.
        history: [(step, statistics)] of the last fit.
    """

    scope: str = "layer"  # K per tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_fabric = False
        self._has_logged = False  # in the present fit
        self.keeps_history = False
        self.history: list[tuple[int, dict[str, float]]] = []
        self._state_key: str | None = None
        self._has_own_seed = self.seed is not None  # False: it is seed_everything's, or the default
        if self.seed is None:
            self.seed = seed_everything_seed()
        self._loaded: dict[str, Any] | None = None
        self._marking: markers.Marking | None = None
        self._resumed_total: float | None = None  # the length of the training that a checkpoint continues

    # -- conversion -------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Convert the network before ``configure_optimizers``, in every stage: a sparse checkpoint can also be tested."""
        guards.refuse_sharding(trainer.strategy)
        if stage == "fit":
            guards.refuse_earlier_averaging(trainer, self)
        if overrides(pl_module, "configure_model", trainer):
            # A callback's setup precedes the module's own hooks, so the layers are built here, as Lightning's WeightAveraging
            # does.
            pl_module.configure_model()
        with finetuning.thawed(trainer, pl_module, self), cli_optimizers.following(pl_module):
            new = self._take(pl_module, watch=True)
        cast_early(trainer, pl_module)
        guards.refuse_spawn(trainer, new)
        if stage == "fit":
            guarded_loggers.guard(trainer)
            run_config.log_config(self, trainer, pl_module)
            run_config.warn_of_watched(pl_module, new)
        if stage == "fit" and self._marking is None:
            self._marking = markers.Marking(pl_module)

    def _take(self, module: nn.Module, watch: bool = False, early: bool = True) -> int:
        """Convert the requested weights and take charge of them; see :func:`lightning_deepr.training.claim.claim`."""
        if self.seed is None:
            self.seed = seed_or_default(None)
        new = claim(self, module, watch, early)
        if self._observer is not None:
            self._observer.add(module)
        self._forget_matches()
        self._state_key = None
        self._apply_loaded()
        return new

    @abstractmethod
    def convert(self, module: nn.Module, new: list[Candidate], counts: Mapping[str, int]) -> list[Converted]:
        """Convert dense weights into the parametrization of the method.

        Args:
            module: the network.
            new: the weights to convert.
            counts: K of each weight, by name.
        """

    @abstractmethod
    def check_kind(self, name: str, slots: Any) -> None:
        """Refuse a tensor that was converted for another kind of method.

        Raises:
            ValueError: the parametrization does not fit; the message says what was expected, what was found and what to do.
        """

    # -- when it runs: under a Trainer ------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        guards.refuse_lost_conversions(pl_module, [tensor.converted for tensor in self.tracked])
        self._watch(False)
        finetuning.refuse_frozen_pools(trainer, self.tracked)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            average = getattr(callback, "_average_model", None)
            if isinstance(average, nn.Module):
                follow(average)  # StochasticWeightAveraging makes its copy without an AveragedModel

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply_loaded()
        self._has_logged, self.history = False, []
        self._continues = self._continues or trainer.global_step > 0
        before, self.total_steps = self._resumed_total, length.total_steps(trainer)
        self._resumed_total, self._advice = None, length.advice(trainer)
        self._check_schedules(self._advice)
        done = max((tensor.done for tensor in self.tracked), default=0)
        if self._follows_progress:
            if self._continues and (line := length.change(before, self.total_steps, done)):
                rank_zero_warn(f"{type(self).__name__}: {line}.")
            if self.total_steps is not None and (seconds := length.time_limit(trainer)) is not None:
                rank_zero_info(
                    f"{type(self).__name__}: schedules over the training count on {self.total_steps:g} steps; max_time "
                    f"({seconds:g} s) may end it before."
                )
        fitness.refuse_unfit(trainer.model or pl_module, [tensor.converted for tensor in self.tracked])
        processes.refuse_shared([tensor.converted for tensor in self.tracked])
        guards.warn_of_pruning(trainer, self)
        self._compare_ranks(trainer.model or pl_module, trainer.strategy)
        self._begin_training()
        # a fine-tuning callback gives thetas to an optimizer later
        waits = bool(finetuning.finetuning(trainer)) and any(not tensor.theta.requires_grad for tensor in self.tracked)
        found = [self._wire(optimizer, waits=waits) for optimizer in trainer.optimizers]
        if not any(found) and not waits:
            raise RuntimeError(guards.unmatched(pl_module, trainer.optimizers, self.tracked))
        known = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        idle = [t.name for t in self.tracked if id(t.theta) not in known and t.theta.requires_grad]
        if idle:
            rank_zero_warn(f"{type(self).__name__}: no optimizer holds {', '.join(idle)}: these tensors are not trained.")

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        # The closure has already run. (A step pre-hook would see the gradients of the previous step: under the Trainer, forward
        # and backward run inside `optimizer.step`.)
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._refuse_non_finite(optimizer, gradients=not scaled)
        if (run := self._runs.of(optimizer)).joined:
            self._welcome(run, optimizer, trainer.global_step)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if self.log_every_n_steps == OF_TRAINER:
            due = trainer._logger_connector.should_update_logs
        else:
            due = max((tensor.step for tensor in self.tracked), default=0) % self.log_every_n_steps == 0
        if due:
            self._log(trainer, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _log(self, trainer: pl.Trainer, step: int) -> None:
        """Log the statistics, if there were steps since the last log. A logger that fails does not end the training."""
        if not (trainer.loggers or self.keeps_history) or self.log_statistics == "none":
            return
        self._settle()
        if not any(t.turnover.steps for t in self.tracked):
            return
        metrics = self.statistics(self.log_statistics)
        if self.keeps_history:
            self.history.append((step, metrics))
        for logger in trainer.loggers:
            try:
                logger.log_metrics(metrics, step=step)
            except Exception as error:
                if "logger" not in self._told:
                    self._told.add("logger")
                    rank_zero_warn(
                        f"{type(self).__name__}: {type(logger).__name__} could not log the statistics "
                        f"({type(error).__name__}: {error}). The training goes on; this is said once."
                    )
        self._has_logged = True

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._has_logged:  # a fit that was shorter than the interval
            self._log(trainer, max(trainer.fit_loop.epoch_loop._batches_that_stepped - 1, 0))
        self._settle()
        self._unhook()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        meaning = guards.explain(str(exception), pl_module)
        if meaning is not None and meaning not in str(exception):
            exception.args = (f"{exception} {meaning}", *exception.args[1:])
        self._unmark()
        self._stop()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._unmark()
        self._stop()

    def _unmark(self) -> None:
        if self._marking is not None:
            self._marking.remove()
            self._marking = None

    def _stop(self) -> None:
        self._unhook()
        self._watch(False)
        self._continues, self._rank_check = False, None
        if self._observer is not None:
            self._observer.end()
        for tensor in self.tracked:
            if tensor.slots.owner() is self:
                tensor.slots.owner = nobody
        self.end()

    @property
    def _is_at_work(self) -> bool:
        return bool(self._runs.hooked())

    # -- when it runs: in a plain loop ------------------------------------------------------------------------------------

    def prepare(self, net: nn.Module) -> nn.Module:
        """Convert a network in place for a plain loop or Fabric, before the optimizer is made.

        Under a Trainer, :meth:`setup` does this. For a method on K slots it equals :func:`lightning_deepr.sparsify` with the
        callback's arguments. A method with a theta for every potential connection can be converted only this way.

        Args:
            net: any module that is not converted yet.

        Returns:
            the network itself.

        Example::

            >>> import torch
            >>> from lightning_deepr import FixedRandom
            >>> callback = FixedRandom(0.05)
            >>> net = callback.prepare(torch.nn.Linear(100, 10))
            >>> rewiring = callback.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
        """
        at_work, self.tracked = self.tracked, []
        loaded, self._loaded = self._loaded, None
        self._take(net)
        for tensor in self.tracked:  # no callback is at work on it yet: attach, or Fabric's setup, takes charge
            tensor.slots.owner = nobody
        self.tracked, self._loaded = at_work, loaded
        self._forget_matches()
        return net

    def attach(self, net: nn.Module, optimizer: Optimizer, total_steps: int | None = None) -> Rewiring:
        """Rewire after each ``optimizer.step()`` of a plain PyTorch loop.

        Args:
            net: a network that was converted (:func:`lightning_deepr.sparsify`) before the optimizer was made.
            optimizer: an optimizer that holds theta of some or all converted tensors. Call ``attach`` once per optimizer.
            total_steps: the length of the training. A schedule over the progress and a fraction in ``rewire_until`` need it.

        Returns:
            a handle with ``remove()``, ``state_dict()`` and ``load_state_dict()``.

        Raises:
            ValueError: the net is not converted, or the optimizer was made before the conversion.

        Example::

            >>> import torch
            >>> from lightning_deepr import DeepR, sparsify
            >>> net = sparsify(torch.nn.Linear(100, 10), 0.05)
            >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            >>> rewiring = DeepR().attach(net, optimizer)
            >>> for _ in range(3):
            ...     optimizer.zero_grad()
            ...     net(torch.ones(4, 100)).square().sum().backward()
            ...     optimizer.step()
            >>> int((net.parametrizations.weight.original >= 0).sum())
            50
        """
        if not any(True for _ in converted_tensors(net)):
            raise ValueError(
                f"attach expects a converted network, found {type(net).__name__} without a converted tensor. Call "
                "`sparsify(net, connectivity)` before you make the optimizer."
            )
        optimizer = _unwrapped(optimizer)
        fitness.refuse_unfit(net, converted_tensors(net))
        processes.refuse_shared(converted_tensors(net))
        self._take_charge(net, keep=self._is_at_work)
        if total_steps is not None:
            self.total_steps = float(total_steps)
        self._check_schedules("Give attach(..., total_steps=...).")
        try:
            self._compare_ranks(net)
            if not self._is_at_work:
                self._begin_training()
            if not self._wire(optimizer, check_before=True):
                raise ValueError(guards.unmatched(net, [optimizer], self.tracked))
        except (ValueError, RuntimeError):
            if not self._is_at_work:
                self._stop()
            raise
        run = self._runs.of(optimizer)

        def remove() -> None:
            run.unhook()
            run.forget_tensors()
            if not self._is_at_work:
                self._stop()

        return Rewiring(self, remove)

    def _take_charge(self, net: nn.Module, keep: bool) -> None:
        """Take charge of a converted network, without converting more of it: an optimizer already exists.

        Args:
            net: a network with converted tensors.
            keep: whether to keep the tensors of other networks on which this callback is at work, for example a generator.
        """
        if {t.slots for t in self.tracked}.isdisjoint(c.slots for c in converted_tensors(net)):
            kept = self.tracked if keep else []
            wanted, self.connectivity = self.connectivity, None
            try:
                self._take(net, early=False)
            finally:
                self.connectivity = wanted
            names = {tensor.name for tensor in kept}
            for tensor in self.tracked:
                plain, number = tensor.name, 2
                while tensor.name in names:
                    tensor.converted = tensor.converted._replace(name=f"{plain} ({number})")
                    number += 1
            if kept:
                self.begin(self.tracked)
            self.tracked = kept + self.tracked
            self._forget_matches()
            if kept and self._observer is not None:
                self._observer.begin(self.tracked, anew=False)
        for tensor in self.tracked:
            tensor.slots.owner = weakref.ref(self)

    # -- when it runs: under Fabric ---------------------------------------------------------------------------------------

    def on_after_setup(self, fabric: Any, module: nn.Module) -> None:
        """Take charge of a network. Fabric calls this at the end of ``fabric.setup(net, optimizer)``; convert the net first."""
        guards.refuse_sharding(fabric.strategy)
        if not any(True for _ in converted_tensors(module)):
            return  # another module of the same script, for example a discriminator
        fitness.refuse_unfit(module, converted_tensors(module))
        processes.refuse_shared(converted_tensors(module))
        at_work = self._is_at_work or self._at_fabric
        self._take_charge(module, keep=at_work)
        self._check_schedules(
            "Fabric does not know the length of the training: call attach(net, optimizer, total_steps=...) on the callback."
        )
        self._compare_ranks(module, fabric.strategy)
        if not at_work:
            self._begin_training()
        self._at_fabric = True
        fabric_hooks.listen(self)

    def before_step_under_fabric(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Refuse values that are not finite, before a step of any optimizer."""
        run = self._runs.of(optimizer)
        if not run.is_hooked and run.matched(optimizer, self.tracked):
            self._before_plain_step(optimizer, args, kwargs)
            self._call_before_step(optimizer)

    def after_step_under_fabric(self, optimizer: Optimizer) -> None:
        """Note that an optimizer really took a step."""
        if not guards.was_skipped(optimizer):
            self._runs.of(optimizer).took_step = True

    @override
    def on_after_optimizer_step(self, strategy: Any = None, optimizer: Optimizer | None = None) -> None:
        """Rewire after an optimizer step. Fabric calls this method; otherwise a hook on the optimizer does.

        A tensor is rewired if its theta is in this optimizer, requires a gradient and has one. It is never rewired twice in a
        step.
        """
        assert optimizer is not None
        if strategy is not None:  # Fabric
            if not self.tracked:
                raise RuntimeError(
                    f"{type(self).__name__} was given to Fabric, but has no network: expected `sparsify(net, ...)` and then "
                    "`fabric.setup(net, optimizer)`. (Fabric does not tell its callbacks of `setup_module`: call "
                    "`attach(net, optimizer)` on the callback there.)"
                )
            run = self._runs.of(optimizer)
            runs = [self._runs.of(one) for one in run.chain(optimizer)]
            was_taken = any(one.took_step for one in runs)
            for one in runs:
                one.took_step = False
            if run.is_hooked or not was_taken:
                return  # the callback is also attached and the optimizer's own hook has run, or the step was skipped
        self._after_optimizer_step(optimizer)

    # -- what it knows and saves ------------------------------------------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        if self._state_key is None:  # Lightning reads it at every hook, to label its profile
            self._state_key = state_keys.key(self)
        return self._state_key

    @override
    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        state_keys.find_state(self, [one for one in trainer.callbacks if isinstance(one, SparseTraining)], checkpoint)  # type: ignore[attr-defined]

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the seed and the steps. With the module's own state this is the complete state."""
        if (not is_documented(self.l1) or not is_documented(self.temperature)) and "lambda" not in self._told:
            self._told.add("lambda")
            rank_zero_warn(
                f"{type(self).__name__}: a function as l1 or temperature can't be saved; give the same one when you resume, or "
                "use LinearDecay and LrPower."
            )
        self._settle()
        extra, tried = self.extra_state(), {} if self._observer is None else self._observer.state()
        return {
            **({"extra": extra} if extra else {}),
            **({"tried": tried} if tried else {}),
            "version": STATE_VERSION,
            "method": state_keys.method(self),
            "seed": self.seed,
            "newborn": self._resumed_newborn or self.newborn,
            "total_steps": self.total_steps,
            "tensors": {
                t.name: {
                    "K": t.slots.wanted,
                    "step": t.step,
                    "start": t.start,
                    "missed": t.missed,
                    "lr_scale": t.scale,
                    "streak": t.turnover.streak,
                    "warned": t.turnover.warned,
                    "steps": t.turnover.steps,
                    "reborn": t.turnover.reborn,
                    "newborn_deaths": t.turnover.newborn_deaths,
                    **({} if t.steering is None else {"steering": t.steering.state()}),
                }
                for t in self.tracked
            },
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        version = state_dict.get("version", 1)
        if version not in range(1, STATE_VERSION + 1):
            raise ValueError(
                f"{type(self).__name__}: expected a callback's state of version {STATE_VERSION} or older, found {version!r}: "
                "the checkpoint is newer than this package. Update lightning-deepr."
            )
        self._loaded = dict(state_dict)
        self._apply_loaded()

    def _apply_loaded(self) -> None:
        """Take over a checkpoint's state as soon as its tensors exist."""
        if self._loaded is None or not self.tracked:
            return
        state, self._loaded, self._continues = self._loaded, None, True
        self._settle()
        recorded: Mapping[str, Any] = state["tensors"]
        mine = {tensor.name: tensor for tensor in self.tracked}
        if set(recorded) != set(mine):
            raise ValueError(
                f"The checkpoint is of another model or selection: expected the tensors {sorted(mine)}, found "
                f"{sorted(recorded)}. Give the same target_modules and connectivity as in the run that wrote it."
            )
        for name, tensor in mine.items():
            if recorded[name]["K"] != tensor.slots.wanted:
                raise ValueError(
                    f"`{name}`: expected a checkpoint with K = {tensor.slots.wanted}, found {recorded[name]['K']}. Give the "
                    "same connectivity as in the run that wrote it."
                )
        if state["seed"] != self.seed and self._has_own_seed:
            rank_zero_warn(f"{type(self).__name__}: goes on with the checkpoint's seed {state['seed']} (given: {self.seed}).")
        self.seed = state["seed"]
        for name, tensor in mine.items():
            entry = recorded[name]
            tensor.step, tensor.start, tensor.missed = entry["step"], entry["start"], entry.get("missed", 0)
            for key in ("streak", "warned", "steps", "reborn", "newborn_deaths"):
                setattr(tensor.turnover, key, entry[key])
        self._load_steering(recorded, state.get("version", 1))
        self._take_over_scales(recorded)
        self._take_over_newborn(state.get("newborn"))
        self._resumed_total = state.get("total_steps")
        self.load_extra_state(state.get("extra", {}))
        if self._observer is not None:
            self._observer.load(state.get("tried", {}))
        if self._is_at_work or self._at_fabric:  # a loop is running: the method begins again with the loaded state
            if self._observer is not None:
                self._observer.begin(self.tracked, anew=False)
            self.begin(self.tracked)

    def _load_steering(self, recorded: Mapping[str, Any], version: int) -> None:
        """Continue with the steered alphas of a checkpoint."""
        steered = [tensor for tensor in self.tracked if tensor.steering is not None]
        resting = []
        for tensor in steered:
            assert tensor.steering is not None
            entry = recorded[tensor.name].get("steering")
            if entry is not None:
                tensor.steering.load(entry)
            elif version < 2:
                tensor.steering.rest()
            else:  # the checkpoint's training had another l1
                tensor.steering.reset()
            if tensor.steering.rests:
                resting.append(tensor.name)
            else:
                tensor.note_steered_alpha()
        for optimizer in [found for run in self._runs.hooked() if (found := run.optimizer()) is not None]:
            self._note_l1(optimizer)
        if resting:
            rank_zero_warn(
                f"{type(self).__name__}: the checkpoint was written before l1 was steered by the turnover: "
                f"{', '.join(resting)} go on with the alpha that they had, the optimizer's default (l1=None). If that training "
                "had another l1, give it. A new training is steered."
            )
