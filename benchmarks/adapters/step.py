"""The cost of training an adapter: time and peak memory of a step, beside LoRA and SHiRA of `peft` with as many values.

    python benchmarks/adapters/step.py

A post-norm encoder of 6 layers (width 384, 12 heads, inner width 1,536), batch 32 x 128, rank 8 on all linear layers. The
frozen weights have float32. A step is forward, backward and AdamW. Times: arms take turns in one process, medians. Memory: the
peak resident memory of a process with one arm, above that of the network before its first step. DEEP R's step includes the
rewiring.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_deepr import DeepR, FixedRandom, adapt
from lightning_deepr.weights.find import converted_tensors

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import calls, medians, parser, prepare, save, take_turns

ARMS = ("LoRA (peft)", "SHiRA (peft)", "FixedRandom", "DeepR")


class Layer(nn.Module):
    """An encoder's layer, whose projections are linear layers of their own."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.output(mixed))
        found: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return found


def encoder(options: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(options.width, 12, 4 * options.width) for _ in range(options.layers)))


def step_of(arm: str, options: argparse.Namespace) -> tuple[Callable[[], None], int]:
    """Make the step of an arm; the number is that of its trained values."""
    net = encoder(options)
    rank = options.rank
    linear = {name: one for name, one in net.named_modules() if isinstance(one, nn.Linear)}
    counts = {name: rank * (one.in_features + one.out_features) for name, one in linear.items()}
    if "peft" in arm:
        import peft

        config = (
            peft.LoraConfig(r=rank, target_modules=list(linear))
            if arm.startswith("LoRA")
            else peft.ShiraConfig(r=rank, target_modules=list(linear), random_seed=0)
        )
        net = peft.inject_adapter_in_model(config, net)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_("lora_" in name or "shira_" in name)
    else:
        adapt(net, counts, seed=0)  # type: ignore[arg-type]
    values = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(values, 1e-4)
    if "peft" not in arm:
        (DeepR() if arm == "DeepR" else FixedRandom(signs="free")).attach(net, optimizer, total_steps=100)
        assert sum(one.slots.count for one in converted_tensors(net)) == sum(counts.values())
    x = torch.randn(options.batch, options.length, options.width)
    target = torch.randn_like(x)

    def step() -> None:
        optimizer.zero_grad()
        F.mse_loss(net(x), target).backward()
        optimizer.step()

    return step, sum(one.numel() for one in values)


def peak_of(arm: str, options: argparse.Namespace) -> float:
    """Measure the peak memory of three steps in this process, in MB above the network."""
    step, _ = step_of(arm, options)
    gc.collect()
    before = _resident()
    for _ in range(3):
        step()
    return (1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    options = parser(__doc__, rounds=5)
    options.add_argument("--peak", help="measure the memory of this arm alone, and print it")
    for name, value in (("layers", 6), ("width", 384), ("batch", 32), ("length", 128), ("rank", 8)):
        options.add_argument(f"--{name}", type=int, default=value)
    given = options.parse_args()
    if given.out == Path(__file__).parents[1]:
        given.out = Path(__file__).parent
    prepare(given)
    if given.peak:
        print(json.dumps(peak_of(given.peak, given)))
        return
    sizes = [f"--{name}={getattr(given, name)}" for name in ("layers", "width", "batch", "length", "rank", "threads")]
    memory = {}
    for arm in ARMS:
        done = subprocess.run(
            [sys.executable, __file__, "--peak", arm, *sizes], capture_output=True, text=True, check=True
        )  # fmt: skip
        memory[arm] = float(done.stdout.strip().splitlines()[-1])
    made = {arm: step_of(arm, given) for arm in ARMS}
    for step, _ in made.values():
        step()  # compiles, allocates
    seconds = medians(take_turns({arm: calls(step) for arm, (step, _) in made.items()}, given.rounds, 1))
    rows = [
        {
            "arm": arm,
            "trained_values": made[arm][1],
            "ms": f"{1000 * seconds[arm]:.0f}",
            "time_over_LoRA": f"{seconds[arm] / seconds[ARMS[0]]:.2f}",
            "peak_MB": f"{memory[arm]:.0f}",
            "memory_over_LoRA": f"{memory[arm] / memory[ARMS[0]]:.2f}",
        }
        for arm in ARMS
    ]
    save(rows, given, "step")


if __name__ == "__main__":
    main()
