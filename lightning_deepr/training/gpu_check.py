"""Compare the Triton kernels with PyTorch on a small artificial network, on the device that is about to use them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from lightning_deepr.algorithm import rewiring
from lightning_deepr.algorithm.newborns import State, start_newborns
from lightning_deepr.kernels.gpu import gate
from lightning_deepr.weights.k_slots import KSlots

# (N, K): nearly empty, half full, denser than half, one of one, one of 40, and more places than 2**31. The last tensor is large
# enough that several programs draw the same place.
SIZES = [(9_000, 90), (720, 360), (500, 400), (1, 1), (40, 1), (10**12, 300), (8_000, 3_600)]
SEED, STEPS = 7, 3


class Network:
    """Tensors with everything that a step writes. Equal arguments give equal networks."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.slots: list[Any] = []
        self.thetas: list[Tensor] = []
        self.states: list[list[State]] = []
        for i, (total, count) in enumerate(SIZES):
            places = rewiring.random_places(total, count, i, SEED)
            exceptions = places[::3].sort().values if i % 2 else None
            slots = KSlots(torch.Size([1, total]), places, i, SEED + i, exceptions, dtype)
            self.slots.append(slots.to(device))
            self.thetas.append(torch.empty(count, dtype=dtype, device=device))
            kinds = [(0.0, False), (1.0, True), (1.0, False)][: 2 + i % 2]  # start, and whether the mean counts
            self.states.append([State("", torch.ones(count, dtype=dtype, device=device), *kind) for kind in kinds])

    def descend(self, step: int) -> None:
        """Imitate an optimizer's step: some slots fall below zero; in the last step all of them do."""
        generator = torch.Generator().manual_seed(step)
        for theta, states in zip(self.thetas, self.states, strict=True):
            value = torch.rand(theta.numel(), generator=generator) + 0.25
            value[torch.rand(theta.numel(), generator=generator) < (0.3, 0.6, 1.0)[step]] *= -1
            theta.copy_(value)
            for state in states:
                state.value.copy_(torch.rand(theta.numel(), generator=generator))


def rewires(theta: Tensor, slots: Any) -> bool:
    """Whether the Triton kernels can rewire a tensor. Those with candidates or a table of signs are left to PyTorch."""
    admitted = gate.admits("rewiring", theta, slots, rewiring_differs)
    return admitted and slots.allowed is None and slots.sign_table is None


def rewiring_differs(device: torch.device, dtype: torch.dtype) -> str | None:
    """Describe how three steps in Triton differ from PyTorch's. None: only the last bits of the noise differ."""
    from lightning_deepr.kernels.gpu import step as triton_step  # Triton may be missing

    fast = Network(device, dtype)
    plain = deepcopy(fast)
    table = triton_step.Table(fast.slots, dtype)
    # every dtype holds this number exactly: PyTorch rounds it to bfloat16 first on the CPU, but not on a GPU
    decrement, eps = 0.0078125, torch.finfo(dtype).eps
    for step in range(STEPS):
        scale = 0.01 * (step == 1)
        rewires = [step != 1 or i != 0 for i in range(len(SIZES))]
        for network in (fast, plain):
            network.descend(step)
        same = [decrement] * len(SIZES), [scale] * len(SIZES)
        counts, _ = table.step(fast.thetas, *same, rewires, fast.states, step - 1, SEED, step)
        expected = _in_pytorch(plain, *same, rewires, step)
        if counts.tolist() != expected:
            return f"step {step}: expected {expected} births and deaths of newborns, found {counts.tolist()}"
        for i, (a, b) in enumerate(zip(fast.slots, plain.slots, strict=True)):
            where = f"step {step}, {SIZES[i][1]} connections in {SIZES[i][0]} places"
            for name in ("places", "signs", "born"):
                differing = int((getattr(a, name) != getattr(b, name)).sum())
                if differing:
                    return f"{where}: {differing} of the {name} differ from PyTorch's"
            off = float((fast.thetas[i].double() - plain.thetas[i].double()).abs().max())
            if not off <= 4 * eps:  # theta is at most 1.3
                return f"{where}: theta differs from PyTorch's by {off:.3g}"
            for one, other in zip(fast.states[i], plain.states[i], strict=True):
                if not torch.equal(one.value, other.value):
                    return f"{where}: the optimizer's state of the reborn differs from PyTorch's"
    return None


def _in_pytorch(
    network: Network, decrements: list[float], scales: list[float], rewires: list[bool], step: int
) -> list[list[int]]:
    thetas, slots = network.thetas, network.slots
    rewiring.shrink(thetas, decrements)
    rewiring.diffuse(thetas, scales, slots, SEED, step)
    rewiring.keep_active([theta for theta, does in zip(thetas, rewires, strict=True) if not does])
    dormant = rewiring.dormant_slots(thetas)
    newborns = [int((tensor.born[d] >= step - 1).sum()) for tensor, d in zip(slots, dormant, strict=True)]
    rewiring.reactivate(thetas, slots, dormant, SEED, step)
    for states, d in zip(network.states, dormant, strict=True):
        start_newborns(states, d)
    return [[d.numel(), n] for d, n in zip(dormant, newborns, strict=True)]
