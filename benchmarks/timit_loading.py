"""How much of a training step of the TIMIT recipes is spent on making the batch.

    python benchmarks/timit_loading.py ROOT [--threads 1]

ROOT holds the full corpus or the free sample. Prints one row per way of training: milliseconds to make a batch of 32, and for a whole
step (batch, forward, backward, Adam and rewiring; 5 % connectivity).
"""

from __future__ import annotations

import argparse
import itertools
import time

import torch

from lightning_deepr import DeepR, sparsify
from lightning_deepr.models import BLSTMClassifier
from lightning_deepr.recipes.sequences import SequenceBatches
from lightning_deepr.recipes.speech import frame_loss
from lightning_deepr.recipes.timit_cache import Frames
from lightning_deepr.recipes.timit_data import load_timit


def measure(frames: Frames, chunk: int | None, dense: bool, steps: int = 24) -> tuple[float, float]:
    """Median milliseconds of a batch and of a step."""
    torch.manual_seed(0)
    net = BLSTMClassifier()
    if not dense:
        sparsify(net, {"lstm.weight_ih*": 0.15, "lstm.weight_hh*": 0.014, "head": 0.1}, init="deepr")
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    if not dense:
        DeepR(l1=0.3).attach(net, optimizer)
    loader = SequenceBatches(frames, 32, chunk_frames=chunk, shuffle=True)
    making, whole = [], []
    stream = itertools.chain.from_iterable(itertools.repeat(loader))
    for _ in range(steps):
        start = time.perf_counter()
        features, labels, lengths = next(stream)
        made = time.perf_counter()
        optimizer.zero_grad()
        frame_loss(net(features, lengths), labels).backward()
        optimizer.step()
        making.append(made - start)
        whole.append(time.perf_counter() - start)
    warm = slice(4, None)  # the first steps compile kernels
    return tuple(1e3 * float(torch.tensor(times[warm]).median()) for times in (making, whole))  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load_timit(options.root)
    print(f"{'batch of 32':22s} {'network':8s} {'batch, ms':>10s} {'step, ms':>10s} {'share':>7s}")
    for chunk, dense in itertools.product((100, None), (False, True)):
        batch, step = measure(data.train, chunk, dense)
        kind = "whole utterances" if chunk is None else f"chunks of {chunk} frames"
        print(f"{kind:22s} {'dense' if dense else 'DEEP R':8s} {batch:10.2f} {step:10.1f} {batch / step:7.1%}")


if __name__ == "__main__":
    main()
