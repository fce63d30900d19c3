"""How long does a training step take at a high connectivity, compared with the dense network?

    python benchmarks/high_connectivity.py
    python benchmarks/high_connectivity.py --steps 20 --rounds 3

Two MLPs, 784-300-100-10 and 784-1024-1024-10, batch 64, SGD with momentum, random images: a whole step (zero_grad, forward,
backward, optimizer with its hooks, so with the rewiring of every step) with ``DeepR()`` at 5 to 100 %, over that of the dense
network. Arms take turns within each round; times are medians. ``--clock cpu`` takes the CPU time of the process instead of the
time on the clock: other processes on the machine then disturb less. The table also has the share of slots that was reborn.
"""

from __future__ import annotations

import itertools
import time

import torch
from arms import batches, plain
from common import Row, medians, parser, prepare, save, take_turns
from torch import nn

from lightning_deepr import DeepR, connections, sparsify

SIZES = ((784, 300, 100, 10), (784, 1024, 1024, 10))
BATCH = 64


def mlp(sizes: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    for columns, rows in itertools.pairwise(sizes):
        layers += [nn.Linear(columns, rows), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def measure(sizes: tuple[int, ...], densities: list[float], rounds: int, steps: int, clock: str) -> list[Row]:
    torch.manual_seed(0)
    arms, rewiring = {}, {}
    for density in (None, *densities):
        net = mlp(sizes) if density is None else sparsify(mlp(sizes), density)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        if density is not None:
            rewiring[density] = DeepR(), net
            rewiring[density][0].attach(net, optimizer)
        now = time.process_time if clock == "cpu" else time.perf_counter
        arms[density] = plain(net, optimizer, batches(BATCH, (784,)), now)
    take_turns(arms, 1, steps)  # compiles, allocates
    for callback, _ in rewiring.values():
        callback.statistics()
    took = medians(take_turns(arms, rounds, steps))
    rows = []
    for density, (callback, net) in rewiring.items():
        reborn = sum(value for key, value in callback.statistics().items() if key.endswith("_deaths"))
        total = sum(places.numel() for _, places, _ in connections(net).values())
        rows.append(
            {
                "network": "-".join(map(str, sizes)),
                "connectivity": f"{density:.0%}",
                "over_dense": f"{took[density] / took[None]:.3g}",
                "reborn_per_step": f"{reborn / total:.1%}",
            }
        )
    return rows


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--steps", type=int, default=50, help="steps per arm and round")
    asked.add_argument("--connectivity", default="0.05,0.1,0.2,0.5,0.9,1.0")
    asked.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = asked.parse_args()
    prepare(options)
    densities = [float(one) for one in options.connectivity.split(",")]
    rows = []
    for sizes in SIZES:
        rows += measure(sizes, densities, options.rounds, options.steps, options.clock)
    save(rows, options, "high_connectivity")


if __name__ == "__main__":
    main()
