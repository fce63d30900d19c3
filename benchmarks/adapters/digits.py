"""Adapters of one size on digits of another kind: LoRA, fixed random places, SET, RigL, DEEP R; all weights; the head alone.

    python benchmarks/adapters/digits.py --root data             # every training that is not in digits.csv
    python benchmarks/adapters/digits.py --root data --tasks "rotated 5000" --arms deepr lora --optimizers SGD
    python benchmarks/adapters/digits.py --table                 # tables from digits.csv

LeNet-300-100 is trained on the first 50,000 upright digits (dense, once). Then it learns 5,000 others (or 1,000) that are
turned by 90 degrees, or inverted, in 20 epochs of batches of 50, with a cosine schedule. Every arm but the last two trains
as many values: 1,594 (what LoRA of rank 1 has) or 6,376 (rank 4), shared out over the three layers as LoRA does; biases are
frozen. "shira" is that of `peft`, whose places are drawn once, too.

Each arm has the same tuning effort: five learning rates under AdamW and eight under SGD at seed 0, of which the best on 5,000
validation digits is taken. Then three seeds are tested once on the 10,000 test digits of the new kind, and on the upright ones
("old"; an adapter that is taken off gives the pretrained network's accuracy back). A training that diverges counts as it ends.

"tuned" is DEEP R with lr_scale = (N / K) ** .75 and a learning rate of .05, under SGD with 6,376 values on 5,000 rotated digits
alone: the best of 17 settings on 55,000 validation digits (with those of the pretraining, turned) at two seeds.
That is more effort than the other arms got.

A run is a line of the csv; the script can be stopped and started again.
"""

from __future__ import annotations

import json
import math
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes.digits import MNISTDataModule

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import study
from grid import Job, Results, quiet
from study import Cell, Study, options

RANKS = {1: 1594, 4: 6376}
STUDY = Study(
    Results(Path(__file__).with_name("digits.csv"), "accuracy", "old", "trained"),
    {  # a factor of about 3 apart; under SGD, whose best is close to where training diverges, also halfway where arms are best
        "AdamW": {
            "lora": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
            "full": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
            "sparse": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        },
        "SGD": {
            **dict.fromkeys(("lora", "full", "sparse"), (3e-3, 1e-2, 1.7e-2, 3e-2, 5e-2, 1e-1, 1.7e-1, 3e-1)),
            "tuned": (5e-2,),
        },
    },
    seeds=(1, 2, 3),
)
ARMS = ("deepr", "tuned", "lora", "fixed", "shira", "set", "rigl", "full", "head")
TASKS = ("rotated 5000", "inverted 5000", "rotated 1000", "inverted 1000")
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


@cache
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
    rank = next(rank for rank, values in RANKS.items() if values == count)
    layers = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
    if arm != "lora":  # (that of `peft` is the same, and `peft` need not be there)
        return study.prepared(net, arm, count, rank, seed, head=layers[-1])
    net.requires_grad_(False)
    for name in layers:
        setattr(net, name, LoRA(net.get_submodule(name), rank))  # type: ignore[arg-type]
    return net


def trained(job: Job, root: str) -> tuple[nn.Module, int]:
    """Train a network as a job says; the number is that of its trained values."""
    settings = json.loads(job.settings)
    task, size = job.part.split()[0], int(job.part.split()[1])
    arm = job.arm.split()[0]
    data, net = images(root), pretrained(root)
    torch.manual_seed(1000 + job.seed)
    net = prepared(net, arm, int(job.connectivity), job.seed)
    values = [parameter for parameter in net.parameters() if parameter.requires_grad]
    more = {"momentum": 0.9} if settings["optimizer"] == "SGD" else {}
    optimizer = getattr(torch.optim, settings["optimizer"])(values, settings["lr"], **more)
    x, y = data["new"]
    handle = study.rewiring(arm, net, optimizer, EPOCHS * (size // BATCH), job.seed)
    try:
        fit(net, optimizer, changed(x[:size], task), y[:size], EPOCHS, BATCH)
    except RuntimeError as error:
        if "not finite" not in str(error):  # a callback stops a training that has diverged; the other arms go on with nan
            raise
    if handle is not None:
        handle.remove()
    return net, sum(one.numel() for one in values)


def train(job: Job, root: str) -> dict[str, Any]:
    """Run one training."""
    start = time.perf_counter()
    net, count = trained(job, root)
    x, y = images(root)[job.split]
    return {
        "accuracy": f"{accuracy(net, changed(x, job.part), y):.2f}",
        "old": f"{accuracy(net, x, y):.2f}",
        "trained": count,
        "seconds": f"{time.perf_counter() - start:.1f}",
    }


def cells(tasks: list[str], optimizers: list[str], arms: list[str]) -> list[Cell]:
    """List the cells; all weights and the head have no size of their own, "tuned" was tuned for one cell."""
    return [
        Cell(task, arm, optimizer, count)
        for task in tasks
        for optimizer in optimizers
        for arm in arms
        for count in RANKS.values()
        if count == {"full": RANKS[1], "head": RANKS[1], "tuned": RANKS[4]}.get(arm, count)
        if arm != "tuned" or (task, optimizer) == ("rotated 5000", "SGD")
    ]


def main() -> None:
    given = options(__doc__, TASKS, ARMS, list(STUDY.rates))
    if not given.table:
        quiet()
        pretrained(given.root)
        for task in given.tasks:
            for optimizer in given.optimizers:
                STUDY.run(cells([task], [optimizer], given.arms), train, given.workers, given.root)
    for task in TASKS:
        for optimizer in STUDY.rates:
            found = STUDY.table(task, optimizer, ARMS, list(RANKS.values()))
            print("\n".join([f"\n{task}, {optimizer}", *found]) if found else "", end="\n" if found else "")


if __name__ == "__main__":
    main()
