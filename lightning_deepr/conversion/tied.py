"""Tied tensors: one parameter that several layers hold, as input and output embeddings of language models do.

A conversion replaces the parameter of a layer. So "all" leaves tied tensors out. Who names a tied tensor by all of its names
gets one tensor of connections, which all of its layers hold; by some of its names only, it is refused, since the conversion
would untie it, or make layers sparse that nobody has named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_deepr.weights.find import plain_name

REASON = "tied"  # the beginning of the reason why a tied tensor is left out


def tied_names(root: nn.Module) -> dict[int, list[str]]:
    """Map the id of each parameter that several layers hold to all its names."""
    names: dict[int, list[str]] = {}
    for prefix, module in root.named_modules():
        for tensor_name, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(plain_name(prefix, tensor_name))
    return {key: found for key, found in names.items() if len(found) > 1}


def partners(root: nn.Module, chosen: Iterable[Any]) -> dict[str, list[tuple[nn.Module, str]]]:
    """Find the other layers that hold a chosen tensor.

    Returns:
        {name of the candidate: [(layer, the tensor's name in it)]}, for tied ones.
    """
    mine = {id(c.parameter): c for c in chosen if c.parameter is not None}
    found: dict[str, list[tuple[nn.Module, str]]] = {}
    for module in root.modules():
        for tensor_name, parameter in module._parameters.items():
            candidate = mine.get(id(parameter))
            if candidate is not None and (module, tensor_name) != (candidate.module, candidate.tensor_name):
                found.setdefault(candidate.name, []).append((module, tensor_name))
    return found


def reason(names: Sequence[str], name: str) -> str:
    """Say why a tied tensor is left out."""
    return f"{REASON} with {', '.join(f'`{other}`' for other in names if other != name)}"


def as_one(
    root: nn.Module,
    chosen: Sequence[Any],
    value_of: Callable[[Any], Any] = lambda candidate: None,
    is_free: Callable[[str], bool] = lambda name: False,
) -> list[Any]:
    """Take each tied tensor that was chosen by all of its names once: its first candidate stands for the others.

    Args:
        root: the network.
        chosen: the candidates.
        value_of: what the user asks of a candidate (a connectivity). It must be the same for all names of a tensor.
        is_free: whether a name need not be chosen: a file has a tied tensor under one of its names.

    Raises:
        ValueError: the names of a tensor ask for different things.
    """
    tied = tied_names(root)
    groups: dict[int, list[Any]] = {}
    for one in chosen:
        if one.slots is None and id(one.parameter) in tied:
            groups.setdefault(id(one.parameter), []).append(one)
    kept = []
    for one in chosen:
        group = groups.get(id(one.parameter)) if one.slots is None else None
        names = tied.get(id(one.parameter), []) if group is not None else []
        chosen_names = {name for other in group or () for name in (other.name, *other.aliases)}
        if group is None or not all(name in chosen_names or is_free(name) for name in names):
            kept.append(one)
        elif one is group[0]:
            others = group[1:]
            for other in others:
                if not _is_same(value_of(one), value_of(other)):
                    raise ValueError(
                        f"`{one.name}` and `{other.name}` are one tensor: expected one connectivity, found {value_of(one)!r} "
                        f"and {value_of(other)!r}."
                    )
            aliases = [name for other in others for name in (other.name, *other.aliases)]
            aliases += [name for name in names if name not in chosen_names]
            kept.append(replace(one, aliases=(*one.aliases, *aliases), is_whole=True))
    return kept


def _is_same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    plain = (int, float, str)
    return isinstance(one, plain) and isinstance(other, plain) and one == other


def refuse(root: nn.Module, chosen: Iterable[Any]) -> None:
    """Refuse chosen tensors that are tied; one message names all of them.

    Raises:
        ValueError: at least one is tied.
    """
    message = refusal(root, chosen)
    if message:
        raise ValueError(message)


def refusal(root: nn.Module, chosen: Iterable[Any]) -> str:
    """Write the message for tied tensors among some candidates; "": there are none."""
    tied = tied_names(root)
    mine = [c for c in chosen if id(c.parameter) in tied and not c.is_whole]
    if not mine:
        return ""
    groups = {id(c.parameter): tied[id(c.parameter)] for c in mine}
    return (
        f"{', '.join(f'`{c.name}`' for c in mine)} {'are' if len(mine) > 1 else 'is'} shared (tied): "
        f"{_listed(groups.values())}, and converting one name of a tensor would untie it. Name all names of a "
        "tensor to convert it as one, for all of its layers; or leave all of them out, "
        f"exclude_modules={sorted(name for names in groups.values() for name in names)}; or untie them first. "
        '(target_modules="all" leaves tied tensors out by itself.)'
    )


def left_out(root: nn.Module, found: Iterable[Any]) -> str:
    """Write the line that says which tied tensors were left out; "": none.

    Args:
        root: the network.
        found: the candidates that stay dense.
    """
    tied = tied_names(root)
    groups = {
        id(c.parameter): tied[id(c.parameter)]
        for c in found
        if c.slots is None and c.left_out.startswith(REASON) and id(c.parameter) in tied
    }
    if not groups:
        return ""
    listed = _listed(groups.values())
    return f"Left dense, since they are tied: {listed}. To convert one, name all of its names, or untie it before."


def _listed(groups: Iterable[Sequence[str]]) -> str:
    return "; ".join(f"{' and '.join(f'`{name}`' for name in names)} are one tensor" for names in groups)
