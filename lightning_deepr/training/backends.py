"""The step of Algorithm 1 that follows the optimizer's, in three interchangeable backends: PyTorch, compiled CPU code, Triton.

:func:`in_pytorch` has the step line by line beside the paper's. The other two backends do the same in a kernel and draw the
same places. Each backend starts newborns in one function: :func:`rebirth` in PyTorch, ``rewire_kernel`` on the CPU, ``finish``
in Triton. Every backend takes a batch of tensors and writes ``item.reborn``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from lightning_deepr import kernels
from lightning_deepr.algorithm import newborns, rewiring
from lightning_deepr.algorithm.newborns import State
from lightning_deepr.kernels import gate
from lightning_deepr.kernels.cpu.fields import MOST_STATES
from lightning_deepr.training import gpu_check
from lightning_deepr.training.tracked import Reborn, Stepped
from lightning_deepr.weights.averages import restart_averages
from lightning_deepr.weights.copies import places_moved
from lightning_deepr.weights.shared import Pool


@dataclass(slots=True)
class Batch:
    """Tensors of one dtype on one device that took the same number of steps: nearly always all tensors of a network.

    Attributes:
        items: the tensors.
        seed: the seed of all draws.
        step: the number of steps that each tensor took before this one. ``seed`` and ``step`` are the whole random state.
        newborn_since: the first birth step of newborns.
        tables: the kernels' tables of this optimizer.
        look: whether the host must know at once which slots were reborn (on a device this costs a synchronization).
    """

    items: Sequence[Stepped]
    seed: int
    step: int
    newborn_since: int
    tables: dict[Any, Any]
    look: bool = False

    @property
    def thetas(self) -> list[Tensor]:
        return [item.theta for item in self.items]

    @property
    def slots(self) -> list[Any]:
        return [item.tensor.slots for item in self.items]

    @property
    def decrements(self) -> list[Any]:
        """The product eta * alpha of each tensor."""
        return [item.lr * item.alpha for item in self.items]

    @property
    def scales(self) -> list[Any]:
        """The root sqrt(2 * eta * T) of each tensor."""
        return [(2 * item.lr * item.temperature) ** 0.5 for item in self.items]


_PASSED = attrgetter("passed")
LAST = "last"  # the key of the CPU table that was used last


def _is_as_before(table: Any, items: Sequence[Stepped]) -> bool:
    """Tell whether these are the tensors of the last step, and the gate has found no difference since."""
    if table is None or len(table.tensors) != len(items):
        return False
    slots = [item.tensor.converted.slots for item in items]
    # (objects that are the same are equal without a look inside)
    return all(map(is_, slots, table.tensors)) and [*map(_PASSED, slots)] == table.passed


def step(batch: Batch) -> None:
    """Run the step after the optimizer's step, in the fastest backend that can."""
    items = batch.items
    last = batch.tables.get(LAST)
    if _is_as_before(last, items):
        in_numba(batch, last)
    elif all(gpu_check.rewires(item.theta, item.tensor.slots) for item in items):
        in_triton(batch)
    elif all(kernels.suits(item.theta) for item in items):
        in_numba(batch)
    elif fast := [item for item in items if gpu_check.rewires(item.theta, item.tensor.slots)]:
        in_triton(replace(batch, items=fast))
        in_pytorch(replace(batch, items=[item for item in items if all(item is not one for one in fast)]))
    else:
        in_pytorch(batch)


# -- PyTorch: the readable version -------------------------------------------------------------------------------------------


def in_pytorch(batch: Batch) -> None:
    """Run the step of Algorithm 1 in PyTorch. (The optimizer did theta <- theta - eta * dE/dtheta.)"""
    # theta <- theta - eta * alpha + sqrt(2 * eta * T) * nu
    drift(batch)
    # a step that does not rewire: theta < 0 becomes 0
    rewiring.keep_active([item.theta for item in batch.items if not item.rewires])
    # if theta < 0: dormant
    rewired = [item for item in batch.items if item.rewires]
    dormant = rewiring.dormant_slots([item.theta for item in rewired]) if rewired else []
    # while fewer than K are active: choose a dormant place uniformly at random, theta <- 0
    places = rewiring.new_places([item.tensor.slots for item in rewired], dormant, batch.seed, batch.step)
    for item, slots, where in zip(rewired, dormant, places, strict=True):
        rebirth(item, slots, where, batch.newborn_since)


def drift(batch: Batch) -> None:
    """Apply the prior and the noise: theta <- theta - eta * alpha + sqrt(2 * eta * T) * nu."""
    rewiring.shrink(batch.thetas, batch.decrements)
    rewiring.diffuse(batch.thetas, batch.scales, batch.slots, batch.seed, batch.step)


def rebirth(item: Stepped, dropped: Tensor, places: Tensor, newborn_since: int) -> None:
    """Give slots new places. Each newborn starts at theta 0, with the sign of its place and a state of its own.

    Args:
        item: the tensor; its ``reborn`` is written.
        dropped: int64 [R], the slots whose connections go dormant.
        places: int64 [R], the new places: dormant and all different.
        newborn_since: the first birth step of newborns.
    """
    if dropped.numel() == 0:
        return
    slots = item.tensor.slots
    young = int((slots.born[dropped] >= newborn_since).sum())
    if slots.notes is not None:
        slots.notes.note(slots.born[dropped], places, item.tensor.step)
    newborns.start_newborns([State("theta", item.theta, 0.0), *item.states()], dropped)
    rewiring.move(slots, dropped, places, item.tensor.step)
    slots.places_changed()
    if slots.averages:
        restart_averages(slots, dropped)
    if slots.copies or slots.has_handed_out:
        places_moved([slots])
    item.reborn = Reborn(dropped.numel(), young, dropped)


def step_of_network(batch: Batch, pool: Pool, *, rule: str, least: int) -> None:
    """Run the step of layers that share one theta (``scope="global"``): the places of all layers form one set.

    Args:
        batch: the layers, in the order of their pieces of theta.
        pool: the layers' pool.
        rule, least: see :func:`lightning_deepr.algorithm.shared_rewiring.plan`.
    """
    theta = batch.items[0].tensor.theta.detach()
    before = theta.clone()
    try:
        _step_of_network(batch, pool, theta, rule=rule, least=least)
    except Exception:
        theta.copy_(before)  # without memory for the rewiring, the step does not happen
        raise


def _step_of_network(batch: Batch, pool: Pool, theta: Tensor, *, rule: str, least: int) -> None:
    items = batch.items
    whole = items[0].tensor.theta
    pool.births = []
    # theta <- theta - eta * alpha + sqrt(2 * eta * T) * nu
    drift(batch)
    moves = None
    if items[0].rewires:
        # if theta < 0: dormant; while fewer than K are active: choose a dormant place of some layer, theta <- 0
        states = items[0].states()
        moves = pool.rewire(
            theta,
            whole.grad,
            states,
            rule=rule,
            least=least,
            newborn_since=batch.newborn_since,
            seed=batch.seed,
            step=batch.step,
        )
    else:
        rewiring.keep_active([theta])
    if moves is not None:
        pool.births = moves.births
        for one in batch.slots:
            if one.notes is not None:
                one.notes.note_shared(batch.step)
    for i, (item, count) in enumerate(zip(items, pool.counts, strict=True)):
        item.tensor.turnover.count = max(count, 1)
        if moves is not None:
            births = moves.births[i]
            numbers = torch.arange(count - births, count, device=theta.device)
            item.reborn = Reborn(births, moves.newborn_deaths[i], numbers, moves.deaths[i] - births)


# -- compiled for the CPU ----------------------------------------------------------------------------------------------------


def in_numba(batch: Batch, table: Any = None) -> None:
    """Run the same step, line by line, in one compiled kernel for all tensors.

    Args:
        batch: the tensors.
        table: the kernel's table if these are the tensors of the last step.
    """
    items, thetas = batch.items, batch.thetas
    if table is None:
        tensors = batch.slots
        key = (thetas[0].dtype, *map(id, tensors))
        table = batch.tables.get(key)
        if table is None or any(a is not b for a, b in zip(table.tensors, tensors, strict=True)):
            from lightning_deepr.kernels.cpu.step import Table

            table = batch.tables[key] = Table(tensors, thetas[0].element_size())
        batch.tables[LAST] = table
    states = [item.states() for item in items]
    within = [found if _kernel_can_write(found) else [] for found in states] if any(states) else states
    rewires = [item.rewires for item in items]
    counts, all_young = table.step(
        thetas, batch.decrements, batch.scales, rewires, within, batch.newborn_since, batch.seed, batch.step, checked=True
    )
    for i, births in enumerate(counts):
        if births:
            item, numbers = items[i], table.reborn[i]
            item.reborn = Reborn(births, all_young[i], numbers)
            if len(within[i]) < len(states[i]):
                newborns.start_newborns(states[i], numbers[:births])
            slots = item.tensor.slots
            if slots.averages:
                restart_averages(slots, numbers[:births])
            if slots.copies or slots.has_handed_out:
                places_moved([slots])


def _kernel_can_write(states: list[State]) -> bool:
    return len(states) <= MOST_STATES and all(kernels.suits(state.value) for state in states)


# -- Triton ------------------------------------------------------------------------------------------------------------------


def in_triton(batch: Batch) -> None:
    """Run the same step in Triton. The host reads the result only if it must, since a read makes it wait."""
    items, slots = batch.items, batch.slots
    first = items[0].theta
    key = (first.device, first.dtype, *map(id, slots), *(one.ranked for one in slots))  # (a load may change how they draw)
    table = batch.tables.get(key)
    if table is None or any(a is not b for a, b in zip(table.tensors, slots, strict=True)):
        from lightning_deepr.kernels.gpu.step import Table

        table = batch.tables[key] = Table(slots, first.dtype)
    look = batch.look or any(one.averages for one in slots)
    rewires, states = [item.rewires for item in items], [item.states() for item in items]
    counts, dormant = table.step(
        batch.thetas, batch.decrements, batch.scales, rewires, states, batch.newborn_since, batch.seed, batch.step,
        want_dormant=look,
    )  # fmt: skip
    for one in slots:
        gate.note(one)  # or the next step would read the places, for which the host has to wait
    if any(one.copies or one.has_handed_out for one in slots):
        places_moved(slots)
    for one in slots:
        if one.notes is not None:
            one.notes.note_on_device(batch.step)
    if not look:
        for i, item in enumerate(items):
            if item.rewires:
                item.reborn = Reborn(0, 0, pending=(counts, i))
        return
    if not any(rewires):
        return
    for item, (births, young), mask in zip(items, counts.tolist(), dormant, strict=True):
        reborn = mask.nonzero().view(-1)
        item.reborn = Reborn(births, young, reborn)
        if births and item.tensor.slots.averages:
            restart_averages(item.tensor.slots, reborn)
