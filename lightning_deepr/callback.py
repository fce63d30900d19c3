"""DEEP R as a Lightning callback, for the Trainer, for Fabric and for a plain PyTorch loop.

:class:`SparseTraining` is the base of the family: it converts, finds out when an optimizer has stepped, saves and logs. An
algorithm overrides :meth:`SparseTraining.after_step`, which is given the tensors that have just taken a step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.wrappers import _FabricOptimizer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from typing_extensions import override

from lightning_deepr import guards, rewiring
from lightning_deepr.connections import Converted, KSlots, converted_tensors, follow, restart_averages
from lightning_deepr.conversion import check_compute, check_seed, connectivity_report, convert, nothing_to_convert
from lightning_deepr.optimizer_state import StartingState
from lightning_deepr.schedules import (
    L1,
    LinearDecay,
    LrPower,
    check_l1,
    check_temperature,
    default_l1,
    evaluate,
    is_documented,
    l1_for,
)
from lightning_deepr.selection import (
    DISTRIBUTIONS,
    Modules,
    allocate,
    candidates,
    check_connectivity,
    check_modules,
    refuse_unknown,
    select,
)
from lightning_deepr.start import INITS
from lightning_deepr.statistics import Turnover, collapse_message

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass
class Tensor_:
    """A tensor at work: the converted weight and what the callback keeps about it."""

    converted: Converted
    turnover: Turnover
    alpha: Any = None  # l1's entry for it; None: by the optimizer
    step: int = 0  # optimizer steps that it took part in
    start: int = 0  # ... at which the present training began
    collapse_told: bool = False

    @property
    def name(self) -> str:
        return self.converted.name

    @property
    def slots(self) -> KSlots:
        return self.converted.slots

    @property
    def theta(self) -> nn.Parameter:
        return self.converted.theta


@dataclass
class Stepped:
    """A tensor that has just taken an optimizer step, with what holds in this step."""

    tensor: Tensor_
    theta: Tensor  # detached: written in place
    group_index: int
    lr: Any
    alpha: Any
    temperature: Any
    rewires: bool  # False: theta < 0 is set to 0


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


class SparseTraining(Callback):
    """Base of the callbacks that train a sparse network; see :class:`DeepR` for the arguments.

    An algorithm overrides :meth:`after_step`.
    """

    def __init__(
        self,
        connectivity: float | int | dict[str, float | int] | None = None,
        *,
        target_modules: Any = "all",
        exclude_modules: Any = (),
        distribution: Any = "erdos_renyi",
        scope: str = "layer",
        l1: Any = None,
        temperature: Any = 0.0,
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
        if scope != "layer":
            raise ValueError(f'scope: expected "layer" (K per tensor; "global" is not in this version), found {scope!r}.')
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
        self.connectivity = connectivity
        self.target_modules = target_modules
        self.exclude_modules = exclude_modules
        self.distribution = distribution
        self.l1 = l1
        self.temperature = temperature
        self.init = init
        self.rewire_every_n_steps = rewire_every_n_steps
        self.rewire_until = rewire_until
        self.seed = seed
        self.compute = compute
        self.check_invariants = check_invariants
        self.log_every_n_steps = log_every_n_steps

        self._tensors: list[Tensor_] = []
        self._total_steps: float | None = None  # of the present training; None: not known
        # By id(optimizer). An id is free again when its optimizer is gone: the first keeps the optimizer, the second tells.
        self._hooks: dict[int, tuple[Optimizer, list[Any]]] = {}
        self._matches: dict[int, tuple[weakref.ref[Optimizer], int, list[tuple[Tensor_, int]]]] = {}
        self._starting_state = StartingState()
        self._newborn_deaths: dict[str, int] = {}  # of the present step, by tensor
        self._fabric_hooks: list[Any] = []
        self._stepped_under_fabric: set[int] = set()
        self._loaded: dict[str, Any] | None = None
        self._continues = False  # a state was loaded: what begins is no new training
        self._told: set[str] = set()

    # -- the algorithm ----------------------------------------------------------------------------------------------------

    def after_step(self, stepped: Sequence[Stepped], optimizer: Optimizer) -> list[Tensor]:
        """What follows an optimizer step, for the tensors that took it. In place.

        Returns:
            for each tensor the slots that were reborn, int64 [R_i].
        """
        raise NotImplementedError(f"{type(self).__name__} has to say what follows an optimizer step.")

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

    def _take(self, module: nn.Module, watch: bool = False) -> int:
        """Convert what is asked for, and take charge of what is converted already. Returns how many were converted."""
        found = candidates(module)
        if isinstance(self.l1, Mapping):
            refuse_unknown(list(self.l1), found, "l1")
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
        alphas = {c.name: l1_for(self.l1, c) for c in chosen}
        old = [c for c in chosen if c.slots is not None]
        new = [c for c in chosen if c.slots is None]
        if new:
            assert self.connectivity is not None
            counts = allocate(new, self.connectivity, self.distribution)
            for converted in convert(module, new, counts, init=self.init, seed=self.seed, compute=self.compute):
                converted.slots.watch(watch)
            total = sum(c.total for c in new)
            rank_zero_info(
                f"{type(self).__name__}: {sum(counts.values()):,} connections of {total:,} ({sum(counts.values()) / total:.2%}) in "
                f"{len(new)} tensors."
            )
        mine = {tensor.slots: tensor for tensor in self._tensors}
        if any(c.slots not in mine for c in old):
            rank_zero_info(
                f"{type(self).__name__}: {len(old)} tensors are converted already; took their connections as they are."
            )
        taken = []
        for converted in converted_tensors(module):
            if converted.name not in alphas:
                continue
            tensor = mine.get(converted.slots) or Tensor_(converted, Turnover(converted.slots.count))
            tensor.converted, tensor.alpha = converted, alphas[converted.name]
            converted.slots.owner = weakref.ref(self)
            taken.append(tensor)
        self._tensors = taken
        self._matches.clear()
        self._apply_loaded()
        return len(new)

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
        self._begin_training()
        total = trainer.estimated_stepping_batches
        self._total_steps = float(total) if total != float("inf") and total > 0 else None
        self._check_schedules("Give the Trainer max_epochs or max_steps.")
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
        if not trainer.loggers or step % self.log_every_n_steps or not any(t.turnover.steps for t in self._tensors):
            return
        metrics = self.statistics()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._unhook()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
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
        if not self._hooks:
            self._begin_training()
        if total_steps is not None:
            self._total_steps = float(total_steps)
        self._check_schedules("Give attach(..., total_steps=...).")
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
                self._take(net)
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
        at_work = bool(self._hooks or self._fabric_hooks)
        self._take_charge(module, keep=at_work)
        if not at_work:
            self._begin_training()
        self._check_schedules(
            "Fabric does not know the length of the training: call attach(net, optimizer, total_steps=...) on the callback."
        )
        if not self._fabric_hooks:
            # Fabric calls on_after_optimizer_step whether or not GradScaler has skipped the step; torch's own hooks know.
            me = weakref.ref(self)

            def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
                callback = me()
                if callback is not None and id(optimizer) not in callback._hooks and callback._match(optimizer):
                    callback._before_plain_step(optimizer, args, kwargs)

            def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
                callback = me()
                if callback is not None and not guards.was_skipped(optimizer):
                    callback._stepped_under_fabric.add(id(optimizer))

            self._fabric_hooks = [
                register_optimizer_step_pre_hook(before),
                register_optimizer_step_post_hook(after),
            ]
            for hook in self._fabric_hooks:
                weakref.finalize(self, hook.remove)

    def on_after_optimizer_step(self, strategy: Any = None, optimizer: Optimizer | None = None) -> None:
        """What follows an optimizer step. Fabric calls it by itself; elsewhere a hook on the optimizer does.

        A tensor is rewired only if its theta is in this optimizer, requires a gradient and has one, and never twice in a step.
        """
        assert optimizer is not None
        if strategy is not None:  # Fabric
            was_taken = id(optimizer) in self._stepped_under_fabric
            self._stepped_under_fabric.discard(id(optimizer))
            if id(optimizer) in self._hooks or not was_taken:
                return  # attached as well: the optimizer's own hook has done it; or the step was skipped
        self._after_optimizer_step(optimizer)

    # -- one step ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _after_optimizer_step(self, optimizer: Optimizer) -> None:
        stepped = []
        for tensor, group_index in self._match(optimizer):
            theta = tensor.theta
            if theta.grad is None or not theta.requires_grad:
                continue
            stepped.append(self._stepped(tensor, theta.detach(), optimizer, group_index))
        if not stepped:
            return
        reborn = self.after_step(stepped, optimizer)
        for item, slots in zip(stepped, reborn, strict=True):
            tensor = item.tensor
            if self.check_invariants:
                guards.check_invariants(tensor, item, slots, optimizer, self._starting_state)
            tensor.step += 1
            if tensor.turnover.add(slots.numel(), self._newborn_deaths.get(tensor.name, 0)):
                rank_zero_warn(collapse_message(tensor.name, item.alpha))
        self._newborn_deaths = {}

    def _stepped(self, tensor: Tensor_, theta: Tensor, optimizer: Optimizer, group_index: int) -> Stepped:
        group = optimizer.param_groups[group_index]
        lr, done = group["lr"], tensor.step - tensor.start
        progress = done / self._total_steps if self._total_steps else 0.0
        alpha = tensor.alpha
        if alpha is None:
            alpha, _ = default_l1(optimizer, group)  # the momentum may be on a schedule
        alpha = evaluate(alpha, min(progress, 1.0), f"l1 of `{tensor.name}`")
        temperature = evaluate(self.temperature, lr, "temperature")
        until = self.rewire_until
        if isinstance(until, float):
            assert self._total_steps is not None
            until = until * self._total_steps
        rewires = (done + 1) % self.rewire_every_n_steps == 0 and (until is None or done < until)
        return Stepped(tensor, theta, group_index, lr, alpha, temperature, rewires)

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

    def _match(self, optimizer: Optimizer) -> list[tuple[Tensor_, int]]:
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

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # a fused optimizer calls its hooks also when GradScaler has made it skip the step
            if not guards.was_skipped(optimizer):
                self.on_after_optimizer_step(optimizer=optimizer)

        self._note_l1(optimizer)
        hooks = [optimizer.register_step_post_hook(after)]
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

    # -- what it knows and saves ------------------------------------------------------------------------------------------

    def statistics(self) -> dict[str, float]:
        """Means per step since the last call: ``deepr/<tensor>/turnover``, ``.../newborn_deaths``, ``.../mature_deaths``."""
        return {f"deepr/{t.name}/{key}": value for t in self._tensors for key, value in t.turnover.take().items()}

    @property
    @override
    def state_key(self) -> str:
        def text(value: Any) -> Any:
            return getattr(value, "__qualname__", None) or (value if isinstance(value, str) else list(value))

        targets = text(self.target_modules)
        if isinstance(self.connectivity, Mapping):  # its keys are the targets
            targets = [targets, *self.connectivity]
        return self._generate_state_key(target_modules=targets, exclude_modules=text(self.exclude_modules))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Seed and steps: with the module's own state this is everything."""
        if (not is_documented(self.l1) or not is_documented(self.temperature)) and "lambda" not in self._told:
            self._told.add("lambda")
            rank_zero_warn(
                f"{type(self).__name__}: a function as l1 or temperature can't be saved; give the same one when you resume, or "
                "use LinearDecay and LrPower."
            )
        return {
            "version": 1,
            "seed": self.seed,
            "tensors": {
                t.name: {
                    "K": t.slots.count,
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
        recorded: Mapping[str, Any] = state["tensors"]
        mine = {tensor.name: tensor for tensor in self._tensors}
        if set(recorded) != set(mine):
            raise ValueError(
                f"The checkpoint is of another model or selection: expected the tensors {sorted(mine)}, found {sorted(recorded)}. "
                "Give the same target_modules and connectivity as in the run that wrote it."
            )
        for name, tensor in mine.items():
            if recorded[name]["K"] != tensor.slots.count:
                raise ValueError(
                    f"`{name}`: expected a checkpoint with K = {tensor.slots.count}, found {recorded[name]['K']}. Give the same "
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

    def report(self, module: nn.Module) -> Any:
        """:func:`lightning_deepr.connectivity_report` of a module."""
        return connectivity_report(module)


class DeepR(SparseTraining):
    """DEEP R: exactly K connections at every step, rewired after each optimizer step (Algorithm 1 of the paper).

    After ``optimizer.step()``, whichever optimizer it is: theta loses eta * alpha and takes a step of a random walk, with
    the plain learning rate eta of theta's parameter group; connections with theta < 0 go dormant; as many dormant places,
    drawn uniformly, become active at theta = 0 with the state that the optimizer starts with.

    Args:
        connectivity: float in (0, 1] | int | dict {pattern: float | int}; None: everything is converted already.
        target_modules: "all" | "all-linear" | list of patterns | regular expression | predicate(name, module).
        exclude_modules: the same forms.
        distribution: "erdos_renyi" | "erk" | "uniform" | "deepr" (0.75, 2.3, 22.8 for three layers) | a function.
        scope: "layer": K per tensor.
        l1: alpha; float | dict {pattern: float} | LinearDecay(start, end) | function of the progress; None: by the optimizer
            (1e-4 / (1 - momentum) under SGD, .03 under Adam's family and RMSprop).
        temperature: T; float | LrPower(coefficient, power) | function of the learning rate.
        init: the start: "module" | "largest" | "deepr".
        rewire_every_n_steps: in the steps between, theta < 0 becomes 0 (active, sign kept).
        rewire_until: a step (int) or a fraction of the training (float), then the connectivity is frozen; L1 and noise go on.
        seed: of places, signs and noise; ``seed_everything`` does not change it.
        compute: "auto" | "dense".
        check_invariants: check everything after every step, and name the tensor and the step when something breaks.
        log_every_n_steps: how often turnover is logged.

    Raises:
        TypeError, ValueError: an argument that makes no sense, or one that does not fit the model (at ``setup``).
        RuntimeError: a theta or gradient that is not finite, before the step.

    Note:
        With Adam a newborn has zero moments but the shared step count, so that its first step is about 3 times the learning
        rate whatever its gradient (RMSprop: 10 times): it survives by the sign of its gradient alone.
        Strategies that shard parameters are refused.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_deepr import DeepR
        >>> trainer = Trainer(callbacks=[DeepR(connectivity=0.01)], logger=False, enable_checkpointing=False)
    """

    # spelled out again: LightningCLI reads names, types and the documentation of the arguments here
    def __init__(
        self,
        connectivity: int | float | dict[str, int | float] | None = None,
        *,
        target_modules: str | list[str] | Callable = "all",
        exclude_modules: str | Iterable[str] | Callable = (),
        distribution: str | Callable = "erdos_renyi",
        scope: str = "layer",
        l1: float | dict[str, float] | LinearDecay | Callable | None = None,
        temperature: float | LrPower | Callable = 0.0,
        init: str = "module",
        rewire_every_n_steps: int = 1,
        rewire_until: int | float | None = None,
        seed: int = 0,
        compute: str = "auto",
        check_invariants: bool = False,
        log_every_n_steps: int = 50,
    ) -> None:
        super().__init__(
            connectivity,
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            distribution=distribution,
            scope=scope,
            l1=l1,
            temperature=temperature,
            init=init,
            rewire_every_n_steps=rewire_every_n_steps,
            rewire_until=rewire_until,
            seed=seed,
            compute=compute,
            check_invariants=check_invariants,
            log_every_n_steps=log_every_n_steps,
        )

    @override
    def after_step(self, stepped: Sequence[Stepped], optimizer: Optimizer) -> list[Tensor]:
        # tensors on one device that took part in equally many steps are handled together: nearly always all of them
        groups = {(item.tensor.step, item.theta.device) for item in stepped}
        if len(groups) == 1:
            return self._deep_r(stepped, optimizer, stepped[0].tensor.step)
        reborn: dict[int, Tensor] = {}
        for step, device in groups:
            group = [item for item in stepped if (item.tensor.step, item.theta.device) == (step, device)]
            reborn.update(zip(map(id, group), self._deep_r(group, optimizer, step), strict=True))
        return [reborn[id(item)] for item in stepped]

    def _deep_r(self, stepped: Sequence[Stepped], optimizer: Optimizer, step: int) -> list[Tensor]:
        thetas, tensors = [item.theta for item in stepped], [item.tensor.slots for item in stepped]
        # theta <- theta - eta * alpha + sqrt(2 * eta * T) * nu    (the gradient step was the optimizer's)
        rewiring.shrink(thetas, [item.lr * item.alpha for item in stepped])
        rewiring.diffuse(thetas, [(2 * item.lr * item.temperature) ** 0.5 for item in stepped], tensors, self.seed, step)
        keep = [item.theta for item in stepped if not item.rewires]
        rewiring.keep_active(keep)
        if len(keep) == len(stepped):
            return [theta.new_empty(0, dtype=torch.long) for theta in thetas]
        # if theta < 0: dormant; then activate as many dormant places, uniformly at random, theta <- 0
        dormant = rewiring.dormant_slots(thetas)
        self._newborn_deaths = {
            item.tensor.name: int((item.tensor.slots.born[slots] == step - 1).sum())
            for item, slots in zip(stepped, dormant, strict=True)
            if slots.numel()
        }
        rewiring.reactivate(thetas, tensors, dormant, self.seed, step)
        for item, slots in zip(stepped, dormant, strict=True):
            if slots.numel():
                self._starting_state.reset(optimizer, item.group_index, item.tensor.theta, slots)
                if item.tensor.slots.averages:
                    restart_averages(item.tensor.slots, slots)
        return dormant


__all__ = ["L1", "DeepR", "Modules", "Rewiring", "SparseTraining", "Stepped"]
