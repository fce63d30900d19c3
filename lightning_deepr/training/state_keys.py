"""Under which name a callback's state lies in a checkpoint, and how the state is found again.

What names the same tensors has the same key: the order of a dict, another predicate and another list do not matter. Before the
network is there, the key is made from the arguments, which tells the callbacks of one Trainer apart.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence, Set
from typing import Any

from lightning_deepr.packages.messages import rank_zero_warn

LISTED = 8  # a key lists the names of up to so many tensors


def key(callback: Any) -> str:
    """Return the key of a callback's state: by its tensors, or by its arguments before it has any."""
    name = type(callback).__qualname__
    names = sorted(tensor.name for tensor in callback.tracked)
    if len(names) > LISTED:
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        return f"{name}{ {'tensors': [*names[:3], '...'], 'count': len(names), 'digest': digest}!r}"
    if names:
        return f"{name}{ {'tensors': names}!r}"
    targets = _text(callback.target_modules)
    if isinstance(callback.connectivity, Mapping):  # its keys are the targets
        targets = [targets, *sorted(callback.connectivity)]
    return f"{name}{ {'target_modules': targets, 'exclude_modules': _text(callback.exclude_modules)}!r}"


def _text(value: Any) -> Any:
    """Describe a choice of modules. Equal choices have equal texts, as far as that can be seen."""
    if isinstance(value, str):
        return value
    if isinstance(value, functools.partial):
        return [_text(value.func), repr(value.args), repr(sorted(value.keywords.items()))]
    code = getattr(value, "__code__", None)
    if code is not None:
        bound = [getattr(cell, "cell_contents", None) for cell in getattr(value, "__closure__", None) or ()]
        constants = [constant for constant in code.co_consts if not hasattr(constant, "co_code")]
        parts = (code.co_code, constants, code.co_names, getattr(value, "__defaults__", None), bound)
        return f"{value.__qualname__} {hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"
    if isinstance(value, (Sequence, Set)):
        return sorted(value)
    return f"{type(value).__qualname__} {id(value)}" if callable(value) else sorted(value)


def method(callback: Any) -> str:
    """Return the name of the method: of the class of this package that a callback is, or derives from."""
    for kind in type(callback).__mro__:
        if kind.__module__.startswith("lightning_deepr.methods.") and not inspect.isabstract(kind):
            return kind.__name__
    return type(callback).__qualname__


def is_state(value: Any) -> bool:
    """Whether a state in a checkpoint is that of a callback of this package."""
    return (
        isinstance(value, Mapping) and {"seed", "tensors", "version"} <= value.keys() and isinstance(value["tensors"], Mapping)
    )


def find_state(callback: Any, callbacks: Sequence[Any], checkpoint: dict[str, Any]) -> None:
    """Put the state of a callback's tensors under its key, whatever the key was, before Lightning looks for it.

    Args:
        callback: the callback. Its network is converted by now.
        callbacks: all callbacks of the Trainer that train sparse networks.
        checkpoint: the checkpoint. Its entry ``callbacks`` is changed.

    Raises:
        ValueError: the checkpoint has a state for the method of a callback, but for other tensors, so that nobody takes it.
    """
    states = checkpoint.get("callbacks")
    if not states:
        return
    ours = {name: state for name, state in states.items() if is_state(state)}
    for name, state in ours.items():
        if _fits(callback, name, state) and callback.state_key not in states:
            checkpoint["callbacks"] = {**states, callback.state_key: state}
    if callback is not callbacks[0]:
        return
    for name, state in ours.items():
        if any(_fits(one, name, state) for one in callbacks):
            continue
        other = [one for one in callbacks if _method_of(name, state) not in (method(one), type(one).__qualname__)]
        found = ", ".join(f"{type(one).__name__} for {_listed(t.name for t in one.tracked)}" for one in callbacks)
        what = f"the state of {_method_of(name, state)} for {_listed(state['tensors'])}"
        if len(other) == len(callbacks):
            rank_zero_warn(f"The checkpoint has {what}, which is not used: another method begins anew ({found}).")
            continue
        raise ValueError(
            f"The checkpoint is of another model or selection: it has {what}, which no callback takes; found {found}. Give the "
            "same target_modules, exclude_modules and keys of connectivity as in the run that wrote it."
        )


def _listed(names: Any) -> str:
    names = sorted(names)
    return ", ".join(f"`{name}`" for name in names[:LISTED]) + (f", ... ({len(names)})" if len(names) > LISTED else "")


def _method_of(name: str, state: Mapping[str, Any]) -> str:
    return str(state.get("method") or name.partition("{")[0])


def _fits(callback: Any, name: str, state: Mapping[str, Any]) -> bool:
    same = _method_of(name, state) in (method(callback), type(callback).__qualname__)
    return same and set(state["tensors"]) == {tensor.name for tensor in callback.tracked}
