"""Shared parts of the accuracy studies: resumable parallel trainings, one csv line each, tables and figures."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import axes
from torch import Tensor, nn
from torch.optim import Optimizer

import lightning_deepr

Row = dict[str, str]


@cache
def digits(root: str, split: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return MNIST as flat images from 0 to 1: training images and labels, and those that are held out.

    The held-out ones of the split "validation" are the last 10,000 training images.
    """
    from lightning_deepr.recipes.digits import MNISTDataModule

    images, labels, test_images, test_labels = MNISTDataModule(root).load()
    if split == "validation":
        images, labels, test_images, test_labels = images[:-10_000], labels[:-10_000], images[-10_000:], labels[-10_000:]
    return images.flatten(1).float() / 255, labels, test_images.flatten(1).float() / 255, test_labels


@dataclass(frozen=True)
class Job:
    """One training."""

    part: str
    arm: str
    connectivity: float
    seed: int
    trial: str
    split: str
    settings: str  # json

    @property
    def key(self) -> tuple[str, ...]:
        return (self.part, self.arm, f"{self.connectivity:g}", str(self.seed), self.trial)


class Results:
    """The csv with one line per training; the job's fields come first."""

    def __init__(self, path: Path, *columns: str) -> None:
        self.path = path
        self.columns = ("part", "arm", "connectivity", "seed", "trial", "split", *columns, "settings", "seconds", "torch")

    def read(self) -> list[Row]:
        if not self.path.is_file():
            return []
        with self.path.open() as file:
            return list(csv.DictReader(file))

    def write(self, row: dict[str, Any]) -> None:
        new = not self.path.is_file()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if new:
                writer.writeheader()
            writer.writerow(row)

    def forget(self, jobs: Sequence[Job]) -> None:
        """Remove the lines of trainings whose job now has other settings."""
        settings = {job.key: json.loads(job.settings) for job in jobs}
        rows = self.read()
        kept = [row for row in rows if _key(row) not in settings or settings[_key(row)] == json.loads(row["settings"])]
        if len(kept) < len(rows):
            print(f"{len(rows) - len(kept)} trainings had other settings and are run again", flush=True)
            new = self.path.with_suffix(".new")
            with new.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(kept)
            new.replace(self.path)

    def train(self, jobs: Sequence[Job], run: Callable[..., dict[str, Any]], workers: int, *arguments: Any) -> None:
        """Run the jobs without a line; ``run(job, *arguments)`` returns the columns that the job does not have."""
        done = {_key(row) for row in self.read()}
        todo = [job for job in jobs if job.key not in done]
        print(f"{len(todo)} of {len(jobs)} trainings to run", flush=True)
        with ProcessPoolExecutor(workers, initializer=quiet) as pool:
            waiting = {pool.submit(run, job, *arguments): job for job in todo}
            for number, finished in enumerate(as_completed(waiting), 1):
                job = waiting[finished]
                row = {**asdict(job), "connectivity": f"{job.connectivity:g}", "torch": torch.__version__.split("+")[0]}
                row |= finished.result()
                self.write(row)
                shown = [row[name] for name in self.columns if name not in ("split", "settings", "torch", "seconds")]
                print(f"{number}/{len(todo)}", *shown, row["seconds"], "s", flush=True)


def _key(row: Row) -> tuple[str, ...]:
    return (row["part"], row["arm"], row["connectivity"], row["seed"], row["trial"])


def steps_in_common(callback: Any) -> int:
    """Count the first steps that do not depend on the connectivity: those before the first pruning or l1-shrinkage's cut.

    Trainings that differ only in the connectivity share these steps, which therefore run only once.
    """
    fraction = getattr(callback, "prune_from", getattr(callback, "freeze_at", None))
    return 0 if fraction is None else callback.step_at(fraction) - 1


def restore(state: dict[str, Any], net: nn.Module, optimizer: Optimizer, callback: Any) -> None:
    """Restore the state_dicts "net", "optimizer" and "callback".

    They come from this training, or from one with another connectivity during the steps that do not depend on it.
    """
    load(net, state["net"])
    optimizer.load_state_dict(state["optimizer"])
    if callback is not None:
        own = callback.state_dict()["tensors"]
        tensors = {name: {**entry, "K": own[name]["K"]} for name, entry in state["callback"]["tensors"].items()}
        callback.load_state_dict({**state["callback"], "tensors": tensors})


def load(net: nn.Module, state: dict[str, Any]) -> None:
    """Load everything except the wanted numbers of connections."""
    own = net.state_dict()
    net.load_state_dict({name: own[name] if name.endswith(".wanted") else value for name, value in state.items()})


def callback_of(kind: str, connectivity: Any, **settings: Any) -> Any:
    """Make a callback as in the recorded studies: each step of theta as the optimizer takes it, newborns as at the start.

    The methods' defaults for ``lr_scale`` and ``newborn`` are newer than these studies.
    """
    method = getattr(lightning_deepr, kind)
    known = {one.name for one in dataclasses.fields(method)}
    recorded = {name: value for name, value in (("lr_scale", 1.0), ("newborn", "start")) if name in known}
    return method(connectivity, **{**recorded, **settings})


def quiet() -> None:
    """Use one thread per training, and silence Lightning."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def summary(values: Sequence[float]) -> str:
    """Format mean, standard deviation and number of runs."""
    if not values:
        return "-"
    spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} ({len(values)})"


def ended(rows: Sequence[Row], total: int) -> float:
    """Return the mean connectivity at the end."""
    return statistics.mean(int(row["connections"]) / total for row in rows)


def table(rows: Sequence[Row], arms: Sequence[str], connectivities: Sequence[float], total: int, value: str) -> list[str]:
    """Make a table of arms by connectivities, with a separate line for the arm "dense".

    A cell also states the connectivity at the end if it is not the wanted one.
    """
    dense = [float(row[value]) for row in rows if row["arm"] == "dense"]
    lines = [f"dense (100 %): {summary(dense)}", ""]
    lines += [
        "| arm | " + " | ".join(f"{100 * c:g} %" for c in connectivities) + " |",
        "|---" * (len(connectivities) + 1) + "|",
    ]
    for arm in arms:
        if arm == "dense":
            continue
        cells = []
        for c in connectivities:
            at = [row for row in rows if row["arm"] == arm and row["connectivity"] == f"{c:g}"]
            cell = summary([float(row[value]) for row in at])
            if at and abs(ended(at, total) / c - 1) > 0.005:
                cell += f", ends at {100 * ended(at, total):.2f} %"
            cells.append(cell)
        lines.append(f"| {arm.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return lines


def over_connectivity(
    panel: Any, rows: Sequence[Row], arms: Sequence[str], connectivities: Sequence[float], total: int, value: str
) -> None:
    """Draw the value over the connectivity at the end, as in the paper's figures, with a horizontal line for dense."""
    for number, arm in enumerate(arms):
        mine = [row for row in rows if row["arm"] == arm]
        if arm == "dense":
            if mine:
                panel.axhline(statistics.mean(float(r[value]) for r in mine), color="black", linewidth=1, label="dense")
            continue
        points = []
        for c in connectivities:
            at = [row for row in mine if row["connectivity"] == f"{c:g}"]
            if at:
                values = [float(row[value]) for row in at]
                spread = statistics.stdev(values) if len(at) > 1 else 0.0
                points.append((100 * ended(at, total), statistics.mean(values), spread))
        if points:
            x, y, spreads = zip(*points, strict=True)
            panel.errorbar(x, y, spreads, marker="o", markersize=4, capsize=2, label=arm.replace("_", " "), color=f"C{number}")
    panel.set_xscale("log")
    panel.set_xticks([100 * c for c in connectivities], [f"{100 * c:g}" for c in connectivities])
    panel.minorticks_off()
    panel.set_xlabel("connectivity at the end, %")
    panel.grid(alpha=0.3)


def figure(
    rows: Sequence[Row],
    arms: Sequence[str],
    connectivities: Sequence[float],
    total: int,
    value: str,
    title: str,
    label: str,
    path: Path,
) -> None:
    """Save a picture of :func:`over_connectivity`."""
    drawing, (panel,) = axes(1, width=6, height=4.4)
    over_connectivity(panel, rows, arms, connectivities, total, value)
    panel.set_xlabel("connectivity at the end, % of all weights")
    panel.set_ylabel(label)
    panel.set_title(title, fontsize=10)
    panel.legend(fontsize=8)
    drawing.savefig(path, dpi=130)
