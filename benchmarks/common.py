"""Shared parts of the speed benchmarks: arms that take turns, medians, tables, plots."""

from __future__ import annotations

import argparse
import csv
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
Block = Callable[[int], list[float]]  # runs the given number of steps, returns the seconds of each
Row = dict[str, Any]


def parser(doc: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """Make a parser with the options that all scripts share."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--rounds", type=int, default=rounds, help=f"rounds in which the arms take turns (default: {rounds})")
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--out", type=Path, default=HERE, help="folder for the table and the plot (default: the script's)")
    return found


def prepare(options: argparse.Namespace) -> None:
    """Set the threads and silence warnings. Call it before any measurement, and before a peer loads another OpenMP runtime."""
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    options.out.mkdir(parents=True, exist_ok=True)


def take_turns(arms: Mapping[str, Block], rounds: int, steps: Mapping[str, int] | int) -> dict[str, list[float]]:
    """Return the seconds of every step of every arm. Arms alternate, so that a slow minute of the machine affects them all."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            seconds[name] += arm(steps if isinstance(steps, int) else steps[name])
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(found) for name, found in seconds.items()}


def calls(function: Callable[[], Any], before: Callable[[], Any] | None = None) -> Block:
    """Make a block that times calls of ``function``; it calls ``before`` first, untimed."""

    def block(steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            if before is not None:
                before()
            started = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - started)
        return seconds

    return block


def training_pass(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """Make a forward and backward pass of one layer, given the gradient of its output; gradients do not accumulate."""
    parameters = list(layer.parameters())

    def run() -> None:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        layer(x).backward(dy)

    return run


def compare(arms: Mapping[str, Block], rounds: int, budget: float, most: int = 200) -> dict[str, float]:
    """Return the median seconds of arms with unknown times; each arm runs for about ``budget`` seconds per round."""
    steps = {}
    for name, arm in arms.items():
        arm(1)  # compiles, allocates
        steps[name] = max(1, min(most, int(budget / arm(1)[0])))
    return medians(take_turns(arms, rounds, steps))


def why_not(error: BaseException) -> str:
    """Format the table's entry for a peer that can't run."""
    return f"not run: {type(error).__name__}: {error}".split("\n")[0][:120]


def save(rows: Sequence[Row], options: argparse.Namespace, name: str, shown: Sequence[Row] | None = None) -> None:
    """Write <name>.csv, and print the rows, or ``shown`` instead, as a markdown table."""
    with (options.out / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    shown = rows if shown is None else shown
    print("| " + " | ".join(key.replace("_", " ") for key in shown[0]) + " |\n" + "|---" * len(shown[0]) + "|")
    for row in shown:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


def axes(panels: int, columns: int = 3, width: float = 4.2, height: float = 3.4) -> tuple[Any, list[Any]]:
    """Make a figure that needs no display, and its panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(panels, columns)
    down = -(-panels // across)
    figure = Figure(figsize=(width * across, height * down), layout="constrained")
    FigureCanvasAgg(figure)
    found = list(figure.subplots(down, across, squeeze=False).flat)
    for axis in found[panels:]:
        axis.axis("off")
    return figure, found[:panels]


def bars(axis: Any, values: Mapping[str, float], title: str, label: str, mark: float | None = None) -> None:
    """Draw horizontal bars, the first on top."""
    names = list(values)[::-1]
    drawn = axis.barh(names, [values[name] for name in names], color="#4477aa")
    axis.bar_label(drawn, fmt="%.3g", padding=2, fontsize=8)
    if mark is not None:
        axis.axvline(mark, color="black", linewidth=0.8)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(label)
    axis.margins(x=0.18)
    axis.tick_params(axis="y", labelsize=8)
