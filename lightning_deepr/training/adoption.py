"""A callback takes over a network that is converted already: its connectivity has to be the one that was asked for."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_deepr.conversion import connectivities, restrictions
from lightning_deepr.conversion.allocation import allocate
from lightning_deepr.conversion.selection import Candidate


def refuse_other_connectivity(callback: Any, adopted: Sequence[Candidate], new: Sequence[Candidate]) -> None:
    """Refuse converted tensors with another number of connections than the callback's ``connectivity`` gives them.

    Args:
        callback: the callback, with a connectivity.
        adopted: the converted tensors that it takes over.
        new: the dense tensors that it is going to convert.

    Raises:
        ValueError: K differs by more than rounding; the message has both.
    """
    if not adopted:
        return
    adapted = [c.name for c in adopted if getattr(c.slots, "adapts", False)]
    if adapted and getattr(callback, "of", "weight") == "weight":
        raise ValueError(
            f"{type(callback).__name__}(connectivity={callback.connectivity!r}) asks for sparse weights, but `{adapted[0]}` is "
            'a frozen dense weight and a sparse difference to it. Give of="difference" to go on with the difference, or '
            "connectivity=None; or call densify(module) first, to convert the sum."
        )
    asked = _asked(callback, adopted, new)
    found, total = sum(_count(c) for c in adopted), sum(c.total for c in adopted)
    if asked is None or abs(found - asked) <= len(adopted):
        return
    names = ", ".join(f"`{c.name}`" for c in adopted[:3]) + (", ..." if len(adopted) > 3 else "")
    raise ValueError(
        f"{type(callback).__name__}(connectivity={callback.connectivity!r}) asks for K = {asked:,} connections "
        f"({asked / total:.3%}), but {len(adopted)} tensors ({names}) are converted already, with K = {found:,} "
        f"({found / total:.3%}). Give connectivity=None to go on with the connections that are there, or the connectivity that "
        'they have; or call densify(module) first, to convert anew (init="largest" keeps the largest weights).'
    )


def adopt_rules(callback: Any, adopted: Sequence[Candidate], chosen: Sequence[Candidate]) -> None:
    """Give converted tensors the candidates of a callback, or refuse those that have other candidates or other signs.

    Args:
        callback: the callback.
        adopted: the converted tensors that it takes over.
        chosen: all its tensors.

    Raises:
        ValueError: a tensor has connections elsewhere, other candidates or other signs.
    """
    mine = {candidate.name for candidate in adopted}
    method = type(callback).__name__
    wanted = restrictions.allowed_of(adopted, restrictions.part(callback.candidates, chosen, mine))
    for candidate in adopted:
        slots: Any = candidate.slots
        allowed = wanted.get(candidate.name)
        if allowed is None or slots.allowed == allowed:
            continue
        if slots.allowed is not None:
            raise ValueError(
                f"`{candidate.name}` is converted already, with connections among {slots.allowed!r}, but {method} has other "
                f"candidates ({allowed!r}). Give the same ones or none, or call densify(module) first."
            )
        places = getattr(slots, "places", None)
        outside = 0 if places is None else int((~allowed.contains(places)).sum())
        if places is None or outside:
            raise ValueError(
                f"`{candidate.name}` is converted already: expected its connections among {allowed!r}, found "
                f"{'a theta for every place' if places is None else f'{outside} of {slots.count} elsewhere'}. Give candidates "
                "to sparsify, or call densify(module) first."
            )
        slots.allowed = allowed
    signs = getattr(callback, "signs", "place")
    for candidate, value in restrictions.entries(adopted, restrictions.part(signs, chosen, mine), "signs"):
        slots = candidate.slots
        table = restrictions.table_of(candidate, value, callback.seed, slots.index)
        if table is not None and slots.sign_table != table:
            found = "by the hash of their places" if slots.sign_table is None else repr(slots.sign_table)
            raise ValueError(
                f"`{candidate.name}` is converted already, with signs {found}: expected {method}'s, {table!r}. Give signs to "
                "sparsify with the same seed, leave them out here, or call densify(module) first."
            )


def _count(candidate: Candidate) -> int:
    slots: Any = candidate.slots
    return slots.count if slots.shares else slots.wanted  # layers that share one K have their present part of it


def _asked(callback: Any, adopted: Sequence[Candidate], new: Sequence[Candidate]) -> int | None:
    """Compute K of the adopted tensors by the callback's arguments; None: a number of connections does not say how many."""
    connectivity = callback.connectivity
    if connectivities.gives_places(connectivity):
        return None  # these are the places of the start, and connections have moved since
    values = connectivity.values() if isinstance(connectivity, Mapping) else [connectivity]
    if new and any(isinstance(value, numbers.Integral) for value in values):
        return None  # a total for the adopted and the new tensors together
    try:
        return sum(allocate(adopted, connectivity, callback.distribution).values())
    except ValueError:  # a distribution for other tensors, or more connections than there are
        if isinstance(connectivity, Mapping):
            raise
        whole = isinstance(connectivity, numbers.Integral)
        return int(connectivity) if whole else round(float(connectivity) * sum(c.total for c in adopted))
