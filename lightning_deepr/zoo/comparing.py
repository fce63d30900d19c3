"""Compares the models of the zoo, accuracy over bytes: ``python -m lightning_deepr.zoo.comparing [FOLDER]``.

It writes ``comparison.md`` and ``comparison.png`` from the records of the files alone. The accuracies are measured by
``python -m lightning_deepr.zoo.results``.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_deepr import zoo
from lightning_deepr.pictures.figures import figure, finished
from lightning_deepr.zoo.loading import folder_of_checkout

_PAGE, _PICTURE = "comparison.md", "comparison.png"
_HEAD = """# The zoo compared: accuracy over bytes

Test accuracy of each file (TIMIT: of frames, in 39 classes) over its size. *Dense* is the size of the same weights in
float32, 4 bytes each. *Best* marks a file that no smaller file of the same data set equals. All numbers are read from the
files; `zoo/README.md` has the mean over seeds. `python -m lightning_deepr.zoo.comparing` writes this page.

![accuracy over bytes, one panel per data set]({picture})
"""


class Row(NamedTuple):
    """A model in the comparison.

    Attributes:
        data: the data set.
        name: its name.
        algorithm: how it was trained.
        bytes, dense: sizes of the file, and of its weights in float32.
        connectivity: active connections over potential ones, of the sparse weights.
        correct, examples: the recorded count on the test set.
        best: whether no smaller file of the data set is as good.
    """

    data: str
    name: str
    algorithm: str
    bytes: int
    dense: int
    connectivity: float
    correct: int
    examples: int
    best: bool

    @property
    def accuracy(self) -> float:
        """In per cent."""
        return 100 * self.correct / self.examples


def rows(names: Sequence[str] | None = None) -> list[Row]:
    """Read the models' records, and sort them by data set and size.

    Args:
        names: names of the zoo; None: all.
    """
    found: list[Row] = []
    for info in map(zoo.info, zoo.list_models() if names is None else names):
        (metric,) = info["metrics"].values()
        connectivity, data = info["connectivity"], info["data"]["name"]
        dense = 4 * (connectivity["total"] + info["dense_parameters"])
        share, counted = connectivity["connectivity"], (metric["correct"], metric["examples"])
        found.append(Row(data, info["name"], info["algorithm"], info["bytes"], dense, share, *counted, best=False))
    found.sort(key=lambda row: (row.data, row.bytes))
    return [
        row._replace(best=all(row.accuracy > other.accuracy for other in found[:at] if other.data == row.data))
        for at, row in enumerate(found)
    ]


def page(found: Sequence[Row], picture: str = _PICTURE) -> str:
    """Write the comparison in Markdown."""
    lines = [_HEAD.format(picture=picture)]
    for data in dict.fromkeys(row.data for row in found):
        lines += [f"## {data}\n", "| model | algorithm | bytes | dense | smaller | connectivity | accuracy, % | best |"]
        lines.append("|---|---|---:|---:|---:|---:|---:|---|")
        for row in found:
            if row.data == data:
                lines.append(
                    f"| `{row.name}` | {row.algorithm} | {row.bytes:,} | {row.dense:,} | {row.dense / row.bytes:.1f} times "
                    f"| {row.connectivity:.2%} | {row.accuracy:.2f} | {'yes' if row.best else ''} |"
                )
        lines.append("")
    return "\n".join(lines)


def digest(found: Sequence[Row]) -> str:
    """Return a digest of what the picture shows; the picture carries it, so that an outdated one is found."""
    return hashlib.sha256(repr(list(found)).encode()).hexdigest()


def draw(found: Sequence[Row], path: Path) -> Path:
    """Draw accuracy over bytes, one panel per data set."""
    names = list(dict.fromkeys(row.data for row in found))
    made, axes = figure(len(names), width=4.2, height=3.6)
    for axis, data in zip(axes, names, strict=True):
        mine = [row for row in found if row.data == data]
        for number, algorithm in enumerate(sorted({row.algorithm for row in mine})):
            points: list[Any] = [row for row in mine if row.algorithm == algorithm]
            x, y = [row.bytes for row in points], [row.accuracy for row in points]
            axis.plot(x, y, "os"[number % 2] + "-", label=algorithm, markersize=4, linewidth=1)
            for row in points:
                at, label = (row.bytes, row.accuracy), f"{row.connectivity:.1%}"
                axis.annotate(label, at, (4, -9), textcoords="offset points", fontsize=6)
        axis.axvline(mine[0].dense, color="0.6", linestyle=":", label="dense float32")
        axis.set(xscale="log", title=data, xlabel="bytes of the file", ylabel="test accuracy, %")
        axis.xaxis.set_minor_formatter(lambda *_: "")  # 2 x 10^4, 3 x 10^4, ... do not fit
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3, which="both")
    finished(made, path, Description=digest(found))
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m lightning_deepr.zoo.comparing``."""
    parser = argparse.ArgumentParser(prog="python -m lightning_deepr.zoo.comparing", description="Compare the zoo's models.")
    parser.add_argument("folder", type=Path, nargs="?", help="folder to write to (default: zoo/ of the checkout)")
    given = parser.parse_args(arguments)
    try:
        folder = given.folder or folder_of_checkout("FOLDER")
    except ValueError as error:
        parser.error(str(error))
    folder.mkdir(parents=True, exist_ok=True)
    found = rows()
    (folder / _PAGE).write_text(page(found), encoding="utf-8")
    draw(found, folder / _PICTURE)
    print(f"{folder / _PAGE} {folder / _PICTURE}")


if __name__ == "__main__":
    main()
