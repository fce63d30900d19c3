"""Trains the zoo's adapter for rotated digits, and writes its file.

    python -m lightning_deepr.zoo.make_adapter              # about a minute on one core

The base is a LeNet-300-100 of the zoo, as a dense network. It was trained on upright digits. The difference is trained on the
17,000 digits that come with the package, turned by 90 degrees: 20 epochs of batches of 50 under AdamW with a cosine schedule.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_deepr.adapters.file import save_adapter
from lightning_deepr.conversion.adapt import adapt
from lightning_deepr.methods import DeepR
from lightning_deepr.recipes.digits import embedded_digits
from lightning_deepr.zoo.adapters import ADAPTERS
from lightning_deepr.zoo.loading import folder_of_checkout, load

CONNECTIVITY, EPOCHS, BATCH, RATE, SEED = 0.006, 20, 50, 3e-3, 0


def turned(images: Tensor) -> Tensor:
    """Turn digits by 90 degrees: uint8 [B, 28, 28] to [B, 28, 28]."""
    return images.rot90(1, (1, 2))


def train() -> nn.Module:
    """Train the adapter; the same bits on the same machine."""
    net = load(ADAPTERS[0].base, dense=True)
    images, labels, _, _ = embedded_digits()
    x = _input(net, turned(images))
    adapt(net, CONNECTIVITY, seed=SEED)
    optimizer = torch.optim.AdamW([one for one in net.parameters() if one.requires_grad], RATE)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rewiring = DeepR(seed=SEED).attach(net, optimizer, total_steps=steps)
    torch.manual_seed(SEED)
    net.train()
    for _ in range(EPOCHS):
        for part in torch.randperm(len(x))[: len(x) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(x[part]), labels[part]).backward()
            optimizer.step()
            schedule.step()
    rewiring.remove()
    return net.eval()


@torch.no_grad()
def right(net: nn.Module, is_turned: bool = True) -> int:
    """Count the right answers for the package's 3,000 test digits, turned or upright."""
    _, _, images, labels = embedded_digits()
    shown = turned(images) if is_turned else images
    return int((net(_input(net, shown)).argmax(1) == labels).sum())


def _input(net: Any, images: Tensor) -> Tensor:
    found: Tensor = net.preprocess(images.unsqueeze(1))
    return found


def main() -> None:
    """Entry point of ``python -m lightning_deepr.zoo.make_adapter``."""
    parser = argparse.ArgumentParser(prog="python -m lightning_deepr.zoo.make_adapter", description=train.__doc__)
    parser.add_argument("--folder", type=Path, help="folder for the file (default: zoo/adapters/ of the checkout)")
    given = parser.parse_args()
    folder = given.folder or folder_of_checkout("--folder") / "adapters"
    folder.mkdir(parents=True, exist_ok=True)
    net = train()
    file = save_adapter(net, folder / f"{ADAPTERS[0].name}.safetensors")
    print(f"{right(net)} of 3,000 turned test digits, {right(net, is_turned=False)} of the upright ones")
    print(f"{file}: {file.stat().st_size:,} bytes, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
