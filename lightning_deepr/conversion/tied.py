"""Tied tensors: one parameter that several layers hold, as input and output embeddings of language models do.

A conversion replaces the parameter of one layer, which would untie it from the others. So "all" leaves tied tensors out, and a
tied tensor that is named is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    mine = [c for c in chosen if id(c.parameter) in tied]
    if not mine:
        return ""
    groups = {id(c.parameter): tied[id(c.parameter)] for c in mine}
    return (
        f"{', '.join(f'`{c.name}`' for c in mine)} {'are' if len(mine) > 1 else 'is'} shared (tied): "
        f"{_listed(groups.values())}, and converting one name of a tensor would untie it. Leave all of them out, "
        f"exclude_modules={sorted(name for names in groups.values() for name in names)}, or untie them first. "
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
    return f"Left dense, since they are tied: {_listed(groups.values())}. Untie them before the conversion to convert them."


def _listed(groups: Iterable[Sequence[str]]) -> str:
    return "; ".join(f"{' and '.join(f'`{name}`' for name in names)} are one tensor" for names in groups)
