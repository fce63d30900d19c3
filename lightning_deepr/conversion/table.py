"""Tables of text that fit a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

WIDTH = 80
_SHORTEST = 12  # characters that are kept for the first column
_NOTHING = ("", "-")


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Iterable[str] = (),
    sums: Sequence[str] | None = None,
    width: int = WIDTH,
) -> str:
    """Write a table. Columns that say nothing ("" or "-" in every row) are left out, except the first.

    What is too wide for that: a text that is the same in every row comes once, below the table; a long name has a line of its
    own; long texts have lines of their own under their rows. Nothing is cut.

    Args:
        columns: the heads.
        rows: the cells of each row.
        right: the heads of the columns that are aligned on the right.
        sums: a last row, below a rule; None: none.
        width: the most characters of a line. A single cell may be longer.

    Example::

        >>> print(table(("name", "K", "note"), [("fc1.weight", "7", "-"), ("fc2.weight", "12", "-")], right=["K"]))
        name         K
        --------------
        fc1.weight   7
        fc2.weight  12
    """
    right = set(right)
    kept = [i for i in range(len(columns)) if i == 0 or not rows or any(row[i] not in _NOTHING for row in rows)]
    everything = [columns, *rows, *([sums] if sums else [])]
    widths = {i: max(len(line[i]) for line in everything) for i in kept}
    below: list[str] = []  # columns that have the same text in every row
    under: list[int] = []  # columns that have a line of their own under each row

    def total() -> int:
        return sum(widths[i] for i in kept) + 2 * (len(kept) - 1)

    texts = [i for i in kept[1:] if columns[i] not in right]
    for i in sorted(texts, key=lambda one: -widths[one]):
        if total() > width and len(rows) > 1 and len({row[i] for row in rows}) == 1:
            kept.remove(i)
            below.append(f"{columns[i]}: {rows[0][i]}")
    for i in sorted(texts, key=lambda one: -widths[one]):
        if i in kept and total() - widths[0] + _SHORTEST > width:
            kept.remove(i)
            under.append(i)
    widths[0] = max(min(widths[0], width - (total() - widths[0])), min(_SHORTEST, widths[0]))

    def written(cells: Sequence[str]) -> list[str]:
        long = len(cells[0]) > widths[0]
        line = [(cells[i] if i or not long else "") for i in kept]
        line = [c.rjust(widths[i]) if columns[i] in right else c.ljust(widths[i]) for i, c in zip(kept, line, strict=True)]
        more = [f"    {columns[i]}: {cells[i]}" for i in sorted(under) if cells[i] not in _NOTHING]
        return [*([cells[0]] if long else []), "  ".join(line).rstrip(), *more]

    rule = "-" * total()
    head = "  ".join(columns[i].rjust(widths[i]) if columns[i] in right else columns[i].ljust(widths[i]) for i in kept)
    lines = [head.rstrip(), rule, *(line for row in rows for line in written(row))]
    return "\n".join([*lines, *([rule, *written(sums)] if sums else []), *below])
