"""CIFAR-10 for the paper's benchmark, read through torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_deepr._needed import needed
from lightning_deepr.recipes.crops import Crops
from lightning_deepr.recipes.resumable import ResumableDataModule
from lightning_deepr.training.run_config import digest_of


class CIFAR10DataModule(ResumableDataModule):
    """CIFAR-10: 50,000 + 10,000 images in 10 classes.

    Training sees distorted 24 x 24 crops (:class:`lightning_deepr.recipes.crops.Crops`), validation and test the central crop.

    Args:
        root: the folder that holds ``cifar-10-batches-py``. Missing files are downloaded to it; torchvision checks their md5.
        batch_size: images per training batch; a smaller last batch is left out.
        val_size: number of training images, taken from the end, that are held out for validation; 0 holds out none.
        contrast: range of the random contrast; [1, 1] turns it off.
        seed: seed of the order of the images and of their distortions; None: the seed of ``seed_everything``.

    Raises:
        RuntimeError: files are missing and can't be downloaded, or have a wrong md5. The message names them.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        val_size: int = 0,
        contrast: tuple[float, float] = (0.2, 1.8),
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if val_size < 0 or batch_size < 1:
            raise ValueError(f"expected batch_size >= 1 and val_size >= 0, found {batch_size} and {val_size}.")
        if not 0 < contrast[0] <= contrast[1]:
            raise ValueError(f"contrast: expected a range above 0, found {list(contrast)}.")
        self.root, self.batch_size, self.val_size, self.seed = root, batch_size, val_size, seed
        self.contrast = (contrast[0], contrast[1])
        self._images: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def prepare_data(self) -> None:
        self._sets(download=True)

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Read the images and labels.

        Returns:
            train images uint8 [50000, 3, 32, 32], train labels int64 [50000], test images [10000, 3, 32, 32], test labels
            [10000].
        """
        train, test = self._sets(download=False)
        images = [torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in (train, test)]
        labels = [torch.tensor(part.targets) for part in (train, test)]
        return images[0], labels[0], images[1], labels[1]

    def setup(self, stage: str) -> None:
        if self._images is None:
            self._images = self.load()
            if self.val_size >= len(self._images[1]):
                raise ValueError(
                    f"val_size: expected fewer than the {len(self._images[1])} training images, found {self.val_size}."
                )

    def digest(self) -> str:
        """Hash the training images and labels: runs on the same data have the same digest in their loggers."""
        return digest_of(self._part(0))

    def train_dataloader(self) -> Crops:
        images, labels = self._part(0)
        keep = len(labels) - self.val_size
        batches = Crops(
            images[:keep],
            labels[:keep],
            self.batch_size,
            distort=True,
            contrast=self.contrast,
            shuffle=True,
            seed=torch.initial_seed() if self.seed is None else self.seed,
            drop_last=True,
        )
        return self.resuming(batches)

    def val_dataloader(self) -> Any:
        if self.val_size == 0:
            return []
        images, labels = self._part(0)
        return Crops(images[-self.val_size :], labels[-self.val_size :], 500)

    def test_dataloader(self) -> Crops:
        images, labels = self._part(2)
        return Crops(images, labels, 500)

    def _part(self, first: int) -> tuple[Tensor, Tensor]:
        assert self._images is not None, "setup comes first"
        return self._images[first], self._images[first + 1]

    def _sets(self, download: bool) -> Any:
        (datasets,) = needed("torchvision.datasets", purpose="CIFAR10DataModule")
        try:
            return tuple(datasets.CIFAR10(self.root, train=train, download=download) for train in (True, False))
        except (RuntimeError, OSError) as error:
            folder = Path(self.root).resolve() / datasets.CIFAR10.base_folder
            raise RuntimeError(
                f"CIFAR-10 was not found in {folder} and could not be downloaded ({error}). {wrong_files(folder)} "
                "Put them there (cifar-10-python.tar.gz, unpacked), or give another folder with --data.root."
            ) from error


def wrong_files(folder: Path) -> str:
    """Name the files, out of seven, that are missing or have a wrong md5."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    expected = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
    missing = [name for name, _ in expected if not (folder / name).is_file()]
    damaged = [name for name, md5 in expected if (folder / name).is_file() and not check_integrity(str(folder / name), md5)]
    found = [f"{what}: {', '.join(names)}." for what, names in (("Missing", missing), ("With a wrong md5", damaged)) if names]
    return " ".join(found) or "All files are in order."
