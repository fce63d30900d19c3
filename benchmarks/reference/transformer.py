"""A character transformer on Tiny Shakespeare: DEEP R's defaults beside the other sparse-throughout methods.

    python benchmarks/reference/transformer.py --root data                   # every training that is not in transformer.csv
    python benchmarks/reference/transformer.py --root data --parts tune
    python benchmarks/reference/transformer.py --table                       # tables and the figure from transformer.csv

The network is ``CharTransformer`` (nanoGPT's shape for a CPU: 4 layers of width 128, 4 heads, 64 characters). The attention and
feed-forward weights (786,432) are sparse; the embeddings and the last layer stay dense. Training: 1,000 steps of 12 x 64
characters, AdamW (weight decay .1 on matrices, betas .9 and .99), 100 steps of warm-up and a cosine to 0, clipping at 1. The
loss is that of the whole validation text (the last 10 % of the text), in bits per character.

Parts:

- tune: each arm at the base learning rates 1e-3, 2e-3, 4e-3, 8e-3; RigL, SET and fixed random also at the exponents 0, .5, 1 of
  (N / K) in the learning rate (at 10 %), one seed;
- study: the arms at 5, 10 and 20 % with their best learning rate and exponent, two seeds; and with the dense network's;
- scope: one K for the whole network.

A run is a line of transformer.csv; the script can be stopped and started again at any time.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_deepr import connectivity_report, decay_groups
from lightning_deepr.models import CharTransformer

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import axes
from grid import Job, Results, Row, over_connectivity, summary
from sparse_arms import ARMS, OLD, Settings, callback_of

HERE = Path(__file__).parent
RESULTS = Results(HERE / "transformer.csv", "steps", "bits", "connections")
TOTAL = 786_432
CONNECTIVITIES = (0.05, 0.1, 0.2)
STEPS, BATCH, CONTEXT = 1_000, 12, 64
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
EXPONENTS = (0.0, 0.5, 1.0)
SMALL = {0.05: 40, 0.1: 48, 0.2: 64}  # width of a dense network with about as many weights in all


def best(arm: str, connectivity: float) -> Settings | None:
    """Choose an arm's learning rate and exponent: the lowest loss of its trials (at 10 % for the sparse arms)."""
    rows = [row for row in RESULTS.read() if row["part"] == "tune" and row["arm"] == arm]
    if arm == "small dense":
        rows = [row for row in rows if row["connectivity"] == f"{connectivity:g}"]
    wanted = len(RATES) * (len(EXPONENTS) if arm in ("rigl", "set", "fixed") else 1)
    if len(rows) < wanted:
        return None
    found: Settings = json.loads(min(rows, key=lambda row: float(row["bits"]))["settings"])
    return found


def jobs(part: str, arms: list[str]) -> list[Job]:
    found = []

    def add(arm: str, c: float, seed: int, trial: str, settings: Settings) -> None:
        found.append(Job(part, arm, c, seed, trial, "validation", json.dumps(settings)))

    if part == "tune":
        for rate in RATES:
            add("dense", 1.0, 0, f"lr {rate:g}", {"lr": rate})
            for c in CONNECTIVITIES:
                add("small dense", c, 0, f"lr {rate:g}", {"lr": rate})
            for arm in arms:
                for exponent in EXPONENTS if arm != "deepr" else (None,):
                    settings: Settings = {"lr": rate} if exponent is None else {"lr": rate, "exponent": exponent}
                    add(arm, 0.1, 0, f"lr {rate:g}" + ("" if exponent is None else f" e {exponent:g}"), settings)
            if "deepr" in arms:
                add("deepr before", 0.1, 0, f"lr {rate:g}", {"lr": rate, **OLD})
                for c in (0.05, 0.2):
                    add("deepr", c, 0, f"lr {rate:g}", {"lr": rate})
    elif part == "study":
        for seed in (1, 2):
            for arm in ["dense", "small dense", *arms, *(["deepr before"] if "deepr" in arms else [])]:
                for c in (1.0,) if arm == "dense" else CONNECTIVITIES:
                    settings_of = best(arm, c)
                    if settings_of is not None:
                        add(arm, c, seed, "best", settings_of)
                        if arm != "small dense":
                            add(arm, c, seed, "lr 2e-3", {**settings_of, "lr": 2e-3})
    else:
        for seed in (1, 2):
            for c in (0.05, 0.1):
                settings_of = best("deepr", c)
                if settings_of is not None:
                    add("deepr", c, seed, "global", {**settings_of, "scope": "global"})
    return sorted(found, key=lambda job: job.seed)


_text: dict[str, Tensor] = {}


def text(root: str, split: str) -> Tensor:
    """Read Tiny Shakespeare as numbers: the first 90 % for training, the last 10 % for validation."""
    if not _text:
        folder = Path(root) / "tinyshakespeare"
        packed = folder / "input.txt.xz"
        raw = (folder / "input.txt").read_text() if not packed.is_file() else lzma.decompress(packed.read_bytes()).decode()
        letters = {letter: number for number, letter in enumerate(sorted(set(raw)))}
        numbers = torch.tensor([letters[letter] for letter in raw])
        cut = int(0.9 * len(numbers))
        _text.update(training=numbers[:cut], validation=numbers[cut:])
    return _text[split]


@torch.no_grad()
def bits(net: nn.Module, numbers: Tensor) -> float:
    """Return the mean loss over a text, in bits per character, in blocks of the context's length."""
    net.eval()
    count = (len(numbers) - 1) // CONTEXT
    x, y = numbers[: count * CONTEXT].view(count, CONTEXT), numbers[1 : count * CONTEXT + 1].view(count, CONTEXT)
    losses = [
        F.cross_entropy(net(x[i : i + 64]).flatten(0, 1), y[i : i + 64].flatten(), reduction="sum").item()
        for i in range(0, count, 64)
    ]
    return sum(losses) / y.numel() / math.log(2)


def run(job: Job, root: str) -> dict[str, Any]:
    """Train once, and test once at the end."""
    settings = json.loads(job.settings)
    lr = settings.pop("lr")
    torch.manual_seed(job.seed)
    small = {"width": SMALL[job.connectivity]} if job.arm == "small dense" else {}
    net = CharTransformer(**small)
    callback = callback_of(job, net, TOTAL, {"target_modules": ["layers.*"], **settings})
    groups = decay_groups(net, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99))
    if callback is not None:
        callback.attach(net, optimizer, total_steps=STEPS)
    numbers, order = text(root, "training"), torch.Generator().manual_seed(job.seed)
    started = time.perf_counter()
    for step in range(STEPS):
        factor = min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * max(step - 100, 0) / (STEPS - 100))))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        at = torch.randint(len(numbers) - CONTEXT, (BATCH, 1), generator=order) + torch.arange(CONTEXT + 1)
        block = numbers[at]
        optimizer.zero_grad()
        F.cross_entropy(net(block[:, :-1]).flatten(0, 1), block[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - started
    return {
        "steps": STEPS,
        "bits": round(bits(net, text(root, "validation")), 4),
        "connections": TOTAL if callback is None else connectivity_report(net).active,
        "seconds": round(seconds),
    }


# -- results ----------------------------------------------------------------------------------------------------------------

NAMES = ("deepr", "deepr before", "rigl", "set", "fixed", "small dense")


def tables() -> str:
    rows, lines = RESULTS.read(), []
    for trial, title in (("best", "each arm at its best learning rate"), ("lr 2e-3", "base learning rate 2e-3")):
        mine = [row for row in rows if row["part"] == "study" and row["trial"] == trial]
        if not mine:
            continue
        dense = [float(row["bits"]) for row in mine if row["arm"] == "dense"]
        lines += [f"**{title}**: validation loss, bits per character (runs); dense {summary(dense)}", ""]
        lines += ["| arm | rule | " + " | ".join(f"{100 * c:g} %" for c in CONNECTIVITIES) + " |", "|---" * 5 + "|"]
        for arm in NAMES:
            at = [[float(r["bits"]) for r in mine if r["arm"] == arm and r["connectivity"] == f"{c:g}"] for c in CONNECTIVITIES]
            if any(at):
                found = best(arm, 0.1) or {}
                rule = f"lr {found.get('lr', 0):g}" if trial == "best" else "lr 0.002"
                rule += f", e {found['exponent']:g}" if "exponent" in found else ""
                if arm == "small dense":
                    rule = "width " + ", ".join(str(width) for width in SMALL.values())
                lines.append(f"| {arm} | {rule} | " + " | ".join(summary(values) for values in at) + " |")
        lines.append("")
    scope = [row for row in rows if row["part"] == "scope"]
    for c in (0.05, 0.1):
        values = [float(row["bits"]) for row in scope if row["connectivity"] == f"{c:g}"]
        if values:
            lines.append(f"DeepR, one K for the whole network, {100 * c:g} %: {summary(values)}")
    tuned = [row for row in rows if row["part"] == "tune"]
    if tuned:
        lines += ["", "**tune**: seed 0", "", "| arm | connectivity | trial | bits |", "|---|---|---|---|"]
        for row in sorted(tuned, key=lambda row: (row["arm"], float(row["connectivity"]), row["trial"])):
            lines.append(f"| {row['arm']} | {100 * float(row['connectivity']):g} % | {row['trial']} | {row['bits']} |")
    return "\n".join(lines)


def pictures() -> None:
    rows: list[Row] = RESULTS.read()
    drawing, panels = axes(2, width=5.2, height=4.2)
    study = [row for row in rows if row["part"] == "study" and row["trial"] == "best"]
    over_connectivity(panels[0], study, ["dense", *NAMES], CONNECTIVITIES, TOTAL, "bits")
    panels[0].set_ylabel("validation loss, bits per character")
    panels[0].set_title("each arm at its best learning rate", fontsize=10)
    panels[0].legend(fontsize=8)
    lines = (("dense", "1"), ("deepr", "0.05"), ("deepr", "0.1"), ("deepr", "0.2"), ("deepr before", "0.1"))
    for number, (arm, c) in enumerate(lines):
        found: dict[float, list[float]] = {}
        for row in rows:
            if row["part"] == "tune" and row["arm"] == arm and row["connectivity"] == c:
                found.setdefault(json.loads(row["settings"])["lr"], []).append(float(row["bits"]))
        if found:
            label = arm if arm == "dense" else f"{arm}, {100 * float(c):g} %"
            values = [statistics.mean(found[rate]) for rate in sorted(found)]
            panels[1].plot(sorted(found), values, marker="o", markersize=4, color=f"C{number}", label=label)
    panels[1].set_xscale("log")
    panels[1].set_xlabel("base learning rate")
    panels[1].set_ylabel("validation loss, bits per character")
    panels[1].set_title("the learning rate carries over", fontsize=10)
    panels[1].legend(fontsize=8)
    panels[1].grid(alpha=0.3)
    drawing.savefig(HERE / "transformer.png", dpi=110)


PARTS = ("tune", "study", "scope")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder with tinyshakespeare/input.txt")
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
