"""From which density on is dense compute faster, and does ``compute="auto"`` choose the faster one?

    python benchmarks/break_even.py
    python benchmarks/break_even.py --only "linear 256x256;conv 3x3" --batches 128 --fit

It times forward and backward of one converted layer (gradients of the input, theta and the bias), with compute="sparse" and
with compute="dense", by layer, dtype, density and batch: linear layers with up to 16,384 rows of input, in float32 and
bfloat16, and convolutions, also strided, dilated and 1 x 1. (Grouped convolutions have dense compute alone, so that there is no
choice.) The table has the ratio sparse / dense: below 1, sparse is faster. Arms take turns within each round; times are medians
of the thread's CPU time. Settings that are in break_even.csv already are not measured again (--again does).

Below the table it prints how often the rule in ``lightning_deepr/compute/choice.py`` is right or within 10 %, and how much time
the other choices lose. --fit prints the constants for that rule that fit these times best (least squares of log time), in the
form of that file. --read does both without a measurement.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Row, axes, compare, parser, prepare, training_pass
from torch import nn

from lightning_deepr import sparsify
from lightning_deepr.compute import choice, conv, tokens

SIZES = "10x100,64x64,256x256,300x784,384x1536,1024x1024,4096x4096"
DENSITIES = "0.005,0.01,0.02,0.05,0.1,0.2,0.5"
BATCHES = "1,10,128,512,2048,16384"
MOST = 1 << 34  # multiply-adds of a dense forward pass; larger settings are left out
Make = Callable[[], nn.Module]
# (size of the image, the layer)
CONVOLUTIONS: dict[str, tuple[int, tuple[int, int, int], dict[str, Any]]] = {
    "conv 3x3": (8, (64, 64, 3), {"padding": 1}),
    "conv 3x3, 32 pixels": (32, (32, 32, 3), {"padding": 1}),
    "conv 3x3, 256 channels": (4, (256, 256, 3), {"padding": 1}),
    "conv 3x3, stride 2": (16, (64, 128, 3), {"padding": 1, "stride": 2}),
    "conv 3x3, dilation 2": (16, (64, 64, 3), {"padding": 2, "dilation": 2}),
    "conv 3x3, dilation 4": (8, (128, 128, 3), {"padding": 4, "dilation": 4}),
    "conv 3x3, dilation 12": (4, (256, 64, 3), {"padding": 12, "dilation": 12}),
    "conv 3x3, dilation 36": (4, (960, 64, 3), {"padding": 36, "dilation": 36}),
    "conv 1x1": (8, (128, 256, 1), {}),
    "conv 1x1, stride 2": (16, (64, 128, 1), {"stride": 2}),
    "conv 1x1, 1 pixel": (1, (96, 24, 1), {}),
    "conv 7x7, first": (32, (3, 32, 7), {"padding": 3, "stride": 2}),
}
CONVOLUTION_DENSITIES = (0.01, 0.05, 0.1, 0.3)
CONVOLUTION_BATCHES = (2, 16, 64)
NARROW_SIZES = ("64x64", "256x256", "384x1536", "1024x1024", "4096x4096")
NARROW_DENSITIES = (0.01, 0.05, 0.1, 0.3)
KEYS = ("layer", "dtype", "density", "batch")


def make(layer: str) -> tuple[Make, tuple[int, ...]]:
    """Return a function that makes a layer, and the shape of its input without the batch."""
    if layer.startswith("linear"):
        rows, columns = size_of(layer)
        return lambda: nn.Linear(columns, rows), (columns,)
    image, channels, options = CONVOLUTIONS[layer]
    return lambda: nn.Conv2d(*channels, **options), (channels[0], image, image)


def size_of(layer: str) -> tuple[int, int]:
    rows, columns = layer.split()[1].split("x")
    return int(rows), int(columns)


def settings(options: argparse.Namespace) -> Iterator[Row]:
    """List what to measure."""
    batches, densities = [int(b) for b in options.batches.split(",")], [float(d) for d in options.densities.split(",")]
    for size in options.sizes.split(","):
        for dtype in ("float32", "bfloat16"):
            if dtype == "bfloat16" and size not in NARROW_SIZES:
                continue
            for batch in batches:
                for density in densities if dtype == "float32" else NARROW_DENSITIES:
                    rows, columns = size_of(f"linear {size}")
                    if batch * rows * columns <= MOST:
                        yield {"layer": f"linear {size}", "dtype": dtype, "density": density, "batch": batch}
    for layer in CONVOLUTIONS:
        for batch in CONVOLUTION_BATCHES:
            for density in CONVOLUTION_DENSITIES:
                for dtype in ("float32", "bfloat16"):
                    yield {"layer": layer, "dtype": dtype, "density": density, "batch": batch}


def calls(function: Callable[[], Any]) -> Callable[[int], list[float]]:
    """Make a block that times calls by the CPU time of this thread."""

    def block(steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            started = time.thread_time()
            function()
            seconds.append(time.thread_time() - started)
        return seconds

    return block


def measure(setting: Row, rounds: int, budget: float) -> Row:
    torch.manual_seed(0)
    dtype = getattr(torch, setting["dtype"])
    new, shape = make(setting["layer"])
    x = torch.randn(setting["batch"], *shape).to(dtype).requires_grad_()
    layers = {compute: sparsify(new().to(dtype), setting["density"], compute=compute) for compute in ("sparse", "dense")}
    dy = torch.randn_like(layers["dense"](x)).detach()
    took = compare({name: calls(training_pass(layer, x, dy)) for name, layer in layers.items()}, rounds, budget)
    return {**setting, **{f"{name}_us": round(1e6 * seconds, 1) for name, seconds in took.items()}}


def linear_arguments(row: Row) -> tuple[int, int, int, int]:
    rows, columns = size_of(row["layer"])
    return rows, columns, max(1, round(row["density"] * rows * columns)), row["batch"]


def conv_arguments(row: Row) -> tuple[torch.Size, int, int, int, int, float]:
    image, channels, options = CONVOLUTIONS[row["layer"]]
    layer = nn.Conv2d(*channels, **options, device="meta")
    around, size = conv.padding_of(layer), (image, image)
    out = conv.output_size(size, layer.kernel_size, layer.stride, around, layer.dilation)
    stretch = conv.stretch_of(size, layer.kernel_size, around)
    shape = layer.weight.shape
    return shape, max(1, round(row["density"] * shape.numel())), row["batch"], image * image, out[0] * out[1], stretch


def picks(row: Row) -> bool:
    """Tell whether the rule picks sparse compute."""
    dtype = getattr(torch, row["dtype"])
    if row["layer"].startswith("conv"):
        return choice.prefers_sparse_conv(*conv_arguments(row), dtype=dtype)
    return choice.prefers_sparse(*linear_arguments(row), dtype, "cpu")


def judge(rows: list[Row]) -> str:
    """Judge the rule by these times, by kind of layer and in all."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        many = ", 512 rows and more" if row["batch"] >= 512 and row["layer"].startswith("linear") else ""
        kinds.setdefault(f"{row['layer'].split()[0]}, {row['dtype']}{many}", []).append(row)
    lines = []
    for kind, mine in {**kinds, "all": rows}.items():
        lost = []
        for row in mine:
            ratio = row["sparse_us"] / row["dense_us"]
            lost.append(max(ratio if picks(row) else 1 / ratio, 1.0) - 1)
        right, near = sum(one == 0 for one in lost), sum(one <= 0.1 for one in lost)
        wrong = [one for one in lost if one > 0]
        lines.append(
            f"{kind}: the faster one in {right} of {len(mine)} settings ({right / len(mine):.0%}), within 10 % of it in {near} "
            f"({near / len(mine):.0%}); the wrong choices lose {statistics.median(wrong or [0]):.0%} (median) and "
            f"{max(wrong or [0]):.0%} at most; on average over all settings {statistics.mean(lost):.1%}."
        )
    return "\n".join(lines)


def fit(rows: list[Row]) -> str:
    """Fit the constants of choice.py, which are non-negative, by least squares of log time."""
    lines = []
    for dtype in ("float32", "bfloat16"):
        mine = [row for row in rows if row["layer"].startswith("linear") and row["dtype"] == dtype]
        for compute, terms in (("sparse", choice.sparse_terms), ("dense", choice.dense_terms)):
            for many in (False, True):
                chosen = [row for row in mine if _many(row, compute) is many]
                if chosen:
                    name = f"{compute}, {dtype}, {'many' if many else 'few'} rows"
                    lines.append(_fit(name, chosen, linear_arguments, terms, compute))
        mine = [row for row in rows if row["layer"].startswith("conv") and row["dtype"] == dtype]
        for compute, terms in (("sparse", choice.sparse_conv_terms), ("dense", choice.dense_conv_terms)):
            if mine:
                lines.append(_fit(f"{compute} convolution, {dtype}", mine, conv_arguments, terms, compute))
    return "\n".join(lines)


def _many(row: Row, compute: str) -> bool:
    rows, columns, count, batch = linear_arguments(row)
    return tokens.suits(batch, rows, columns, count, 4) if compute == "sparse" else batch >= choice.MANY


def _fit(name: str, rows: list[Row], arguments: Any, terms: Any, compute: str) -> str:
    from scipy.optimize import least_squares, nnls

    work = np.array([terms(*arguments(row)) for row in rows], np.float64)
    target = np.log([row[f"{compute}_us"] for row in rows])
    # settings near the break-even count most
    weights = 1 / (1 + np.log([row["sparse_us"] / row["dense_us"] for row in rows]) ** 2)
    took = np.exp(target)
    start, _ = nnls(work / took[:, None] * weights[:, None], weights)  # the least squares of relative errors
    start = np.log(np.maximum(start, 1e-3 * took.mean() / np.maximum(work.mean(0), 1) / work.shape[1]))

    def error(exponents: Any) -> Any:
        return (np.log(work @ np.exp(exponents)) - target) * weights

    found = least_squares(error, start, loss="soft_l1", f_scale=0.2)
    off = np.exp(np.median(np.abs(np.log(work @ np.exp(found.x)) - target))) - 1
    return f"{name}: ({', '.join(f'{value:.2g}' for value in np.exp(found.x))})  # off by {off:.0%} (median)"


def table(rows: list[Row]) -> str:
    """Make a table with one line per layer, dtype and batch, and one column per density."""
    densities = sorted({row["density"] for row in rows})
    lines = ["| layer | dtype | batch | " + " | ".join(f"{d:.1%}" for d in densities) + " |"]
    lines.append("|---" * (3 + len(densities)) + "|")
    found: dict[Any, dict[float, str]] = {}
    for row in rows:
        ratio = f"{row['sparse_us'] / row['dense_us']:.2g}"
        found.setdefault((row["layer"], row["dtype"], row["batch"]), {})[row["density"]] = ratio
    lines += ["| " + " | ".join(map(str, (*key, *(line.get(d, "") for d in densities)))) + " |" for key, line in found.items()]
    return "\n".join(lines)


def read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [
            {
                key: value if key in ("layer", "dtype") else int(value) if key == "batch" else float(value)
                for key, value in row.items()
            }
            for row in csv.DictReader(file)
        ]


def write(path: Path, rows: list[Row]) -> None:
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*KEYS, "sparse_us", "dense_us"])
        writer.writeheader()
        writer.writerows(rows)
    new.replace(path)


def draw(rows: list[Row], options: argparse.Namespace) -> None:
    kinds = list(dict.fromkeys((row["layer"], row["dtype"]) for row in rows))
    figure, panels = axes(len(kinds), columns=4)
    for axis, kind in zip(panels, kinds, strict=True):
        for batch in dict.fromkeys(row["batch"] for row in rows if (row["layer"], row["dtype"]) == kind):
            mine = [row for row in rows if (row["layer"], row["dtype"]) == kind and row["batch"] == batch]
            axis.loglog(
                [row["density"] for row in mine],
                [row["sparse_us"] / row["dense_us"] for row in mine],
                "o-",
                label=f"batch {batch}",
                markersize=3,
            )
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(title=", ".join(kind), xlabel="density", ylabel="sparse / dense")
        axis.legend(fontsize=7)
    figure.savefig(options.out / "break_even.png", dpi=50)


def main() -> None:
    asked = parser(__doc__, rounds=3)
    asked.add_argument("--sizes", default=SIZES, help="rows x columns of the linear layers")
    asked.add_argument("--densities", default=DENSITIES)
    asked.add_argument("--batches", default=BATCHES)
    asked.add_argument("--only", default="", help="beginnings of the layers' names, separated by semicolons")
    asked.add_argument("--budget", type=float, default=0.03, help="seconds per arm and round")
    asked.add_argument("--again", action="store_true", help="measure what is in the csv anew")
    asked.add_argument("--fit", action="store_true", help="print constants for choice.py")
    asked.add_argument("--read", action="store_true", help="measure nothing, read the break_even.csv in --out")
    asked.set_defaults(threads=1)
    options = asked.parse_args()
    prepare(options)
    path = options.out / "break_even.csv"
    rows = [] if options.again else read(path)
    if not options.read:
        known = {tuple(row[key] for key in KEYS) for row in rows}
        for setting in settings(options):
            if tuple(setting[key] for key in KEYS) in known:
                continue
            if setting["layer"].startswith(tuple(options.only.split(";"))):
                rows.append(measure(setting, options.rounds, options.budget))
                write(path, rows)
        draw(rows, options)
    print(table(rows) + "\n\n" + judge(rows))
    if options.fit:
        print("\n" + fit(rows))


if __name__ == "__main__":
    main()
