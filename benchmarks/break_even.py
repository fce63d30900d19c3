"""From which density on is dense compute faster, and does ``compute="auto"`` choose the faster one?

    python benchmarks/break_even.py
    python benchmarks/break_even.py --sizes 256x256 --batches 128 --fit

It times forward and backward of one converted linear layer (gradients of the input, theta and the bias; float32), with
compute="sparse" and with compute="dense", by size, density and batch. The table has the ratio sparse / dense: below 1, sparse
is faster. Arms take turns within each round; times are medians.

Below the table it prints how often the rule in ``lightning_deepr/compute/choice.py`` chooses the faster one, and how much time
the other choices lose. --fit prints the constants for that rule that fit these times best (least squares of log time), in the
form of that file. --read does both for an existing break_even.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from typing import Any

import numpy as np
import torch
from common import Row, axes, calls, compare, parser, prepare, save, training_pass
from torch import nn

from lightning_deepr import sparsify
from lightning_deepr.compute import choice

SIZES = "10x100,64x64,256x256,300x784,1024x1024,4096x4096"
DENSITIES = "0.005,0.01,0.02,0.05,0.1,0.2,0.5"
BATCHES = "1,10,128,512"


def measure(rows: int, columns: int, density: float, batch: int, rounds: int, budget: float) -> Row:
    torch.manual_seed(0)
    x, dy = torch.randn(batch, columns, requires_grad=True), torch.randn(batch, rows)
    layers = {compute: sparsify(nn.Linear(columns, rows), density, compute=compute) for compute in ("sparse", "dense")}
    took = compare({name: calls(training_pass(layer, x, dy)) for name, layer in layers.items()}, rounds, budget)
    return {
        "rows": rows,
        "columns": columns,
        "count": max(1, round(density * rows * columns)),
        "density": density,
        "batch": batch,
        "sparse_us": round(1e6 * took["sparse"], 1),
        "dense_us": round(1e6 * took["dense"], 1),
    }


def arguments(row: Row) -> tuple[int, int, int, int]:
    return row["rows"], row["columns"], row["count"], row["batch"]


def judge(rows: list[Row]) -> str:
    """Judge the rule by these times."""
    lost, right = [], 0
    for row in rows:
        picked = choice.prefers_sparse(*arguments(row), torch.float32, "cpu")
        ratio = row["sparse_us"] / row["dense_us"] if picked else row["dense_us"] / row["sparse_us"]
        right += ratio <= 1
        lost.append(max(ratio, 1.0) - 1)
    chosen = [one for one in lost if one > 0]
    return (
        f"The rule picks the faster compute in {right} of {len(rows)} settings ({right / len(rows):.0%}). In the others it "
        f"loses {statistics.median(chosen or [0]):.0%} (median) and {max(chosen or [0]):.0%} at most; "
        f"on average over all settings it loses {statistics.mean(lost):.1%}."
    )


def fit(rows: list[Row]) -> str:
    """Fit the constants of choice.py, which are non-negative, by least squares of log time."""
    from scipy.optimize import least_squares

    settings = np.array([arguments(row) for row in rows]).T
    lines = []
    for name, terms, key in (
        ("SPARSE", choice.sparse_terms, "sparse_us"),
        ("DENSE", choice.dense_terms, "dense_us"),
    ):
        work = np.array([terms(*map(int, setting)) for setting in settings.T])
        target = np.log([row[key] for row in rows])
        start = np.log(np.exp(target).mean() / work.mean(0) / work.shape[1])

        def error(exponents: Any, work: Any = work, target: Any = target) -> Any:
            return np.log(work @ np.exp(exponents)) - target

        found = least_squares(error, start, loss="soft_l1", f_scale=0.2)
        off = np.exp(np.median(np.abs(error(found.x)))) - 1
        constants = ", ".join(f"{value:.2g}" for value in np.exp(found.x))
        lines.append(f"{name} = ({constants})  # off by {off:.0%} (median)")
    return "\n".join(lines)


def table(rows: list[Row]) -> list[Row]:
    """Make a table with one line per size and batch, and one column per density."""
    found: dict[Any, Row] = {}
    for row in rows:
        line = found.setdefault(
            (row["rows"], row["columns"], row["batch"]), {"layer": f"{row['rows']}x{row['columns']}", "batch": row["batch"]}
        )
        line[f"{row['density']:.1%}"] = f"{row['sparse_us'] / row['dense_us']:.2g}"
    return list(found.values())


def read(options: argparse.Namespace) -> list[Row]:
    with (options.out / "break_even.csv").open() as file:
        return [
            {key: float(value) if key.endswith("us") or key == "density" else int(value) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


def draw(rows: list[Row], options: argparse.Namespace) -> None:
    sizes = list(dict.fromkeys((row["rows"], row["columns"]) for row in rows))
    figure, panels = axes(len(sizes))
    for axis, size in zip(panels, sizes, strict=True):
        for batch in dict.fromkeys(row["batch"] for row in rows):
            mine = [row for row in rows if (row["rows"], row["columns"]) == size and row["batch"] == batch]
            axis.loglog(
                [row["density"] for row in mine],
                [row["sparse_us"] / row["dense_us"] for row in mine],
                "o-",
                label=f"batch {batch}",
                markersize=3,
            )
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(title=f"{size[0]} x {size[1]}", xlabel="density", ylabel="sparse / dense")
        axis.legend(fontsize=7)
    figure.savefig(options.out / "break_even.png", dpi=130)


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--sizes", default=SIZES, help="rows x columns")
    asked.add_argument("--densities", default=DENSITIES)
    asked.add_argument("--batches", default=BATCHES)
    asked.add_argument("--budget", type=float, default=0.03, help="seconds per arm and round")
    asked.add_argument("--fit", action="store_true", help="print constants for choice.py")
    asked.add_argument("--read", action="store_true", help="measure nothing, read the break_even.csv in --out")
    options = asked.parse_args()
    prepare(options)
    rows = read(options) if options.read else []
    if not options.read:
        for size in options.sizes.split(","):
            height, width = map(int, size.split("x"))
            for batch in map(int, options.batches.split(",")):
                for density in map(float, options.densities.split(",")):
                    rows.append(measure(height, width, density, batch, options.rounds, options.budget))
        save(rows, options, "break_even", shown=table(rows))
        draw(rows, options)
    print("\n" + judge(rows))
    if options.fit:
        print("\n" + fit(rows))


if __name__ == "__main__":
    main()
