"""What do the rules of the defaults cost in a training step: the steered alpha, the scaled step, the neutral newborns?

Arms that take turns: the same network with all rules off (a constant alpha, ``lr_scale=1``, ``newborn="start"``), each rule on
alone, and all of them on. Every arm is trained with a steered alpha first, to a turnover of 5 %; those without that rule go on
with the alphas at which it stands. So all arms rewire alike, and the ratio is the cost of the rules, not of the births.

    python benchmarks/rule_cost.py                # all networks and optimizers, rule_cost.csv
    python benchmarks/rule_cost.py --only lenet --rounds 5
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Block, calls, medians, parser, prepare, save, take_turns
from lightning_deepr import DeepR, TurnoverTarget, sparsify
from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes.digits import embedded_digits


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 10))


SETTLE = 1500  # steps until alpha stands


@dataclass
class Network:
    build: Callable[[], nn.Module]
    connectivity: float
    batch: int
    settle: int


NETWORKS = {
    "lenet, batch 10": Network(LeNet300100, 0.01, 10, SETTLE),
    "lenet, batch 128": Network(LeNet300100, 0.01, 128, SETTLE),
    "lenet 10 %, batch 64": Network(LeNet300100, 0.1, 64, SETTLE),
    "784-4096-10, batch 128": Network(wide, 0.01, 128, 300),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
}
TARGET = TurnoverTarget(start=0.05, shape="constant")
OFF: dict[str, Any] = {"lr_scale": 1.0, "newborn": "start"}
RULES: dict[str, tuple[bool, dict[str, Any]]] = {  # whether alpha is steered, and the others
    "all off": (False, {}),
    "steered alpha": (True, {}),
    "lr_scale": (False, {"lr_scale": "auto"}),
    "neutral newborns": (False, {"newborn": "neutral"}),
    "all on": (True, {"lr_scale": "auto", "newborn": "neutral"}),
}


def arm(
    network: Network, optimizer_of: Callable[[Any], torch.optim.Optimizer], steered: bool, options: dict[str, Any]
) -> tuple[Block, DeepR]:
    """Make a block of training steps of a network that has been trained until its alpha stands."""
    torch.manual_seed(0)
    net = sparsify(network.build(), network.connectivity, seed=0)
    optimizer, loop = optimizer_of(net.parameters()), DeepR(l1=TARGET, seed=0, **options)
    rewiring = loop.attach(net, optimizer, total_steps=1_000_000)
    images, labels, _, _ = embedded_digits()
    x, y = images.flatten(1).float() / 255, labels
    data = list(zip(x.split(network.batch), y.split(network.batch), strict=True))[:-1]
    count = 0

    def step() -> None:
        nonlocal count
        x, y = data[count % len(data)]
        count += 1
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()

    block = calls(step)
    block(network.settle)
    if not steered:
        found = {tensor.name: float(tensor.steering.alpha) for tensor in loop.tracked if tensor.steering is not None}
        rewiring.remove()
        loop = DeepR(l1=found, seed=0, **options)
        loop.attach(net, optimizer, total_steps=1_000_000)
    return block, loop


def turnover(loop: DeepR) -> float:
    """Return the mean share of the slots that were reborn per step since the last call."""
    found = loop.statistics()
    deaths = sum(value for key, value in found.items() if key.endswith("_deaths"))
    return deaths / sum(tensor.slots.count for tensor in loop.tracked)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--only", default="")
    found = options.parse_args()
    prepare(found)
    rows = []
    for title, network in NETWORKS.items():
        if not title.startswith(found.only):
            continue
        for name, optimizer_of in OPTIMIZERS.items():
            made = {rule: arm(network, optimizer_of, steered, {**OFF, **more}) for rule, (steered, more) in RULES.items()}
            blocks = {rule: block for rule, (block, _) in made.items()}
            take_turns(blocks, 1, 50)  # warms up
            for _, loop in made.values():
                turnover(loop)
            seconds = medians(take_turns(blocks, found.rounds, found.steps))
            for rule, (_, loop) in made.items():
                rows.append(
                    {
                        "network": title,
                        "optimizer": name,
                        "rule": rule,
                        "over_all_off": f"{seconds[rule] / seconds['all off']:.3f}",
                        "reborn_per_step": f"{turnover(loop):.2%}",
                    }
                )
                print(rows[-1], flush=True)
    save(rows, found, "rule_cost")


if __name__ == "__main__":
    main()
