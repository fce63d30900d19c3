"""ResNet-20 on CIFAR-10: DEEP R's defaults beside the other sparse-throughout methods, one schedule for all.

    python benchmarks/reference/resnet.py --root data --keep states      # every training that is not in resnet.csv
    python benchmarks/reference/resnet.py --root data --keep states --arms deepr --connectivities 0.05
    python benchmarks/reference/resnet.py --table                        # the table and the figure from resnet.csv

The network is ``ResNet20`` (He et al. 2016 for CIFAR; 268,336 weights, the batch norms are dense). Training: 20 epochs of batch
128, crops of 32 x 32 from images with a border of 4, flips, each image standardized; SGD with momentum .9, Nesterov, learning
rate .1, weight decay 5e-4 on weights, two epochs of warm-up and a cosine to 0. (He et al. train 160 epochs; 20 fit two cores.)
Connectivity counts all weights. Every arm has the learning rate of the dense network, and its own rule for theta's.

- all arms at 5 and 10 %, DeepR and RigL at 2 and 20 %; two seeds of DeepR and of the dense network at 5 %, else one.

A run is a line of resnet.csv, with its seconds. With --keep a run that was stopped goes on from its last epoch.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_deepr import connectivity_report, decay_groups, save_sparse
from lightning_deepr.models import ResNet20
from lightning_deepr.recipes.cifar10 import CIFAR10DataModule
from lightning_deepr.recipes.crops import Crops

sys.path.insert(0, str(Path(__file__).parents[1]))
from grid import Job, Results, figure, quiet, restore, table
from sparse_arms import ARMS, callback_of

HERE = Path(__file__).parent
RESULTS = Results(HERE / "resnet.csv", "epochs", "accuracy", "train_loss", "connections")
TOTAL = 268_336
CONNECTIVITIES = (0.02, 0.05, 0.1, 0.2)
ALL = (0.05, 0.1)  # where all arms are trained
LR, MOMENTUM, DECAY, BATCH, WARM_UP = 0.1, 0.9, 5e-4, 128, 2
EXPONENTS = {"rigl": 0.5, "set": 0.5, "fixed": 0.25}  # under SGD with momentum, from lenet.csv


def jobs(arms: list[str], connectivities: list[float], epochs: int) -> list[Job]:
    found = []
    for seed in (0, 1):
        for arm in ["dense", *arms]:
            for c in (1.0,) if arm == "dense" else connectivities:
                more = arm == "dense" or (arm == "deepr" and c == 0.05)
                if (seed and not more) or (c not in (1.0, *ALL) and arm not in ("deepr", "rigl")):
                    continue
                settings: dict[str, Any] = {"epochs": epochs} | ({"exponent": EXPONENTS[arm]} if arm in EXPONENTS else {})
                found.append(Job("study", arm, c, seed, "", "test", json.dumps(settings)))
    return sorted(found, key=lambda job: (job.seed, job.connectivity not in (0.05, 1.0)))


def state_file(keep: str | None, job: Job, suffix: str = ".pt") -> Path | None:
    return None if keep is None else Path(keep) / ("resnet_" + "_".join(job.key[1:4]).replace(" ", "") + suffix)


def run(job: Job, root: str, keep: str | None) -> dict[str, Any]:
    """Train once, and test once at the end."""
    images, labels, test_images, test_labels = CIFAR10DataModule(root).load()
    bordered = F.pad(images, (4, 4, 4, 4))
    training = Crops(
        bordered, labels, BATCH, distort=True, size=32, contrast=(1, 1), shuffle=True, seed=job.seed, drop_last=True
    )
    settings = json.loads(job.settings)
    epochs = settings.pop("epochs")
    torch.manual_seed(job.seed)
    net: nn.Module = ResNet20().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    callback = callback_of(job, net, TOTAL, settings)
    optimizer = torch.optim.SGD(decay_groups(net, DECAY), lr=LR, momentum=MOMENTUM, nesterov=True)
    steps = epochs * len(training)
    if callback is not None:
        callback.attach(net, optimizer, total_steps=steps)
    file, first, seconds, loss_sum = state_file(keep, job), 0, 0.0, 0.0
    state = torch.load(file, weights_only=True) if file is not None and file.is_file() else {}
    if state.get("settings") == job.settings:
        restore(state, net, optimizer, callback)
        first, seconds = state["epoch"], state["seconds"]
    for epoch in range(first, epochs):
        started, loss_sum = time.perf_counter(), 0.0
        training.set_epoch(epoch)
        for number, (x, y) in enumerate(training):
            step = epoch * len(training) + number
            factor = min(1.0, (step + 1) / (WARM_UP * len(training))) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = LR * factor
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            loss_sum += float(loss.detach())
        seconds += time.perf_counter() - started
        if file is not None:
            state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "settings": job.settings}
            state |= {"callback": {} if callback is None else callback.state_dict(), "epoch": epoch + 1, "seconds": seconds}
            torch.save(state, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
    net.eval()
    with torch.no_grad():
        batches = Crops(test_images, test_labels, 500, size=32)
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in batches)
    if file is not None:
        file.unlink(missing_ok=True)
        if callback is not None:
            save_sparse(net, file.with_suffix(".safetensors"), correct=right)
    return {
        "epochs": epochs,
        "accuracy": round(100 * right / len(test_labels), 2),
        "train_loss": round(loss_sum / len(training), 4),
        "connections": TOTAL if callback is None else connectivity_report(net).active,
        "seconds": round(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder with cifar-10-batches-py")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--connectivities", nargs="*", type=float, default=list(CONNECTIVITIES), choices=CONNECTIVITIES)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2, help="number of trainings at a time, one thread each")
    parser.add_argument("--keep", help="folder for the states of interrupted runs and the trained networks")
    parser.add_argument("--table", action="store_true", help="only print the table and draw the figure")
    options = parser.parse_args()
    if options.keep:
        Path(options.keep).mkdir(parents=True, exist_ok=True)
    if not options.table:
        todo = jobs(options.arms, options.connectivities, options.epochs)
        RESULTS.train(todo, run, options.workers, options.root, options.keep)
    rows = RESULTS.read()
    if rows:
        arms = ["dense", *ARMS]
        print(f"test accuracy after {rows[0]['epochs']} epochs, % (runs)\n")
        print("\n".join(table(rows, arms, CONNECTIVITIES, TOTAL, "accuracy")))
        title = f"CIFAR-10, ResNet-20, {rows[0]['epochs']} epochs"
        figure(rows, arms, CONNECTIVITIES, TOTAL, "accuracy", title, "test accuracy, %", HERE / "resnet.png")


if __name__ == "__main__":
    quiet()
    main()
