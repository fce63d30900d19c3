"""Which settings should the zoo's LeNet-300-100 be trained with? The recipe's own, or DeepR's defaults of today.

    python benchmarks/reference/recipe.py --root data      # every training that is not in recipe.csv
    python benchmarks/reference/recipe.py --table          # the table from recipe.csv
    python benchmarks/reference/recipe.py --root data --zoo runs/zoo    # the zoo's models, three seeds each

10 epochs on the first 50,000 training images of MNIST with the recipe's shifts, seed 0; the accuracy is that on the last 10,000
training images. The test set is not read. A run is a line of recipe.csv; the script can be stopped and started again. Training
is a plain loop with the callback attached to the optimizer, and a cosine to 0.

``--zoo`` trains with the recipe's settings on all 60,000 images and keeps networks and CPU seconds. The networks are those of
``python -m lightning_deepr.zoo.make train``, bit for bit; the Trainer takes longer.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_deepr import DeepR, LinearDecay, SoftDeepR, TurnoverTarget, connectivity_report, save_sparse
from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes.batches import Batches
from lightning_deepr.recipes.digits import MNISTDataModule

sys.path.insert(0, str(Path(__file__).parents[1]))
from grid import Job, Results, quiet, summary

HERE = Path(__file__).parent
RESULTS = Results(HERE / "recipe.csv", "epochs", "accuracy", "connections")
TOTAL = 266_200
EPOCHS = 10

SHIFTS = {"shift_probability": 0.8, "shift_until": 0.8}
OLD = {"l1": 2e-4, "lr_scale": 1.0, "newborn": "start"}  # l1 falls linearly to 0
TRIALS: dict[str, dict[str, Any]] = {
    "recipe": {"optimizer": "SGD", "lr": 0.4, "batch": 10, **OLD},
    "defaults, SGD .1": {"optimizer": "SGD", "lr": 0.1, "batch": 10},
    "defaults, SGD .2": {"optimizer": "SGD", "lr": 0.2, "batch": 10},
    "defaults, SGD .2, turnover from .05": {"optimizer": "SGD", "lr": 0.2, "batch": 10, "turnover": 0.05},
    "defaults, SGD .2, turnover from .2": {"optimizer": "SGD", "lr": 0.2, "batch": 10, "turnover": 0.2},
    "defaults, Adam 1e-3, batch 20": {"optimizer": "Adam", "lr": 1e-3, "batch": 20},
    "defaults, Adam 2e-3, batch 20": {"optimizer": "Adam", "lr": 2e-3, "batch": 20},
    "defaults, Adam 2e-3, batch 64": {"optimizer": "Adam", "lr": 2e-3, "batch": 64},
    "defaults, Adam 4e-3, batch 64": {"optimizer": "Adam", "lr": 4e-3, "batch": 64},
}


ZOO = TRIALS["recipe"]  # the settings of the zoo's models
SOFT = {"optimizer": "SGD", "lr": 0.4, "batch": 10, "l1": 5e-4, "temperature": 1e-9, "lr_scale": 1.0}  # l1 stays as it is
MODELS: dict[str, tuple[int, dict[str, Any]]] = {  # what to aim at, and the settings
    "lenet300_100.deepr_1pct_mnist": (2_662, ZOO),
    "lenet300_100.deepr_5pct_mnist": (13_310, ZOO),
    "lenet300_100.deepr_2pct_mnist": (5_324, ZOO),
    "lenet300_100.deepr_0p5pct_mnist": (1_331, ZOO),
    "lenet300_100.deepr_10pct_mnist": (26_620, ZOO),
    "lenet300_100.deepr_20pct_mnist": (53_240, ZOO),
    "lenet300_100.soft_deepr_1pct_mnist": (1_750, SOFT),
    "lenet300_100.soft_deepr_5pct_mnist": (11_000, SOFT),
}


def jobs(trials: list[str], connectivities: list[float]) -> list[Job]:
    return [
        Job("recipe", "deepr", c, 0, trial, "validation", json.dumps({**SHIFTS, **TRIALS[trial]}))
        for c in connectivities
        for trial in trials
    ]


def trained(count: int, seed: int, settings: dict[str, Any], images: Tensor, labels: Tensor) -> tuple[nn.Module, float]:
    """Train once, and return the network and the CPU seconds of the training."""
    settings = dict(settings)
    kind, lr, batch_size = getattr(torch.optim, settings.pop("optimizer")), settings.pop("lr"), settings.pop("batch")
    probability, until = settings.pop("shift_probability"), settings.pop("shift_until")
    method: Any = SoftDeepR if "temperature" in settings else DeepR
    if method is DeepR and isinstance(settings.get("l1"), float):
        settings["l1"] = LinearDecay(settings["l1"])
    if "turnover" in settings:
        settings["l1"] = TurnoverTarget(settings.pop("turnover"))
    torch.manual_seed(seed)
    net = LeNet300100()
    callback = method(count, distribution="deepr", seed=seed, **settings)
    callback.prepare(net)
    optimizer = kind(net.parameters(), lr=lr)
    batches = Batches(
        images, labels, batch_size, shuffle=True, seed=seed, shift_probability=probability, shift_epochs=until * EPOCHS
    )
    steps, step, group = EPOCHS * len(batches), 0, optimizer.param_groups[0]
    rewiring = callback.attach(net, optimizer, total_steps=steps)
    started = time.process_time()
    for epoch in range(EPOCHS):
        batches.set_epoch(epoch)
        for x, y in batches:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            step += 1
    seconds = time.process_time() - started
    rewiring.remove()
    return net.eval(), seconds


def run(job: Job, root: str) -> dict[str, Any]:
    """Train once, and test on the validation images once at the end."""
    images, labels, _, _ = MNISTDataModule(root).load()
    count = round(job.connectivity * TOTAL)
    net, seconds = trained(count, job.seed, json.loads(job.settings), images[:-10_000], labels[:-10_000])
    with torch.no_grad():
        found = torch.cat([net(x).argmax(1) == y for x, y in Batches(images[-10_000:], labels[-10_000:], 1000)])
    return {
        "epochs": EPOCHS,
        "accuracy": round(100 * found.double().mean().item(), 2),
        "connections": connectivity_report(net).active,
        "seconds": round(seconds),
    }


def keep(name: str, seed: int, root: str, folder: Path) -> str:
    """Train a model of the zoo on all 60,000 images, and keep it and its CPU seconds."""
    quiet()
    file, spent = (folder / f"{name}_{seed}.{ending}" for ending in ("safetensors", "cpu_seconds.txt"))
    if not file.is_file():
        images, labels, _, _ = MNISTDataModule(root).load()
        count, settings = MODELS[name]
        net, seconds = trained(count, seed, {**SHIFTS, **settings}, images, labels)
        folder.mkdir(parents=True, exist_ok=True)
        spent.write_text(f"{seconds:.1f}\n")
        save_sparse(net, file)
    return f"{file}: {spent.read_text().strip()} CPU seconds"


def table() -> str:
    rows = RESULTS.read()
    at = sorted({float(row["connectivity"]) for row in rows})
    lines = ["| settings | " + " | ".join(f"{100 * c:g} %" for c in at) + " | CPU seconds |", "|---" * (len(at) + 2) + "|"]
    for trial in TRIALS:
        mine = [row for row in rows if row["trial"] == trial]
        cells = [summary([float(r["accuracy"]) for r in mine if r["connectivity"] == f"{c:g}"]) for c in at]
        seconds = [int(row["seconds"]) for row in mine]
        lines.append(f"| {trial} | " + " | ".join(cells) + f" | {round(sum(seconds) / len(seconds)) if seconds else '-'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder with MNIST/raw")
    parser.add_argument("--trials", nargs="*", default=list(TRIALS), choices=list(TRIALS))
    parser.add_argument("--connectivities", nargs="*", type=float, default=[0.01, 0.005, 0.05, 0.2])
    parser.add_argument("--workers", type=int, default=2, help="number of trainings at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--zoo", type=Path, help="train the zoo's models, three seeds each, and keep them in this folder")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), help="which, with --zoo")
    options = parser.parse_args()
    if options.zoo is not None:
        with ProcessPoolExecutor(options.workers) as pool:
            todo = [(name, seed, options.root, options.zoo) for name in options.models for seed in range(3)]
            for said in pool.map(keep, *zip(*todo, strict=True)):
                print(said, flush=True)
        return
    if not options.table:
        RESULTS.train(jobs(options.trials, options.connectivities), run, options.workers, options.root)
    print(table())


if __name__ == "__main__":
    main()
