"""Adapters of one size on digits of another kind: LoRA, fixed random places, SET, RigL, DEEP R; all weights; the head alone.

    python benchmarks/adapters/digits.py --root data             # every training that is not in digits.csv
    python benchmarks/adapters/digits.py --table                 # tables from digits.csv

LeNet-300-100 is trained on the first 50,000 upright digits (dense, once). Then it learns 5,000 others (or 1,000) that are
turned by 90 degrees, or inverted, in 20 epochs of batches of 50, with a cosine schedule. Every arm but the last two trains
as many values: 1,594 (what LoRA of rank 1 has) or 6,376 (rank 4), shared out over the three layers as LoRA does; biases are
frozen.

Each arm has the same tuning effort: five learning rates at seed 0, of which the best on 5,000 validation digits is taken. Then
three seeds are tested once on the 10,000 test digits of the new kind, and on the upright ones ("old"; an adapter that is taken
off gives the pretrained network's accuracy back). A run is a line of the csv; the script can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_deepr
from lightning_deepr import adapt
from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes.digits import MNISTDataModule

sys.path.insert(0, str(Path(__file__).parents[1]))
from grid import Job, Results, Row, summary

HERE = Path(__file__).parent
RESULTS = Results(HERE / "digits.csv", "accuracy", "old", "trained")
RANKS = {1: 1594, 4: 6376}
RATES = {  # five per optimizer and kind of arm, a factor of about 3 apart; the best lies inside
    "AdamW": {
        "lora": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        "full": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        "sparse": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    },
    "SGD": {
        "lora": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        "full": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        "sparse": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    },
}
SPARSE: dict[str, tuple[str, dict[str, Any]]] = {
    "fixed": ("FixedRandom", {"signs": "free"}),
    "set": ("SET", {}),
    "rigl": ("RigL", {}),
    "deepr": ("DeepR", {}),
}
ARMS = ("deepr", "lora", "fixed", "set", "rigl", "full", "head")
TASKS = ("rotated 5000", "inverted 5000", "rotated 1000", "inverted 1000")
SEEDS = (1, 2, 3)
EPOCHS, BATCH = 20, 50


class LoRA(nn.Module):
    """A linear layer with a low-rank difference, as PEFT's with ``lora_alpha = r``: W x + b + B A x, where B starts at 0."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.empty(rank, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) + F.linear(F.linear(x, self.a), self.b)
        return y


def images(root: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Read the digits: {part: (images [B, 784] from 0 to 1, labels)}."""
    x, y, x_test, y_test = MNISTDataModule(root=root).load()
    x, x_test = (one.reshape(-1, 784).float() / (255 if one.dtype == torch.uint8 else 1) for one in (x, x_test))
    return {
        "old": (x[:50_000], y[:50_000]), "new": (x[50_000:55_000], y[50_000:55_000]),
        "validation": (x[55_000:], y[55_000:]), "test": (x_test, y_test),
    }  # fmt: skip


def changed(x: Tensor, task: str) -> Tensor:
    """Turn or invert the images."""
    if task.startswith("inverted"):
        return 1 - x
    return x.view(-1, 28, 28).rot90(1, (1, 2)).reshape(-1, 784)


def pretrained(root: str) -> nn.Module:
    """Train the network on upright digits, once; it is kept beside the data."""
    file = Path(root) / "adapters_lenet300_100.pt"
    torch.manual_seed(0)
    net = LeNet300100()
    if not file.is_file():
        x, y = images(root)["old"]
        fit(net, torch.optim.AdamW(net.parameters(), 1e-3), x, y, epochs=10, batch=128)
        torch.save(net.state_dict(), file)
    net.load_state_dict(torch.load(file, weights_only=True))
    return net


def fit(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, epochs: int, batch: int) -> None:
    """Train with a cosine schedule."""
    steps = epochs * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for _ in range(epochs):
        for part in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
            optimizer.zero_grad()
            F.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    net.eval()
    return 100 * float((net(x).argmax(1) == y).float().mean())


def prepared(net: nn.Module, arm: str, count: int, seed: int) -> nn.Module:
    """Give the network what the arm trains, and freeze the rest."""
    if arm in SPARSE:
        return adapt(net, count, seed=seed)
    if arm == "full":
        return net
    net.requires_grad_(False)
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if arm == "head":
        net.get_submodule(layers[-1]).requires_grad_(True)
        return net
    rank = next(rank for rank, values in RANKS.items() if values == count)
    for name in layers:
        setattr(net, name, LoRA(net.get_submodule(name), rank))  # type: ignore[arg-type]
    return net


def train(job: Job, root: str) -> dict[str, Any]:
    """Run one training."""
    start, settings = time.perf_counter(), json.loads(job.settings)
    task, size = job.part.split()[0], int(job.part.split()[1])
    arm = job.arm.split()[0]
    data, net = images(root), pretrained(root)
    torch.manual_seed(1000 + job.seed)
    net = prepared(net, arm, int(job.connectivity), job.seed)
    values = [parameter for parameter in net.parameters() if parameter.requires_grad]
    more = {"momentum": 0.9} if settings["optimizer"] == "SGD" else {}
    optimizer = getattr(torch.optim, settings["optimizer"])(values, settings["lr"], **more)
    x, y = data["new"]
    x, y = changed(x[:size], task), y[:size]
    rewiring = None
    if arm in SPARSE:
        kind, own = SPARSE[arm]
        callback = getattr(lightning_deepr, kind)(seed=job.seed, **own, **settings.get("callback", {}))
        rewiring = callback.attach(net, optimizer, total_steps=EPOCHS * (size // BATCH))
    fit(net, optimizer, x, y, EPOCHS, BATCH)
    if rewiring is not None:
        rewiring.remove()
    xs, ys = data["test" if job.split == "test" else "validation"]
    old = data["test"] if job.split == "test" else (xs, ys)
    return {
        "accuracy": f"{accuracy(net, changed(xs, task), ys):.2f}",
        "old": f"{accuracy(net, *old):.2f}",
        "trained": sum(one.numel() for one in values),
        "seconds": f"{time.perf_counter() - start:.1f}",
    }


def combinations(tasks: list[str], optimizers: list[str]) -> list[tuple[str, str, int]]:
    """List (task, arm with optimizer, number of values)."""
    return [
        (task, f"{arm} {optimizer}", count)
        for task in tasks
        for optimizer in optimizers
        for arm in ARMS
        for count in RANKS.values()
        if arm not in ("full", "head") or count == RANKS[1]
    ]


def rates(arm: str) -> tuple[float, ...]:
    kind, optimizer = arm.split()
    known = RATES[optimizer]
    return known["full" if kind in ("full", "head") else "lora" if kind == "lora" else "sparse"]


def made(task: str, arm: str, count: int, seed: int, lr: float, split: str) -> Job:
    settings = json.dumps({"optimizer": arm.split()[1], "lr": lr})
    return Job(task, arm, count, seed, f"lr {lr:g}" if split == "validation" else "test", split, settings)


def tests(task: str, arm: str, count: int) -> list[Job]:
    """List the tests that the tuning of a combination leads to."""
    mine = [row for row in RESULTS.read() if row["split"] == "validation"]
    mine = [row for row in mine if (row["part"], row["arm"], row["connectivity"]) == (task, arm, f"{count:g}")]
    best = max(mine, key=lambda row: float(row["accuracy"]))
    lr = json.loads(best["settings"])["lr"]
    return [made(task, arm, count, seed, lr, "test") for seed in SEEDS]


def tables() -> None:
    """Print a table per task and optimizer from the csv."""
    rows = [row for row in RESULTS.read() if row["split"] == "test"]
    for task in dict.fromkeys(row["part"] for row in rows):
        for optimizer in dict.fromkeys(row["arm"].split()[1] for row in rows if row["part"] == task):
            print(f"\n{task}, {optimizer}: test accuracy (accuracy on upright digits with the adapter; learning rate)")
            for arm in ARMS:
                cells = []
                for count in RANKS.values():
                    mine = [r for r in rows if (r["part"], r["arm"]) == (task, f"{arm} {optimizer}")]
                    mine = [r for r in mine if r["connectivity"] == str(count)]
                    if mine:
                        old = statistics.mean(float(row["old"]) for row in mine)
                        lr = json.loads(mine[0]["settings"])["lr"]
                        cells.append(f"{mine[0]['trained']:>7}: {_shown(mine)} ({old:.1f}; {lr:g})")
                if cells:
                    print(f"  {arm:<6}", "   ".join(cells))


def _shown(rows: list[Row]) -> str:
    return summary([float(row["accuracy"]) for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--optimizers", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        pretrained(options.root)
        for one in combinations(options.tasks, options.optimizers):
            tuning = [made(*one, 0, lr, "validation") for lr in rates(one[1])]
            RESULTS.train(tuning, train, options.workers, options.root)
            RESULTS.train(tests(*one), train, options.workers, options.root)
    tables()


if __name__ == "__main__":
    main()
