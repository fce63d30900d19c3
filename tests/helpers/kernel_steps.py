"""Networks, gradients and optimizers for comparisons of compiled steps with PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn, optim

from lightning_deepr import DeepR, sparsify
from tests.helpers.regression import SEED
from tests.helpers.state import all_slots, assert_equal_states, state_of, thetas

LR, ALPHA = 0.5, 0.01
Run = Callable[[Callable[[], Any]], Any]  # call a function without kernels
Size = tuple[int, int, int]  # rows, columns, K


def network(sizes: Sequence[Size], dtype: torch.dtype = torch.float32, compute: str = "dense") -> nn.Module:
    with torch.device("meta"):
        net = nn.ModuleList([nn.Linear(columns, rows, bias=False, dtype=dtype) for rows, columns, _ in sizes])
    return sparsify(net, {str(i): count for i, (_, _, count) in enumerate(sizes)}, init="deepr", seed=SEED, compute=compute)


def let_die(net: nn.Module, share: float, step: int) -> None:
    """Make gradients that move a share of the slots (at least one, unless 0) just below zero, and do not move the others."""
    for i, theta in enumerate(thetas(net)):
        count = theta.numel()
        number = min(count, max(1, round(share * count))) if share else 0
        dying = torch.randperm(count, generator=torch.Generator().manual_seed(100 * step + i))[:number]
        theta.grad = torch.zeros_like(theta)
        theta.grad[dying] = (theta.detach()[dying] + 0.25) / LR


SHARES = (0.3, 0.0, 1.0, 1e-9, 0.7, 0.05)
SIZES: dict[str, list[Size]] = {
    "0.1 %": [(200, 100, 20)],
    "1 %": [(100, 90, 90)],
    "10 %": [(50, 61, 305)],
    "40 %": [(30, 25, 300)],
    "just under 50 %": [(30, 25, 374)],
    "50 %": [(30, 24, 360)],
    "just over 50 %": [(30, 25, 376)],
    "80 %": [(20, 25, 400)],
    "99 %": [(30, 30, 891)],
    "100 %": [(17, 13, 221)],
    "K = 1": [(30, 40, 1)],
    "N = 1": [(1, 1, 1)],
    "K = 1 of 1e12": [(10**6, 10**6, 1)],
    "1e12": [(10**6, 10**6, 400)],
    "2 ** 40, a power of two": [(2**20, 2**20, 200)],
    "many small": [(3, 4, 5)] * 20,
}
SIZES["together"] = [size for name, sizes in SIZES.items() for size in sizes if name != "many small"]


def pretrained(seed: int, share: float = 0.45) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(30, 20, bias=False), nn.Linear(20, 25, bias=False))
    return sparsify(net, share, init="largest", seed=SEED, distribution="uniform", compute="sparse")


def signs_by_place(net: nn.Module) -> list[dict[int, float]]:
    return [dict(zip(slots.places.tolist(), slots.signs.tolist(), strict=True)) for slots in all_slots(net)]


class ManyStates(optim.Optimizer):
    """An optimizer with more state tensors than the kernel takes, or with some that it cannot write (other dtype, strides)."""

    def __init__(self, params: Any, lr: float, kinds: str) -> None:
        super().__init__(params, {"lr": lr, "kinds": kinds})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    if group["kinds"] == "six":
                        state.update({f"level{i}": torch.full_like(p, i) for i in range(6)})
                    elif group["kinds"] == "double":
                        state["level"] = torch.full_like(p, 0.5, dtype=torch.float64)
                    elif group["kinds"] == "half":
                        state["level"] = torch.full_like(p, 0.5, dtype=torch.bfloat16)
                    else:
                        state["level"] = torch.full((2 * p.numel(),), 0.5)[::2]
                for value in state.values():
                    value.mul_(0.5).add_(p.grad.abs())
                p.sub_(p.grad, alpha=group["lr"])


OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "momentum": lambda p: optim.SGD(p, lr=0.05, momentum=0.9),
    "Adam": lambda p: optim.Adam(p, lr=0.02, amsgrad=True),
    "Adam fused": lambda p: optim.Adam(p, lr=0.02, fused=True),
    "Adagrad": lambda p: optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "RMSprop": lambda p: optim.RMSprop(p, lr=0.02, centered=True, momentum=0.5),
    "Rprop": lambda p: optim.Rprop(p, lr=0.02),
    **{f"{k} state": lambda p, k=k: ManyStates(p, 0.05, k) for k in ("six", "double", "half", "strided")},  # type: ignore[misc]
}


def step_separately(pytorch: Run, alpha: float, steps: int) -> list[nn.Module]:
    """Train two equal networks with two optimizers each, sometimes without a gradient, and with a dtype without kernels."""
    sizes = [(30, 20, 100), (20, 10, 90), (7, 5, 30), (6, 50, 120)]
    nets = [network(sizes), network(sizes)]
    made = []
    for net in nets:
        net[3].double()
        a, b, c, d = thetas(net)
        made.append((optim.SGD([a, b, d], lr=LR), optim.SGD([c], lr=LR)))
        rewiring = DeepR(l1=alpha, seed=SEED)
        for optimizer in made[-1]:
            rewiring.attach(net, optimizer)
    for step in range(steps):
        for net in nets:
            let_die(net, 0.4, step)
            if step % 3 == 1:
                thetas(net)[0].grad = None
        for i in (0, 1) if step % 2 else (0,):
            made[0][i].step()
            pytorch(made[1][i].step)
        assert_equal_states(state_of(nets[0]), state_of(nets[1]))
    return nets
