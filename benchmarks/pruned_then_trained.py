"""What does training on add to a pruned network?

LeNet-300-100 is trained on MNIST for some epochs and pruned to 10 % by ``torch.nn.utils.prune.global_unstructured``. Arms: the
pruned network as it is; its remaining weights trained on where they are (fixed, free signs); SET and DeepR from the same
connections ("nonzero"), and DeepR from the same places with new values (``Topology``). One row per arm and seed.

    python benchmarks/pruned_then_trained.py --data FOLDER     # of MNIST's IDX files; without it, the embedded digits
    python benchmarks/pruned_then_trained.py --epochs 1 --after 1 --seeds 1   # a short form
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_deepr import SET, DeepR, FixedRandom, Topology, sparsify
from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes.digits import embedded_digits

BATCH = 100
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def read(folder: Path | None) -> Data:
    """Read train images [N, 784], train labels, test images and test labels."""
    if folder is None:
        images, labels, test_images, test_labels = embedded_digits()
    else:
        found = []
        for part in ("train", "t10k"):
            for kind, offset in (("images-idx3", 16), ("labels-idx1", 8)):
                (path,) = folder.rglob(f"{part}-{kind}-ubyte.gz")
                content = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=offset)
                found.append(torch.from_numpy(content.copy()))
        images, labels, test_images, test_labels = found
    return (
        images.view(-1, 784).float() / 255, labels.long(), test_images.view(-1, 784).float() / 255, test_labels.long(),
    )  # fmt: skip


def epochs(net: nn.Module, data: Data, number: int, lr: float, seed: int, callback: Any = None) -> nn.Module:
    """Train for some epochs with Adam, the learning rate falling to 0 as a cosine."""
    images, labels = data[:2]
    steps = number * (len(labels) // BATCH)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    rewiring = callback.attach(net, optimizer, total_steps=steps) if callback is not None and steps else None
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        for chosen in torch.randperm(len(labels), generator=generator)[: len(labels) // BATCH * BATCH].view(-1, BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    if rewiring is not None:
        rewiring.remove()
    return net


@torch.no_grad()
def accuracy(net: nn.Module, data: Data) -> float:
    return float((net(data[2]).argmax(1) == data[3]).float().mean())


def taken_over(net: nn.Module) -> nn.Module:
    return sparsify(net, "nonzero")


ARMS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[], Any]] | None] = {
    "pruned": None,
    "fixed": (taken_over, lambda: FixedRandom(signs="free")),
    "SET": (taken_over, SET),
    "DeepR": (taken_over, DeepR),
    "DeepR, topology alone": (lambda net: sparsify(LeNet300100(), Topology(taken_over(net))), DeepR),
}


def pruned(dense: nn.Module) -> nn.Module:
    """Copy a network and prune the copy. (A pruned network itself can't be copied: its weights are results of an operation.)"""
    net = copy.deepcopy(dense)
    tensors = [(layer, "weight") for layer in net.modules() if isinstance(layer, nn.Linear)]
    prune.global_unstructured(tensors, prune.L1Unstructured, amount=0.9)
    return net


def run(data: Data, seed: int, first: int, after: int, lr: float) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    dense = epochs(LeNet300100(), data, first, lr, seed)
    rows = [{"arm": "dense", "seed": seed, "accuracy": f"{accuracy(dense, data):.4f}"}]
    for name, arm in ARMS.items():
        net = pruned(dense)
        if arm is not None:
            torch.manual_seed(seed + 1000)
            convert, callback = arm
            net = epochs(convert(net), data, after, lr, seed + 1, callback())
        rows.append({"arm": name, "seed": seed, "accuracy": f"{accuracy(net, data):.4f}"})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="a folder with MNIST's IDX files (default: embedded digits)")
    parser.add_argument("--epochs", type=int, default=5, help="of the dense network")
    parser.add_argument("--after", type=int, default=5, help="after pruning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    data = read(options.data)
    rows = [row for seed in range(options.seeds) for row in run(data, seed, options.epochs, options.after, options.lr)]
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "pruned_then_trained.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["arm", "seed", "accuracy"])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("dense", *ARMS):
        found = torch.tensor([float(row["accuracy"]) for row in rows if row["arm"] == name])
        spread = f" +- {100 * found.std():.2f}" if len(found) > 1 else ""
        print(f"{name}: {100 * found.mean():.2f}{spread} % ({len(found)} seeds)")


if __name__ == "__main__":
    main()
