"""The connectivity of a network as a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_deepr.conversion.selection import candidates
from lightning_deepr.weights.find import converted_tensors


class ConnectivityReport:
    """The connectivity of a network, tensor by tensor. It prints as a table; see :func:`connectivity_report`."""

    columns = ("name", "shape", "total", "active", "connectivity", "l1", "lr_scale", "compute")

    def __init__(self, rows: list[dict[str, Any]], left_out: dict[str, str]) -> None:
        self.rows = rows
        self.left_out = left_out

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
        }

    def to_pandas(self) -> Any:
        """Return the rows as a pandas DataFrame."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("ConnectivityReport.to_pandas needs pandas: `pip install pandas`.") from error
        return pandas.DataFrame(self.rows, columns=list(self.columns))

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
            )
            for row in self.rows
        ]
        if self.rows:
            body.append(("total", "", f"{self.total:,}", f"{self.active:,}", f"{self.active / self.total:.3%}", "", "", ""))
        widths = [max(len(line[i]) for line in [self.columns, *body]) for i in range(len(self.columns))]
        right = {2, 3, 4}

        def line(cells: tuple[str, ...]) -> str:
            cells_ = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
            return "  ".join(cells_).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        lines = [line(self.columns), rule, *(line(row) for row in body[: len(self.rows)])]
        if self.rows:
            lines += [rule, line(body[-1])]
        lines += [f"left dense: {name} ({why})" for name, why in self.left_out.items()]
        return "\n".join(lines)

    __repr__ = __str__


def connectivity_report(module: nn.Module) -> ConnectivityReport:
    """Report which tensors are sparse, how sparse they are, and what was left dense and why.

    Args:
        module: any module.

    Returns:
        rows with name, shape, total (N), active (K), connectivity (K / N), l1 and lr_scale (the values that a callback took,
        None before) and compute (under "auto" a guess before the first batch, then what the last training step did). Print the
        report, iterate over it, or use ``.to_dict()`` and ``.to_pandas()``.

    Example::

        >>> from lightning_deepr import sparsify
        >>> print(connectivity_report(sparsify(nn.Linear(100, 10), 0.05)))
        name    shape   total  active  connectivity  l1  lr_scale  compute
        ------------------------------------------------------------------
        weight  10x100  1,000      50        5.000%  -   -         sparse
        ------------------------------------------------------------------
        total           1,000      50        5.000%
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
            "compute": c.slots.compute,
        }
        for c in converted_tensors(module)
    ]
    left_out = {c.name: c.left_out or "not selected" for c in candidates(module) if c.slots is None}
    return ConnectivityReport(rows, left_out)
