"""Tables as text and as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any


def as_text(columns: Sequence[str], rows: Sequence[Sequence[Any]], total: Sequence[Any] | None = None) -> str:
    """Lay out a table; numbers stand at the right."""
    body = [[_cell(value) for value in row] for row in [*rows, *([total] if total else [])]]
    widths = [max(len(line[i]) for line in [list(columns), *body]) for i in range(len(columns))]
    right = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines = [line(list(columns)), rule, *(line(row) for row in body[: len(rows)])]
    return "\n".join([*lines, rule, line(body[-1])] if total else lines)


def as_html(columns: Sequence[str], rows: Sequence[Sequence[Any]], total: Sequence[Any] | None = None) -> str:
    """Write a table for a notebook. It takes its colours from the page."""

    def line(cells: Sequence[Any], tag: str) -> str:
        align = ["right" if isinstance(value, (int, float)) else "left" for value in cells]
        inside = "".join(
            f'<{tag} style="text-align:{side}">{html.escape(_cell(value))}</{tag}>'
            for value, side in zip(cells, align, strict=True)
        )
        return f"<tr>{inside}</tr>"

    body = "".join(line(row, "td") for row in rows)
    foot = f"<tfoot>{line(total, 'th')}</tfoot>" if total else ""
    return f"<table><thead>{line(columns, 'th')}</thead><tbody>{body}</tbody>{foot}</table>"


def _cell(value: Any) -> str:
    return (
        ""
        if value is None
        else f"{value:,}"
        if isinstance(value, int)
        else f"{value:.4g}"
        if isinstance(value, float)
        else str(value)
    )
