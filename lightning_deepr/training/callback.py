"""DEEP R as a Lightning callback, for the Trainer, for Fabric and for a plain PyTorch loop.

:class:`SparseTraining` is the base of the family: it converts, finds out when an optimizer has stepped, saves and logs. An
algorithm overrides :meth:`SparseTraining.after_step`, which is given the tensors that have just taken a step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightning.fabric.wrappers import _FabricOptimizer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr.algorithm.statistics import Turnover
from lightning_deepr.conversion import sharing
from lightning_deepr.conversion.allocation import DISTRIBUTIONS, allocate, check_connectivity
from lightning_deepr.conversion.convert import check_compute, check_seed, convert, nothing_to_convert
from lightning_deepr.conversion.selection import Candidate, candidates, check_modules, entry_for, refuse_unknown, select
from lightning_deepr.conversion.start import INITS
from lightning_deepr.training import fabric_hooks, guards
from lightning_deepr.training.schedules import LinearDecay, LrPower, check_l1, check_temperature, is_documented
from lightning_deepr.training.stepping import Stepper
from lightning_deepr.training.tracked import TrackedTensor
from lightning_deepr.weights.averages import follow
from lightning_deepr.weights.base import Parametrization
from lightning_deepr.weights.find import Converted, converted_tensors
from lightning_deepr.weights.k_slots import KSlots

if TYPE_CHECKING:
    import lightning.pytorch as pl


def _keep_draws_apart(tensors: list[Any]) -> None:
    """Layers that were converted one by one have the same index, and would draw alike."""
    taken: set[int] = set()
    following = 1 + max((slots.index for slots in tensors), default=0)
    for slots in tensors:
        if slots.index in taken:
            slots.index, following = following, following + 1
        taken.add(slots.index)


@dataclass
class Rewiring:
    """A callback at work on an optimizer of a plain loop, from :meth:`SparseTraining.attach`."""

    callback: SparseTraining
    _remove: Callable[[], None] = field(repr=False)

    def remove(self) -> None:
        """Stop: the connections stay as they are, and theta is the optimizer's alone."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """The callback's state (step counters, seed), for a checkpoint of your own."""
        return self.callback.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on exactly where :meth:`state_dict` was taken; load module and optimizer too."""
        self.callback.load_state_dict(state_dict)


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose hooks are called and whose id Fabric names, without the wrapper of Fabric or the Trainer."""
    return optimizer.optimizer if isinstance(optimizer, (_FabricOptimizer, LightningOptimizer)) else optimizer


class SparseTraining(Stepper, Callback):
    """Base of the callbacks that train a sparse network; see :class:`DeepR` for the arguments.

    An algorithm overrides :meth:`after_step`.
    """

    scopes: tuple[str, ...] = ("layer",)

    # LightningCLI reads the arguments' names and types here: they have to be there when the program runs
    def __init__(
        self,
        connectivity: int | float | dict[str, int | float] | None = None,
        *,
        target_modules: str | list[str] | Callable = "all",
        exclude_modules: str | Iterable[str] | Callable = (),
        distribution: str | Callable = "erdos_renyi",
        scope: str = "layer",
        l1: float | LinearDecay | dict[str, float | LinearDecay] | Callable | None = None,
        temperature: float | LrPower | dict[str, float | LrPower] | Callable = 0.0,
        init: str = "module",
        rewire_every_n_steps: int = 1,
        rewire_until: int | float | None = None,
        seed: int = 0,
        compute: str = "auto",
        check_invariants: bool = False,
        log_every_n_steps: int = 50,
    ) -> None:
        if connectivity is not None:
            check_connectivity(connectivity)
        check_modules(target_modules, "target_modules")
        check_modules(exclude_modules, "exclude_modules")
        check_l1(l1)
        check_temperature(temperature)
        check_compute(compute)
        check_seed(seed)
        if not callable(distribution) and distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution: expected one of {', '.join(DISTRIBUTIONS)} or a function, found {distribution!r}.")
        if init not in INITS:
            raise ValueError(f"init: expected one of {', '.join(INITS)}, found {init!r}.")
        if scope not in self.scopes:
            known = {"layer": '"layer" (K per tensor)', "global": '"global" (one K for the whole network)'}
            raise ValueError(f"scope: expected {' or '.join(known[one] for one in self.scopes)}, found {scope!r}.")
        for name, value in (("rewire_every_n_steps", rewire_every_n_steps), ("log_every_n_steps", log_every_n_steps)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, found {value!r}.")
        if not isinstance(check_invariants, bool):
            raise TypeError(f"check_invariants: expected True or False, found {check_invariants!r}.")
        if rewire_until is not None and (
            isinstance(rewire_until, bool)
            or not isinstance(rewire_until, (int, float))
            or not rewire_until >= 0
            or (isinstance(rewire_until, float) and rewire_until > 1)
        ):
            raise ValueError(
                f"rewire_until: expected a step (int) or a fraction of training (float in [0, 1]), found {rewire_until!r}."
            )
        super().__init__(
            temperature=temperature,
            rewire_every_n_steps=rewire_every_n_steps,
            rewire_until=rewire_until,
            seed=seed,
            check_invariants=check_invariants,
            log_every_n_steps=log_every_n_steps,
        )
        self.connectivity = connectivity
        self.target_modules: Any = target_modules
        self.exclude_modules: Any = exclude_modules
        self.distribution: Any = distribution
        self.scope = scope
        self.l1: Any = l1
        self.init = init
        self.compute = compute
        self._at_fabric = False
        self._state_key: tuple[Any, ...] = ()
        self._stepped_under_fabric: set[int] = set()
        self._loaded: dict[str, Any] | None = None

    # -- conversion -------------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Convert, in every stage: a sparse checkpoint can be tested, too. Comes before ``configure_optimizers``."""
        guards.refuse_sharding(trainer.strategy)
        if stage == "fit":
            guards.refuse_earlier_averaging(trainer, self)
        if is_overridden("configure_model", pl_module):
            # A callback's setup precedes the module's own hooks; as in Lightning's WeightAveraging, the layers are built here.
            pl_module.configure_model()
        new = self._take(pl_module, watch=True)
        guards.refuse_spawn(trainer, new)

    def _take(self, module: nn.Module, watch: bool = False, early: bool = True) -> int:
        """Convert what is asked for, and take charge of what is converted already.

        Args:
            module: of which.
            watch: whether to look out for writes into converted weights until the training starts.
            early: no optimizer exists yet, so that parameters may become others.

        Returns:
            how many tensors were converted.
        """
        found = candidates(module)
        for argument, value in (("l1", self.l1), ("temperature", self.temperature)):
            if isinstance(value, Mapping):
                refuse_unknown(list(value), found, argument)
        free = [c for c in found if c.slots is None or c.slots.owner() in (None, self)]
        if self.connectivity is None:
            chosen = [c for c in select(free, self.target_modules, self.exclude_modules) if c.slots is not None]
            if not chosen:
                busy = [c.name for c in found if c.slots is not None and c not in free]
                if busy:
                    raise ValueError(
                        f"{type(self).__name__} expects converted tensors that no other callback is at work on, found only "
                        f"{', '.join(busy)}, which another one rewires: call `remove()` on what its `attach` returned."
                    )
                raise ValueError(
                    f"{type(self).__name__}(connectivity=None) expects a converted module, found no converted tensor in "
                    f"{type(module).__name__}. Give a connectivity, or call sparsify(net, connectivity) first."
                )
        else:
            chosen = select(free, self.target_modules, self.exclude_modules, self.connectivity)
        if not chosen:
            raise ValueError(nothing_to_convert(module))
        entries = {c.name: (entry_for("l1", self.l1, c), entry_for("temperature", self.temperature, c)) for c in chosen}
        for candidate in chosen:
            if candidate.slots is not None:
                self.check_kind(candidate.name, candidate.slots)
        if self.scope == "global":
            sharing.check(chosen, early)
        old = [c for c in chosen if c.slots is not None]
        new = [c for c in chosen if c.slots is None]
        if new:
            assert self.connectivity is not None
            counts = allocate(new, self.connectivity, self.distribution)
            for converted in self.convert(module, new, counts):
                converted.slots.watch(watch)
            total = sum(c.total for c in new)
            rank_zero_info(
                f"{type(self).__name__}: {sum(counts.values()):,} connections of {total:,} ({sum(counts.values()) / total:.2%}) in "
                f"{len(new)} tensors."
            )
        if self.scope == "global":
            sharing.join([converted for converted in converted_tensors(module) if converted.name in entries])
        mine = {tensor.slots: tensor for tensor in self._tensors}
        if any(c.slots not in mine for c in old):
            rank_zero_info(
                f"{type(self).__name__}: {len(old)} tensors are converted already; took their connections as they are."
            )
        taken = []
        for converted in converted_tensors(module):
            if converted.name not in entries:
                continue
            tensor = mine.get(converted.slots)
            if tensor is None:
                # a new callback on a trained network goes on counting, so that it does not repeat the draws of the old one
                step = 1 + converted.slots.last_birth()
                count = converted.slots.wanted if self.scope == "layer" else converted.slots.count
                tensor = TrackedTensor(converted, Turnover(count), step=step, start=step)
            tensor.converted, (tensor.alpha, tensor.temperature) = converted, entries[converted.name]
            converted.slots.owner = weakref.ref(self)
            taken.append(tensor)
        if self.scope == "global":  # one theta takes one number of steps
            step = max(tensor.step for tensor in taken)
            for tensor in taken:
                if tensor.step != step:
                    tensor.step = tensor.start = step
        _keep_draws_apart([tensor.slots for tensor in taken])
        self._tensors = taken
        self._matches.clear()
        self._apply_loaded()
        return len(new)

    def convert(self, module: nn.Module, new: list[Candidate], counts: Mapping[str, int]) -> list[Converted]:
        """Convert dense weights into what the algorithm works on: K slots."""
        return convert(module, new, counts, init=self.init, seed=self.seed, compute=self.compute)

    def check_kind(self, name: str, slots: Parametrization) -> None:
        """Refuse a tensor that was converted into something else than what the algorithm works on."""
        if not isinstance(slots, KSlots):
            raise ValueError(
                f"`{name}` has a theta for every potential connection ({type(slots).__name__}): {type(self).__name__} expects K "
                "slots. Call densify(module) and convert it anew."
            )
        if slots.shares and self.scope != "global":
            instead = 'Give scope="global", or call' if "global" in self.scopes else "Call"
            raise ValueError(
                f'`{name}` shares one K with other layers (scope="global"), but {type(self).__name__} works with K per tensor '
                f'(scope="layer"). {instead} densify(module) and convert it anew.'
            )

    # -- when it runs: under a Trainer ------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        guards.refuse_lost_conversions(pl_module, [tensor.converted for tensor in self._tensors])
        self._watch(False)
        guards.refuse_unequal_ranks(trainer, self._tensors)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            average = getattr(callback, "_average_model", None)
            if isinstance(average, nn.Module):
                follow(average)  # StochasticWeightAveraging copies without an AveragedModel

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._apply_loaded()
        self._continues = self._continues or trainer.global_step > 0
        total = trainer.estimated_stepping_batches
        self._total_steps = float(total) if total != float("inf") and total > 0 else None
        self._check_schedules("Give the Trainer max_epochs or max_steps.")
        self._begin_training()
        found = [self._wire(optimizer) for optimizer in trainer.optimizers]
        if not any(found):
            raise RuntimeError(guards.OPTIMIZER_TOO_EARLY)
        known = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        idle = [t.name for t in self._tensors if id(t.theta) not in known and t.theta.requires_grad]
        if idle:
            rank_zero_warn(f"{type(self).__name__}: no optimizer holds {', '.join(idle)}: these tensors won't be trained.")

    @override
    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        # The closure has run by now. (A step pre-hook would see the gradients of the step before: under the Trainer forward
        # and backward happen inside `optimizer.step`.)
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._refuse_non_finite(optimizer, gradients=not scaled)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        step = max((tensor.step for tensor in self._tensors), default=0)
        if not trainer.loggers or step % self.log_every_n_steps:
            return
        self._settle()
        if not any(t.turnover.steps for t in self._tensors):
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
        self._release()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        self._unhook()
        self._watch(False)
        self._continues = False
        for tensor in self._tensors:
            if tensor.slots.owner() is self:
                tensor.slots.owner = lambda: None

    # -- when it runs: in a plain loop ------------------------------------------------------------------------------------

    def prepare(self, net: nn.Module) -> nn.Module:
        """Convert a network in place, as :meth:`setup` does under a Trainer: for a plain loop or Fabric, before the optimizer is made.

        For what works on K slots it is :func:`lightning_deepr.sparsify` with the callback's own arguments; a method that needs a
        theta for every potential connection has no other way.

        Args:
            net: any module, not converted yet.

        Returns:
            the network itself.

        Example::

            >>> import torch
            >>> from lightning_deepr import FixedRandom
            >>> callback = FixedRandom(0.05)
            >>> net = callback.prepare(torch.nn.Linear(100, 10))
            >>> rewiring = callback.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
        """
        at_work, self._tensors = self._tensors, []
        loaded, self._loaded = self._loaded, None
        self._take(net)
        for tensor in self._tensors:  # nobody is at work on it yet: attach, or Fabric's setup, takes charge
            tensor.slots.owner = lambda: None
        self._tensors, self._loaded = at_work, loaded
        self._matches.clear()
        return net

    def attach(self, net: nn.Module, optimizer: Optimizer, total_steps: int | None = None) -> Rewiring:
        """Rewire after each ``optimizer.step()`` of a plain PyTorch loop.

        Args:
            net: converted before (:func:`lightning_deepr.sparsify`), and before the optimizer was made.
            optimizer: holds theta of the converted tensors, or some of them (call once per optimizer).
            total_steps: length of the training; needed by a schedule over the progress and a fraction in ``rewire_until``.

        Returns:
            a handle with ``remove()``, ``state_dict()`` and ``load_state_dict()``.

        Raises:
            ValueError: the net is not converted, or the optimizer was made before it was.

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
                "`sparsify(net, connectivity)` before the optimizer is made."
            )
        optimizer = _unwrapped(optimizer)
        self._take_charge(net, keep=bool(self._hooks))
        if total_steps is not None:
            self._total_steps = float(total_steps)
        self._check_schedules("Give attach(..., total_steps=...).")
        if not self._hooks:
            self._begin_training()
        if not self._wire(optimizer, check_before=True):
            if not self._hooks:
                self._release()
            raise ValueError(guards.OPTIMIZER_TOO_EARLY)
        key = id(optimizer)

        def remove() -> None:
            self._unhook(key)
            if not self._hooks:
                self._release()

        return Rewiring(self, remove)

    def _take_charge(self, net: nn.Module, keep: bool) -> None:
        """Take charge of a network that is converted: nothing is converted any more, an optimizer exists.

        Args:
            net: has converted tensors.
            keep: the tensors of other networks at which this callback is at work too, a generator for one.
        """
        if {t.slots for t in self._tensors}.isdisjoint(c.slots for c in converted_tensors(net)):
            kept = self._tensors if keep else []
            wanted, self.connectivity = self.connectivity, None
            try:
                self._take(net, early=False)
            finally:
                self.connectivity = wanted
            names = {tensor.name for tensor in kept}
            for tensor in self._tensors:
                plain, number = tensor.name, 2
                while tensor.name in names:
                    tensor.converted = tensor.converted._replace(name=f"{plain} ({number})")
                    number += 1
            self._tensors = kept + self._tensors
            self._matches.clear()
        for tensor in self._tensors:
            tensor.slots.owner = weakref.ref(self)

    # -- when it runs: under Fabric ---------------------------------------------------------------------------------------

    def on_after_setup(self, fabric: Any, module: nn.Module) -> None:
        """Fabric calls this at the end of ``fabric.setup(net, optimizer)``; the net has to be converted before that."""
        guards.refuse_sharding(fabric.strategy)
        if not any(True for _ in converted_tensors(module)):
            return  # another module of the same script, a discriminator for one
        at_work = bool(self._hooks) or self._at_fabric
        self._take_charge(module, keep=at_work)
        self._check_schedules(
            "Fabric does not know the length of the training: call attach(net, optimizer, total_steps=...) on the callback."
        )
        if not at_work:
            self._begin_training()
        self._at_fabric = True
        fabric_hooks.listen(self)

    def before_step_under_fabric(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Before a step of any optimizer: values that are not finite."""
        if id(optimizer) not in self._hooks and self._match(optimizer):
            self._before_plain_step(optimizer, args, kwargs)
            self._call_before_step(optimizer)

    def after_step_under_fabric(self, optimizer: Optimizer) -> None:
        """After a step of any optimizer: it was really taken."""
        if not guards.was_skipped(optimizer):
            self._stepped_under_fabric.add(id(optimizer))

    @override
    def on_after_optimizer_step(self, strategy: Any = None, optimizer: Optimizer | None = None) -> None:
        """What follows an optimizer step. Fabric calls it by itself; elsewhere a hook on the optimizer does.

        A tensor is rewired only if its theta is in this optimizer, requires a gradient and has one, and never twice in a step.
        """
        assert optimizer is not None
        if strategy is not None:  # Fabric
            if not self._tensors:
                raise RuntimeError(
                    f"{type(self).__name__} was given to Fabric, but has no network: expected `sparsify(net, ...)` and then "
                    "`fabric.setup(net, optimizer)`. (Fabric does not tell its callbacks of `setup_module`: call "
                    "`attach(net, optimizer)` on the callback there.)"
                )
            was_taken = id(optimizer) in self._stepped_under_fabric
            self._stepped_under_fabric.discard(id(optimizer))
            if id(optimizer) in self._hooks or not was_taken:
                return  # attached as well: the optimizer's own hook has done it; or the step was skipped
        self._after_optimizer_step(optimizer)

    # -- what it knows and saves ------------------------------------------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        # Lightning asks for it at every hook, to name what it profiles
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
        """Seed and steps: with the module's own state this is everything."""
        if (not is_documented(self.l1) or not is_documented(self.temperature)) and "lambda" not in self._told:
            self._told.add("lambda")
            rank_zero_warn(
                f"{type(self).__name__}: a function as l1 or temperature can't be saved; give the same one when you resume, or "
                "use LinearDecay and LrPower."
            )
        self._settle()
        return {
            "version": 1,
            "seed": self.seed,
            "tensors": {
                t.name: {
                    "K": t.slots.wanted,
                    "step": t.step,
                    "start": t.start,
                    "streak": t.turnover.streak,
                    "warned": t.turnover.warned,
                    "steps": t.turnover.steps,
                    "reborn": t.turnover.reborn,
                    "newborn_deaths": t.turnover.newborn_deaths,
                }
                for t in self._tensors
            },
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict)
        self._apply_loaded()

    def _apply_loaded(self) -> None:
        """Take over a checkpoint's state as soon as the tensors that it is about are there."""
        if self._loaded is None or not self._tensors:
            return
        state, self._loaded, self._continues = self._loaded, None, True
        self._settle()
        recorded: Mapping[str, Any] = state["tensors"]
        mine = {tensor.name: tensor for tensor in self._tensors}
        if set(recorded) != set(mine):
            raise ValueError(
                f"The checkpoint is of another model or selection: expected the tensors {sorted(mine)}, found {sorted(recorded)}. "
                "Give the same target_modules and connectivity as in the run that wrote it."
            )
        for name, tensor in mine.items():
            if recorded[name]["K"] != tensor.slots.wanted:
                raise ValueError(
                    f"`{name}`: expected a checkpoint with K = {tensor.slots.wanted}, found {recorded[name]['K']}. Give the same "
                    "connectivity as in the run that wrote it."
                )
        if state["seed"] != self.seed:
            rank_zero_warn(f"{type(self).__name__}: goes on with the checkpoint's seed {state['seed']} (given: {self.seed}).")
            self.seed = state["seed"]
        for name, tensor in mine.items():
            entry = recorded[name]
            tensor.step, tensor.start = entry["step"], entry["start"]
            for key in ("streak", "warned", "steps", "reborn", "newborn_deaths"):
                setattr(tensor.turnover, key, entry[key])
