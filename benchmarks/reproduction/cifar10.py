"""CIFAR-10 with the tutorial's CNN: every method from dense to 2 % connectivity, under one schedule.

    python benchmarks/reproduction/cifar10.py --root data                     # every training that is not in cifar10.csv
    python benchmarks/reproduction/cifar10.py --root data --parts study --arms deepr fixed_random
    python benchmarks/reproduction/cifar10.py --table                         # tables and the figure from cifar10.csv

Parts: `tune` (short trainings, validation on the last 5,000 training images) and `study` (20 epochs, test set). All arms share
the network (1,067,584 weights, biases dense), the data (24 x 24 crops and flips, without the tutorial's contrast), batch 128,
SGD with momentum .9, weight decay on the two linear layers, one epoch of warm-up and a cosine to 0. Connectivity counts *all*
weights, also those of conv1 and the output layer, which stay dense. Training is a plain loop with the callback attached to the
optimizer.

Each run is one line; the script can be stopped and started again at any time. With --keep an interrupted run continues from its
last epoch, and the epochs of pruning and l1-shrinkage that do not depend on the connectivity run once for all connectivities.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_deepr import LinearDecay, connectivity_report, save_sparse
from lightning_deepr.models import CIFAR10CNN
from lightning_deepr.recipes.cifar10 import CIFAR10DataModule
from lightning_deepr.recipes.classifier import is_decayed
from lightning_deepr.recipes.crops import Crops

sys.path.insert(0, str(Path(__file__).parents[1]))
from grid import Job, Results, callback_of, figure, restore, steps_in_common, table

HERE = Path(__file__).parent
RESULTS = Results(HERE / "cifar10.csv", "accuracy", "train_loss", "connections", "per_layer")
SIZES = {"conv1": 4_800, "conv2": 102_400, "local3": 884_736, "local4": 73_728, "output": 1_920}
TOTAL = sum(SIZES.values())
CONNECTIVITIES = (0.02, 0.05, 0.1, 0.2)
AT = {"dense": (1.0,), "fixed_random_free_signs": (0.05,)}  # arms that are not trained at all connectivities
EPOCHS = {"tune": 6, "study": 20}
Settings = dict[str, Any]

ARMS: dict[str, str | None] = {
    "dense": None,
    "deepr": "DeepR",
    "soft_deepr": "SoftDeepR",
    "fixed_random": "FixedRandom",
    "fixed_random_free_signs": "FixedRandom",
    "pruning": "MagnitudePruning",
    "l1_shrinkage": "L1Shrinkage",
}
SCHEDULE: Settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4, "warmup": 1.0}
# The settings that each arm adds. `shares`: connectivity of conv2 and local4, divided by local3's. `aim`: connectivity given to
# soft-DEEP R, divided by the wanted one, since data keep more connections than theta_min predicts.
OWN: dict[str, Settings] = {
    "dense": {},
    "deepr": {"lr": 0.1, "l1": 3e-3, "shares": [10, 10]},
    "soft_deepr": {"lr": 0.1, "l1": 3e-3, "temperature": 1e-6, "aim": 0.6, "shares": [10, 10]},
    "fixed_random": {"lr": 0.1, "shares": [10, 10]},
    "fixed_random_free_signs": {"lr": 0.1, "signs": "free", "shares": [10, 10]},
    "pruning": {"shares": [10, 10]},
    "l1_shrinkage": {"l1": 1e-3, "freeze_at": 0.5, "shares": [10, 10]},
}
FROM_10: dict[str, Settings] = {"deepr": {"l1": 1e-3}}  # settings from 10 % on, see TRIALS_AT_20


def settings_of(arm: str, connectivity: float) -> Settings:
    """Return the study's settings of an arm."""
    return {**SCHEDULE, **OWN[arm], **(FROM_10.get(arm, {}) if connectivity >= 0.1 else {})}


def budget(connectivity: float, shares: Sequence[float]) -> dict[str, int]:
    """Share out ``round(connectivity * TOTAL)`` connections among the layers.

    conv1 and the output layer (.6 % of the weights) stay dense; conv2 and local4 get ``shares`` times the connectivity of
    local3, but at most 1.
    """
    left = round(connectivity * TOTAL) - SIZES["conv1"] - SIZES["output"]
    wanted = dict(zip(("conv2", "local4"), shares, strict=True))
    found: dict[str, int] = {}
    while True:
        rest = left - sum(found.values())
        p = rest / (SIZES["local3"] + sum(wanted[name] * SIZES[name] for name in wanted if name not in found))
        full = [name for name in wanted if name not in found and wanted[name] * p >= 1]
        if not full:
            break
        found.update({name: SIZES[name] for name in full})
    found.update({name: round(wanted[name] * p * SIZES[name]) for name in wanted if name not in found})
    found["local3"] = left - sum(found.values())
    return found


def jobs(part: str, arms: list[str]) -> list[Job]:
    """List the trainings of a part: the first seed of all arms comes first, and 5 % and dense come before the rest."""
    found = []
    for arm in arms:
        if part == "study":
            for c in AT.get(arm, CONNECTIVITIES):
                for seed in range(2 if arm in ("dense", "deepr", "fixed_random") and c in (1.0, 0.05) else 1):
                    found.append(Job(part, arm, c, seed, "", "test", json.dumps(settings_of(arm, c))))
        else:
            for c, trials in ((1.0 if arm == "dense" else 0.05, TRIALS), (0.2, TRIALS_AT_20)):
                for trial, changed in trials.get(arm, {}).items():
                    settings = {**SCHEDULE, **OWN[arm], **changed}
                    found.append(Job(part, arm, c, 100, trial, "validation", json.dumps(settings)))
    return sorted(found, key=lambda job: (job.seed, job.connectivity not in (0.05, 1.0)))


FIRST: Settings = {"lr": 0.05}
TRIALS: dict[str, dict[str, Settings]] = {
    "deepr": {
        "first": {**FIRST, "l1": 1e-3},
        "lr .1": {"l1": 1e-3},
        "l1 3e-3": FIRST,
        "lr .1, l1 3e-3": {},
        "lr .1, l1 1e-2": {"l1": 1e-2},
        "more in conv2": {"shares": [16, 8]},
        "more in local3": {"shares": [6, 6]},
        "lr .2": {"lr": 0.2},
        "l1 1e-3 in conv2": {"l1": {"conv2": 1e-3, "local3": 3e-3, "local4": 3e-3}},
        "l1 1e-3 in local3, local4": {"l1": {"conv2": 3e-3, "local3": 1e-3, "local4": 1e-3}},
    },
    "dense": {"first": {}, "lr .1": {"lr": 0.1}},
    "fixed_random": {"first": FIRST, "lr .1": {}},
    "pruning": {"first": {}, "from .2 to .5, 8 times": {"prune_from": 0.2, "prune_until": 0.5, "prunings": 8}},
    "l1_shrinkage": {
        "first": {"l1": 1e-4, "freeze_at": 0.7},
        "l1 3e-4, cut at .5": {"l1": 3e-4},
        "l1 1e-3, cut at .5": {},
    },
    "soft_deepr": {"l1 1e-3": {"l1": 1e-3, "temperature": 1e-7, "aim": 1.0}, "T 1e-6": {"aim": 1.0}},
}
# With more connections each weight is smaller, so that the same alpha shrinks it more.
TRIALS_AT_20: dict[str, dict[str, Settings]] = {
    "deepr": {"lr .1, l1 3e-3": {}, "lr .1, l1 1e-3": {"l1": 1e-3}, "lr .1, l1 3e-4": {"l1": 3e-4}},
}


def method_callback(job: Job, settings: Settings) -> Any:
    shares, aim = settings.pop("shares"), settings.pop("aim", 1.0)
    kind = ARMS[job.arm]
    assert kind is not None
    if "l1" in settings and job.arm == "deepr":
        l1 = settings["l1"]
        settings["l1"] = {n: LinearDecay(v, 0.0) for n, v in l1.items()} if isinstance(l1, dict) else LinearDecay(l1, 0.0)
    if job.arm == "soft_deepr":
        settings.setdefault("target_modules", ["conv2", "local3", "local4"])
    return callback_of(kind, budget(aim * job.connectivity, shares), seed=job.seed, **settings)


def state_file(keep: str | None, job: Job, connectivity: str) -> Path | None:
    """Return the file for the state of a run, or, for the connectivity "any", of the epochs that all connectivities share."""
    name = "_".join((job.part, job.arm, connectivity, str(job.seed), job.trial, "state")).replace(" ", "-")
    return Path(keep) / f"{name}.pt" if keep else None


def run(job: Job, root: str, keep: str | None) -> Settings:
    """Train once, and test once at the end.

    With the folder ``keep`` an interrupted run continues from its last epoch, and the trained network is kept.
    """
    epochs = EPOCHS[job.part]
    images, labels, test_images, test_labels = CIFAR10DataModule(root).load()
    if job.split == "validation":
        images, labels, test_images, test_labels = images[:-5000], labels[:-5000], images[-5000:], labels[-5000:]
    training = Crops(images, labels, 128, distort=True, contrast=(1, 1), shuffle=True, seed=job.seed, drop_last=True)
    settings = json.loads(job.settings)
    lr, momentum, decay, warmup = (settings.pop(name) for name in ("lr", "momentum", "weight_decay", "warmup"))
    torch.manual_seed(job.seed)
    net: nn.Module = CIFAR10CNN().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    callback = None if ARMS[job.arm] is None else method_callback(job, settings)
    if callback is not None:
        callback.prepare(net)
    decayed = [p for name, p in net.named_parameters() if is_decayed(name)]
    others = [p for name, p in net.named_parameters() if not is_decayed(name)]
    optimizer = torch.optim.SGD([{"params": decayed, "weight_decay": decay}, {"params": others}], lr=lr, momentum=momentum)
    steps = epochs * len(training)
    if callback is not None:
        callback.attach(net, optimizer, total_steps=steps)
    step, seconds, first, train_loss = 0, 0.0, 0, 0.0
    shared = steps_in_common(callback) // len(training)
    file, common = (state_file(keep, job, c) for c in (f"{job.connectivity:g}", "any"))
    for begun in (file, common if shared else None):
        state = torch.load(begun, weights_only=True) if begun is not None and begun.is_file() else {}
        if state.get("settings") == job.settings:  # a run that was stopped with other settings begins anew
            restore(state, net, optimizer, callback)
            step, seconds, first = state["step"], state["seconds"], state["epoch"]
            train_loss = state["train_loss"]
            break
    for epoch in range(first, epochs):
        started, loss_sum = time.perf_counter(), 0.0
        training.set_epoch(epoch)
        for x, y in training:
            rising = min(1.0, (step + 1) / (warmup * len(training))) if warmup else 1.0
            for group in optimizer.param_groups:
                group["lr"] = lr * rising * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            loss_sum += float(loss.detach())
            step += 1
        seconds += time.perf_counter() - started
        train_loss = loss_sum / len(training)
        if file is not None and common is not None:
            state = {
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seconds": seconds,
                "epoch": epoch + 1,
                "train_loss": train_loss,
                "settings": job.settings,
            }
            state["callback"] = callback.state_dict() if callback is not None else {}
            for kept in (file, common) if epoch + 1 == shared else (file,):
                torch.save(state, kept.with_suffix(".new"))
                kept.with_suffix(".new").replace(kept)
    net.eval()
    right = 0
    with torch.no_grad():
        for x, y in Crops(test_images, test_labels, 500):
            right += int((net(x).argmax(1) == y).sum())
    report = connectivity_report(net)
    dense = SIZES["conv1"] + SIZES["output"]
    if file is not None:
        file.unlink(missing_ok=True)
        if callback is not None and job.part == "study":
            save_sparse(net, file.with_name(file.name.replace("__state.pt", ".safetensors")), correct=right)
    return {
        "accuracy": round(100 * right / len(test_labels), 2),
        "train_loss": round(train_loss, 4),
        "connections": report.active + dense if callback is not None else TOTAL,
        "per_layer": " ".join(f"{row['name'].split('.')[0]} {row['active']}" for row in report),
        "seconds": round(seconds),
    }


def tables() -> str:
    rows, lines = RESULTS.read(), []
    study = [row for row in rows if row["part"] == "study"]
    if study:
        lines += ["**study**: test accuracy after 20 epochs, % (runs)", ""]
        lines += [*table(study, list(ARMS), CONNECTIVITIES, TOTAL, "accuracy"), ""]
    tune = [row for row in rows if row["part"] == "tune"]
    if tune:
        lines += [
            "**tune**: validation accuracy after 6 epochs, %",
            "",
            "| arm | connectivity | trial | accuracy | training loss |",
            "|---|---|---|---|---|",
        ]
        for r in sorted(tune, key=lambda row: (list(ARMS).index(row["arm"]), float(row["connectivity"]))):
            percent = 100 * float(r["connectivity"])
            lines.append(
                f"| {r['arm'].replace('_', ' ')} | {percent:g} % | {r['trial']} | {r['accuracy']} | {r['train_loss']} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder with cifar-10-batches-py")
    parser.add_argument("--parts", nargs="*", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=2, help="largest number of seeds")
    parser.add_argument("--workers", type=int, default=2, help="number of trainings at a time, one thread each")
    parser.add_argument("--keep", help="folder for the states of interrupted runs and the trained networks")
    parser.add_argument("--table", action="store_true", help="only print the tables and draw the figure")
    options = parser.parse_args()
    if options.keep:
        Path(options.keep).mkdir(parents=True, exist_ok=True)
    if not options.table:
        for part in options.parts:
            todo = [job for job in jobs(part, options.arms) if part == "tune" or job.seed < options.seeds]
            RESULTS.forget(todo)
            RESULTS.train(todo, run, options.workers, options.root, options.keep)
    print(tables())
    study = [row for row in RESULTS.read() if row["part"] == "study"]
    title = "CIFAR-10, the tutorial's CNN, 20 epochs"
    figure(study, list(ARMS), CONNECTIVITIES, TOTAL, "accuracy", title, "test accuracy, %", HERE / "cifar10.png")


if __name__ == "__main__":
    main()
