"""A long training: the invariants of all tensors, and the slope of the process's memory.

A small network takes a million steps with ever-changing gradients. Every ``--every`` steps all invariants are checked, and the
resident memory is noted. A line is fitted to the second half of the notes: what grows per step is a leak.

    python benchmarks/long_training.py                              # DeepR in float32
    python benchmarks/long_training.py --method SET --dtype bfloat16

A row of ``long_training.csv`` is written for each run; a run of the same method and number format replaces its row.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

from lightning_deepr import SET, DeepR, FixedRandom, SoftDeepR
from lightning_deepr.weights.find import converted_tensors
from lightning_deepr.weights.k_slots import KSlots

METHODS: dict[str, Any] = {
    "DeepR": lambda: DeepR(0.2, temperature=1e-6),
    "DeepR, one K": lambda: DeepR(0.2, scope="global", l1=1e-3),
    "SoftDeepR": lambda: SoftDeepR(0.2, l1=1e-3, temperature=1e-6),
    "SET": lambda: SET(0.2, rewire_every_n_steps=100),
    "FixedRandom": lambda: FixedRandom(0.2),
}
RESULTS = Path(__file__).with_suffix(".csv")
COLUMNS = ["method", "dtype", "steps", "checks", "last birth", "MiB first", "MiB last", "bytes per step", "seconds"]
FREE = ("SET", "FixedRandom")  # the sign of a connection may change


def resident() -> int:
    """Return the resident memory of this process in bytes (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check(net: nn.Module, counts: dict[str, int], shared: bool, free: bool) -> None:
    """Check K, the places, the signs and theta of every tensor; with free signs, theta may be negative."""
    found = list(converted_tensors(net))
    if shared:
        assert sum(one.slots.count for one in found) == sum(counts.values())
    for one in found:
        if not isinstance(one.slots, KSlots):
            assert bool(torch.isfinite(one.theta).all()), one.name
            continue
        assert shared or one.slots.count == counts[one.name], f"{one.name}: K was not held"
        problem = one.slots.problem(one.theta.detach(), torch.arange(0), [], signed=free)
        assert problem is None, f"{one.name}: {problem}"


def slope(notes: list[tuple[int, int]]) -> float:
    """Fit a line to the second half of the notes, and return its slope in bytes per step."""
    half = notes[len(notes) // 2 :]
    x, y = (torch.tensor([float(note[i]) for note in half], dtype=torch.float64) for i in (0, 1))
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum().clamp(min=1))


def note(row: dict[str, Any]) -> None:
    """Write the row of a run into ``long_training.csv``, in place of an older one."""
    rows: list[dict[str, Any]] = []
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            rows = [old for old in csv.DictReader(file) if (old["method"], old["dtype"]) != (row["method"], row["dtype"])]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*rows, row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--every", type=int, default=1000, help="steps between two checks")
    parser.add_argument("--method", choices=METHODS, default="DeepR")
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, help="a file for the notes, CSV")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = METHODS[options.method]().prepare(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6)))
    net.to(getattr(torch, options.dtype))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    method = METHODS[options.method]()
    method.connectivity = None
    method.attach(net, optimizer, total_steps=options.steps)
    counts = {one.name: one.slots.count for one in converted_tensors(net)}
    generator = torch.Generator().manual_seed(1)
    parameters, notes, started = list(net.parameters()), [], time.monotonic()
    for step in range(1, options.steps + 1):
        for p in parameters:  # the gradients of a forward pass would take most of the time
            gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = gradient if p.grad is None else p.grad.copy_(gradient)
        optimizer.step()
        if step % options.every == 0:
            if step % (100 * options.every) == 0:
                with torch.no_grad():
                    assert bool(torch.isfinite(net(torch.ones(2, 12, dtype=getattr(torch, options.dtype)))).all())
                gc.collect()
            check(net, counts, method.scope == "global", free=options.method in FREE)
            notes.append((step, resident()))
    born = max(one.slots.last_birth() for one in converted_tensors(net))
    if options.out is not None:
        with options.out.open("w", newline="") as file:
            csv.writer(file).writerows([("step", "resident bytes"), *notes])
    row = {
        "method": options.method,
        "dtype": options.dtype,
        "steps": options.steps,
        "checks": len(notes),
        "last birth": born,
        "MiB first": round(notes[0][1] / 2**20, 1),
        "MiB last": round(notes[-1][1] / 2**20, 1),
        "bytes per step": round(slope(notes), 4),
        "seconds": round(time.monotonic() - started),
    }
    note(row)
    print(
        f"{options.method}, {options.dtype}: {options.steps} steps in {row['seconds']} s, {len(notes)} checks of all "
        f"invariants, last birth in step {born}; resident memory {row['MiB first']} MiB after {options.every} steps, "
        f"{row['MiB last']} at the end, slope of the second half {row['bytes per step']} bytes per step."
    )


if __name__ == "__main__":
    main()
