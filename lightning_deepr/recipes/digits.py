"""MNIST: a subset that comes with the package, and the full set through torchvision."""

from __future__ import annotations

import hashlib
import lzma
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_deepr._needed import needed
from lightning_deepr.recipes.batches import Batches
from lightning_deepr.recipes.resumable import ResumableDataModule
from lightning_deepr.training.run_config import digest_of

EMBEDDED = "mnist_digits.xz"
EMBEDDED_TRAIN, EMBEDDED_TEST = 17_000, 3_000
EMBEDDED_SHA256 = "94af5fa0381beeb0398da21217a04180f967ab253a8b60d9cdc27bd41d664c6e"


def embedded_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read the embedded digits: a random subset of MNIST, 17,000 of its training and 3,000 of its test images.

    Returns:
        train images uint8 [17000, 28, 28], train labels int64 [17000], test images [3000, 28, 28], test labels [3000].

    Raises:
        RuntimeError: the file is damaged.
    """
    packed = resources.files("lightning_deepr.recipes.data").joinpath(EMBEDDED).read_bytes()
    raw = lzma.decompress(packed)
    if hashlib.sha256(raw).hexdigest() != EMBEDDED_SHA256:
        raise RuntimeError(f"{EMBEDDED} is damaged (its checksum differs): install lightning-deepr again.")
    everything = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    count = EMBEDDED_TRAIN + EMBEDDED_TEST
    images = everything[: count * 784].view(count, 28, 28)
    labels = everything[count * 784 :].long()
    return images[:EMBEDDED_TRAIN], labels[:EMBEDDED_TRAIN], images[EMBEDDED_TRAIN:], labels[EMBEDDED_TRAIN:]


class DigitsDataModule(ResumableDataModule):
    """The embedded subset of MNIST, and the base class of :class:`MNISTDataModule`.

    Args:
        batch_size: images per training batch.
        val_size: number of training images, taken from the end, that are held out for validation; 0 holds out none.
        shift_probability: see :class:`lightning_deepr.recipes.batches.Batches`.
        shift_until: fraction of the training after which shifts end.
        seed: seed of the order of the images and of their shifts; None: the seed of ``seed_everything``.
    """

    def __init__(
        self,
        batch_size: int = 10,
        val_size: int = 0,
        shift_probability: float = 0.0,
        shift_until: float = 1.0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if val_size < 0 or batch_size < 1:
            raise ValueError(f"expected batch_size >= 1 and val_size >= 0, found {batch_size} and {val_size}.")
        if not 0.0 <= shift_probability <= 1.0:
            raise ValueError(f"shift_probability: expected a probability, found {shift_probability}.")
        self.batch_size, self.val_size, self.seed = batch_size, val_size, seed
        self.shift_probability, self.shift_until = shift_probability, shift_until
        self._digits: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Read the train images, train labels, test images and test labels."""
        return embedded_digits()

    def setup(self, stage: str) -> None:
        if self._digits is None:
            self._digits = self.load()
            if self.val_size >= len(self._digits[1]):
                raise ValueError(
                    f"val_size: expected fewer than the {len(self._digits[1])} training images, found {self.val_size}."
                )

    def digest(self) -> str:
        """Hash the training images and labels: runs on the same data have the same digest in their loggers."""
        return digest_of(self._part(0))

    def train_dataloader(self) -> Batches:
        images, labels = self._part(0)
        keep = len(labels) - self.val_size
        epochs = self.trainer.max_epochs if self.trainer is not None else None
        batches = Batches(
            images[:keep],
            labels[:keep],
            self.batch_size,
            shuffle=True,
            seed=torch.initial_seed() if self.seed is None else self.seed,
            shift_probability=self.shift_probability,
            shift_epochs=self.shift_until * epochs if epochs and epochs > 0 else float("inf"),
        )
        return self.resuming(batches)

    def val_dataloader(self) -> Any:
        if self.val_size == 0:
            return []
        images, labels = self._part(0)
        return Batches(images[-self.val_size :], labels[-self.val_size :], 1000)

    def test_dataloader(self) -> Batches:
        images, labels = self._part(2)
        return Batches(images, labels, 1000)

    def _part(self, first: int) -> tuple[Tensor, Tensor]:
        assert self._digits is not None, "setup comes first"
        return self._digits[first], self._digits[first + 1]


class MNISTDataModule(DigitsDataModule):
    """All of MNIST, 60,000 + 10,000 images, through torchvision, which checks the files.

    Args:
        root: the folder that holds ``MNIST/raw``; missing files are downloaded to it.
        batch_size, val_size, shift_probability, shift_until, seed: as in :class:`DigitsDataModule`.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 10,
        val_size: int = 0,
        shift_probability: float = 0.0,
        shift_until: float = 1.0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, val_size, shift_probability, shift_until, seed)
        self.root = root

    def prepare_data(self) -> None:
        self._sets(download=True)

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        train, test = self._sets(download=False)
        return train.data, train.targets.long(), test.data, test.targets.long()

    def _sets(self, download: bool) -> Any:
        (datasets,) = needed("torchvision.datasets", purpose="MNISTDataModule")
        try:
            return tuple(datasets.MNIST(self.root, train=train, download=download) for train in (True, False))
        except (RuntimeError, OSError) as error:
            raise RuntimeError(
                f"MNIST was not found in {Path(self.root).resolve()} and could not be downloaded ({error}). Expected the four "
                "files of MNIST (train-images-idx3-ubyte.gz and so on) in its folder MNIST/raw: put them there, give another "
                "folder with --data.root, or use the embedded digits (recipes/mnist_quickstart.yaml)."
            ) from error
