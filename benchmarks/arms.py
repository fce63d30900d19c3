"""Training arms: blocks of whole training steps for a network, an optimizer and data, here and in peer packages."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from common import Block, why_not
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

from lightning_deepr.weights.find import converted_tensors

LR = 0.05
Batches = list[tuple[Tensor, Tensor]]


def batches(batch_size: int, shape: tuple[int, ...], count: int = 64) -> Batches:
    """Make random images from ten noisy prototypes, so that the network can learn and rewiring has a gradient to act on."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(10, *shape, generator=generator)
    found = []
    for _ in range(count):
        labels = torch.randint(0, 10, (batch_size,), generator=generator)
        images = prototypes[labels] * (torch.rand(batch_size, *shape, generator=generator) < 0.3)
        found.append((images, labels))
    return found


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=LR)


def plain(net: nn.Module, optimizer: Any, data: Batches, now: Callable[[], float] = time.perf_counter) -> Block:
    """Make a plain loop; a step is forward, loss, backward and ``optimizer.step()`` with its hooks. ``now`` is the clock."""
    done = 0

    def block(steps: int) -> list[float]:
        nonlocal done
        seconds = []
        for _ in range(steps):
            images, labels = data[done % len(data)]
            done += 1
            started = now()
            optimizer.zero_grad()
            cross_entropy(net(images), labels).backward()
            optimizer.step()
            seconds.append(now() - started)
        return seconds

    return block


def start_newborn(net: nn.Module, share: float) -> None:
    """Set theta of a random share of the slots to 0, the starting value of newborns."""
    for converted in converted_tensors(net):
        theta = converted.theta.detach()
        theta[torch.rand_like(theta) < share] = 0.0


class Mask(nn.Module):
    """A dense weight times a dense mask."""

    def __init__(self, weight: Tensor, connectivity: float) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.rand_like(weight) < connectivity).to(weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def weighted(net: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in net.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def masked(net: nn.Module, connectivity: float) -> nn.Module:
    """Mask the weights, as mask libraries do, without rewiring or anything else."""
    for _, module in weighted(net):
        parametrize.register_parametrization(module, "weight", Mask(module.weight, connectivity))
    return net


class _Steps:
    """Several optimizers and actions, called as one optimizer."""

    def __init__(self, optimizers: list[Any], *steps: Any) -> None:
        self.optimizers, self.steps = optimizers, steps

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for step in self.steps:
            step()


def deep_rewire(net: nn.Module, connectivity: float, l1: float, data: Batches) -> Block | str:
    """DEEP R on dense tensors."""
    try:
        from deep_rewire import DEEPR, convert
    except Exception as error:  # a peer may fail to import for any reason
        return why_not(error)
    total = sum(module.weight.numel() for _, module in weighted(net))  # type: ignore[union-attr, operator]
    sparse, rest = convert(net, handle_biases="ignore")
    optimizers = [DEEPR(sparse, nc=round(connectivity * total), lr=LR, l1=l1), torch.optim.SGD(rest, lr=LR)]
    return plain(net, _Steps(optimizers, *(optimizer.step for optimizer in optimizers)), data)


def rigl_torch(net: nn.Module, connectivity: float, data: Batches) -> Block | str:
    """RigL on masked dense weights with its default of one update in 100 steps. It leaves the first layer dense."""
    try:
        from rigl_torch.RigL import RigLScheduler

        optimizer = sgd(net)
        scheduler = RigLScheduler(net, optimizer, dense_allocation=connectivity, T_end=10**9, ignore_linear_layers=False)
        block = plain(net, _Steps([optimizer], lambda: scheduler() and optimizer.step()), data)
        block(2)
    except Exception as error:
        return why_not(error)
    return block


def sparsimony(net: nn.Module, connectivity: float, every: int, data: Batches) -> Block | str:
    """RigL on masked dense weights; 10 % of the connections are replaced in an update."""
    try:
        from sparsimony.distributions.base import UniformDistribution
        from sparsimony.dst.rigl import RigL
        from sparsimony.schedulers.base import ConstantScheduler

        optimizer = sgd(net)
        schedule = ConstantScheduler(0.1, t_end=10**9, delta_t=every)
        rewiring = RigL(schedule, UniformDistribution(), optimizer, sparsity=1 - connectivity, init_method=None)
        rewiring.prepare(net, [{"tensor_fqn": f"{name}.weight"} for name, _ in weighted(net)])
        block = plain(net, _Steps([optimizer], optimizer.step, rewiring.step), data)
        block(2)
    except Exception as error:
        return why_not(error)
    return block
