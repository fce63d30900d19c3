"""A changing task: MNIST, then MNIST with permuted labels, then the first labels again.

    python benchmarks/comparison/changing_task.py --root data
    python benchmarks/comparison/changing_task.py --table          # table and figure from changing_task.csv

The paper claims that rewiring keeps adapting after convergence and re-uses learned connectivity under changed labels. The
paper's protocol is not known; this one is the project's: LeNet-300-100, 1 % of the connections (biases dense), SGD with a
constant learning rate of .1, batch 10, three phases of equal length. Between phases only the labels change (each digit gets the
next digit's label); nothing is re-initialized or reset. The arms are dense; fixed random connectivity, with fixed and with free
signs; DeepR (l1 1e-4); and DeepR with the first labels in all phases, which shows the turnover without a change.

Ten times a phase the script measures the test accuracy with the phase's labels. It also follows the first layer's connections
that were established at the end of phase 1 (alive for at least 1,000 steps): ``kept`` is the share that has stayed without
interruption, ``present`` the share that is there now, including those that grew again. (By chance it is the layer's density, .7
%.)
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

# `mnist` is the script in the same folder.
from mnist import BATCH, TOTAL, axes, callback_of, digits
from torch import nn

from lightning_deepr.models import LeNet300100
from lightning_deepr.weights.find import slots_of

HERE = Path(__file__).parent
RESULTS = HERE / "changing_task.csv"
COLUMNS = ("arm", "seed", "phase", "step", "accuracy", "established", "kept", "present", "deaths_per_step")
ARMS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "dense": (None, {}),
    "deepr": ("DeepR", {"l1": 1e-4}),
    "deepr, same labels": ("DeepR", {"l1": 1e-4}),
    "fixed random": ("FixedRandom", {}),
    "fixed random, free signs": ("FixedRandom", {"signs": "free"}),
}
ESTABLISHED = 1000  # steps
PER_PHASE = 10


def run(arm: str, seed: int, root: str, epochs: int) -> list[dict[str, Any]]:
    """Train through all phases, and return a line per measurement."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    images, labels, test_images, test_labels = digits(root, "test")
    torch.manual_seed(seed)
    net: nn.Module = LeNet300100()
    kind, settings = ARMS[arm]
    callback = None
    if kind is not None:
        callback = callback_of(kind, round(0.01 * TOTAL), distribution="deepr", seed=seed, **settings)
        callback.prepare(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    if callback is not None:
        callback.attach(net, optimizer)
    slots = slots_of(net.fc1, "weight")
    order = torch.Generator().manual_seed(seed)
    per_phase = epochs * (len(labels) // BATCH)
    shuffled, at, step = torch.empty(0), 0, 0
    learned = born = None  # the first layer at the end of phase 1
    lost = torch.empty(0, dtype=torch.bool)
    lines = []
    for phase in (1, 2, 3):
        change = 1 if phase == 2 and arm != "deepr, same labels" else 0
        for inner in range(1, per_phase + 1):
            if at + BATCH > len(shuffled):
                shuffled, at = torch.randperm(len(labels), generator=order), 0
            batch = shuffled[at : at + BATCH]
            at += BATCH
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), (labels[batch] + change) % 10).backward()
            optimizer.step()
            step += 1
            if inner % (per_phase // PER_PHASE):
                continue
            with torch.no_grad():
                accuracy = (net(test_images).argmax(1) == (test_labels + change) % 10).double().mean().item()
            line = {"arm": arm, "seed": seed, "phase": phase, "step": step, "accuracy": round(100 * accuracy, 2)}
            if slots is not None and learned is not None:
                now = torch.zeros(slots.total, dtype=torch.bool)
                now[slots.places] = True
                births = torch.full((slots.total,), -1)
                births[slots.places] = slots.born
                # Kept without interruption: the connection is there and was not born since.
                lost |= ~now[learned] | (births[learned] > born)
                line |= {
                    "kept": round((~lost).double().mean().item(), 4),
                    "present": round(now[learned].double().mean().item(), 4),
                }
                line["established"] = len(learned)
            if callback is not None:
                found = callback.statistics()
                deaths = [v for k, v in found.items() if "fc1" in k and k.endswith("_deaths")]
                line["deaths_per_step"] = round(sum(deaths), 3)
            lines.append(line)
        if phase == 1 and slots is not None:
            learned = slots.places[(step - 1 - slots.born >= ESTABLISHED) | (slots.born < 0)].clone()
            born, lost = step - 1, torch.zeros(len(learned), dtype=torch.bool)
    return lines


def read() -> list[dict[str, str]]:
    if not RESULTS.is_file():
        return []
    with RESULTS.open() as file:
        return list(csv.DictReader(file))


def mean(rows: list[dict[str, str]], name: str) -> str:
    values = [float(row[name]) for row in rows if row[name] != ""]
    if not values:
        return "-"
    return f"{statistics.mean(values):.3g}" if name != "accuracy" else f"{statistics.mean(values):.2f}"


def table() -> str:
    rows = read()
    shown = [
        "| arm | end of phase 1 | first tenth of phase 2 | end of phase 2 | first tenth of phase 3 | end of phase 3 "
        "| kept, end of phase 2 / 3 | present, end of phase 2 / 3 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        if not mine:
            continue
        steps = sorted({int(row["step"]) for row in mine})
        length = steps[-1] // 3
        at = {step: [row for row in mine if int(row["step"]) == step] for step in steps}
        moments = [length, length + length // PER_PHASE, 2 * length, 2 * length + length // PER_PHASE, 3 * length]
        cells = [mean(at[step], "accuracy") for step in moments]
        cells += [" / ".join(mean(at[step], name) for step in (2 * length, 3 * length)) for name in ("kept", "present")]
        shown.append(f"| {arm} ({len(at[length])} seeds) | " + " | ".join(cells) + " |")
    return "\n".join(shown)


def figure() -> None:
    rows = read()
    drawing, panels = axes(3, width=4.8)
    for number, arm in enumerate(ARMS):
        mine = [row for row in rows if row["arm"] == arm]
        for panel, name in zip(panels, ("accuracy", "kept", "present"), strict=True):
            found = [row for row in mine if row[name] != "" and (name == "accuracy" or arm.startswith("deepr"))]
            steps = sorted({int(row["step"]) for row in found})
            if steps:
                means = [statistics.mean(float(row[name]) for row in found if int(row["step"]) == step) for step in steps]
                panel.plot(steps, means, marker=".", color=f"C{number}", label=arm)
    for panel, title in zip(
        panels,
        (
            "test accuracy by the phase's labels, %",
            "first layer: kept without interruption",
            "first layer: present (re-grown included)",
        ),
        strict=True,
    ):
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
    panels[0].set_ylim(75, 100)
    panels[0].legend(fontsize=7, loc="lower right")
    drawing.savefig(HERE / "changing_task.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder with MNIST/raw")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="epochs per phase")
    parser.add_argument("--workers", type=int, default=2, help="number of trainings at a time, one thread each")
    parser.add_argument("--table", action="store_true", help="only print the table and draw the figure")
    options = parser.parse_args()
    if not options.table:
        done = {(row["arm"], row["seed"]) for row in read()}
        todo = [(arm, seed) for seed in range(options.seeds) for arm in ARMS if (arm, str(seed)) not in done]
        with ProcessPoolExecutor(options.workers) as pool:
            waiting = [pool.submit(run, arm, seed, options.root, options.epochs) for arm, seed in todo]
            for number, finished in enumerate(as_completed(waiting), 1):
                lines = finished.result()
                new = not RESULTS.is_file()
                with RESULTS.open("a", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS)
                    if new:
                        writer.writeheader()
                    writer.writerows(lines)
                print(f"{number}/{len(todo)}", lines[-1], flush=True)
    print(table())
    figure()


if __name__ == "__main__":
    main()
