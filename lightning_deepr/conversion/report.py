"""The connectivity of a network as a table."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_deepr._needed import needed
from lightning_deepr.conversion import tables
from lightning_deepr.conversion.computing import computes
from lightning_deepr.conversion.parameters import count_adapted, count_parameters
from lightning_deepr.conversion.selection import candidates
from lightning_deepr.conversion.table import WIDTH, table
from lightning_deepr.weights.find import converted_tensors


class ConnectivityReport:
    """The connectivity of a network, tensor by tensor. It prints as a table; see :func:`connectivity_report`."""

    columns = ("name", "shape", "total", "active", "connectivity", "l1", "lr_scale", "compute")
    rule_columns = ("candidates", "allowed", "signs")  # only if the connections of some tensor follow such rules

    def __init__(
        self,
        rows: list[dict[str, Any]],
        left_out: dict[str, str],
        parameters: int | None = None,
        dense: dict[str, int] | None = None,
        adapted: dict[str, int] | None = None,
    ) -> None:
        self.rows = rows
        self.left_out = left_out
        self.parameters = parameters  # of the whole network, as if it were dense; None: not known (a checkpoint)
        self.adapted = adapted  # of an adapted network: {"adapted", "frozen", "trainable"}: numbers of parameters
        self.dense = dense or {}  # {reason: the number of parameters that are dense for it}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.rows[position]

    @property
    def total(self) -> int:
        """The sum of N over the converted tensors."""
        return sum(row["total"] for row in self.rows)

    @property
    def active(self) -> int:
        """The sum of K over the converted tensors."""
        return sum(row["active"] for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return rows, sums and what was left out, in builtins only."""
        connectivity = self.active / self.total if self.total else 0.0
        return {
            "rows": [dict(row) for row in self.rows],
            "total": self.total,
            "active": self.active,
            "connectivity": connectivity,
            "left_out": dict(self.left_out),
            "parameters": self.parameters,
            "dense": dict(self.dense),
            **({} if self.adapted is None else {"adapted": dict(self.adapted)}),
        }

    def to_pandas(self) -> Any:
        """Return the rows as a pandas DataFrame."""
        (pandas,) = needed("pandas", purpose="ConnectivityReport.to_pandas")
        return pandas.DataFrame(self.rows, columns=[*self.columns, *self._rules])

    @property
    def _rules(self) -> tuple[str, ...]:
        return self.rule_columns if any(set(self.rule_columns) & row.keys() for row in self.rows) else ()

    def __str__(self) -> str:
        body = [
            (
                row["name"],
                "x".join(str(size) for size in row["shape"]),
                f"{row['total']:,}",
                f"{row['active']:,}",
                f"{row['connectivity']:.3%}",
                "-" if row["l1"] is None else f"{row['l1']:g}" if isinstance(row["l1"], float) else str(row["l1"]),
                "-" if row["lr_scale"] is None else f"{row['lr_scale']:g}",
                row["compute"],
                *(_rule_cell(row, rule) for rule in self._rules),
            )
            for row in self.rows
        ]
        if self.rows:
            empty = [""] * (3 + len(self._rules))
            body.append(("total", "", f"{self.total:,}", f"{self.active:,}", f"{self.active / self.total:.3%}", *empty))
        columns = (*self.columns, *self._rules)
        right = ("total", "active", "connectivity", "allowed")
        sums = body.pop() if self.rows else None
        return "\n".join([table(columns, body, right=right, sums=sums), *map(_wrapped, self._notes())])

    def _notes(self) -> Iterator[str]:
        """Write the lines below the table: what is dense."""
        yield from (f"left dense: {name} ({why})" for name, why in self.left_out.items())
        for row in self.rows:
            if "measured" in row:
                times = " and ".join(
                    f"{way} {1e3 * s:.3g} ms" for way, s in zip(("sparse", "dense"), row["measured"], strict=True)
                )
                yield f"measured here: {row['name']}: {times}"
        if self.adapted is not None:
            yield (
                f"adapted: {self.active:,} connections beside {self.adapted['adapted']:,} frozen weights; frozen in all: "
                f"{self.adapted['frozen']:,}; trainable: {self.adapted['trainable']:,}"
            )
            return
        if self.parameters:
            dense = sum(self.dense.values())
            why = ", ".join(f"{reason} {count:,}" for reason, count in self.dense.items() if count)
            share = f"dense: {dense:,} of all {self.parameters:,} parameters ({dense / self.parameters:.2%})"
            yield f"{share}: {why}" if why else share

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        columns = (*self.columns, *self._rules)
        rows = [
            [
                row["name"], "x".join(str(size) for size in row["shape"]), row["total"], row["active"],
                f"{row['connectivity']:.3%}", "-" if row["l1"] is None else row["l1"],
                "-" if row["lr_scale"] is None else row["lr_scale"], row["compute"],
                *(_rule_cell(row, rule) for rule in self._rules),
            ]
            for row in self.rows
        ]  # fmt: skip
        share = f"{self.active / self.total:.3%}" if self.total else ""
        total = ["total", "", self.total, self.active, share, *[""] * (len(columns) - 5)]
        notes = "".join(f"<br>{html.escape(line)}" for line in self._notes())
        return f"{tables.as_html(columns, rows, total)}<p>{notes.removeprefix('<br>')}</p>"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _rule_cell(row: dict[str, Any], rule: str) -> str:
    value = row.get(rule)
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _rules_of(slots: Any) -> dict[str, Any]:
    """Describe where the connections of a tensor may be and how its signs are given; nothing if there are no rules."""
    if slots.allowed is None and slots.sign_table is None:
        return {}
    return {
        "candidates": None if slots.allowed is None else slots.allowed.text,
        "allowed": slots.total if slots.allowed is None else slots.allowed.count,
        "signs": "place" if slots.sign_table is None else slots.sign_table.text,
    }


def connectivity_report(module: nn.Module) -> ConnectivityReport:
    """Report which tensors are sparse, how sparse they are, and what was left dense and why.

    Args:
        module: any module.

    Returns:
        rows with name, shape, total (N), active (K), connectivity (K / N), l1 and lr_scale (the values that a callback took,
        None before) and compute: "sparse", or "dense" if connections are stored and each pass builds the weight (under "auto",
        and for layers with a forward of their own, a guess before the first batch, then what happened). Print the report,
        iterate over it, or use ``.to_dict()`` and ``.to_pandas()``. ``.left_out`` has {name: reason} of the weights that
        stayed dense, ``.dense`` {reason: number} of all parameters that did, and ``.parameters`` the number of all, converted
        tensors with N each.

        The report of an adapted network has ``.adapted``: {"adapted": the number of weights that have a difference, "frozen":
        that of all frozen parameters, "trainable": that of all trained ones}; connections are those of the difference.

        Rows of tensors that ``compute="tune"`` has timed have measured: the seconds (sparse, dense) of the last input's size.

        Rows of tensors whose places or signs follow rules also have candidates, allowed (the number of allowed places) and
        signs.

    Example::

        >>> from lightning_deepr import sparsify
        >>> print(connectivity_report(sparsify(nn.Linear(100, 10), 0.05)))
        name    shape   total  active  connectivity  compute
        ----------------------------------------------------
        weight  10x100  1,000      50        5.000%  sparse
        ----------------------------------------------------
        total           1,000      50        5.000%
        dense: 10 of all 1,010 parameters (0.99%): bias or norm 10
    """
    rows = [
        {
            "name": c.name,
            "shape": tuple(c.slots.shape),
            "total": c.slots.total,
            "active": c.slots.count,
            "connectivity": c.slots.count / c.slots.total,
            "l1": c.slots.l1_taken,
            "lr_scale": c.slots.lr_scale_taken,
            "compute": computes(c),
            **({} if c.slots.measured is None else {"measured": tuple(c.slots.measured)}),
            **_rules_of(c.slots),
        }
        for c in converted_tensors(module)
    ]
    left_out = {c.name: c.left_out or "not selected" for c in candidates(module) if c.slots is None}
    return ConnectivityReport(rows, left_out, *count_parameters(module), count_adapted(module))
