"""DEEP R's defaults beside the other sparse-throughout methods on MNIST: LeNet-300-100, nothing tuned but the dense network.

    python benchmarks/reference/lenet.py --root data                     # every training that is not in lenet.csv
    python benchmarks/reference/lenet.py --root data --parts published
    python benchmarks/reference/lenet.py --table                         # tables and figures from lenet.csv

Parts:

- exponents: each method with the learning rate times (N / K) ** e, e in (0, .25, .5, .75, 1), validation split, seed 0. It
  decides which exponent each method takes in the next part (one per method and optimizer, the best mean over 1 and 5
  %, so that every method has the rule that suits it best);
- defaults: 10 epochs at the learning rate of the dense network under three optimizers, validation split, seeds 1 to 3;
- published: the protocol of the published tables (100 epochs, batch 100, no augmentation), test set;
- ablation: what decides at 20 and 50 %: the defaults with one of them changed at a time, validation split, seeds 1 and 2;
- transfer: the accuracy over the base learning rate, before (lr_scale=1) and after, 3 epochs, validation split.

The validation split is the last 10,000 training images; 50,000 are left for training. A run is a line of lenet.csv; the script
can be stopped and started again at any time. Connectivity counts all 266,200 weights, and all arms get the same number; biases
are dense. Training is a plain loop with the callback attached to the optimizer.
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
from torch import nn

from lightning_deepr import connectivity_report
from lightning_deepr.models import LeNet300100

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import axes
from grid import Job, Results, Row, digits, over_connectivity, summary
from sparse_arms import ARMS, OLD, Settings, callback_of

HERE = Path(__file__).parent
RESULTS = Results(HERE / "lenet.csv", "epochs", "accuracy", "connections")
TOTAL = 266_200
CONNECTIVITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)

# the learning rates are those that suit the dense network
OPTIMIZERS: dict[str, Settings] = {
    "momentum": {"optimizer": "SGD", "lr": 0.05, "momentum": 0.9, "batch": 64},
    "adamw": {"optimizer": "AdamW", "lr": 2e-3, "batch": 64},
    "sgd": {"optimizer": "SGD", "lr": 0.1, "batch": 10},
}
ABLATION: dict[str, Settings] = {  # the defaults themselves are in the part "defaults"
    "deepr, no l1": {"l1": 0.0},
    "deepr, half the turnover": {"l1": ["TurnoverTarget", 0.05]},
    "deepr, a fifth of the turnover": {"l1": ["TurnoverTarget", 0.02]},
    "deepr, lr_scale 1": {"lr_scale": 1.0},
    "deepr, newborns at the start": {"newborn": "start"},
    "fixed, free signs": {"lr_scale": "auto"},
    "fixed, fixed signs": {"signs": "fixed", "lr_scale": "auto"},
}
EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def chosen_exponent(arm: str, optimizer: str) -> float | None:
    """Choose the exponent with the best mean over the connectivities at which every exponent was run."""
    rows = [row for row in RESULTS.read() if row["part"] == "exponents" and row["arm"] == arm]
    found: dict[float, dict[str, float]] = {}
    for row in rows:
        name, _, exponent = row["trial"].partition(" ")
        if name == optimizer:
            found.setdefault(float(exponent), {})[row["connectivity"]] = float(row["accuracy"])
    if set(found) != set(EXPONENTS):
        return None
    common = set.intersection(*(set(one) for one in found.values()))
    return max(found, key=lambda exponent: statistics.mean(found[exponent][c] for c in common)) if common else None


def jobs(part: str, arms: list[str], optimizers: list[str]) -> list[Job]:
    found = []
    for name in optimizers:
        base = OPTIMIZERS[name]
        if part == "exponents":
            for arm in arms:
                if arm in ("dense", "deepr"):
                    continue
                for c in (0.01, 0.05):
                    for exponent in EXPONENTS:
                        settings = {**base, "epochs": 10, "exponent": exponent}
                        found.append(Job(part, arm, c, 0, f"{name} {exponent}", "validation", json.dumps(settings)))
        elif part == "defaults":
            for seed in (1, 2, 3):
                for arm in ["dense", *arms]:
                    for c in (1.0,) if arm == "dense" else CONNECTIVITIES:
                        settings = {**base, "epochs": 10}
                        if arm == "deepr":
                            found.append(Job(part, "deepr before", c, seed, name, "validation", json.dumps(settings | OLD)))
                        elif arm != "dense":
                            exponent = chosen_exponent(arm, name)
                            if exponent is None:
                                continue
                            settings["exponent"] = exponent
                        found.append(Job(part, arm, c, seed, name, "validation", json.dumps(settings)))
        elif part == "ablation":
            for seed in (1, 2):
                for c in (0.2, 0.5):
                    for arm, more in ABLATION.items():
                        settings = json.dumps({**base, "epochs": 10} | more)
                        found.append(Job(part, arm, c, seed, name, "validation", settings))
        elif part == "transfer":
            for factor in (0.25, 0.5, 1, 2, 4, 8):
                for c in (0.01, 0.05, 0.2, 1.0):
                    for trial, more in (("before", OLD), ("after", {})):
                        if c == 1.0 and trial == "before":
                            continue
                        settings = {**base, "epochs": 3, "lr": base["lr"] * factor}
                        arm = "dense" if c == 1.0 else "deepr"
                        trial = f"{name} x {factor:g}" + ("" if c == 1.0 else f" {trial}")
                        found.append(Job(part, arm, c, 0, trial, "validation", json.dumps(settings | (more if c < 1 else {}))))
    if part == "published":
        base = {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "batch": 100, "epochs": 100}
        for seed in range(5):
            for arm in ["dense", *arms]:
                for c in (1.0,) if arm == "dense" else (0.01, 0.02, 0.05, 0.1):
                    if seed < (5 if arm in ("dense", "deepr") else 2):
                        exponent = {} if arm in ("dense", "deepr") else {"exponent": chosen_exponent(arm, "momentum")}
                        if exponent.get("exponent", 0) is not None:
                            found.append(Job(part, arm, c, seed, "", "test", json.dumps(base | exponent)))
        for arm in ["dense", *arms]:
            for c in (1.0,) if arm == "dense" else (0.2, 0.5):
                exponent = {} if arm in ("dense", "deepr") else {"exponent": chosen_exponent(arm, "momentum")}
                if exponent.get("exponent", 0) is not None:
                    settings = base | exponent | {"epochs": 20}
                    found.append(Job(part, arm, c, 0, "20 epochs", "test", json.dumps(settings)))
    return sorted(found, key=lambda job: job.seed)


def run(job: Job, root: str) -> dict[str, Any]:
    """Train once, and test once at the end."""
    settings = json.loads(job.settings)
    images, labels, test_images, test_labels = digits(root, job.split)
    epochs, batch_size, lr = settings.pop("epochs"), settings.pop("batch"), settings.pop("lr")
    kind, momentum = getattr(torch.optim, settings.pop("optimizer")), settings.pop("momentum", None)
    torch.manual_seed(job.seed)
    net: nn.Module = LeNet300100()
    callback = callback_of(job, net, TOTAL, settings)
    optimizer = kind(net.parameters(), lr=lr, **({} if momentum is None else {"momentum": momentum}))
    steps = epochs * (len(labels) // batch_size)
    if callback is not None:
        callback.attach(net, optimizer, total_steps=steps)
    group, step = optimizer.param_groups[0], 0
    order = torch.Generator().manual_seed(job.seed)
    started = time.perf_counter()
    for _ in range(epochs):
        shuffled = torch.randperm(len(labels), generator=order)
        for first in range(0, len(labels) - batch_size + 1, batch_size):
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            batch = shuffled[first : first + batch_size]
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
            step += 1
    seconds = time.perf_counter() - started
    net.eval()
    with torch.no_grad():
        accuracy = (net(test_images).argmax(1) == test_labels).double().mean().item()
    return {
        "epochs": epochs,
        "accuracy": round(100 * accuracy, 2),
        "connections": TOTAL if callback is None else connectivity_report(net).active,
        "seconds": round(seconds),
    }


# -- results ----------------------------------------------------------------------------------------------------------------

NAMES = ("deepr", "deepr before", "rigl", "set", "fixed")
PUBLISHED = {  # TimDettmers/sparse_learning, results/MNIST_sparse_summary.csv: 100 epochs, batch 100, dense 98.69
    "DEEP R there": (94.0, 98.21, 98.06, 98.19),
    "SET there": (95.8, 97.74, 98.14, 98.39),
    "DSR there": (97.54, 98.14, 98.32, 98.44),
    "Sparse Momentum there": (97.53, 98.20, 98.53, 98.67),
}


def tables() -> str:
    rows, lines = RESULTS.read(), []
    for name in OPTIMIZERS:
        mine = [row for row in rows if row["part"] == "defaults" and row["trial"] == name]
        if not mine:
            continue
        dense = [float(row["accuracy"]) for row in mine if row["arm"] == "dense"]
        lines += [f"**defaults**, {name}: validation accuracy, % (runs); dense {summary(dense)}", ""]
        lines += ["| arm | rule | " + " | ".join(f"{100 * c:g} %" for c in CONNECTIVITIES) + " |", "|---" * 8 + "|"]
        for arm in NAMES:
            exponent = chosen_exponent(arm, name) if arm in ("rigl", "set", "fixed") else None
            rule = {"deepr": "auto", "deepr before": "1"}.get(arm, f"(N/K)^{exponent:g}" if exponent is not None else "-")
            lines.append(f"| {arm} | {rule} | " + " | ".join(_cells(mine, arm, CONNECTIVITIES)) + " |")
        lines.append("")
    published = [row for row in rows if row["part"] == "published"]
    if published:
        main, short = ([row for row in published if row["epochs"] == epochs] for epochs in ("100", "20"))
        first = CONNECTIVITIES[:4]
        dense = [float(row["accuracy"]) for row in main if row["arm"] == "dense"]
        lines += [f"**published protocol**: test accuracy, % (runs); dense {summary(dense)} (there 98.69)", ""]
        lines += ["| arm | " + " | ".join(f"{100 * c:g} %" for c in first) + " | 20 % (20 epochs) | 50 % (20 epochs) |"]
        lines += ["|---" * 7 + "|"]
        for arm in ("deepr", "rigl", "set", "fixed"):
            cells = [*_cells(main, arm, first), *_cells(short, arm, (0.2, 0.5))]
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        lines += [f"| {arm} | " + " | ".join(f"{x}" for x in found) + " | | |" for arm, found in PUBLISHED.items()] + [""]
    changed = [row for row in rows if row["part"] == "ablation"]
    if changed:
        lines += ["**ablation**: validation accuracy, % (runs)", "", "| changed | optimizer | 20 % | 50 % |", "|---" * 4 + "|"]
        for name in dict.fromkeys(row["trial"] for row in changed):
            same = [r for r in rows if r["part"] == "defaults" and r["trial"] == name and r["seed"] in ("1", "2")]
            lines.append(f"| nothing | {name} | " + " | ".join(_cells(same, "deepr", (0.2, 0.5))) + " |")
            for arm in ABLATION:
                mine = [row for row in changed if row["trial"] == name]
                lines.append(f"| {arm} | {name} | " + " | ".join(_cells(mine, arm, (0.2, 0.5))) + " |")
        lines.append("")
    tuning = [row for row in rows if row["part"] == "exponents"]
    if tuning:
        lines += ["**exponents**: validation accuracy, %, seed 0", ""]
        lines += ["| arm | optimizer | e | 1 % | 5 % | 20 % |", "|---" * 6 + "|"]
        for trial in dict.fromkeys(row["trial"] for row in tuning):
            for arm in ("rigl", "set", "fixed"):
                mine = [row for row in tuning if row["trial"] == trial]
                name, exponent = trial.split()
                lines.append(f"| {arm} | {name} | {exponent} | " + " | ".join(_cells(mine, arm, (0.01, 0.05, 0.2))) + " |")
    return "\n".join(lines)


def _cells(rows: list[Row], arm: str, connectivities: tuple[float, ...]) -> list[str]:
    at = [[r for r in rows if r["arm"] == arm and r["connectivity"] == f"{c:g}"] for c in connectivities]
    return [summary([float(row["accuracy"]) for row in found]) for found in at]


def pictures() -> None:
    rows = RESULTS.read()
    names = [name for name in OPTIMIZERS if any(r["part"] == "defaults" and r["trial"] == name for r in rows)]
    if names:
        drawing, panels = axes(len(names), width=4.8, height=4.2)
        for panel, name in zip(panels, names, strict=True):
            mine = [row for row in rows if row["part"] == "defaults" and row["trial"] == name]
            over_connectivity(panel, mine, ["dense", *NAMES], CONNECTIVITIES, TOTAL, "accuracy")
            panel.set_title(f"{name}: the dense network's learning rate", fontsize=10)
            panel.set_ylabel("validation accuracy, %")
            panel.set_ylim(89, 98.7)
        panels[0].legend(fontsize=8, loc="lower right")
        drawing.savefig(HERE / "lenet_defaults.png", dpi=110)
    moved = [row for row in rows if row["part"] == "transfer"]
    names = [name for name in OPTIMIZERS if any(row["trial"].startswith(name + " ") for row in moved)]
    if names:
        drawing, panels = axes(len(names), width=4.8, height=4.2)
        for panel, name in zip(panels, names, strict=True):
            for number, c in enumerate((0.01, 0.05, 0.2, 1.0)):
                for trial, line in (("before", ":"), ("after", "-")) if c < 1 else (("", "-"),):
                    mine = [row for row in moved if row["connectivity"] == f"{c:g}" and row["trial"].startswith(name + " ")]
                    points = sorted(
                        (json.loads(row["settings"])["lr"], 100 - float(row["accuracy"]))
                        for row in mine
                        if row["trial"].endswith(trial)
                    )
                    if points:
                        label = f"{100 * c:g} %" + (f", {trial}" if trial else ", dense")
                        panel.plot(*zip(*points, strict=True), line, marker="o", markersize=3, color=f"C{number}", label=label)
            panel.set_xscale("log")
            panel.set_yscale("log")
            rates = sorted({json.loads(row["settings"])["lr"] for row in moved if row["trial"].startswith(name + " ")})
            panel.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=8)
            panel.set_xticks([], minor=True)
            panel.set_yticks([2, 3, 5, 10, 20], ["2", "3", "5", "10", "20"])
            panel.set_yticks([], minor=True)
            panel.set_xlabel("base learning rate")
            panel.set_ylabel("validation error, %")
            panel.set_title(name, fontsize=10)
            panel.grid(alpha=0.3)
        panels[0].legend(fontsize=7)
        drawing.savefig(HERE / "lenet_transfer.png", dpi=110)


PARTS = ("exponents", "defaults", "ablation", "published", "transfer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder with MNIST/raw")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--optimizers", nargs="*", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--workers", type=int, default=2, help="number of trainings at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="only print the tables and draw the figures")
    options = parser.parse_args()
    if not options.table:
        for part in options.parts:
            RESULTS.train(jobs(part, options.arms, options.optimizers), run, options.workers, options.root)
    print(tables())
    pictures()


if __name__ == "__main__":
    main()
