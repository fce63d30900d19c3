"""How does the cost of rewiring depend on the number K of connections and the number N of places?

    python benchmarks/rewiring_cost.py
    python benchmarks/rewiring_cost.py --largest 1e6 --rounds 3

The setting is one linear layer in the state after a training step: ``DeepR().attach(layer, SGD)``, and theta.grad is filled.
Before each call the script overwrites theta, with 12 % of the slots below zero, as after an optimizer step. It times the hook
after ``optimizer.step()``, ``DeepR.on_after_optimizer_step``: L1, sign test, draws, births, signs and, with compute="sparse",
the order of the connections by row and by column. With compute="dense" no order is kept.

- by K: 1e4 ... 1e7 slots at 1 %. The exponent is the slope of a straight line through log time and log K.
- by N: the same K in a layer 1, 10, 100 and 1,000 times larger, so that its density falls by the same factor; ratios to the
first.
  With an order kept, the time also depends on the layer's rows and columns, but not on its places.

Settings take turns within each round; times are medians.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from common import Block, Row, axes, calls, medians, parser, prepare, save, take_turns
from torch import nn

from lightning_deepr import DeepR, sparsify
from lightning_deepr.weights.find import converted_tensors

DENSITY, DYING = 0.01, 0.12


class Setting:
    """A layer of K connections in about N places, with a call that rewires it."""

    def __init__(self, count: int, total: float, compute: str) -> None:
        side = round(math.sqrt(total))
        self.layer = sparsify(nn.Linear(side, side, bias=False, device="meta"), count, compute=compute, device="cpu")
        self.optimizer, self.callback = torch.optim.SGD(self.layer.parameters(), lr=0.05), DeepR(l1=1e-3, lr_scale=1.0)
        self.callback.attach(self.layer, self.optimizer)
        self.theta = next(converted_tensors(self.layer)).theta
        self.theta.grad = torch.zeros_like(self.theta)
        generator = torch.Generator().manual_seed(0)
        self.stepped = []
        for _ in range(2):
            value = torch.rand(count, generator=generator) + 0.1
            value[torch.rand(count, generator=generator) < DYING] *= -1
            self.stepped.append(value)
        self.turn = 0

    def take_step(self) -> None:
        """Write theta, in place of ``optimizer.step()``."""
        self.turn += 1
        self.theta.data.copy_(self.stepped[self.turn % len(self.stepped)])

    def block(self) -> Block:
        return calls(lambda: self.callback.on_after_optimizer_step(optimizer=self.optimizer), before=self.take_step)

    def reborn(self) -> float:
        return self.callback.statistics()["deepr/weight/turnover"]


def measure(settings: dict[Any, Setting], rounds: int) -> tuple[dict[Any, float], dict[Any, float]]:
    """Return the median seconds and the reborn share of each setting."""
    blocks = {key: setting.block() for key, setting in settings.items()}
    steps = {key: int(min(50, max(3, 3e6 / setting.theta.numel()))) for key, setting in settings.items()}
    take_turns(blocks, 1, 3)
    took = medians(take_turns(blocks, rounds, steps))
    return took, {key: setting.reborn() for key, setting in settings.items()}


def by_count(rounds: int, largest: float) -> list[Row]:
    counts = [round(10 ** (exponent / 2)) for exponent in range(8, 15) if 10 ** (exponent / 2) <= 1.001 * largest]
    rows = []
    for compute in ("sparse", "dense"):
        took, reborn = measure({count: Setting(count, count / DENSITY, compute) for count in counts}, rounds)
        exponent = np.polyfit(np.log(counts), np.log([took[count] for count in counts]), 1)[0]
        for count in counts:
            rows.append(
                row(
                    f"by K (exponent {exponent:.2f})",
                    compute,
                    count,
                    count / DENSITY,
                    took[count],
                    reborn[count],
                    took[counts[0]],
                )
            )
    return rows


def by_total(rounds: int, largest: float) -> list[Row]:
    rows = []
    for count in (100_000, 1_000_000):
        for compute in ("sparse", "dense"):
            if count <= largest:
                totals = [count / DENSITY * factor for factor in (1, 10, 100, 1000)]
                took, reborn = measure({total: Setting(count, total, compute) for total in totals}, rounds)
                rows += [row("by N", compute, count, total, took[total], reborn[total], took[totals[0]]) for total in totals]
    return rows


def row(series: str, compute: str, count: int, total: float, seconds: float, reborn: float, first: float) -> Row:
    return {
        "series": series,
        "order_kept": "yes" if compute == "sparse" else "no",
        "K": count,
        "N": f"{total:.0e}",
        "over_first": f"{seconds / first:.3g}",
        "reborn_per_step": f"{reborn:.1%}",
    }


def main() -> None:
    asked = parser(__doc__, rounds=7)
    asked.add_argument("--largest", type=float, default=1e7, help="largest K")
    options = asked.parse_args()
    prepare(options)
    rows = by_count(options.rounds, options.largest) + by_total(options.rounds, options.largest)
    save(rows, options, "rewiring_cost")

    figure, (left, right) = axes(2)
    for kept in ("yes", "no"):
        label = "order kept" if kept == "yes" else "no order"
        mine = [one for one in rows if one["series"] != "by N" and one["order_kept"] == kept]
        exponent = mine[0]["series"].split()[-1].rstrip(")")
        left.loglog(
            [one["K"] for one in mine],
            [float(one["over_first"]) for one in mine],
            "o-",
            label=f"{label}: K^{exponent}",
            markersize=4,
        )
        for count in sorted({one["K"] for one in rows if one["series"] == "by N"}):
            mine = [one for one in rows if one["series"] == "by N" and one["order_kept"] == kept and one["K"] == count]
            ratios = [float(one["over_first"]) for one in mine]
            right.semilogx([float(one["N"]) for one in mine], ratios, "o-", label=f"K = {count:.0e}, {label}", markersize=4)
    left.set(xlabel="K", ylabel="time / time at the smallest K", title="at 1 %")
    right.set(xlabel="N", ylabel="time / time in the smallest layer", title="the same K", ylim=(0, None))
    left.legend(fontsize=8)
    if right.lines:
        right.legend(fontsize=8)
    figure.savefig(options.out / "rewiring_cost.png", dpi=130)


if __name__ == "__main__":
    main()
