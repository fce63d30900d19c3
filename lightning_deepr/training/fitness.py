"""Refuse thetas that no longer fit their connections: at the start of a training, and before each step writes anything.

A theta that FSDP has split, that was replaced, or that has left its device looks like any other parameter. A step would write
beyond its end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_deepr.kernels import gate
from lightning_deepr.training.tracked import Stepped
from lightning_deepr.weights.find import Converted
from lightning_deepr.weights.k_slots import KSlots

if TYPE_CHECKING:
    from lightning_deepr.training.run import Run


def check(run: Run, stepped: Sequence[Stepped]) -> None:
    """Refuse a step whose tensors do not fit, before it writes. Without a change since the last step it only compares numbers.

    Args:
        run: the records of the optimizer.
        stepped: the tensors that took a step.

    Raises:
        RuntimeError: the message names the tensor, and says what was expected, what was found and what to do.
    """
    if run.fit is not None and _are_as_before(run.fit, stepped):
        return
    changed = False
    held = run.held
    for item in stepped:
        name, _, _, slots = item.tensor.converted
        if item.parameter is not held.get(name):
            _refuse_replaced(run, item)
        if slots.check(item.theta, name):
            changed = True
    if changed:
        written = [pair for item in stepped for pair in item.tensor.weight.written(item.theta, item.tensor.name)]
        gate.check_apart(written)
    run.fit = _Fit(stepped) if all(type(item.tensor.converted.slots) is KSlots for item in stepped) else None


class _Fit:
    """What :func:`check` has let pass, so that the next step compares all tensors at once."""

    def __init__(self, stepped: Sequence[Stepped]) -> None:
        self.slots = [*map(_SLOTS, stepped)]
        self.parameters = [item.parameter for item in stepped]
        self.passed = [*map(_PASSED, self.slots)]
        try:
            self.numbers: Any = gate.numbers_of([*chain.from_iterable(map(gate.TENSORS, self.slots)), *map(_THETA, stepped)])
        except (RuntimeError, AttributeError, TypeError):  # a tensor without an address: nothing is as before
            self.numbers = None


def _are_as_before(fit: _Fit, stepped: Sequence[Stepped]) -> bool:
    """Tell whether each tensor would pass with nothing changed. (``map`` takes a third of the time of a loop.)"""
    slots = fit.slots
    if (
        len(slots) != len(stepped)
        or not all(map(is_, map(_SLOTS, stepped), slots))
        or not all(map(is_, map(_PARAMETER, stepped), fit.parameters))
        or [*map(_PASSED, slots)] != fit.passed  # (objects that are the same are equal without a look inside)
        or any(map(_ADAPTS, slots))
    ):
        return False
    thetas, trusted, places = [*map(_THETA, stepped)], [*map(_TRUSTED, slots)], [*map(_PLACES, slots)]
    if {*map(type, thetas)} != _PLAIN or None in trusted or not all(map(is_, map(_FIRST, trusted), places)):
        return False
    of = [*chain.from_iterable(map(gate.TENSORS, slots)), *thetas]
    try:
        return [*map(_FOURTH, trusted)] == [*map(_VERSION, places)] and bool(gate.numbers_of(of) == fit.numbers)
    except (RuntimeError, AttributeError, TypeError):
        return False


_SLOTS, _PARAMETER, _THETA = attrgetter("tensor.converted.slots"), attrgetter("parameter"), attrgetter("theta")
_PASSED, _ADAPTS, _TRUSTED = attrgetter("passed"), attrgetter("adapts"), attrgetter("trusted")
_PLACES, _VERSION, _FIRST, _FOURTH = attrgetter("places"), attrgetter("_version"), itemgetter(0), itemgetter(3)
_PLAIN = {Tensor}


def _refuse_replaced(run: Run, item: Stepped) -> None:
    optimizer, tensor = run.optimizer(), item.tensor
    assert optimizer is not None
    if any(parameter is item.parameter for group in optimizer.param_groups for parameter in group["params"]):
        run.held[tensor.name] = item.parameter
        return
    raise RuntimeError(
        f"`{tensor.name}`: theta was replaced by another parameter, which {type(optimizer).__name__} does not hold: expected "
        "the parameter that the optimizer was made with. Write values into it (`theta.data.copy_(...)`, load_state_dict), or "
        "make the optimizer, and attach the callback, after the replacement."
    )


# -- at the start ------------------------------------------------------------------------------------------------------------


def refuse_unfit(net: nn.Module, tensors: Iterable[Converted]) -> None:
    """Refuse a network some of whose thetas are sharded, on the meta device, or of another size than their connections.

    Args:
        net: the network, with its wrappers.
        tensors: its converted tensors.

    Raises:
        ValueError: the message names the tensor, and says what was expected, what was found and what to do.
    """
    sharded = _flattened(net)
    for one in tensors:
        holder = one.holder
        theta = holder._parameters.get("original")
        if id(holder) in sharded or theta is None:
            raise ValueError(
                f"`{one.name}`: theta: expected a plain tensor of K values, found a parameter that "
                f"{'FullyShardedDataParallel' if id(holder) in sharded else 'something else'} has taken over. {gate.SHARD}"
            )
        try:
            one.slots.check(one.slots.own(theta.detach()), one.name)
        except RuntimeError as error:
            if f"`{one.name}`" in str(error):
                raise ValueError(str(error)) from None
            raise ValueError(f"`{one.name}`: {error}") from error


def _flattened(net: nn.Module) -> set[int]:
    """Return the ids of the modules whose parameters FullyShardedDataParallel has put into one flat parameter."""
    if "torch.distributed.fsdp" not in sys.modules:
        return set()
    from torch.distributed.fsdp import FullyShardedDataParallel

    found = set()
    for module in net.modules():
        if not isinstance(module, FullyShardedDataParallel):
            continue
        flat: Any = getattr(getattr(module, "_handle", None), "flat_param", None)
        for info in (*getattr(flat, "_param_infos", ()), *getattr(flat, "_shared_param_infos", ())):
            found.add(id(info.module))
    return found
