"""The rules of a converted weight in a ``state_dict``: where its connections may be, and a table of signs.

A weight without rules has no entries, so that its ``state_dict`` is what it always was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_deepr.algorithm.allowed import Allowed
from lightning_deepr.algorithm.signs import SignTable

CANDIDATES, CANDIDATE_ITEMS = "candidates", "candidate_items"
SIGN_RULE, SIGN_TABLE = "sign_rule", "sign_table"
KEYS = (CANDIDATES, CANDIDATE_ITEMS, SIGN_RULE, SIGN_TABLE)


def save(allowed: Allowed | None, table: SignTable | None, destination: dict[str, Any], prefix: str) -> None:
    """Add the rules of a weight to a ``state_dict``."""
    for rule, head, body in ((allowed, CANDIDATES, CANDIDATE_ITEMS), (table, SIGN_RULE, SIGN_TABLE)):
        if rule is not None:
            numbers, items = rule.record()
            destination[prefix + head] = torch.tensor(numbers)
            destination[prefix + body] = items.clone()


def of_record(record: Mapping[str, Tensor], total: int) -> tuple[Allowed | None, SignTable | None]:
    """Read the rules of a weight from its record.

    Raises:
        ValueError: they are damaged, or those of another weight.
    """
    allowed = table = None
    if CANDIDATES in record:
        allowed = Allowed.of_record(*_numbers(record, CANDIDATES, CANDIDATE_ITEMS), total)
    if SIGN_RULE in record:
        table = SignTable.of_record(*_numbers(record, SIGN_RULE, SIGN_TABLE), total)
    return allowed, table


def _numbers(record: Mapping[str, Tensor], head: str, body: str) -> tuple[list[int], Tensor]:
    numbers, items = record[head], record.get(body)
    if items is None or items.is_floating_point() or numbers.is_floating_point():
        raise ValueError(
            f"{head}: expected whole numbers with `{body}`, found {'none' if items is None else 'floats, an average'}: load a "
            "state_dict of one network."
        )
    return numbers.tolist(), items.detach().cpu().clone()


def problem(
    record: Mapping[str, Tensor], total: int, allowed: Allowed | None, table: SignTable | None, places: Tensor | None
) -> str | None:
    """Say why the rules of a record do not fit a converted weight, or return None.

    Args:
        record: the entries of the weight in a ``state_dict``.
        total: N.
        allowed, table: the rules that the weight has.
        places: the recorded places of K slots; None: there are none.
    """
    try:
        theirs, signs = of_record(record, total)
    except ValueError as error:
        return str(error)
    if allowed is not None and theirs is not None and theirs != allowed:
        return (
            f"expected connections among {allowed!r}, found a checkpoint with {theirs!r}: give the candidates of the run that "
            "wrote it, or convert as recorded with `lightning_deepr.load_state_dict(module, checkpoint)`."
        )
    if table is not None and signs != table:
        found = "signs by the hash of their places" if signs is None else f"other signs ({signs!r})"
        return (
            f"expected signs by {table!r}, found a checkpoint with {found}: give the signs and the seed of the run that wrote "
            "it, or convert as recorded with `lightning_deepr.load_state_dict(module, checkpoint)`."
        )
    both = theirs or allowed
    if both is not None and places is not None and places.numel():
        outside = ~both.contains(places)
        if bool(outside.any()):
            return (
                f"expected connections among {both!r}, found {int(outside.sum())} of {places.numel()} elsewhere, the first at "
                f"place {int(places[outside][0])}."
            )
    return None
