"""Taking charge of a network: what is asked for is converted, and what is converted already is taken as it is."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_deepr.algorithm.statistics import Turnover
from lightning_deepr.conversion import sharing
from lightning_deepr.conversion.allocation import allocate
from lightning_deepr.conversion.convert import nothing_to_convert
from lightning_deepr.conversion.selection import Candidate, candidates, entry_for, refuse_unknown, select
from lightning_deepr.training.tracked import TrackedTensor
from lightning_deepr.weights.find import Converted, converted_tensors

Entries = dict[str, tuple[Any, Any, Any]]  # name of a tensor -> its entries of l1, temperature and lr_scale
BY_TENSOR = ("l1", "temperature", "lr_scale")  # arguments that may be a dict by pattern


class Method(Protocol):
    """What this has to know of a callback (see :class:`lightning_deepr.training.callback.SparseTraining`)."""

    connectivity: Any
    target_modules: Any
    exclude_modules: Any
    distribution: Any
    l1: Any
    temperature: Any
    lr_scale: Any
    scope: str
    tracked: list[TrackedTensor]

    def check_kind(self, name: str, slots: Any) -> None: ...

    def convert(self, module: nn.Module, new: list[Candidate], counts: Mapping[str, int]) -> list[Converted]: ...


def claim(callback: Method, module: nn.Module, watch: bool = False, early: bool = True) -> int:
    """Convert what a callback asks for, and let it take charge of that and of what is converted already.

    Args:
        callback: ``callback.tracked`` are the network's tensors afterwards.
        module: the network.
        watch: whether to look out for writes into converted weights until the training starts.
        early: no optimizer exists yet, so that parameters may become others.

    Returns:
        how many tensors were converted.

    Raises:
        ValueError: nothing is found, something does not fit the method, or another callback is at work on it.
    """
    found = candidates(module)
    given = [(argument, getattr(callback, argument)) for argument in BY_TENSOR]
    for argument, value in given:
        if isinstance(value, Mapping):
            refuse_unknown(list(value), found, argument)
    chosen = _chosen(callback, module, found)
    entries: Entries = {c.name: tuple(entry_for(argument, value, c) for argument, value in given) for c in chosen}  # type: ignore[misc]
    for candidate in chosen:
        if candidate.slots is not None:
            callback.check_kind(candidate.name, candidate.slots)
    if callback.scope == "global":
        sharing.check(chosen, early)
    old, new = [c for c in chosen if c.slots is not None], [c for c in chosen if c.slots is None]
    if new:
        _convert(callback, module, new, watch)
    if callback.scope == "global":
        sharing.join([converted for converted in converted_tensors(module) if converted.name in entries])
    mine = {tensor.slots for tensor in callback.tracked}
    if any(c.slots not in mine for c in old):
        rank_zero_info(
            f"{type(callback).__name__}: {len(old)} tensors are converted already; took their connections as they are."
        )
    callback.tracked = _tracked(callback, module, entries)
    return len(new)


def _chosen(callback: Method, module: nn.Module, found: list[Candidate]) -> list[Candidate]:
    """The tensors that a callback's arguments ask for, but for those on which another callback is at work."""
    method = type(callback).__name__
    free = [c for c in found if c.slots is None or c.slots.owner() in (None, callback)]
    if callback.connectivity is not None:
        chosen = select(free, callback.target_modules, callback.exclude_modules, callback.connectivity)
        if not chosen:
            raise ValueError(nothing_to_convert(module))
        return chosen
    chosen = [c for c in select(free, callback.target_modules, callback.exclude_modules) if c.slots is not None]
    if chosen:
        return chosen
    busy = [c.name for c in found if c.slots is not None and c not in free]
    if busy:
        raise ValueError(
            f"{method} expects converted tensors that no other callback is at work on, found only {', '.join(busy)}, which another "
            "one rewires: call `remove()` on what its `attach` returned."
        )
    raise ValueError(
        f"{method}(connectivity=None) expects a converted module, found no converted tensor in {type(module).__name__}. Give a "
        "connectivity, or call sparsify(net, connectivity) first."
    )


def _convert(callback: Method, module: nn.Module, new: list[Candidate], watch: bool) -> None:
    assert callback.connectivity is not None
    counts = allocate(new, callback.connectivity, callback.distribution)
    for converted in callback.convert(module, new, counts):
        converted.slots.watch(watch)
    total, count = sum(c.total for c in new), sum(counts.values())
    rank_zero_info(
        f"{type(callback).__name__}: {count:,} connections of {total:,} ({count / total:.2%}) in {len(new)} tensors."
    )


def _tracked(callback: Method, module: nn.Module, entries: Entries) -> list[TrackedTensor]:
    """What the callback keeps about each tensor; what it keeps already goes on."""
    known = {tensor.slots: tensor for tensor in callback.tracked}
    taken = []
    for converted in converted_tensors(module):
        if converted.name not in entries:
            continue
        tensor = known.get(converted.slots)
        if tensor is None:
            # a new callback on a trained network goes on counting, so that it does not repeat the draws of the old one
            step = 1 + converted.slots.last_birth()
            count = converted.slots.wanted if callback.scope == "layer" else converted.slots.count
            tensor = TrackedTensor(converted, Turnover(count), step=step, start=step)
        tensor.converted = converted
        tensor.alpha, tensor.temperature, tensor.lr_scale = entries[converted.name]
        converted.slots.owner = weakref.ref(callback)
        taken.append(tensor)
    if callback.scope == "global":  # one theta takes one number of steps
        step = max(tensor.step for tensor in taken)
        for tensor in taken:
            if tensor.step != step:
                tensor.step = tensor.start = step
    _keep_draws_apart([tensor.slots for tensor in taken])
    return taken


def _keep_draws_apart(tensors: list[Any]) -> None:
    """Layers that were converted one by one have the same index, and would draw alike."""
    taken: set[int] = set()
    following = 1 + max((slots.index for slots in tensors), default=0)
    for slots in tensors:
        if slots.index in taken:
            slots.index, following = following, following + 1
        taken.add(slots.index)
