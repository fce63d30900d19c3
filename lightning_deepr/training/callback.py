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

from lightning.fabric.wrappers import _FabricOptimizer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr.conversion.selection import Candidate
from lightning_deepr.training import fabric_hooks, guards
from lightning_deepr.training.arguments import SharedArguments
from lightning_deepr.training.claim import claim
from lightning_deepr.training.schedules import is_documented
from lightning_deepr.weights.averages import follow
from lightning_deepr.weights.base import nobody
from lightning_deepr.weights.find import Converted, converted_tensors

if TYPE_CHECKING:
    import lightning.pytorch as pl


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
    return optimizer.optimizer if isinstance(optimizer, (_FabricOptimizer, LightningOptimizer)) else optimizer


class SparseTraining(SharedArguments, Callback):
    """Base of the callbacks that train a sparse network: it converts, notices when an optimizer has stepped, saves and logs.

    A method on K slots derives from :class:`lightning_deepr.methods.SlotTraining` and overrides :meth:`after_step`.
    """

    scope: str = "layer"  # K per tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_fabric = False
        self._state_key: tuple[Any, ...] = ()
        self._loaded: dict[str, Any] | None = None

    # -- conversion -------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Convert the network before ``configure_optimizers``, in every stage: a sparse checkpoint can also be tested."""
        guards.refuse_sharding(trainer.strategy)
        if stage == "fit":
            guards.refuse_earlier_averaging(trainer, self)
        if is_overridden("configure_model", pl_module):
            # A callback's setup precedes the module's own hooks, so the layers are built here, as Lightning's WeightAveraging
            # does.
            pl_module.configure_model()
        new = self._take(pl_module, watch=True)
        guards.refuse_spawn(trainer, new)

    def _take(self, module: nn.Module, watch: bool = False, early: bool = True) -> int:
        """Convert the requested weights and take charge of them; see :func:`lightning_deepr.training.claim.claim`."""
        new = claim(self, module, watch, early)
        self._forget_matches()
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
        guards.refuse_unequal_ranks(trainer, self.tracked)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            average = getattr(callback, "_average_model", None)
            if isinstance(average, nn.Module):
                follow(average)  # StochasticWeightAveraging makes its copy without an AveragedModel

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply_loaded()
        self._continues = self._continues or trainer.global_step > 0
        total = trainer.estimated_stepping_batches
        self.total_steps = float(total) if total != float("inf") and total > 0 else None
        self._check_schedules("Give the Trainer max_epochs or max_steps.")
        self._begin_training()
        found = [self._wire(optimizer) for optimizer in trainer.optimizers]
        if not any(found):
            raise RuntimeError(guards.OPTIMIZER_TOO_EARLY)
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

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        step = max((tensor.step for tensor in self.tracked), default=0)
        if not trainer.loggers or step % self.log_every_n_steps:
            return
        self._settle()
        if not any(t.turnover.steps for t in self.tracked):
            return
        metrics = self.statistics()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._settle()
        self._unhook()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        meaning = guards.explain(str(exception), pl_module)
        if meaning is not None and meaning not in str(exception):
            exception.args = (f"{exception} {meaning}", *exception.args[1:])
        self._stop()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._stop()

    def _stop(self) -> None:
        self._unhook()
        self._watch(False)
        self._continues = False
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
        self._take_charge(net, keep=self._is_at_work)
        if total_steps is not None:
            self.total_steps = float(total_steps)
        self._check_schedules("Give attach(..., total_steps=...).")
        if not self._is_at_work:
            self._begin_training()
        if not self._wire(optimizer, check_before=True):
            if not self._is_at_work:
                self._stop()
            raise ValueError(guards.OPTIMIZER_TOO_EARLY)
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
        for tensor in self.tracked:
            tensor.slots.owner = weakref.ref(self)

    # -- when it runs: under Fabric ---------------------------------------------------------------------------------------

    def on_after_setup(self, fabric: Any, module: nn.Module) -> None:
        """Take charge of a network. Fabric calls this at the end of ``fabric.setup(net, optimizer)``; convert the net first."""
        guards.refuse_sharding(fabric.strategy)
        if not any(True for _ in converted_tensors(module)):
            return  # another module of the same script, for example a discriminator
        at_work = self._is_at_work or self._at_fabric
        self._take_charge(module, keep=at_work)
        self._check_schedules(
            "Fabric does not know the length of the training: call attach(net, optimizer, total_steps=...) on the callback."
        )
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
            was_taken, run.took_step = run.took_step, False
            if run.is_hooked or not was_taken:
                return  # the callback is also attached and the optimizer's own hook has run, or the step was skipped
        self._after_optimizer_step(optimizer)

    # -- what it knows and saves ------------------------------------------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        # Lightning reads it at every hook, to label its profile
        known = self._state_key
        if known and known[:3] == (id(self.target_modules), id(self.exclude_modules), id(self.connectivity)):
            return str(known[3])

        def text(value: Any) -> Any:
            return getattr(value, "__qualname__", None) or (value if isinstance(value, str) else list(value))

        targets = text(self.target_modules)
        if isinstance(self.connectivity, Mapping):  # its keys are the targets
            targets = [targets, *self.connectivity]
        key = self._generate_state_key(target_modules=targets, exclude_modules=text(self.exclude_modules))
        self._state_key = (id(self.target_modules), id(self.exclude_modules), id(self.connectivity), key)
        return key

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
        extra = self.extra_state()
        return {
            **({"extra": extra} if extra else {}),
            "version": 2,
            "seed": self.seed,
            "tensors": {
                t.name: {
                    "K": t.slots.wanted,
                    "step": t.step,
                    "start": t.start,
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
        if state["seed"] != self.seed:
            rank_zero_warn(f"{type(self).__name__}: goes on with the checkpoint's seed {state['seed']} (given: {self.seed}).")
            self.seed = state["seed"]
        for name, tensor in mine.items():
            entry = recorded[name]
            tensor.step, tensor.start = entry["step"], entry["start"]
            for key in ("streak", "warned", "steps", "reborn", "newborn_deaths"):
                setattr(tensor.turnover, key, entry[key])
        self._load_steering(recorded, state.get("version", 1))
        self._take_over_scales(recorded)
        self.load_extra_state(state.get("extra", {}))
        if self._is_at_work or self._at_fabric:  # a loop is running: the method begins again with the loaded state
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
