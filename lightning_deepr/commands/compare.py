"""The command ``lightning-deepr compare A B``: two trained networks side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from lightning_deepr.commands.sources import Source, lines_of, open_source, short
from lightning_deepr.conversion.table import table


class Common(NamedTuple):
    """What two networks have in common in one tensor.

    Attributes:
        name: the tensor, as the first network names it.
        total: N.
        first, second: K of each; None: this network does not have the tensor, or its places are not recorded.
        common: the places that both have; None: not known.
    """

    name: str
    total: int
    first: int | None
    second: int | None
    common: int | None

    @property
    def overlap(self) -> float | None:
        """The common places over those of the smaller one, from 0 to 1."""
        if self.common is None or not self.first or not self.second:
            return None
        return self.common / min(self.first, self.second)

    @property
    def by_chance(self) -> float | None:
        """The expected overlap of two independent draws: the larger K over N."""
        return None if self.overlap is None else max(self.first or 0, self.second or 0) / self.total

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "overlap": self.overlap, "by_chance": self.by_chance}


def common(first: Source, second: Source) -> list[Common]:
    """Compare the connections of two networks, tensor by tensor; ``net.fc1.weight`` is ``fc1.weight``."""
    others = {row["name"]: row for row in second.report}
    found = []
    for row in first.report:
        fitting = [one for one in others if _match(row["name"], one) and others[one]["shape"] == row["shape"]]
        other = row["name"] if row["name"] in fitting else fitting[0] if len(fitting) == 1 else None
        both = None
        if other is not None:
            mine, theirs = first.places.get(row["name"]), second.places.get(other)
            if mine is not None and theirs is not None:
                both = int(torch.isin(mine, theirs).sum())
        active = others.pop(other)["active"] if other is not None else None
        found.append(Common(row["name"], row["total"], row["active"], active, both))
    return found + [Common(name, row["total"], None, row["active"], None) for name, row in others.items()]


def _match(one: str, other: str) -> bool:
    return one == other or one.endswith(f".{other}") or other.endswith(f".{one}")


def compare(arguments: Sequence[str]) -> None:
    """Run the command.

    Raises:
        SystemExit: with status 2, the arguments are wrong; with status 1, one of the two can't be read.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-deepr compare",
        description="Two trained networks side by side: connectivity, common connections, metrics and settings.",
    )
    what = "a run's folder, a sparse file, a checkpoint, a model of the zoo, or owner/name on the Hub"
    parser.add_argument("first", metavar="A", help=what)
    parser.add_argument("second", metavar="B", help="the same")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    given = parser.parse_args(arguments)
    try:
        first, second = open_source(given.first), open_source(given.second)
    except (OSError, ValueError) as error:
        raise SystemExit(f"lightning-deepr compare: {error}") from error
    tensors = common(first, second)
    if given.json:
        result = {"first": first.to_dict(), "second": second.to_dict(), "tensors": [one.to_dict() for one in tensors]}
        print(json.dumps({**result, "overlap": overlap(tensors)}, indent=2, default=str))
    else:
        print(text(first, second, tensors))


def overlap(tensors: Sequence[Common]) -> float | None:
    """Return the overlap over all tensors that both networks have; None: it is not known."""
    known = [one for one in tensors if one.common is not None]
    smaller = min(sum(one.first or 0 for one in known), sum(one.second or 0 for one in known)) if known else 0
    return sum(one.common or 0 for one in known) / smaller if smaller else None


def text(first: Source, second: Source, tensors: Sequence[Common]) -> str:
    """Write the comparison as two tables."""
    rows: list[tuple[str, ...]] = [("", *(one.kind for one in (first, second)))]
    rows.append(("connections", *(f"{one.report.active:,}" for one in (first, second))))
    rows.append(("connectivity", *(percent(one.connectivity, "dense") for one in (first, second))))
    rows.append(("bytes of the file", *(f"{one.bytes:,}" for one in (first, second))))
    for kind in ("metrics", "settings"):
        mine, theirs = getattr(first, kind), getattr(second, kind)
        for key in [*mine, *(key for key in theirs if key not in mine)]:
            cells = [short(one[key]) if key in one else "-" for one in (mine, theirs)]
            if kind == "metrics" or cells[0] != cells[1]:
                rows += lines_of(key, *cells, width=27)
    parts = [f"A: {first.name}", f"B: {second.name}", "", table(("", "A", "B"), rows)]
    if tensors:
        body = [
            (
                one.name,
                number(one.first),
                number(one.second),
                number(one.common),
                percent(one.overlap),
                percent(one.by_chance),
            )
            for one in tensors
        ]
        known = [one for one in tensors if one.common is not None]
        sums = ("total", f"{first.report.active:,}", f"{second.report.active:,}")
        last = (number(sum(one.common or 0 for one in known) if known else None), percent(overlap(tensors)), "")
        heads = ("tensor", "A", "B", "common", "overlap", "by chance")
        parts += ["", table(heads, body, right=heads[1:], sums=(*sums, *last))]
    if first.report.active and second.report.active and not any(one.common is not None for one in tensors):
        parts.append("No tensor of both has recorded places: nothing to compare place by place.")
    return "\n".join(parts)


def number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def percent(value: float | None, nothing: str = "-") -> str:
    return nothing if value is None else f"{value:.2%}"
