"""Make shared.pt: a run under scope="global", as version 1 of the format writes it.

    python tests/data/make_shared.py FILE

Run it with the version that is to be recorded.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_deepr import DeepR, sparsify

STEPS, MORE = 8, 6


def dense() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6)).double()


def begin() -> tuple[nn.Module, torch.optim.Optimizer, Any, AveragedModel]:
    """Return the network, the optimizer, the rewiring and the average before the first step."""
    net = sparsify(dense(), 0.3, scope="global", distribution="uniform", seed=3)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    rewiring = DeepR(scope="global", l1=0.5, seed=3).attach(net, optimizer)
    return net, optimizer, rewiring, AveragedModel(net, avg_fn=get_ema_avg_fn(0.9))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    numbers = torch.randn(STEPS + MORE, 8, 18, generator=generator).double()
    return [(part[:, :12], part[:, 12:]) for part in numbers]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedModel, data: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in data:
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
        average.update_parameters(net)


def main() -> None:
    net, optimizer, rewiring, average = begin()
    train(net, optimizer, average, batches()[:STEPS])
    found = {"net": net, "optimizer": optimizer, "rewiring": rewiring, "average": average}
    record: dict[str, Any] = copy.deepcopy({name: part.state_dict() for name, part in found.items()})
    record["output"] = net(batches()[0][0]).detach()
    train(net, optimizer, average, batches()[STEPS:])
    record["later"] = copy.deepcopy({"net": net.state_dict(), "average": average.state_dict()})
    torch.save(record, sys.argv[1])


if __name__ == "__main__":
    main()
