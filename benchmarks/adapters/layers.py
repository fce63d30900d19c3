"""The cost of a training step of single layers of other kinds, beside LoRA with as many trained values.

    python benchmarks/adapters/layers.py

LSTM, GRU, `nn.MultiheadAttention` and `nn.Conv1d` have no pass of their own over connections upon a frozen weight: each pass
builds the sum. LoRA is that of `peft` for the convolution and the attention; `peft` has none for recurrent layers, so B A is
added to their weights in each pass, by `torch.nn.utils.parametrize`. A step is forward, backward and AdamW; DEEP R's includes
the rewiring. CPU time of one thread, arms take turns, medians.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_deepr import DeepR, adapt
from lightning_deepr.weights.find import converted_tensors

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import medians, parser, prepare, save, take_turns

ARMS = ("dense, all weights", "LoRA", "DeepR")


class LowRank(nn.Module):
    """W + B A, where B starts at 0."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight, self.b, self.a)


class First(nn.Module):
    """A layer of several inputs or outputs, of which one counts."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.attends = layer, isinstance(layer, nn.MultiheadAttention)

    def forward(self, x: Tensor) -> Tensor:
        found: Any = self.layer(x, key=x, value=x) if self.attends else self.layer(x)
        return found[0] if isinstance(found, tuple) else found


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM 256": (lambda: nn.LSTM(256, 256), (64, 32, 256)),
    "GRU 256": (lambda: nn.GRU(256, 256), (64, 32, 256)),
    "attention 384": (lambda: nn.MultiheadAttention(384, 12, batch_first=True), (32, 128, 384)),
    "Conv1d 128": (lambda: nn.Conv1d(128, 128, 5, padding=2), (32, 128, 256)),
}


def step_of(kind: str, arm: str, rank: int) -> tuple[Callable[[], None], int]:
    """Return the function of a training step, and the number of trained values."""
    make, shape = LAYERS[kind]
    torch.manual_seed(0)
    layer = make()
    weights = {name: one for name, one in layer.named_parameters() if one.dim() > 1}
    if arm == "LoRA":
        net = _lora(layer, rank)
    elif arm == "DeepR":
        counts = {name: rank * (one.shape[0] + one[0].numel()) for name, one in weights.items()}
        net = adapt(First(layer), {f"layer.{name}": count for name, count in counts.items()}, seed=0)
        assert sum(one.slots.count for one in converted_tensors(net)) == sum(counts.values())
    else:
        net = First(layer)
    values = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(values, 1e-4)
    if arm == "DeepR":
        DeepR().attach(net, optimizer, total_steps=1000)
    x = torch.randn(shape, requires_grad=True)  # (as behind another layer)
    dy = torch.randn_like(net(x))

    def step() -> None:
        optimizer.zero_grad()
        x.grad = None
        net(x).backward(dy)
        optimizer.step()

    return step, sum(one.numel() for one in values)


def _lora(layer: nn.Module, rank: int) -> nn.Module:
    layer.requires_grad_(False)
    if isinstance(layer, nn.RNNBase):
        for name in [name for name, one in layer.named_parameters() if one.dim() > 1]:
            parametrize.register_parametrization(layer, name, LowRank(layer.get_parameter(name), rank))
        return First(layer)
    import peft

    net = peft.inject_adapter_in_model(peft.LoraConfig(r=rank, target_modules=["layer"]), First(layer))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return net


def timed(step: Callable[[], None]) -> Callable[[int], list[float]]:
    """Make a block that takes the CPU time of steps."""

    def block(steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            started = time.process_time()
            step()
            seconds.append(time.process_time() - started)
        return seconds

    return block


def main() -> None:
    options = parser(__doc__, rounds=15)
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--only", nargs="+", default=list(LAYERS), choices=LAYERS)
    options.set_defaults(threads=1)
    given = options.parse_args()
    if given.out == Path(__file__).parents[1]:
        given.out = Path(__file__).parent
    prepare(given)
    rows = []
    for kind in given.only:
        made = {arm: step_of(kind, arm, given.rank) for arm in ARMS}
        for step, _ in made.values():
            step()  # compiles, allocates
        seconds = medians(take_turns({arm: timed(step) for arm, (step, _) in made.items()}, given.rounds, 2))
        rows += [
            {
                "layer": kind,
                "arm": arm,
                "trained_values": made[arm][1],
                "ms": f"{1000 * seconds[arm]:.1f}",
                "time_over_LoRA": f"{seconds[arm] / seconds['LoRA']:.2f}",
            }
            for arm in ARMS
        ]
    save(rows, given, "layers")


if __name__ == "__main__":
    main()
