"""DEEP R, the callback."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_deepr import kernels
from lightning_deepr.algorithm import rewiring
from lightning_deepr.algorithm.shared_rewiring import RULES
from lightning_deepr.conversion.sharing import refuse_small_total
from lightning_deepr.training import gpu_check, guards
from lightning_deepr.training.callback import SparseTraining
from lightning_deepr.training.schedules import LinearDecay, LrPower
from lightning_deepr.training.tracked import Reborn, Stepped, TrackedTensor
from lightning_deepr.weights.averages import restart_averages
from lightning_deepr.weights.shared import Pool

if TYPE_CHECKING:
    from lightning_deepr.kernels.cpu.step import Table
    from lightning_deepr.kernels.gpu import step as triton_step

MOST_STATES = 4  # state tensors of an optimizer that the kernel resets; more are reset in PyTorch


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
        scope: "layer": K per tensor. "global": one K for the whole network; a connection that goes dormant may come back in another
            layer. One theta serves all layers, so they have to be in one parameter group of one optimizer. ``connectivity`` gives
            K, ``distribution`` the start. (A compiled network is compiled anew when counts change, and soon runs uncompiled.)
        reactivation: under ``scope="global"``: "budget": a newborn's layer is drawn with probability proportional to the connections
            with which it started (N_l * p_l, as in the authors' script), then one of its dormant places; "uniform": one of all
            dormant places of the network. A full layer is never chosen.
        least_per_layer: under ``scope="global"``: a layer that a step leaves with fewer connections than this gets births before the
            rule is asked; 0 lets layers go empty (a chain of layers is cut then).
        l1: alpha; float | dict {pattern: float} | LinearDecay(start, end) | function of the progress; None: by the optimizer
            (1e-4 / (1 - momentum) under SGD, .03 under Adam's family and RMSprop).
        temperature: T; float | LrPower(coefficient, power) | function of the learning rate.
        init: the start: "module" | "largest" | "deepr".
        rewire_every_n_steps: in the steps between, theta < 0 becomes 0 (active, sign kept).
        rewire_until: a step (int) or a fraction of the training (float), then the connectivity is frozen; L1 and noise go on.
        seed: of places, signs and noise; ``seed_everything`` does not change it.
        compute: "auto" | "dense" | "sparse", see :func:`lightning_deepr.sparsify`.
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

    scopes = ("layer", "global")
    watches_for_collapse = True

    def __init__(
        self,
        connectivity: int | float | dict[str, int | float] | None = None,
        *,
        target_modules: str | list[str] | Callable = "all",
        exclude_modules: str | Iterable[str] | Callable = (),
        distribution: str | Callable = "erdos_renyi",
        scope: str = "layer",
        reactivation: str = "budget",
        least_per_layer: int = 1,
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
        if reactivation not in RULES:
            raise ValueError(f"reactivation: expected one of {', '.join(RULES)}, found {reactivation!r}.")
        if isinstance(least_per_layer, bool) or not isinstance(least_per_layer, int) or least_per_layer < 0:
            raise ValueError(f"least_per_layer: expected an int of at least 0, found {least_per_layer!r}.")
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
        self.reactivation = reactivation
        self.least_per_layer = least_per_layer

    @override
    def _begin_training(self) -> None:
        super()._begin_training()
        guards.warn_of_free_signs(type(self).__name__, self._tensors, "these connections go dormant")

    @override
    def after_step(self, stepped: Sequence[Stepped], optimizer: Optimizer) -> list[Reborn]:
        if self.scope == "global":
            return self._deep_r_of_networks(stepped, optimizer)
        # tensors of a kind that took part in equally many steps are handled together: nearly always all of them
        groups = {(item.tensor.step, item.theta.device, item.theta.dtype) for item in stepped}
        if len(groups) == 1:
            return self._deep_r(stepped, optimizer, stepped[0].tensor.step)
        reborn: dict[int, Reborn] = {}
        for step, device, dtype in groups:
            group = [i for i in stepped if (i.tensor.step, i.theta.device, i.theta.dtype) == (step, device, dtype)]
            reborn.update(zip(map(id, group), self._deep_r(group, optimizer, step), strict=True))
        return [reborn[id(item)] for item in stepped]

    def _deep_r(self, stepped: Sequence[Stepped], optimizer: Optimizer, step: int) -> list[Reborn]:
        if all(gpu_check.rewires(item.theta, item.tensor.slots) for item in stepped):
            return self._deep_r_on_gpu(stepped, optimizer, step)
        dtype = stepped[0].theta.dtype
        if all(item.theta.dtype == dtype and kernels.suits(item.theta) for item in stepped):
            return self._deep_r_in_one_call(stepped, optimizer, step)
        thetas, tensors = [item.theta for item in stepped], [item.tensor.slots for item in stepped]
        # theta <- theta - eta * alpha + sqrt(2 * eta * T) * nu    (the gradient step was the optimizer's)
        rewiring.shrink(thetas, [item.lr * item.alpha for item in stepped])
        rewiring.diffuse(thetas, [(2 * item.lr * item.temperature) ** 0.5 for item in stepped], tensors, self.seed, step)
        keep = [item.theta for item in stepped if not item.rewires]
        rewiring.keep_active(keep)
        if len(keep) == len(stepped):
            return [Reborn(0, 0, theta.new_empty(0, dtype=torch.long)) for theta in thetas]
        # if theta < 0: dormant; then activate as many dormant places, uniformly at random, theta <- 0
        dormant = rewiring.dormant_slots(thetas)
        newborns = [
            int((tensor.born[slots] >= step - self.rewire_every_n_steps).sum()) if slots.numel() else 0
            for tensor, slots in zip(tensors, dormant, strict=True)
        ]
        rewiring.reactivate(thetas, tensors, dormant, self.seed, step)
        for item, slots in zip(stepped, dormant, strict=True):
            if slots.numel():
                self._starting_state.reset(optimizer, item.group_index, item.tensor.theta, slots)
                if item.tensor.slots.averages:
                    restart_averages(item.tensor.slots, slots)
        return [Reborn(slots.numel(), count, slots) for slots, count in zip(dormant, newborns, strict=True)]

    def _deep_r_in_one_call(self, stepped: Sequence[Stepped], optimizer: Optimizer, step: int) -> list[Reborn]:
        """The same, line by line, in a compiled kernel for all tensors together."""
        table = self._table(stepped)
        states = [self._starting_state.tensors(optimizer, item.group_index, item.tensor.theta) for item in stepped]
        within = [found if not found or _kernel_can_write(found) else [] for found in states]
        counts, newborns = table.step(
            [item.theta for item in stepped],
            [item.lr * item.alpha for item in stepped],
            [(2 * item.lr * item.temperature) ** 0.5 for item in stepped],
            [item.rewires for item in stepped],
            within,
            step - self.rewire_every_n_steps,
            self.seed,
            step,
        )
        reborn = [Reborn(*found) for found in zip(counts, newborns, table.reborn, strict=True)]
        for item, born, found, done in zip(stepped, reborn, states, within, strict=True):
            if born.births and len(done) < len(found):
                for value, start in found:
                    value.index_fill_(0, born.slots, start)
            if born.births and item.tensor.slots.averages:
                restart_averages(item.tensor.slots, born.slots)
        return reborn

    def _deep_r_on_gpu(self, stepped: Sequence[Stepped], optimizer: Optimizer, step: int) -> list[Reborn]:
        """The same in Triton. The host learns nothing of the outcome, unless it has to: looking would make it wait."""
        look = self.check_invariants or any(item.tensor.slots.averages for item in stepped)
        counts, dormant = self._gpu_table(stepped).step(
            [item.theta for item in stepped],
            [item.lr * item.alpha for item in stepped],
            [(2 * item.lr * item.temperature) ** 0.5 for item in stepped],
            [item.rewires for item in stepped],
            [self._starting_state.tensors(optimizer, item.group_index, item.tensor.theta) for item in stepped],
            step - self.rewire_every_n_steps,
            self.seed,
            step,
            want_dormant=look,
        )
        nothing = torch.empty(0, dtype=torch.long, device=counts.device)
        if not look or not any(item.rewires for item in stepped):
            return [Reborn(0, 0, nothing, pending=(counts, i) if item.rewires else None) for i, item in enumerate(stepped)]
        reborn = [
            Reborn(births, newborns, mask.nonzero().view(-1))
            for (births, newborns), mask in zip(counts.tolist(), dormant, strict=True)
        ]
        for item, born in zip(stepped, reborn, strict=True):
            if born.births and item.tensor.slots.averages:
                restart_averages(item.tensor.slots, born.slots)
        return reborn

    # -- one K for a whole network ----------------------------------------------------------------------------------------

    @override
    def _take(self, module: nn.Module, watch: bool = False, early: bool = True) -> int:
        converted = super()._take(module, watch, early)
        if self.scope == "global":
            for pool in self._pools(self._tensors):
                refuse_small_total(pool.count, [member.total for member in pool.members], self.least_per_layer)
        return converted

    @staticmethod
    def _pools(tensors: Sequence[TrackedTensor]) -> list[Pool]:
        """One for each network; nearly always there is one."""
        return list({id(tensor.slots.pool): tensor.slots.pool for tensor in tensors}.values())

    def _deep_r_of_networks(self, stepped: Sequence[Stepped], optimizer: Optimizer) -> list[Reborn]:
        reborn: dict[int, Reborn] = {}
        for pool in self._pools([item.tensor for item in stepped]):
            items = sorted((i for i in stepped if i.tensor.slots.pool is pool), key=lambda item: item.tensor.slots.position)
            reborn.update(zip(map(id, items), self._deep_r_of_network(pool, items, optimizer), strict=True))
        return [reborn[id(item)] for item in stepped]

    def _deep_r_of_network(self, pool: Pool, items: Sequence[Stepped], optimizer: Optimizer) -> list[Reborn]:
        """The same algorithm, with the places of all layers as one set."""
        first, step = items[0], items[0].tensor.step
        whole = first.tensor.theta
        theta = whole.detach()
        decrements = [item.lr * item.alpha for item in items]
        if not isinstance(first.lr, Tensor) and all(decrement == decrements[0] for decrement in decrements):
            rewiring.shrink([theta], decrements[:1])
        else:
            rewiring.shrink([item.theta for item in items], decrements)
        scales = [(2 * item.lr * item.temperature) ** 0.5 for item in items]
        rewiring.diffuse([item.theta for item in items], scales, [item.tensor.slots for item in items], self.seed, step)
        moves = None
        if first.rewires:
            moves = pool.rewire(
                theta,
                whole.grad,
                self._starting_state.tensors(optimizer, first.group_index, whole),
                rule=self.reactivation,
                least=self.least_per_layer,
                newborn_since=step - self.rewire_every_n_steps,
                seed=self.seed,
                step=step,
            )
        else:
            rewiring.keep_active([theta])
        reborn = []
        for i, (item, count) in enumerate(zip(items, pool.counts, strict=True)):
            item.tensor.turnover.count = max(count, 1)
            births, deaths, newborns = (
                (0, 0, 0) if moves is None else (moves.births[i], moves.deaths[i], moves.newborn_deaths[i])
            )
            numbers = torch.arange(count - births, count, device=theta.device)
            reborn.append(Reborn(births, newborns, numbers, deaths - births))
        return reborn

    @override
    def check(self, item: Stepped, born: Reborn, optimizer: Optimizer) -> None:
        slots = item.tensor.slots
        if not slots.shares:
            super().check(item, born, optimizer)
            return
        theta = item.tensor.theta
        starts = self._starting_state.of(optimizer, item.group_index, theta) if optimizer.state.get(theta) else {}
        states = [
            (name, value, starts.get(name, 0.0))
            for name, value in optimizer.state.get(theta, {}).items()
            if isinstance(value, Tensor) and value.shape == theta.shape
        ]
        problem = slots.problem(theta.detach(), born.slots, states, least=self.least_per_layer)
        if problem is not None:
            raise RuntimeError(f"check_invariants: `{item.tensor.name}`, step {item.tensor.step}: {problem}.")

    @override
    def statistics(self) -> dict[str, float]:
        """As of the base; under ``scope="global"`` also ``deepr/<tensor>/connectivity``, which moves."""
        found = super().statistics()
        if self.scope == "global":
            found.update({f"deepr/{t.name}/connectivity": t.slots.count / t.slots.total for t in self._tensors})
        return found

    def _table(self, stepped: Sequence[Stepped]) -> Table:
        key = tuple(id(item.tensor.slots) for item in stepped)
        table = self._tables.get(key)
        if table is None or any(a is not b.tensor.slots for a, b in zip(table.tensors, stepped, strict=True)):
            from lightning_deepr.kernels.cpu.step import Table

            table = self._tables[key] = Table([item.tensor.slots for item in stepped], stepped[0].theta.element_size())
        return table

    def _gpu_table(self, stepped: Sequence[Stepped]) -> triton_step.Table:
        first = stepped[0].theta
        key = (first.device, first.dtype, *(id(item.tensor.slots) for item in stepped))
        table = self._tables.get(key)
        if table is None or any(a is not b.tensor.slots for a, b in zip(table.tensors, stepped, strict=True)):
            from lightning_deepr.kernels.gpu.step import Table

            table = self._tables[key] = Table([item.tensor.slots for item in stepped], first.dtype)
        return table  # type: ignore[no-any-return]


def _kernel_can_write(states: list[tuple[Tensor, float]]) -> bool:
    return len(states) <= MOST_STATES and all(kernels.suits(value) for value, _ in states)
