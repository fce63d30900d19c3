"""Makes ``recipes/mnist_digits.xz``: ``python -m lightning_deepr.recipes.make_digits ROOT TARGET``.

The file has a random subset of MNIST (LeCun, Cortes, Burges): 17,000 of the 60,000 training images and 3,000 of the 10,000 test
images, drawn without replacement by ``torch.Generator().manual_seed(0)``. It holds 20,000 x 784 bytes of pixels, then 20,000
labels, packed by xz.
"""

from __future__ import annotations

import hashlib
import lzma
import sys
from pathlib import Path

import torch

from lightning_deepr.recipes.digits import EMBEDDED_TEST, EMBEDDED_TRAIN, MNISTDataModule


def main(root: str, target: str) -> None:
    """Write the subset.

    Args:
        root: folder of the full MNIST, as for :class:`lightning_deepr.recipes.digits.MNISTDataModule`.
        target: path of the file to write.
    """
    train_images, train_labels, test_images, test_labels = MNISTDataModule(root).load()
    generator = torch.Generator().manual_seed(0)
    train = torch.randperm(len(train_labels), generator=generator)[:EMBEDDED_TRAIN]
    test = torch.randperm(len(test_labels), generator=generator)[:EMBEDDED_TEST]
    images = torch.cat([train_images[train], test_images[test]])
    labels = torch.cat([train_labels[train], test_labels[test]]).to(torch.uint8)
    raw = images.numpy().tobytes() + labels.numpy().tobytes()
    packed = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
    Path(target).write_bytes(packed)
    print(f"{target}: {len(packed):,} bytes, sha256 of the unpacked data {hashlib.sha256(raw).hexdigest()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
