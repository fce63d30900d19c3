"""Changing tasks: does a network that goes on rewiring learn a new one, and the old one again?

The paper says that DEEP R keeps adapting after convergence. Here LeNet-300-100 with 1 % of its connections learns digits; then
every digit gets the label of the next; then the first labels come back. Nothing is reset in between. Beside it: the same
network with connections that never move. (The whole study with all arms: benchmarks/comparison/changing_task.py.)

    python examples/changing_task.py            # some minutes on a CPU
    python examples/changing_task.py --short    # a few seconds
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from lightning_deepr import DeepR, FixedRandom, SparseTraining, connections
from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes.digits import embedded_digits

BATCH, CONNECTIONS = 10, 2662  # 1 %


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((net(images).argmax(1) == labels).float().mean())


def places(net: nn.Module) -> Tensor:
    """Return where the first layer's connections are, sorted."""
    return connections(net)["fc1.weight"][1].sort().values


def train(method: SparseTraining, steps: int, seed: int) -> tuple[list[float], float]:
    """Train through three phases.

    Returns:
        the test accuracy at the end of each, with the labels of that phase; and the share of the first layer's connections that
        were there at the end of the first phase and are there at the end of the third.
    """
    images, labels, test_images, test_labels = embedded_digits()
    images, test_images = images.float() / 255, test_images.float() / 255
    torch.manual_seed(seed)
    net: nn.Module = method.prepare(LeNet300100())  # converts the network, as the method wants it
    # A constant learning rate: the network has to be able to learn at any time.
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method.attach(net, optimizer)
    order, found, learned = torch.Generator().manual_seed(seed), [], torch.empty(0)
    for phase in (1, 2, 3):
        change = 1 if phase == 2 else 0
        for _ in range(steps):
            chosen = torch.randint(len(labels), (BATCH,), generator=order)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[chosen]), (labels[chosen] + change) % 10).backward()
            optimizer.step()
        found.append(accuracy(net, test_images, (test_labels + change) % 10))
        if phase == 1:
            learned = places(net)
    return found, float(torch.isin(learned, places(net)).float().mean())


def main(arguments: list[str] | None = None) -> dict[str, tuple[list[float], float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="of each phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="600 steps")
    given = parser.parse_args(arguments)
    steps = 600 if given.short else given.steps
    settings = {"distribution": "deepr", "seed": given.seed}
    # l1=1e-4, a constant: steered alphas (l1="auto") come to rest at the end of a training, and this one has no end
    methods: dict[str, SparseTraining] = {
        "DeepR": DeepR(CONNECTIONS, l1=1e-4, lr_scale=1, newborn="start", **settings),
        "FixedRandom": FixedRandom(CONNECTIONS, **settings),
    }
    found = {}
    print("method       digits  next digit  digits again  connections kept")
    for name, method in methods.items():
        found[name] = (reached, kept) = train(method, steps, given.seed)
        print(f"{name:11s}  {reached[0]:6.1%}  {reached[1]:10.1%}  {reached[2]:12.1%}  {kept:16.1%}")
    return found


if __name__ == "__main__":
    main()
