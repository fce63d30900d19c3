"""Optimizers that hold another one (Lookahead, SAM, ZeroRedundancyOptimizer), and state tensors wherever they are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_OWN = ("state", "param_groups", "defaults")  # attributes of every optimizer that are looked at elsewhere


def chain_of(optimizer: Any) -> list[Any]:
    """List an optimizer and the optimizers that it holds, directly or in turn; the outermost comes first.

    They are found by a search over attributes, also in lists, tuples and dicts; no name is known.
    """
    found, at = [optimizer], 0
    while at < len(found):
        for name, value in list(vars(found[at]).items()):
            for one in () if name in _OWN else _optimizers_in(value):
                if all(one is not other for other in found):
                    found.append(one)
        at += 1
    return found


def _optimizers_in(value: Any) -> Iterator[Any]:
    if isinstance(value, Optimizer):
        yield value
    elif isinstance(value, Mapping):
        for one in list(value.values()):
            yield from _optimizers_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _optimizers_in(one)


def group_of(optimizer: Any, theta: Tensor) -> int | None:
    """Return the index of theta's parameter group; None: the optimizer does not hold theta."""
    for i, group in enumerate(optimizer.param_groups):
        if any(parameter is theta for parameter in group["params"]):
            return i
    return None


def partition_of(optimizer: Any) -> Any | None:
    """Return the optimizer of this rank's parameters in torch's ZeroRedundancyOptimizer (ZeRO 1), or None."""
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        return vars(optimizer).get("optim")
    return None


def slot_tensors(state: Mapping[Any, Any], shape: torch.Size) -> list[tuple[str, Tensor]]:
    """List the tensors of a shape in a parameter's state, with their names. In a list or a dict, "Q" becomes "Q.0", ..."""
    found = []
    for name, value in state.items():
        if isinstance(value, Tensor):
            if value.shape == shape:
                found.append((name, value))
        elif isinstance(value, (list, tuple, dict)):
            found += _nested(str(name), value, shape)
    return found


def _nested(name: str, value: Any, shape: torch.Size) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.shape == shape:
            yield name, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _nested(f"{name}.{key}", one, shape)
    elif isinstance(value, (list, tuple)):
        for i, one in enumerate(value):
            yield from _nested(f"{name}.{i}", one, shape)


def attribute_tensors(optimizer: Any, theta: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of theta's shape that an optimizer keeps for theta in attributes of its own, outside of its state.

    These are dicts with theta or its id as a key, and lists that are parallel to the parameters or to the parameter groups.
    """
    for name, value in vars(optimizer).items():
        if name not in _OWN and not name.startswith("_optimizer_") and isinstance(value, (Mapping, list, tuple)) and value:
            yield from _kept_for(name, value, optimizer, theta)


def _kept_for(name: str, value: Any, optimizer: Any, theta: Tensor) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Mapping):
        for key, one in value.items():
            if key is theta or (type(key) is int and key == id(theta)):
                yield from _nested(name, one, theta.shape)
            elif isinstance(key, str) and isinstance(one, (Mapping, list, tuple)) and one:
                yield from _kept_for(f"{name}.{key}", one, optimizer, theta)
        return
    groups = [list(group["params"]) for group in optimizer.param_groups]
    flat = [parameter for group in groups for parameter in group]
    if _is_parallel(value, flat):
        pairs = list(zip(value, flat, strict=True))
    elif len(value) == len(groups) and all(_is_parallel(one, group) for one, group in zip(value, groups, strict=True)):
        pairs = [pair for one, group in zip(value, groups, strict=True) for pair in zip(one, group, strict=True)]
    else:
        return
    for tensor, parameter in pairs:
        if parameter is theta and tensor is not theta:
            yield name, tensor.detach()


def _is_parallel(values: Any, parameters: list[Tensor]) -> bool:
    """Whether the values are a tensor for each parameter, of its shape."""
    return (
        isinstance(values, (list, tuple))
        and len(values) == len(parameters)
        and all(isinstance(v, Tensor) and v.shape == p.shape for v, p in zip(values, parameters, strict=True))
    )
