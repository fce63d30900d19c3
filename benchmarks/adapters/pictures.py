"""Adapters of one size on pictures of another kind: ResNet-20, trained on CIFAR-10, learns rotated or grey pictures.

    python benchmarks/adapters/pictures.py --root data           # every training that is not in pictures.csv
    python benchmarks/adapters/pictures.py --table

ResNet-20 is trained on the first 40,000 training pictures (dense, once; crops and flips, SGD, 12 epochs under bfloat16
autocast). Then it learns 2,000 others, turned by 90 degrees or made grey, in 3 epochs of batches of 50 under AdamW, with a
cosine schedule, crops and flips, under bfloat16 autocast, too. Batch norms are frozen in every arm but the one of all weights,
and keep their statistics in all. Every arm but the last two trains 6,405 values: what LoRA of rank 1 of `peft` has on all
convolutions and the last layer, shared out as LoRA does. SHiRA of `peft` takes linear layers only: "shira" is what it does
(fixed random places of either sign, the learning rate as it is, LoRA's rates) by parts of this package.

Three learning rates at seed 0, of which the best on the last 2,500 training pictures is taken; then the seeds are tested once
on the first 5,000 test pictures of the new kind, and on those of the old kind ("old"). Needs `peft`.
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

from lightning_deepr import decay_groups
from lightning_deepr.models import ResNet20
from lightning_deepr.recipes.cifar10 import CIFAR10DataModule
from lightning_deepr.recipes.crops import Crops

sys.path.insert(0, str(Path(__file__).parents[1]))
from grid import Job, Results, quiet
from study import Cell, Study, options, prepared, rewiring

TASKS = ("rotated", "grey")
ARMS = ("deepr", "lora", "shira", "fixed", "set", "rigl", "full", "head")
COUNT, RANK, EPOCHS, BATCH, EXAMPLES = 6405, 1, 3, 50, 2000
FIRST_EPOCHS = 12
STUDY = Study(
    Results(Path(__file__).with_name("pictures.csv"), "accuracy", "old", "trained"),
    {"AdamW": {"lora": (3e-3, 1e-2, 3e-2), "full": (3e-4, 1e-3, 3e-3), "sparse": (3e-4, 1e-3, 3e-3)}},
    seeds=(1, 2),
)


@cache
def pictures(root: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Read the pictures: {part: (uint8 [B, 3, 32, 32], labels)}."""
    x, y, x_test, y_test = CIFAR10DataModule(root).load()
    return {
        "old": (x[:40_000], y[:40_000]), "new": (x[40_000 : 40_000 + EXAMPLES], y[40_000 : 40_000 + EXAMPLES]),
        "validation": (x[47_500:], y[47_500:]), "test": (x_test[:5000], y_test[:5000]),
    }  # fmt: skip


def changed(x: Tensor, task: str) -> Tensor:
    """Turn pictures by 90 degrees, or make them grey."""
    if task == "rotated":
        return x.rot90(1, (2, 3)).contiguous()
    return x.float().mean(1, keepdim=True).round().to(x.dtype).expand(-1, 3, -1, -1).contiguous()


def batches(x: Tensor, y: Tensor, size: int, seed: int) -> Crops:
    bordered = F.pad(x, (4, 4, 4, 4))
    return Crops(bordered, y, size, distort=True, size=32, contrast=(1, 1), shuffle=True, seed=seed, drop_last=True)


def pretrained(root: str) -> nn.Module:
    """Train the network on ordinary pictures, once; it is kept beside the data, after every epoch."""
    file = Path(root) / "adapters_resnet20.pt"
    torch.manual_seed(0)
    net: nn.Module = ResNet20().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # (faster without adapters)
    optimizer = torch.optim.SGD(decay_groups(net, 5e-4), lr=0.1, momentum=0.9, nesterov=True)
    state = torch.load(file, weights_only=True) if file.is_file() else {"epoch": 0}
    if state["epoch"]:
        net.load_state_dict(state["net"])
    if state["epoch"] < FIRST_EPOCHS:
        if state["epoch"]:
            optimizer.load_state_dict(state["optimizer"])
        loader = batches(*pictures(root)["old"], 128, 0)
        steps = FIRST_EPOCHS * len(loader)
        for epoch in range(state["epoch"], FIRST_EPOCHS):
            loader.set_epoch(epoch)
            for number, (x, y) in enumerate(loader):
                step = epoch * len(loader) + number
                for group in optimizer.param_groups:
                    group["lr"] = 0.1 * min(1.0, (step + 1) / len(loader)) * 0.5 * (1 + math.cos(math.pi * step / steps))
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    logits = net(x)
                F.cross_entropy(logits.float(), y).backward()
                optimizer.step()
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, file)
            print(f"pretraining: {epoch + 1} of {FIRST_EPOCHS} epochs", flush=True)
    return net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,no-any-return]


def still(net: nn.Module) -> nn.Module:
    """Set the mode for training with batch norms that keep their statistics."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    net.eval()
    with torch.autocast("cpu", torch.bfloat16):
        right = sum(int((net(images).argmax(1) == labels).sum()) for images, labels in Crops(x, y, 500, size=32))
    return 100 * right / len(y)


def train(job: Job, root: str) -> dict[str, Any]:
    """Run one training."""
    start, settings, task = time.perf_counter(), json.loads(job.settings), job.part
    arm, net = job.arm.split()[0], pretrained(root)
    layers = [(name, one.weight) for name, one in net.named_modules() if isinstance(one, nn.Conv2d | nn.Linear)]
    counts = {f"{name}.weight": RANK * (weight.shape[0] + weight[0].numel()) for name, weight in layers}
    assert sum(counts.values()) == COUNT
    torch.manual_seed(1000 + job.seed)
    net = prepared(net, "plain" if arm == "shira" else arm, counts, RANK, job.seed, head="fc")
    values = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = getattr(torch.optim, settings["optimizer"])(values, settings["lr"])
    x, y = pictures(root)["new"]
    loader = batches(changed(x, task), y, BATCH, job.seed)
    steps = EPOCHS * len(loader)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    handle = rewiring("plain" if arm == "shira" else arm, net, optimizer, steps, job.seed)
    still(net)
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(images)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            schedule.step()
    if handle is not None:
        handle.remove()
    xs, ys = pictures(root)[job.split]
    return {
        "accuracy": f"{accuracy(net, changed(xs, task), ys):.2f}",
        "old": f"{accuracy(net, xs, ys):.2f}" if job.split == "test" else "",
        "trained": sum(one.numel() for one in values),
        "seconds": f"{time.perf_counter() - start:.1f}",
    }


def main() -> None:
    given = options(__doc__, TASKS, ARMS, ("AdamW",))
    if not given.table:
        quiet()
        net = pretrained(given.root)
        xs, ys = pictures(given.root)["test"]
        print(
            "pretrained:", {"old": accuracy(net, xs, ys), **{t: accuracy(net, changed(xs, t), ys) for t in TASKS}}, flush=True
        )
        for task in given.tasks:
            STUDY.run([Cell(task, arm, "AdamW", COUNT) for arm in given.arms], train, given.workers, given.root)
    for task in TASKS:
        print("\n".join([f"\n{task}", *STUDY.table(task, "AdamW", ARMS, [COUNT])]))


if __name__ == "__main__":
    main()
