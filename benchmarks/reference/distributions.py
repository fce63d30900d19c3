"""What is a distribution worth? A small ViT, a small ResNet-18 and a GPT-2-like network, trained for some minutes at 10 %.

    python benchmarks/reference/distributions.py --root data      # every training that is not in distributions.csv
    python benchmarks/reference/distributions.py --table          # the table from distributions.csv

All weights of convolutions and linear layers count, and every arm has the same K: 10 % of them. "ends dense" keeps the first
and the last tensor dense and gives the others what is left, uniformly. Defaults of ``DeepR``, one thread, seed 0 (``--seeds``).

- ViT: patches of 4 x 4, width 96, 4 layers; AdamW 1e-3; ResNet-18 with a quarter of its channels and the stem for small images,
  SGD .05, momentum .9. Both: the first 6,400 training images of CIFAR-10, flipped at random, batch 32, 1 epoch;
  accuracy on the last 5,000 training images, in %.
- GPT-2: ``CharTransformer`` on Tiny Shakespeare, 200 steps of 12 x 64 characters, AdamW 2e-3; loss on the last 10 % of the
  text, in bits per character. It has linear layers only, for which "erk" and "erdos_renyi" are the same rule.

All: a tenth of the steps of warm-up, a cosine to 0, clipping at 1.

These trainings are short: they rank the rules and are no results on CIFAR-10. A run is a line of the csv; the script can be
stopped and started again. The test sets are not read.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_deepr import DeepR, connectivity_report
from lightning_deepr.models import CharTransformer
from lightning_deepr.recipes.cifar10 import CIFAR10DataModule

sys.path.append(str(Path(__file__).parents[1]))
from grid import Job, Results, summary
from transformer import CONTEXT, bits, text

HERE = Path(__file__).parent
CONNECTIVITY = 0.1
ARMS = ("dense", "uniform", "erdos_renyi", "erk", "ends dense")
IMAGES, HELD_OUT, BATCH, EPOCHS = 6_400, 5_000, 32, 1
STEPS = 200


class ViT(nn.Module):
    """A vision transformer for images of 32 x 32 pixels: the mean over all patches is classified."""

    def __init__(self, width: int = 96, layers: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.positions = nn.Parameter(torch.randn(64, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.patches(x).flatten(2).transpose(1, 2) + self.positions).mean(1))


class _Block(nn.Module):
    """Two convolutions and the sum with their input, which a convolution of 1 x 1 adapts."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


class ResNet18(nn.Sequential):
    """ResNet-18 with ``width`` channels at first (64 in the original), and a first convolution of 3 x 3 without a stride."""

    def __init__(self, width: int = 16) -> None:
        stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        blocks, inputs = [], width
        for stage in range(4):
            for stride in (2 if stage else 1, 1):
                blocks.append(_Block(inputs, width << stage, stride))
                inputs = width << stage
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


NETWORKS: dict[str, tuple[type[nn.Module], type[torch.optim.Optimizer], dict[str, Any], str]] = {
    "ViT": (ViT, torch.optim.AdamW, {"lr": 1e-3}, "accuracy, %"),
    "ResNet-18": (ResNet18, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}, "accuracy, %"),
    "GPT-2": (CharTransformer, torch.optim.AdamW, {"lr": 2e-3, "betas": (0.9, 0.99)}, "bits per character"),
}


def sparse_weights(net: nn.Module) -> dict[str, int]:
    """Return the sizes of all weights of convolutions, linear and attention layers by name, in order."""
    kinds = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
    found = {}
    for name, module in net.named_modules():
        if isinstance(module, kinds):
            own = {n: p.numel() for n, p in module.named_parameters(recurse=False) if p.dim() > 1}
            found |= {f"{name}.{n}": count for n, count in own.items()}
    return found


def sparse(net: nn.Module, arm: str, seed: int) -> DeepR:
    """Convert a network by a rule; K is the same for all rules."""
    sizes = sparse_weights(net)
    count = round(CONNECTIVITY * sum(sizes.values()))
    if arm == "ends dense":
        first, *_, last = sizes
        left = count - sizes[first] - sizes[last]
        callback = DeepR(left, distribution="uniform", exclude_modules=[first, last], seed=seed)
    else:
        callback = DeepR(count, distribution=arm, seed=seed)
    callback.prepare(net)
    return callback


def batches_of(name: str, root: str, seed: int, steps: int) -> Any:
    """Yield the training's batches."""
    generator = torch.Generator().manual_seed(seed)
    if name == "GPT-2":
        letters = text(root, "training")
        for _ in range(steps):
            first = torch.randint(len(letters) - CONTEXT - 1, (12, 1), generator=generator) + torch.arange(CONTEXT)
            yield letters[first], letters[first + 1]
        return
    images, labels = (part[:IMAGES] for part in CIFAR10DataModule(root).load()[:2])
    order = torch.cat([torch.randperm(IMAGES, generator=generator) for _ in range(-(-steps * BATCH // IMAGES))])
    for step in range(steps):
        chosen = order[step * BATCH : (step + 1) * BATCH]
        x = prepared(images[chosen])
        turned = torch.rand(len(x), generator=generator) < 0.5
        yield torch.where(turned[:, None, None, None], x.flip(3), x), labels[chosen]


def prepared(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.47) / 0.25


@torch.no_grad()
def measured(name: str, net: nn.Module, root: str) -> float:
    """Return the accuracy in %, or the loss in bits, on what was held out."""
    net.eval()
    if name == "GPT-2":
        return bits(net, text(root, "validation"))
    images, labels = (part[-HELD_OUT:] for part in CIFAR10DataModule(root).load()[:2])
    right = sum(int((net(prepared(x)).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return 100 * right / HELD_OUT


def run(job: Job, root: str) -> dict[str, Any]:
    """Train once, and measure once at the end."""
    make, kind, options, _ = NETWORKS[job.part]
    steps = json.loads(job.settings)["steps"]
    torch.manual_seed(job.seed)
    net = make()
    total = sum(sparse_weights(net).values())
    callback = None if job.arm == "dense" else sparse(net, job.arm, job.seed)
    optimizer = kind(net.parameters(), **options)
    if callback is not None:
        callback.attach(net, optimizer, total_steps=steps)
    warm = max(1, steps // 10)
    started = time.process_time()
    for step, (x, y) in enumerate(batches_of(job.part, root, job.seed, steps)):
        for group in optimizer.param_groups:
            group["lr"] = options["lr"] * min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        output = net(x)
        F.cross_entropy(output.flatten(0, -2), y.flatten()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    seconds = time.process_time() - started
    active = total if callback is None else connectivity_report(net).active
    if job.arm == "ends dense":
        sizes = list(sparse_weights(make()).values())
        active += sizes[0] + sizes[-1]
    return {"value": round(measured(job.part, net, root), 3), "connections": active, "seconds": round(seconds)}


def jobs(names: list[str], arms: list[str], seeds: int, steps: int | None) -> list[Job]:
    found = []
    for seed in range(seeds):
        for name in names:
            for arm in arms:
                if (name, arm) != ("GPT-2", "erk"):
                    length = steps or (STEPS if name == "GPT-2" else EPOCHS * IMAGES // BATCH)
                    c = 1.0 if arm == "dense" else CONNECTIVITY
                    found.append(Job(name, arm, c, seed, "", "validation", json.dumps({"steps": length})))
    return found


def table(results: Results) -> str:
    rows = results.read()
    lines = ["| network | measured | " + " | ".join(ARMS) + " |", "|---" * (len(ARMS) + 2) + "|"]
    for name, (_, _, _, what) in NETWORKS.items():
        mine = [row for row in rows if row["part"] == name]
        cells = [summary([float(row["value"]) for row in mine if row["arm"] == arm]) for arm in ARMS]
        lines.append(f"| {name} | {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder with cifar-10-batches-py and tinyshakespeare")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, help="steps of each training (default: as above)")
    parser.add_argument("--workers", type=int, default=1, help="number of trainings at a time, one thread each")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the table (default: the script's)")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    results = Results(options.out / "distributions.csv", "value", "connections")
    if not options.table:
        todo = jobs(options.networks, options.arms, options.seeds, options.steps)
        results.train(todo, run, options.workers, options.root)
    print(table(results))


if __name__ == "__main__":
    main()
