"""What the accuracy studies of adapters share: equal tuning effort for every arm, then seeds, one csv line per training."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import lightning_deepr
from lightning_deepr import adapt
from lightning_deepr.weights.find import converted_tensors

sys.path.insert(0, str(Path(__file__).parents[1]))
from grid import Job, Results, Row

SPARSE: dict[str, tuple[str, dict[str, Any]]] = {
    "fixed": ("FixedRandom", {"signs": "free"}),
    "set": ("SET", {}),
    "rigl": ("RigL", {}),
    "deepr": ("DeepR", {}),
    "tuned": ("DeepR", {}),  # see :func:`rewiring`
    "plain": ("FixedRandom", {"signs": "free", "lr_scale": 1.0}),  # SHiRA, for layers that PEFT's does not take
}
NAMES = {
    "deepr": "**`DeepR`**", "tuned": "`DeepR`, tuned further",
    "lora": "LoRA", "shira": "SHiRA of `peft`", "fixed": "fixed random places", "set": "`SET`",
    "rigl": "`RigL` (dense gradient)", "full": "all weights", "head": "the last layer alone",
}  # fmt: skip
ONE_SIZE = ("full", "head", "tuned")  # not trained at each number of values


@dataclass(frozen=True)
class Cell:
    """A combination that is tuned and tested by itself: a cell of a table."""

    task: str
    arm: str
    optimizer: str
    count: int

    def job(self, seed: int, lr: float, split: str) -> Job:
        settings = json.dumps({"optimizer": self.optimizer, "lr": lr})
        trial = f"lr {lr:g}" if split == "validation" else "test"
        return Job(self.task, f"{self.arm} {self.optimizer}", self.count, seed, trial, split, settings)


@dataclass(frozen=True)
class Study:
    """A study: where its trainings are kept, and how every cell is tuned.

    Attributes:
        results: the csv, with the columns "accuracy", "old" and "trained".
        rates: {optimizer: {arm or kind of arms: learning rates}}. Without rates of their own, SHiRA takes those of "lora", the
            head those of "full", and the others those of "sparse".
        seeds: those of the tests. Tuning has seed 0.
    """

    results: Results
    rates: Mapping[str, Mapping[str, Sequence[float]]]
    seeds: Sequence[int]

    def rates_of(self, cell: Cell) -> Sequence[float]:
        rates = self.rates[cell.optimizer]
        if cell.arm in rates:
            return rates[cell.arm]
        return rates[{"shira": "lora", "head": "full"}.get(cell.arm, "sparse")]

    def run(self, cells: Sequence[Cell], train: Callable[..., dict[str, Any]], workers: int, *arguments: Any) -> None:
        """Run what the csv does not have: every learning rate of every cell, then the tests with the best of each."""
        self.results.train(self.tuning(cells), train, workers, *arguments)
        tests = [cell.job(seed, self.best(cell), "test") for cell in cells for seed in self.seeds]
        self.results.forget(tests)  # another learning rate is the best now
        self.results.train(tests, train, workers, *arguments)

    def tuning(self, cells: Sequence[Cell]) -> list[Job]:
        return [cell.job(0, lr, "validation") for cell in cells for lr in self.rates_of(cell)]

    def best(self, cell: Cell) -> float:
        """Return the learning rate with the best accuracy on validation data."""
        mine = [row for row in self.rows(cell) if row["split"] == "validation"]
        return float(json.loads(max(mine, key=lambda row: float(row["accuracy"]))["settings"])["lr"])

    def rows(self, cell: Cell) -> list[Row]:
        wanted = (cell.task, f"{cell.arm} {cell.optimizer}", str(cell.count))
        return [row for row in self.results.read() if (row["part"], row["arm"], row["connectivity"]) == wanted]

    def table(self, task: str, optimizer: str, arms: Sequence[str], counts: Sequence[int]) -> list[str]:
        """Make a table of arms by counts. A cell without tests says "not run"."""
        lines = [f"| arm |{''.join(f' {count:,} values | old task | learning rate |' for count in counts)}"]
        lines.append("|---|" + "---|---|---|" * len(counts))
        for arm in arms:
            cells = []
            for count in counts:
                rows = [row for row in self.rows(Cell(task, arm, optimizer, count)) if row["split"] == "test"]
                cells += shown(rows) if rows else ["" if arm in ONE_SIZE else "not run", "", ""]
            if any(cell not in ("not run", "") for cell in cells):
                lines.append(f"| {NAMES[arm]} | " + " | ".join(cells) + " |")
        return lines if len(lines) > 2 else []


def shown(rows: Sequence[Row]) -> list[str]:
    """Return the cells of a table: accuracy with its standard deviation, accuracy on the old task, learning rate."""
    values = [float(row["accuracy"]) for row in rows]
    spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    old = statistics.mean(float(row["old"]) for row in rows) if rows[0]["old"] else None
    rates = sorted({f"{json.loads(row['settings'])['lr']:g}" for row in rows})
    trained = "" if rows[0]["trained"] == rows[0]["connectivity"] else f" ({int(rows[0]['trained']):,} values)"
    return [f"{statistics.mean(values):.2f}{spread}{trained}", "" if old is None else f"{old:.1f}", ", ".join(rates)]


def prepared(net: nn.Module, arm: str, counts: Mapping[str, int] | int, rank: int, seed: int, head: str) -> nn.Module:
    """Give the network what the arm trains, and freeze the rest.

    Args:
        net: the pretrained network.
        arm: the arm.
        counts: the connections of each weight, or of all of them.
        rank: LoRA's and SHiRA's.
        seed: of the places.
        head: the name of the last layer, which the arm "head" trains.
    """
    if arm in SPARSE:
        return adapt(net, counts, seed=seed)  # type: ignore[arg-type]
    if arm == "full":
        return net
    net.requires_grad_(False)
    if arm == "head":
        net.get_submodule(head).requires_grad_(True)
        return net
    import peft

    targets = [name.removesuffix(".weight") for name in counts] if isinstance(counts, Mapping) else _linear(net)
    if arm == "lora":
        config: Any = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    else:
        config = peft.ShiraConfig(r=rank, target_modules=targets, random_seed=seed)
    net = peft.inject_adapter_in_model(config, net)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_" in name or "shira_" in name)
    return net


def _linear(net: nn.Module) -> list[str]:
    return [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]


def rewiring(arm: str, net: nn.Module, optimizer: Any, steps: int, seed: int) -> Any:
    """Attach the callback of an arm; None for an arm without one. "tuned" has other factors of its steps."""
    if arm not in SPARSE:
        return None
    kind, own = SPARSE[arm]
    if arm in ("set", "rigl"):  # as often in a short training as in one of 2,000 steps: their default is every 100
        own = {"rewire_every_n_steps": max(1, steps // 20)}
    if arm == "tuned":
        own = {"lr_scale": {one.name: one.slots.places_per_connection**0.75 for one in converted_tensors(net)}}
    return getattr(lightning_deepr, kind)(seed=seed, **own).attach(net, optimizer, total_steps=steps)


def options(doc: str | None, tasks: Sequence[str], arms: Sequence[str], optimizers: Sequence[str]) -> argparse.Namespace:
    """Read the options that all studies have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--tasks", nargs="+", default=list(tasks), choices=tasks)
    parser.add_argument("--arms", nargs="+", default=list(arms), choices=arms)
    parser.add_argument("--optimizers", nargs="+", default=list(optimizers), choices=optimizers)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    return parser.parse_args()
