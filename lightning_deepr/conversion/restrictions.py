"""Fit ``candidates=`` and ``signs=`` to the tensors of a network."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch

from lightning_deepr.algorithm import allowed as allowed_places
from lightning_deepr.algorithm import signs as sign_tables
from lightning_deepr.algorithm.allowed import Allowed
from lightning_deepr.algorithm.candidates import as_candidates
from lightning_deepr.algorithm.signs import SignTable
from lightning_deepr.conversion.selection import Candidate, best_key


def check_candidates(candidates: Any, argument: str = "candidates") -> None:
    """Check ``candidates`` before there is a network.

    Raises:
        TypeError, ValueError: it is none of the forms.
    """
    if candidates is None:
        return
    if isinstance(candidates, Mapping):
        if not candidates:
            raise ValueError(f"{argument}: expected at least one pattern, found an empty dict.")
        for pattern, value in candidates.items():
            as_candidates(value, f"{argument}[{pattern!r}]")
        return
    as_candidates(candidates, argument)


def allowed_of(chosen: Sequence[Candidate], candidates: Any, device: torch.device | str | None = None) -> dict[str, Allowed]:
    """Find where the connections of each tensor may be.

    Args:
        chosen: the tensors.
        candidates: what the user gives; None: everywhere.
        device: the device that the tensors are moved to; None: they stay.

    Returns:
        {tensor name: the allowed places}, without the tensors that are not restricted.

    Raises:
        ValueError: they do not fit a tensor, or a pattern names none.
    """
    found = {}
    for candidate, value in entries(chosen, candidates, "candidates"):
        weight = candidate.parameter
        target = torch.device(device) if device is not None else weight.device if weight is not None else None
        try:
            found[candidate.name] = allowed_places.bind(value, candidate.units, candidate.shape, target)
        except ValueError as error:
            raise ValueError(f"candidates of `{candidate.name}`: {error}.") from error
    return found


def refuse_too_many(counts: Mapping[str, int], allowed: Mapping[str, Allowed]) -> None:
    """Refuse tensors with more connections than allowed places.

    Raises:
        ValueError: the message has both numbers.
    """
    for name, places in allowed.items():
        if counts[name] > places.count:
            raise ValueError(
                f"`{name}`: expected at most {places.count:,} connections, one for each place that {places.text} allows (of "
                f"{places.units.total:,}), found K = {counts[name]:,}. Lower the connectivity, name one for this tensor in a "
                "dict, or allow more places."
            )


def tables_of(chosen: Sequence[Candidate], signs: Any, seed: int, first: int) -> dict[str, SignTable]:
    """Find the table of signs of each tensor.

    Args:
        chosen: the tensors.
        signs: "place" | Dale | a tensor | a dict of these by pattern.
        seed: the seed of the draws.
        first: the number of the first tensor.

    Returns:
        {tensor name: the table}, without the tensors whose signs are hashed.

    Raises:
        ValueError: they do not fit a tensor, or a pattern names none.
    """
    numbers = {candidate.name: first + offset for offset, candidate in enumerate(chosen)}
    tables = {c.name: table_of(c, value, seed, numbers[c.name]) for c, value in entries(chosen, signs, "signs")}
    return {name: table for name, table in tables.items() if table is not None}


def table_of(candidate: Candidate, value: Any, seed: int, number: int) -> SignTable | None:
    """Fit signs to one tensor; None: they are hashed.

    Raises:
        ValueError: they do not fit; the message names the tensor.
    """
    try:
        return sign_tables.bind(value, candidate.units, candidate.shape, seed, number)
    except ValueError as error:
        raise ValueError(f"signs of `{candidate.name}`: {error}.") from error


def part(given: Any, chosen: Sequence[Candidate], names: Container[str]) -> Any:
    """Leave out the patterns of a dict that none of some tensors follows.

    Args:
        given: ``candidates`` or ``signs``.
        chosen: all tensors.
        names: the names of those tensors.
    """
    if not isinstance(given, Mapping):
        return given
    followed = {best_key(given, candidate, "candidates") for candidate in chosen if candidate.name in names}
    return {key: value for key, value in given.items() if key in followed}


def refuse_unnamed(chosen: Sequence[Candidate], arguments: Mapping[str, Any]) -> None:
    """Refuse patterns that name none of the tensors.

    Args:
        chosen: all tensors.
        arguments: {"candidates" or "signs": what is given}.
    """
    for argument, given in arguments.items():
        if isinstance(given, Mapping):
            entries(chosen, given, argument)


def entries(chosen: Sequence[Candidate], given: Any, argument: str) -> list[tuple[Candidate, Any]]:
    """List the tensors for which something is given.

    Raises:
        ValueError: a pattern names none of the tensors.
    """
    if given is None:
        return []
    if not isinstance(given, Mapping):
        return [(candidate, given) for candidate in chosen]
    keys = {candidate.name: best_key(given, candidate, argument) for candidate in chosen}
    for key in given:
        if key not in keys.values():
            names = ", ".join(f"`{candidate.name}`" for candidate in chosen)
            raise ValueError(
                f"{argument}: the pattern {key!r} names no tensor that is converted with it: expected a name or a pattern of "
                f"one of {names}. (A longer pattern that names the same tensor goes first.)"
            )
    return [(candidate, given[key]) for candidate in chosen if (key := keys[candidate.name]) is not None]
