"""What does DEEP R cost on a GPU: rewiring alone, whole training steps, sparse against dense layers?

    python benchmarks/gpu.py
    python benchmarks/gpu.py --only rewiring,steps --rounds 3

First it compares the Triton kernels with PyTorch on this card, in every dtype. Then it measures medians of arms that take
turns. A block is timed from its first launch until the card has finished:

- steps: training steps of the CIFAR-10 CNN (5 %) and of the 784-4096-4096-10 MLP (1 %), batch 128, dense compute: dense layers,
  DeepR by Triton, DeepR by plain PyTorch; with the host synchronizations per step that PyTorch reports.
- rewiring: the work after ``optimizer.step()``, 12 % of the slots reborn, by K and by N.
- break_even: forward and backward of one layer: dense, with the transient weight, and by the sparse kernels.
- lstm: a converted LSTM (cuDNN) compared with the same LSTM with ordinary dense weights.

Without a GPU it prints that there is none and measures nothing. ``--device cpu`` only tests the script, with the kernels of the
CPU.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from arms import batches, mlp, plain, sgd, start_newborn
from common import Block, Row, medians, parser, prepare, save, take_turns
from rewiring_cost import DENSITY, DYING, Setting
from step_time import cifar_cnn
from torch import nn

from lightning_deepr import DeepR, densify, sparsify
from lightning_deepr.compute import gpu_check as linear_check
from lightning_deepr.kernels.gpu import gate
from lightning_deepr.training import gpu_check
from lightning_deepr.weights.find import converted_tensors

PARTS = ("steps", "rewiring", "break_even", "lstm")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@contextmanager
def plain_pytorch() -> Iterator[None]:
    """A context that turns the Triton kernels off."""
    kept, gate.DEVICE_TYPES = gate.DEVICE_TYPES, set()
    try:
        yield
    finally:
        gate.DEVICE_TYPES = kept


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def whole(block: Block, device: torch.device, by_pytorch: bool = False) -> Block:
    """Time a whole block: mean seconds per step until the device has finished, without waiting between steps."""

    def timed(steps: int) -> list[float]:
        wait(device)
        started = time.perf_counter()
        if by_pytorch:
            with plain_pytorch():
                block(steps)
        else:
            block(steps)
        wait(device)
        return [(time.perf_counter() - started) / steps]

    return timed


def synchronizations(block: Block, device: torch.device, by_pytorch: bool, steps: int = 50) -> str:
    """Count the host synchronizations per step."""
    if device.type != "cuda":
        return "-"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with plain_pytorch() if by_pytorch else nullcontext():
                block(steps)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return f"{sum('synchronizing' in str(one.message) for one in caught) / steps:.2f}"


def check(device: torch.device) -> list[Row]:
    """Compare the kernels with PyTorch on this device."""
    rows = []
    checks = {"rewiring": gpu_check.rewiring_differs, "sparse linear layers": linear_check.linear_differs}
    for name, one in checks.items():
        for dtype in DTYPES:
            started = time.perf_counter()
            problem = gate._problem(one, device, dtype)
            seconds = f"{time.perf_counter() - started:.1f}"
            rows.append({"kernels": name, "dtype": str(dtype), "seconds": seconds, "result": problem or "as PyTorch"})
    return rows


def steps(device: torch.device, rounds: int, count: int) -> list[Row]:
    rows = []
    networks: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], float, float, float]] = [
        ("CIFAR-10 CNN, 5 %", cifar_cnn, (3, 24, 24), 0.05, 1e-3, 0.15),
        ("784-4096-4096-10, 1 %", mlp, (784,), 0.01, 1e-3, 0.15),
    ]
    for title, make, shape, connectivity, l1, newborn in networks:
        data = [(x.to(device), y.to(device)) for x, y in batches(128, shape, 16)]
        blocks: dict[str, Block] = {}
        callbacks: dict[str, DeepR] = {}
        net = make().to(device)
        blocks["dense"] = plain(net, sgd(net), data)
        for arm in ("DeepR, Triton", "DeepR, PyTorch"):
            net = sparsify(make(), connectivity, compute="dense").to(device)
            start_newborn(net, newborn)
            optimizer, callbacks[arm] = sgd(net), DeepR(l1=l1)
            callbacks[arm].attach(net, optimizer)
            blocks[arm] = plain(net, optimizer, data)
        timed = {arm: whole(block, device, arm.endswith("PyTorch")) for arm, block in blocks.items()}
        take_turns(timed, 1, 5)  # compiles kernels, allocates memory
        took = medians(take_turns(timed, rounds, count))
        for arm, seconds in took.items():
            turnover = (
                [v for k, v in callbacks[arm].statistics().items() if k.endswith("/turnover")] if arm in callbacks else []
            )
            rows.append(
                {
                    "network": title,
                    "arm": arm,
                    "over_dense": f"{seconds / took['dense']:.3f}",
                    "ms": f"{seconds * 1e3:.3f}",
                    "syncs_per_step": synchronizations(blocks[arm], device, arm.endswith("PyTorch")),
                    "reborn_per_step": f"{max(turnover):.1%}" if turnover else "-",
                }
            )
    return rows


class OnDevice(Setting):
    """A layer on the GPU for timing its rewiring."""

    def __init__(self, count: int, total: float, device: torch.device) -> None:
        super().__init__(count, total, "dense")
        self.callback._unhook()
        self.layer.to(device)
        self.stepped = [value.to(device) for value in self.stepped]
        self.optimizer, self.callback = torch.optim.SGD(self.layer.parameters(), lr=0.05), DeepR(l1=1e-3, lr_scale=1.0)
        self.callback.attach(self.layer, self.optimizer)
        self.theta = next(converted_tensors(self.layer)).theta
        self.theta.grad = torch.zeros_like(self.theta)


def rewiring(device: torch.device, rounds: int, largest: float) -> list[Row]:
    rows = []
    series = [("by K", 10**e, 10**e / DENSITY) for e in range(4, 8) if 10**e <= largest]
    series += [("by N", 100_000, 100_000 / DENSITY * factor) for factor in (1, 10, 100, 1000) if largest >= 1e5]
    for name, count, total in series:
        found: dict[str, float] = {}
        settings = {arm: OnDevice(count, total, device) for arm in ("Triton", "PyTorch")}
        blocks: dict[str, Block] = {}
        for arm, setting in settings.items():

            def block(steps: int, setting: Setting = setting) -> list[float]:
                for _ in range(steps):
                    setting.take_step()
                    setting.callback.on_after_optimizer_step(optimizer=setting.optimizer)
                return []

            blocks[arm] = whole(block, device, arm == "PyTorch")

            def only_write(steps: int, setting: Setting = setting) -> list[float]:
                for _ in range(steps):
                    setting.take_step()
                return []

            blocks[f"{arm}, writing theta"] = whole(only_write, device)
        take_turns(blocks, 1, 3)
        took = medians(take_turns(blocks, rounds, 20))
        for arm in settings:
            found[arm] = took[arm] - took[f"{arm}, writing theta"]
            rows.append(
                {
                    "series": name,
                    "arm": arm,
                    "K": count,
                    "N": f"{total:.0e}",
                    "ms": f"{found[arm] * 1e3:.3f}",
                    "over_PyTorch": "",
                    "reborn_per_step": f"{settings[arm].reborn():.1%}",
                }
            )
        for row in rows[-2:]:
            row["over_PyTorch"] = f"{found[row['arm']] / found['PyTorch']:.3f}"
    return rows


def break_even(device: torch.device, rounds: int) -> list[Row]:
    rows = []
    for size in (512, 1024, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            for connectivity in (0.003, 0.01, 0.03, 0.1):
                dense = nn.Linear(size, size, device=device, dtype=dtype)
                layers = {"dense": dense}
                for compute in ("dense", "sparse"):
                    name = "transient weight" if compute == "dense" else "sparse"
                    layers[name] = sparsify(deepcopy(dense), connectivity, compute=compute)
                x = torch.randn(128, size, device=device, dtype=dtype, requires_grad=True)
                dy = torch.randn(128, size, device=device, dtype=dtype)

                def passes(layer: nn.Module, x: Any = x, dy: Any = dy) -> Block:
                    def block(steps: int) -> list[float]:
                        for _ in range(steps):
                            layer.zero_grad()
                            x.grad = None
                            layer(x).backward(dy)
                        return []

                    return whole(block, device)

                blocks = {name: passes(layer) for name, layer in layers.items()}
                take_turns(blocks, 1, 3)
                took = medians(take_turns(blocks, rounds, 20))
                for name, seconds in took.items():
                    rows.append(
                        {
                            "layer": f"{size} x {size}",
                            "dtype": str(dtype).removeprefix("torch."),
                            "connectivity": f"{connectivity:.1%}",
                            "arm": name,
                            "over_dense": f"{seconds / took['dense']:.3f}",
                            "ms": f"{seconds * 1e3:.3f}",
                        }
                    )
    return rows


def lstm(device: torch.device) -> list[Row]:
    """Compare a forward and backward pass with the same network with ordinary weights."""
    net = sparsify(nn.LSTM(40, 64, num_layers=2, bidirectional=True), 0.05, compute="dense").to(device)
    ordinary = densify(deepcopy(net))
    x = torch.randn(20, 8, 40, device=device)
    found = []
    for one in (net, ordinary):
        own = x.clone().requires_grad_()
        y, _ = one(own)
        y.square().sum().backward()
        found.append((y.detach(), own.grad))
    differences = []
    for a, b in zip(*found, strict=True):
        assert a is not None and b is not None
        differences.append(float((a - b).abs().max() / b.abs().max()))
    for converted in converted_tensors(net):
        gradient = getattr(ordinary, converted.tensor_name).grad.view(-1)[converted.slots.places] * converted.slots.signs
        assert converted.theta.grad is not None
        differences.append(float((converted.theta.grad - gradient).abs().max() / gradient.abs().max().clamp(min=1e-30)))
    return [{"what": "LSTM 40-64, 2 layers, both ways", "largest_relative_difference": f"{max(differences):.2e}"}]


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--only", default=",".join(PARTS), help=f"parts to run, out of {','.join(PARTS)}")
    asked.add_argument("--largest", type=float, default=1e7, help="largest K of the rewiring")
    asked.add_argument("--steps", type=int, default=50, help="steps per block")
    asked.add_argument("--device", default="cuda")
    options = asked.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("Not measured on a GPU: none is here.")
        return
    prepare(options)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, reborn at {DYING:.0%} forced in `rewiring`\n")
        save(check(device), options, "gpu_check")
    wanted = options.only.split(",")
    measures: dict[str, Callable[[], list[Row]]] = {
        "steps": lambda: steps(device, options.rounds, options.steps),
        "rewiring": lambda: rewiring(device, options.rounds, options.largest),
        "break_even": lambda: break_even(device, options.rounds),
        "lstm": lambda: lstm(device),
    }
    for name, measure in measures.items():
        if name in wanted:
            print()
            save(measure(), options, f"gpu_{name}")


if __name__ == "__main__":
    main()
