"""Fit a checkpoint to a module before anything changes: which entry is which tensor, what does not fit, and the way back."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_deepr.conversion.selection import Candidate, candidates
from lightning_deepr.files.records import kind_of_record
from lightning_deepr.weights.base import FORMAT_KEY, UPON_KEY
from lightning_deepr.weights.find import converted_tensors, stacked_upon
from lightning_deepr.weights.install import remove
from lightning_deepr.weights.k_slots import KSlots
from lightning_deepr.weights.names import Finder, PlainState, join, keep_metadata, split_head, without_wrappers

_RECORD = ".0." + FORMAT_KEY


def refuse_no_state(state: Any) -> None:
    """Refuse what is no ``state_dict``."""
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"expected a state_dict with names as keys, found {type(state).__name__} of something else.")


def entries_of(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Candidate]:
    """Find the tensor of each record of connections in a ``state_dict``.

    A module that is reached on several paths has a record for each of them. They have to agree, and the first one is taken.

    Returns:
        {head of the entries in ``state``: the module's tensor}.

    Raises:
        ValueError: the module has no such weight, its shape is another, records of one tensor differ, or one is incomplete.
    """
    by_name = {name: one for one in candidates(module) for name in (one.name, *one.aliases)}
    finder = Finder(by_name)
    found: dict[str, Candidate] = {}
    heads: dict[str, str] = {}
    for key in state:
        if not key.endswith(_RECORD):
            continue
        head = key.removesuffix("0." + FORMAT_KEY)
        parts = split_head(key)
        if parts is None:
            continue
        name = without_wrappers(join(parts[0], parts[1]))
        target = finder.find(join(parts[0], parts[1]))
        if target is None:
            raise ValueError(
                f"The checkpoint has connections for `{name}`, but {type(module).__name__} has no such weight. Expected a "
                f"checkpoint of this model; its weights are: {', '.join(one.name for one in candidates(module)) or 'none'}."
            )
        candidate = by_name[target]
        _refuse_incomplete(state, head, name)
        shape = tuple(state[head + "0.shape"].tolist())
        if candidate.barred:
            raise ValueError(f"`{name}` can't be converted as the checkpoint has it: it is {candidate.barred}.")
        if candidate.shape != shape:
            raise ValueError(f"`{name}`: expected a weight of shape {candidate.shape}, found {shape} in the checkpoint.")
        _refuse_other_sizes(state, head, name)
        _refuse_lost(state, head, candidate)
        if candidate.name not in heads:
            heads[candidate.name] = head
            found[head] = candidate
        elif not _agree(state, heads[candidate.name], head):
            raise ValueError(
                f"`{candidate.name}` and `{name}` are one tensor of this {type(module).__name__}, but the checkpoint has "
                "different connections for them: expected a checkpoint of a network that shares them, too."
            )
    return found


def _refuse_incomplete(state: Mapping[str, Any], head: str, name: str) -> None:
    kind = kind_of_record(state, head)
    for entry in ("original", "0.shape", "0.index", "0.sign_seed", *(f"0.{record}" for record in kind.records)):
        if not isinstance(state.get(head + entry), Tensor):
            raise ValueError(
                f"`{name}`: expected a tensor `{head}{entry}` in the checkpoint, found none. The checkpoint is damaged."
            )


def _refuse_other_sizes(state: Mapping[str, Any], head: str, name: str) -> None:
    """Refuse a record of K slots whose theta, places and births are not of one length; a shared theta is longer."""
    if kind_of_record(state, head) is not KSlots or head + "0.pool" in state:
        return
    sizes = {entry: tuple(state[head + entry].shape) for entry in ("original", "0.places", "0.born")}
    if len(set(sizes.values())) > 1 or len(sizes["original"]) != 1:
        raise ValueError(
            f"`{name}`: expected theta, places and births of one length K, found the shapes "
            f"{', '.join(map(str, sizes.values()))} in the checkpoint: it is damaged."
        )
    total = int(state[head + "0.shape"].prod())
    if not 0 < sizes["original"][0] <= total:
        raise ValueError(
            f"`{name}`: expected K from 1 to N = {total}, found {sizes['original'][0]} in the checkpoint: it is damaged."
        )


def _refuse_lost(state: Mapping[str, Any], head: str, candidate: Candidate) -> None:
    """Refuse to load connections without the parametrizations that computed the weight from them."""
    recorded = int(state.get(f"{head}0.{UPON_KEY}", 0))
    present = 0
    if candidate.slots is not None:
        present = len(stacked_upon(candidate.module.parametrizations[candidate.tensor_name]))  # type: ignore[index, union-attr, arg-type]
    if recorded and recorded != present:
        raise ValueError(
            f"`{candidate.name}` was saved with another parametrization upon its connections (a spectral norm, or one of your "
            f"own; {recorded} in all): expected {recorded} upon this module's, found {present}. Convert the module with the "
            "recorded connectivity, register the parametrization, then load."
        )


def _agree(state: Mapping[str, Any], one: str, other: str) -> bool:
    mine = {key.removeprefix(one) for key in state if key.startswith(one)}
    if mine != {key.removeprefix(other) for key in state if key.startswith(other)}:
        return False
    return all(
        state[one + key] is state[other + key]
        or torch.equal(torch.as_tensor(state[one + key]), torch.as_tensor(state[other + key]))
        for key in mine
    )


def refuse_misfits(module: nn.Module, state: Mapping[str, Any], entries: Mapping[str, Candidate]) -> None:
    """Refuse dense tensors of another shape than the module's, before anything changes.

    Raises:
        ValueError: the message names the tensor and both shapes.
    """
    own = PlainState(module).values
    finder = Finder(own)
    for name, value in state.items():
        if not isinstance(value, Tensor) or _belongs(name, entries):
            continue
        mine = own.get(finder.find(name) or "")
        if not isinstance(mine, Tensor) or is_lazy(mine) or split_head(name) is not None:
            continue
        if mine.shape != value.shape and not (mine.dim() == 0 and value.shape == (1,)):  # torch reads this one, too
            raise ValueError(
                f"`{name}`: expected a tensor of shape {tuple(mine.shape)}, as this {type(module).__name__} has it, found "
                f"{tuple(value.shape)} in the checkpoint: it is another network's."
            )


def _belongs(name: str, heads: Mapping[str, Any] | set[str]) -> bool:
    parts = split_head(name)
    return parts is not None and name.removesuffix(parts[2]) in heads


def without_heads(state: Mapping[str, Any], heads: set[str]) -> OrderedDict[str, Any]:
    """Leave the entries of some converted tensors out of a ``state_dict``; its ``_metadata`` is kept."""
    rest = OrderedDict((name, value) for name, value in state.items() if not _belongs(name, heads))
    keep_metadata(rest, state)
    return rest


def without_marks(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out the empty tensors that a Trainer's checkpoint has under the names of dense weights.

    They are there so that a dense network does not load it, see :mod:`lightning_deepr.training.markers`.
    """
    ends = [name.removesuffix("0." + FORMAT_KEY) for name in state if name.endswith(".0." + FORMAT_KEY)]
    names = {end.removesuffix(".").replace("parametrizations.", "") for end in ends}
    marks = {name for name in names if isinstance(value := state.get(name), Tensor) and value.shape == (0,)}
    if not marks:
        return state
    rest = OrderedDict((name, value) for name, value in state.items() if name not in marks)
    keep_metadata(rest, state)
    return rest


@contextmanager
def put_back(module: nn.Module) -> Iterator[None]:
    """After an exception, give all tensors their values back, and weights that were converted meanwhile their own parameters.

    A module with tensors on the meta device, which have no values, is left as it is.
    """
    had = {one.slots for one in converted_tensors(module)}
    state = module.state_dict()
    values = [value for value in state.values() if isinstance(value, Tensor)]
    if any(value.device.type == "meta" or is_lazy(value) for value in values):
        yield
        return
    before: OrderedDict[str, Any] = OrderedDict(
        (name, value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)) for name, value in state.items()
    )
    keep_metadata(before, state)
    parameters = {part: dict(part._parameters) for part in module.modules()}
    trained = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        yield
    except Exception:
        # The tensors are looked up again: one that joined a shared theta has new slots since its conversion.
        new = [one for one in converted_tensors(module, every=True) if one.slots not in had]
        for converted in new:
            remove(converted)
        for part in {converted.module for converted in new}:
            part._parameters.clear()  # an optimizer may hold the former parameters, in the former order
            part._parameters.update(parameters[part])
        for parameter, requires_grad in trained.items():
            parameter.requires_grad_(requires_grad)
        for converted in new:
            converted.slots.layer.give_back(converted.module, converted.tensor_name)
        module.load_state_dict(before)
        raise
