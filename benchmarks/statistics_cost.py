"""What do the statistics cost?

    python benchmarks/statistics_cost.py

Whole training steps of LeNet-300-100 at 1 %, batch 128, Adam, in a plain loop, with one log in 50 steps. The arms differ in
``log_statistics`` and take turns; a block is 50 steps and one log. The first two arms are the same, "none": their ratio shows
how exact the comparison is. Times are the process's CPU time, on one thread by default, which the load of the machine changes
less than wall time.

- ratio_to_none: the shortest block over that of "none". It has everything, also what the step notes about its births.
- share_of_logs: the time within ``callback.statistics`` over the time of its block, the median. It is exact where the ratio is
  not: the arms share nothing here.
"""

from __future__ import annotations

import statistics
import time

import torch
from common import Block, Row, parser, prepare, save, take_turns
from torch import nn

from lightning_deepr import DeepR, sparsify
from lightning_deepr.models import LeNet300100

INTERVAL = 50  # the Trainer's default
ARMS = {"none": "none", "none, again": "none", "network (default)": "network", "tensors": "tensors", "all": "all"}


def arm(level: str, shares: list[float]) -> Block:
    """Make a training; a block is 50 steps and, unless the statistics are off, one log, whose share of the time is kept."""
    torch.manual_seed(0)
    x, y = torch.randn(128, 784), torch.randint(10, (128,))
    net = sparsify(LeNet300100(), 0.01, seed=0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    callback = DeepR(log_statistics=level)
    callback.attach(net, optimizer, total_steps=100_000)

    def block(blocks: int) -> list[float]:
        seconds = []
        for _ in range(blocks):
            start = time.process_time()
            for _ in range(INTERVAL):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
            before = time.process_time()
            if level != "none":
                callback.statistics(level)
            end = time.process_time()
            seconds.append((end - start) / INTERVAL)
            shares.append((end - before) / (end - start))
        return seconds

    block(4)
    shares.clear()
    return block


def main() -> None:
    asked = parser(__doc__, rounds=40)
    asked.set_defaults(threads=1)
    options = asked.parse_args()
    prepare(options)
    shares: dict[str, list[float]] = {name: [] for name in ARMS}
    seconds = take_turns({name: arm(level, shares[name]) for name, level in ARMS.items()}, options.rounds, 1)
    rows: list[Row] = [
        {
            "log_statistics": name,
            "cpu_ms_per_step": round(1000 * statistics.median(found), 4),
            "ratio_to_none": round(min(found) / min(seconds["none"]), 4),
            "share_of_logs": round(statistics.median(shares[name]), 5) if ARMS[name] != "none" else 0.0,
        }
        for name, found in seconds.items()
    ]
    save(rows, options, "statistics_cost")


if __name__ == "__main__":
    main()
