"""MNIST at 1 % connectivity: the paper's setting, this project's best recipe, its controls, and the untuned defaults.

    python benchmarks/reproduction/mnist.py --root data                        # every arm, all its seeds
    python benchmarks/reproduction/mnist.py --root data --arms best --seeds 3
    python benchmarks/reproduction/mnist.py --table                            # mean and spread of results.csv

Each run uses the callback and the Trainer, trains on all 60,000 images and tests once after the last step. The settings were
chosen on a validation split (the last 10,000 training images, ``--val``). A run is one line of results.csv; the script skips
runs that have a line, so that it can be stopped and started again.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_deepr import DeepR, LinearDecay, LrPower, connectivity_report
from lightning_deepr.recipes.classifier import DigitClassifier
from lightning_deepr.recipes.digits import MNISTDataModule

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS = ("arm", "seed", "epochs", "split", "connections", "accuracy", "seconds", "torch", "note")

SHIFTS: dict[str, Any] = {"shift_probability": 0.8, "shift_until": 0.8}
BEST: dict[str, Any] = {
    "model": {"lr": 0.4, "schedule": "cosine"},
    "data": SHIFTS,
    "deepr": {"connectivity": 2662, "distribution": "deepr", "l1": LinearDecay(2e-4)},
}


# the defaults at the time of the recorded runs, except for what an arm names
RECORDED: dict[str, Any] = {"lr_scale": 1.0, "newborn": "start"}


def defaults(batch_size: int = 10, **model: Any) -> dict[str, Any]:
    return {"model": model, "data": {"batch_size": batch_size}, "deepr": {"connectivity": 0.01, "l1": None}}


def present_defaults(connectivity: float, batch_size: int = 10, **model: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"connectivity": connectivity, "l1": "auto", "lr_scale": "auto", "newborn": "neutral"}
    model = {"schedule": "cosine", **model}
    return {"model": model, "data": {"batch_size": batch_size}, "deepr": settings, "seeds": 3}


ARMS: dict[str, dict[str, Any]] = {
    "best": {**BEST, "seeds": 5},
    "best_no_shifts": {**BEST, "data": {}, "seeds": 5},
    "best_100_epochs": {**BEST, "model": {"lr": 0.2, "schedule": "cosine"}, "epochs": 100, "seeds": 1},
    "paper": {
        "model": {"lr": 0.05, "bias": False},
        "data": {},
        "deepr": {
            "connectivity": 0.01,
            "distribution": "deepr",
            "l1": 1e-4,
            "temperature": LrPower(1e-12, 2),
            "init": "deepr",
        },
        "seeds": 3,
    },
    "fixed_random": {**BEST, "deepr": {**BEST["deepr"], "rewire_until": 0}, "seeds": 3},
    "defaults_sgd_0.05": {**defaults(lr=0.05), "seeds": 2},
    "defaults_sgd_0.1": {**defaults(lr=0.1), "seeds": 2},
    "defaults_sgd_0.3": {**defaults(lr=0.3), "seeds": 2},
    "defaults_sgd_0.05_momentum": {**defaults(64, lr=0.05, momentum=0.9), "seeds": 2},
    "defaults_adam_1e-3": {**defaults(64, lr=1e-3, optimizer="adam"), "seeds": 2},
    "defaults_adam_3e-3": {**defaults(64, lr=3e-3, optimizer="adam"), "seeds": 2},
    **{
        f"present_defaults_{name}_{100 * c:g}pct": present_defaults(c, 64, **model)
        for name, model in (("momentum", {"lr": 0.05, "momentum": 0.9}), ("adam", {"lr": 2e-3, "optimizer": "adam"}))
        for c in (0.01, 0.05, 0.2)
    },
    "collapse": {
        "model": {"lr": 0.05},
        "data": {},
        "deepr": {"connectivity": 0.01, "distribution": "uniform", "l1": 3e-4, "init": "deepr"},
        "epochs": 2,
        "seeds": 1,
    },
}


for _arm in ARMS.values():
    _arm["deepr"] = {**RECORDED, **_arm["deepr"]}


def run(arm: dict[str, Any], seed: int, root: str, val: bool) -> dict[str, Any]:
    """Train once, and return the line of the results."""
    seed_everything(seed, verbose=False)
    model = DigitClassifier(**arm["model"])
    data = MNISTDataModule(root, val_size=10_000 if val else 0, seed=seed, **arm["data"])
    deepr = DeepR(**arm["deepr"], seed=seed)
    epochs = arm.get("epochs", 10)
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=[deepr],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, data)
    seconds = time.perf_counter() - started
    collapsed = [str(w.message) for w in caught if "has collapsed" in str(w.message)]
    if val:
        trainer.limit_val_batches = 1.0
        accuracy = trainer.validate(model, data, verbose=False)[0]["val_accuracy"]
    else:
        accuracy = trainer.test(model, data, verbose=False)[0]["test_accuracy"]
    return {
        "seed": seed,
        "epochs": epochs,
        "split": "validation" if val else "test",
        "connections": connectivity_report(model).active,
        "accuracy": round(100 * accuracy, 3),
        "seconds": round(seconds),
        "torch": torch.__version__.split("+")[0],
        "note": "; ".join(sorted({message.split(":")[0] for message in collapsed})),
    }


def read() -> list[dict[str, str]]:
    if not RESULTS.is_file():
        return []
    with RESULTS.open() as file:
        return list(csv.DictReader(file))


def table() -> str:
    """Make a table with mean and standard deviation over seeds, one arm per line."""
    lines = ["| arm | epochs | connections | split | seeds | accuracy, % |", "|---|---|---|---|---|---|"]
    rows = read()
    for arm in ARMS:
        for split in ("test", "validation"):
            mine = [row for row in rows if row["arm"] == arm and row["split"] == split]
            if not mine:
                continue
            values = [float(row["accuracy"]) for row in mine]
            spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            note = f" ({mine[0]['note']})" if mine[0]["note"] else ""
            lines.append(
                f"| {arm} | {mine[0]['epochs']} | {mine[0]['connections']} | {split} | {len(values)} | "
                f"{statistics.mean(values):.2f}{spread}{note} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder with MNIST/raw")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, help="number of seeds (default: the arm's own number)")
    parser.add_argument("--val", action="store_true", help="train on 50,000 images and validate on the other 10,000")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    if not options.table:
        torch.set_num_threads(options.threads)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        split = "validation" if options.val else "test"
        for arm in options.arms:
            for seed in range(options.seeds or ARMS[arm]["seeds"]):
                done = {(row["arm"], row["seed"], row["split"]) for row in read()}
                if (arm, str(seed), split) in done:
                    continue
                line = {"arm": arm, **run(ARMS[arm], seed, options.root, options.val)}
                new = not RESULTS.is_file()
                with RESULTS.open("a", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    if new:
                        writer.writeheader()
                    writer.writerow(line)
                print(line, flush=True)
    print(table())


if __name__ == "__main__":
    main()
