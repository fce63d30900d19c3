"""Every method at every connectivity on MNIST: LeNet-300-100, batch 10, 10 epochs.

    python benchmarks/comparison/mnist.py --root data                        # every training that is not in results.csv
    python benchmarks/comparison/mnist.py --root data --parts common --arms deepr soft_deepr
    python benchmarks/comparison/mnist.py --table                            # tables and the figure from results.csv

Parts, in this order:

- common: the paper's protocol for all arms (SGD, learning rate .05, batch 10), test set;
- scope: one K per layer compared with one K for the whole network, 1 %;
- rewiring: rewiring less often, or ending it early, 1 %;
- tune: the same number of short trials (2 epochs, validation on the last 10,000 training images) for every arm at 1 and at 10
%; - tuned: each arm with its best trial (the trials at 1 % for 1 and 2 %, those at 10 % for 5, 10 and 20 %), test set.

A run is a line of results.csv; the script can be stopped and started again at any time. Connectivity counts all 266,200
weights, and all arms get the same number; biases are dense. Training is a plain loop with the callback attached to the
optimizer.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_deepr import LinearDecay, LrPower, connectivity_report
from lightning_deepr.models import LeNet300100

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import axes
from grid import Job, Results, callback_of, digits, over_connectivity, summary, table

HERE = Path(__file__).parent
RESULTS = Results(HERE / "results.csv", "epochs", "accuracy", "connections", "per_layer")
TOTAL = 266_200
CONNECTIVITIES = (0.01, 0.02, 0.05, 0.1, 0.2)
TRIALS = 8
BATCH = 10
# SoftDeepR's theta_min divided by the theory's, which assumes no data. With these factors the connectivity ends near the wanted
# one. Short runs on the validation split gave the factor at 1 %, the final connectivity of earlier runs with other factors gave
# the others (at 5 %: .9 ends at 6.9 %, 3 at 2.5 %).
SOFT_FACTORS = {0.01: 3, 0.02: 1.6, 0.05: 1.3, 0.1: 1.0, 0.2: 0.7}

Settings = dict[str, Any]

ARMS: dict[str, str | None] = {
    "dense": None,
    "deepr": "DeepR",
    "soft_deepr": "SoftDeepR",
    "fixed_random": "FixedRandom",
    "fixed_random_free_signs": "FixedRandom",
    "pruning": "MagnitudePruning",
    "l1_shrinkage": "L1Shrinkage",
    "set": "SET",
    "rigl": "RigL",
}
COMMON: dict[str, Settings] = {
    "dense": {},
    "deepr": {"l1": 1e-4, "temperature": ["LrPower", 1e-12, 2]},
    "soft_deepr": {"l1": 5e-4, "temperature": 1e-10},
    "fixed_random": {},
    "fixed_random_free_signs": {"signs": "free"},
    "pruning": {},
    "l1_shrinkage": {"l1": 1e-4},
    "set": {},
    "rigl": {},
}


def space(arm: str, draw: random.Random, first: bool) -> Settings:
    """Draw the settings of one trial; the first trial of every arm has the same optimizer and the arm's defaults."""
    if first:
        own = COMMON[arm] | ({"temperature": 1e-9} if arm == "soft_deepr" else {})
        return {"lr": 0.4, "schedule": "cosine", "distribution": "deepr", **own}
    found: Settings = {
        "lr": draw.choice([0.05, 0.1, 0.2, 0.4]),
        "schedule": draw.choice(["constant", "cosine", "cosine"]),
        "distribution": draw.choice(["deepr", "erdos_renyi"]),
    }
    if arm in ("deepr", "soft_deepr", "l1_shrinkage"):
        alpha = draw.choice([3e-5, 1e-4, 2e-4, 4e-4])
        found["l1"] = draw.choice([alpha, ["LinearDecay", alpha, 0.0]]) if arm == "deepr" else alpha
    if arm == "deepr":
        found["temperature"] = draw.choice([0.0, ["LrPower", 1e-12, 2]])
    if arm == "soft_deepr":
        found["temperature"] = draw.choice([1e-10, 1e-9, 1e-8])
        found["theta_min_factor"] = draw.choice([0.5, 1.0, 1.5])  # multiplies SOFT_FACTORS
    if arm == "fixed_random_free_signs":
        found["signs"] = "free"
    if arm == "pruning":
        found["prune_from"], found["prune_until"], found["prunings"] = draw.choice(
            [(0.3, 0.3, 1), (0.5, 0.5, 1), (0.1, 0.6, 5), (0.2, 0.8, 10)]
        )
    if arm == "l1_shrinkage":
        found["freeze_at"] = draw.choice([0.5, 0.8])
    if arm in ("set", "rigl"):
        found["drop_fraction"] = draw.choice([0.1, 0.3, 0.5])
        found["rewire_every_n_steps"] = draw.choice([100, 300, 1000])
    return found


def epochs_of(part: str) -> int:
    return 2 if part == "tune" else 10


def seeds_at(connectivity: float) -> range:
    return range(3 if connectivity in (0.01, 0.05, 1.0) else 1)


def best_trial(rows: list[dict[str, str]]) -> dict[str, str]:
    """Choose the most accurate trial that ends with at most 1.2 times the wanted connections; if there is none, the sparsest.

    Only a method without a hard K can miss the wanted connectivity, and denser networks are more accurate.
    """

    def excess(row: dict[str, str]) -> float:
        return int(row["connections"]) / (TOTAL * float(row["connectivity"]))

    kept = [row for row in rows if excess(row) <= 1.2]
    return max(kept, key=lambda row: float(row["accuracy"])) if kept else min(rows, key=excess)


def jobs(part: str, arms: list[str]) -> list[Job]:
    """List the trainings of a part; the first seed of all arms comes first."""
    found = []
    if part == "common":
        for arm in arms:
            for c in (1.0,) if arm == "dense" else CONNECTIVITIES:
                for seed in seeds_at(c):
                    settings = {"lr": 0.05, "schedule": "constant", "distribution": "deepr", **COMMON[arm]}
                    found.append(Job(part, arm, c, seed, "", "test", json.dumps(settings)))
    elif part == "tune":
        for arm in arms:
            for c in (1.0,) if arm == "dense" else (0.01, 0.1):
                draw = random.Random(f"{arm} {c}")
                for trial in range(TRIALS):
                    settings = space(arm, draw, first=trial == 0)
                    found.append(Job(part, arm, c, 100, str(trial), "validation", json.dumps(settings)))
    elif part == "tuned":
        rows = [row for row in RESULTS.read() if row["part"] == "tune"]
        for arm in arms:
            for c in (1.0,) if arm == "dense" else CONNECTIVITIES:
                source = f"{1.0 if arm == 'dense' else 0.01 if c < 0.05 else 0.1:g}"
                mine = [row for row in rows if row["arm"] == arm and row["connectivity"] == source]
                if len(mine) < TRIALS:
                    continue
                best = best_trial(mine)
                found += [Job(part, arm, c, seed, best["trial"], "test", best["settings"]) for seed in seeds_at(c)]
    else:
        best_deepr: Settings = {"lr": 0.4, "schedule": "cosine", "distribution": "deepr", "l1": ["LinearDecay", 2e-4, 0.0]}
        variants: dict[str, Settings]
        if part == "scope":
            variants = {
                "layer": {},
                "global, budget": {"scope": "global"},
                "global, uniform": {"scope": "global", "reactivation": "uniform"},
            }
        else:
            variants = {
                "every step": {},
                **{f"every {n} steps": {"rewire_every_n_steps": n} for n in (3, 10, 100)},
                **{f"until {u:g}": {"rewire_until": u} for u in (0.9, 0.7, 0.5)},
            }
        for trial, changed in variants.items():
            found += [Job(part, "deepr", 0.01, seed, trial, "test", json.dumps({**best_deepr, **changed})) for seed in range(3)]
    return sorted(found, key=lambda job: job.seed)


def _value(entry: Any) -> Any:
    kinds = {"LrPower": LrPower, "LinearDecay": LinearDecay}
    return kinds[entry[0]](*entry[1:]) if isinstance(entry, list) else entry


def run(job: Job, root: str) -> dict[str, Any]:
    """Train once, and test once at the end."""
    epochs = epochs_of(job.part)
    images, labels, test_images, test_labels = digits(root, job.split)
    settings = {name: _value(entry) for name, entry in json.loads(job.settings).items()}
    lr, schedule = settings.pop("lr"), settings.pop("schedule")
    if job.arm == "soft_deepr":
        # T is given for 1 %. In proportion to p^2, a dormant connection takes the same time to walk to 0 at every connectivity.
        p = job.connectivity
        settings["temperature"] *= (100 * p) ** 2
        bound = settings["temperature"] * (1 - p) / (settings["l1"] * p)
        settings["theta_min"] = -settings.pop("theta_min_factor", 1) * SOFT_FACTORS[p] * bound
    torch.manual_seed(job.seed)
    net: nn.Module = LeNet300100()
    kind, callback = ARMS[job.arm], None
    if kind is not None:
        callback = callback_of(kind, round(job.connectivity * TOTAL), seed=job.seed, **settings)
        callback.prepare(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    steps = epochs * (len(labels) // BATCH)
    if callback is not None:
        callback.attach(net, optimizer, total_steps=steps)
    group, step = optimizer.param_groups[0], 0
    order = torch.Generator().manual_seed(job.seed)
    started = time.perf_counter()
    for _ in range(epochs):
        shuffled = torch.randperm(len(labels), generator=order)
        for first in range(0, len(labels) - BATCH + 1, BATCH):
            if schedule == "cosine":
                group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            batch = shuffled[first : first + BATCH]
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
            step += 1
    seconds = time.perf_counter() - started
    net.eval()
    with torch.no_grad():
        accuracy = (net(test_images).argmax(1) == test_labels).double().mean().item()
    report = connectivity_report(net)
    return {
        "epochs": epochs,
        "accuracy": round(100 * accuracy, 2),
        "connections": report.active if kind is not None else TOTAL,
        "per_layer": " ".join(str(row["active"]) for row in report),
        "seconds": round(seconds),
    }


PARTS = ("common", "scope", "rewiring", "tune", "tuned")


# -- results ----------------------------------------------------------------------------------------------------------------


def tables() -> str:
    rows, lines = RESULTS.read(), []
    for part in ("common", "tuned"):
        mine = [row for row in rows if row["part"] == part]
        lines += [f"**{part}**: test accuracy, % (runs)", ""]
        lines += [*table(mine, list(ARMS), CONNECTIVITIES, TOTAL, "accuracy"), ""]
    lines += [
        "**tune**: the best trial of each arm (validation accuracy after 2 epochs, %)",
        "",
        "| arm | connectivity | best | settings |",
        "|---|---|---|---|",
    ]
    for arm in ARMS:
        for c in ("1", "0.01", "0.1"):
            mine = [row for row in rows if row["part"] == "tune" and row["arm"] == arm and row["connectivity"] == c]
            if mine:
                best = best_trial(mine)
                lines.append(
                    f"| {arm.replace('_', ' ')} | {100 * float(c):g} % | {best['accuracy']} of {len(mine)} "
                    f"| `{best['settings']}` |"
                )
    for part in ("scope", "rewiring"):
        lines += [
            "",
            f"**{part}**: DeepR at 1 %, test accuracy, % (runs)",
            "",
            "| variant | accuracy | connections per layer at the end |",
            "|---|---|---|",
        ]
        mine = [row for row in rows if row["part"] == part]
        for trial in dict.fromkeys(row["trial"] for row in mine):
            at = [row for row in mine if row["trial"] == trial]
            lines.append(
                f"| {trial} | {summary([float(row['accuracy']) for row in at])} | {'; '.join(row['per_layer'] for row in at)} |"
            )
    return "\n".join(lines)


def pictures() -> None:
    """Draw the accuracy over the connectivity, as in the paper, with one panel per protocol."""
    titles = {"common": "the paper's protocol: SGD .05, batch 10", "tuned": "each method tuned with the same budget"}
    drawing, panels = axes(len(titles), width=5.6, height=4.4)
    for panel, (part, title) in zip(panels, titles.items(), strict=True):
        rows = [row for row in RESULTS.read() if row["part"] == part]
        over_connectivity(panel, rows, list(ARMS), CONNECTIVITIES, TOTAL, "accuracy")
        panel.set_ylabel("test accuracy, %")
        panel.set_title(title, fontsize=10)
        panel.set_ylim(86, 99)
    panels[0].legend(fontsize=8, loc="lower right")
    drawing.savefig(HERE / "accuracy_connectivity.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder with MNIST/raw")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--workers", type=int, default=2, help="number of trainings at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="only print the tables and draw the figure")
    options = parser.parse_args()
    if not options.table:
        for part in options.parts:
            RESULTS.train(jobs(part, options.arms), run, options.workers, options.root)
    print(tables())
    pictures()


if __name__ == "__main__":
    main()
