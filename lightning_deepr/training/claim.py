"""Let a callback take charge of a network: convert the requested weights, and adopt weights that are converted already."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from lightning_deepr.algorithm.statistics import Turnover
from lightning_deepr.algorithm.steering import Steering, TurnoverTarget
from lightning_deepr.conversion import adapting, connectivities, pruned, restrictions, sharing, tied
from lightning_deepr.conversion.allocation import shares
from lightning_deepr.conversion.convert import nothing_to_convert
from lightning_deepr.conversion.selection import (
    Candidate,
    candidates,
    connectivity_of,
    entry_for,
    refuse_unknown,
    select,
    takes_what_is_usual,
)
from lightning_deepr.packages.messages import rank_zero_info, rank_zero_warn
from lightning_deepr.training.adoption import adopt_rules, refuse_other_connectivity
from lightning_deepr.training.schedules import is_steered
from lightning_deepr.training.tracked import TrackedTensor
from lightning_deepr.weights.find import Converted, converted_tensors

Entries = dict[str, tuple[Any, Any, Any]]  # a tensor's name -> its values of l1, temperature and lr_scale
BY_TENSOR = ("l1", "temperature", "lr_scale")  # the arguments that may be a dict by pattern


class Method(Protocol):
    """The attributes of a callback that this module uses (see :class:`lightning_deepr.training.callback.SparseTraining`)."""

    connectivity: Any
    candidates: Any
    seed: int
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
    """Convert the weights that a callback requests. The callback takes charge of them and of those that are converted already.

    Args:
        callback: the callback. Afterwards ``callback.tracked`` lists the network's tensors.
        module: the network.
        watch: whether to watch for writes to converted weights until the training starts.
        early: whether no optimizer exists yet. Then parameters may be replaced.

    Returns:
        the number of tensors that were converted.

    Raises:
        ValueError: no tensor is found, a tensor does not fit the method, or another callback is at work on the tensors.
    """
    connectivity = connectivities.as_mapping(callback.connectivity)
    with pruned.made_plain(module, early and connectivities.asks_for_nonzero(connectivity)):
        return _claim(callback, module, connectivity, watch, early)


def _claim(callback: Method, module: nn.Module, connectivity: Any, watch: bool, early: bool) -> int:
    found = candidates(module)
    of = getattr(callback, "of", "weight")
    if of == "difference" and connectivity is not None:
        found = adapting.adaptable(module, found, callback.target_modules, callback.trainable)  # type: ignore[attr-defined]
    for argument in BY_TENSOR:
        value = getattr(callback, argument)
        if isinstance(value, Mapping):
            refuse_unknown(list(value), found, argument)
    chosen = _chosen(callback, module, found, connectivity)
    if of == "difference":
        adapting.refuse_sparse(chosen)
        adapting.refuse_trained(chosen)
        chosen = adapting.once(chosen)
    else:
        chosen = tied.as_one(module, chosen, lambda candidate: connectivity_of(connectivity, candidate))
    entries: Entries = {
        c.name: (
            entry_for("l1", callback.l1, c),
            entry_for("temperature", callback.temperature, c),
            entry_for("lr_scale", callback.lr_scale, c),
        )
        for c in chosen
    }
    for candidate in chosen:
        if candidate.slots is not None:
            callback.check_kind(candidate.name, candidate.slots)
    if callback.scope == "global":
        sharing.check(chosen, early)
    old, new = [c for c in chosen if c.slots is not None], [c for c in chosen if c.slots is None]
    mine = {tensor.weight for tensor in callback.tracked}
    adopted = [c for c in old if c.slots not in mine]
    if early and connectivity is not None:
        refuse_other_connectivity(callback, adopted, new)
    rules = {"candidates": callback.candidates, "signs": getattr(callback, "signs", None)}
    restrictions.refuse_unnamed(chosen, rules)
    adopt_rules(callback, adopted, chosen)
    if new:
        usual = of == "weight" and takes_what_is_usual(callback.target_modules, connectivity)
        if usual and (line := tied.left_out(module, found)):
            rank_zero_warn(f"{type(callback).__name__}: {line}")
        _convert(callback, module, new, connectivity, watch)
        if of == "difference":
            adapting.freeze(module, callback.trainable)  # type: ignore[attr-defined]
    if callback.scope == "global":
        sharing.join([converted for converted in converted_tensors(module) if converted.name in entries])
    if adopted:
        rank_zero_info(f"{type(callback).__name__}: {len(old)} tensors are converted already; their connections are kept.")
    callback.tracked = _tracked(callback, module, entries)
    return len(new)


def _chosen(callback: Method, module: nn.Module, found: list[Candidate], connectivity: Any) -> list[Candidate]:
    """List the tensors that a callback's arguments select, except those on which another callback is at work."""
    method = type(callback).__name__
    free = [c for c in found if c.slots is None or c.slots.owner() in (None, callback)]
    asked = select(found, callback.target_modules, callback.exclude_modules, connectivity)
    if connectivity is not None:
        chosen = [c for c in asked if c in free]
        named = isinstance(connectivity, Mapping) or isinstance(callback.target_modules, (list, tuple, set))
        if len(chosen) < len(asked) and (named or not chosen):  # who asks for "all" gets what is left
            raise ValueError(_taken(callback, [c for c in asked if c not in free]))
        if not chosen:
            raise ValueError(nothing_to_convert(module))
        return chosen
    chosen = [c for c in asked if c.slots is not None and c in free]
    if chosen:
        return chosen
    busy = [c.name for c in found if c.slots is not None and c not in free]
    if busy:
        raise ValueError(
            f"{method} expects converted tensors that no other callback rewires, found only {', '.join(busy)}, which another "
            "one rewires: call `remove()` on the handle that its `attach` returned."
        )
    raise ValueError(
        f"{method}(connectivity=None) expects a converted module, found no converted tensor in {type(module).__name__}. Give a "
        "connectivity, or call sparsify(net, connectivity) first."
    )


def _taken(callback: Method, taken: list[Candidate]) -> str:
    """Write the message for a callback that asks for tensors of which another one has taken charge."""
    assert taken[0].slots is not None
    method, other = type(callback).__name__, type(taken[0].slots.owner()).__name__
    names = ", ".join(f"`{c.name}`" for c in taken[:3]) + (", ..." if len(taken) > 3 else "")
    return (
        f"{method} and {other} both ask for {names}: expected one callback for each weight, found two. Give each its own "
        f'target_modules (or exclude_modules), for example {other}(..., target_modules=["encoder"]) and '
        f'{method}(..., exclude_modules=["encoder"]), or leave one of them out.'
    )


def _convert(callback: Method, module: nn.Module, new: list[Candidate], connectivity: Any, watch: bool) -> None:
    assert connectivity is not None
    counts = shares(new, connectivity, callback.distribution)
    for converted in callback.convert(module, new, counts):
        converted.slots.watch(watch)
    total, count = sum(c.total for c in new), sum(counts.values())
    upon = " upon frozen weights" if getattr(callback, "of", "weight") == "difference" else ""
    rank_zero_info(
        f"{type(callback).__name__}: {count:,} connections{upon} of {total:,} ({count / total:.2%}) in {len(new)} tensors."
    )


def _tracked(callback: Method, module: nn.Module, entries: Entries) -> list[TrackedTensor]:
    """List the callback's records of the tensors. Existing records are kept."""
    known = {tensor.weight: tensor for tensor in callback.tracked}
    taken = []
    for converted in converted_tensors(module):
        if converted.name not in entries:
            continue
        tensor = known.get(converted.slots)
        if tensor is None:
            # a new callback on a trained network continues the step count, so that it does not repeat earlier draws
            step = 1 + converted.slots.last_birth()
            count = converted.slots.wanted if callback.scope == "layer" else converted.slots.count
            tensor = TrackedTensor(converted, Turnover(count), step=step, start=step)
        tensor.converted = converted
        tensor.alpha, tensor.temperature, tensor.lr_scale = entries[converted.name]
        converted.slots.owner = weakref.ref(callback)
        taken.append(tensor)
    if callback.scope == "global":  # layers that share one theta have taken the same number of steps
        step = max(tensor.step for tensor in taken)
        for tensor in taken:
            if tensor.step != step:
                tensor.step = tensor.start = step
    _steer(taken)
    _keep_draws_apart([tensor.slots for tensor in taken])
    return taken


def _steer(tensors: list[TrackedTensor]) -> None:
    """Give each tensor whose l1 is a target a :class:`Steering`.

    Layers that share a theta and a target share the steering.
    """
    together: dict[tuple[int, TurnoverTarget], Steering] = {}
    for tensor in tensors:
        if not is_steered(tensor.alpha):
            tensor.steering = None
            continue
        target = tensor.alpha if isinstance(tensor.alpha, TurnoverTarget) else TurnoverTarget()  # "auto"
        if tensor.steering is None or tensor.steering.target != target:
            tensor.steering = Steering(target)
        tensor.steering = together.setdefault((id(tensor.theta), target), tensor.steering)


def _keep_draws_apart(tensors: list[Any]) -> None:
    """Make the indices of layers unique. Layers that were converted one by one would otherwise draw the same numbers."""
    taken: set[int] = set()
    following = 1 + max((slots.index for slots in tensors if not slots.is_block), default=0)
    for slots in tensors:
        if slots.index in taken:
            if slots.is_block:  # its number must be the same on every rank
                raise ValueError(
                    f"`{slots.name}`: expected blocks with draws of their own, found two layers that draw alike. Give the plan "
                    "of each layer another number, RowBlocks(..., layer=...), or one plan to all of them."
                )
            slots.index, following = following, following + 1
        taken.add(slots.index)
