"""Is a training step of a recipe bound by its data?

    python benchmarks/data_loading.py

It prints one row per recipe and network, DeepR with the recipe's connectivity and dense: the milliseconds to make a batch of
the recipe's size, and their share of the whole step (batch, forward, backward, optimizer, rewiring). Made-up images and frames
of the recipes' sizes replace the files; making a batch takes the same time. Batches are made in the same process while nothing
else runs.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from common import parser, prepare, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_deepr import DeepR, sparsify
from lightning_deepr.models import CIFAR10CNN, BLSTMClassifier, LeNet300100
from lightning_deepr.recipes.batches import Batches
from lightning_deepr.recipes.crops import Crops
from lightning_deepr.recipes.sequences import SequenceBatches
from lightning_deepr.recipes.speech import frame_loss
from lightning_deepr.recipes.timit_cache import Frames

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class Recipe:
    """Network, data and settings of a recipe."""

    title: str
    batches: Iterable[Any]
    net: Callable[[], nn.Module]
    connectivity: Any
    l1: float
    loss: Loss


def images_loss(net: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(net(batch[0]), batch[1])


def sequences_loss(net: nn.Module, batch: Any) -> Tensor:
    return frame_loss(net(batch.features, batch.lengths), batch.labels)


def recipes() -> list[Recipe]:
    draw = torch.Generator().manual_seed(0)
    digits = torch.randint(0, 256, (20_000, 28, 28), dtype=torch.uint8, generator=draw)
    photographs = torch.randint(0, 256, (10_000, 3, 32, 32), dtype=torch.uint8, generator=draw)
    labels = torch.arange(20_000) % 10
    lengths = torch.randint(142, 551, (100,), generator=draw)  # lengths like those of the sample's utterances
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    count = int(offsets[-1])
    frames = Frames(torch.randn(count, 39, generator=draw), torch.arange(count) % 60, offsets)
    cnn = lambda: CIFAR10CNN().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # noqa: E731
    lstm = {"lstm.weight_ih*": 0.15, "lstm.weight_hh*": 0.014, "head": 0.1}
    conv = {"conv2": 0.176, "local3": 0.018, "local4": 0.176}
    digit_batches = Batches(digits, labels, 10, shuffle=True, shift_probability=0.8)
    crops = Crops(photographs, labels[:10_000], 128, distort=True, shuffle=True)
    return [
        Recipe("mnist_best, batch 10", digit_batches, LeNet300100, 2662, 2e-4, images_loss),
        Recipe("cifar10, batch 128", crops, cnn, conv, 1e-3, images_loss),
        Recipe(
            "timit_sample, 32 chunks of 100 frames",
            SequenceBatches(frames, 32, chunk_frames=100, shuffle=True),
            BLSTMClassifier,
            lstm,
            0.3,
            sequences_loss,
        ),
        Recipe(
            "timit, 32 whole utterances",
            SequenceBatches(frames, 32, shuffle=True),
            BLSTMClassifier,
            lstm,
            0.03,
            sequences_loss,
        ),
    ]


def measure(recipe: Recipe, sparse: bool, steps: int) -> tuple[float, float]:
    """Return the median seconds of making a batch and of a whole step."""
    torch.manual_seed(0)
    net = recipe.net()
    if sparse:
        sparsify(net, recipe.connectivity)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    if sparse:
        DeepR(l1=recipe.l1, lr_scale=1.0).attach(net, optimizer)
    stream = itertools.chain.from_iterable(itertools.repeat(recipe.batches))
    making, whole = [], []
    for _ in range(steps + 4):
        start = time.perf_counter()
        batch = next(stream)
        made = time.perf_counter()
        optimizer.zero_grad()
        recipe.loss(net, batch).backward()
        optimizer.step()
        making.append(made - start)
        whole.append(time.perf_counter() - start)
    return statistics.median(making[4:]), statistics.median(whole[4:])  # the first steps compile kernels


def main() -> None:
    asked = parser(__doc__, rounds=1)
    asked.add_argument("--steps", type=int, default=20)
    options = asked.parse_args()
    prepare(options)
    rows = []
    for recipe in recipes():
        for sparse in (True, False):
            batch, step = measure(recipe, sparse, options.steps)
            rows.append(
                {
                    "recipe": recipe.title,
                    "network": "DeepR" if sparse else "dense",
                    "batch_ms": f"{1e3 * batch:.2f}",
                    "share_of_step": f"{100 * batch / step:.1f} %",
                }
            )
    save(rows, options, "data_loading")


if __name__ == "__main__":
    main()
