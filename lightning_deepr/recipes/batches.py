"""Batches of small images that lie in memory as tensors.

At batch 10 a DataLoader takes longer to collect single images than the network takes to learn from them. Here a batch is one
gather. Everything random is a function of (seed, epoch, batch), so that a training that stops in the middle of an epoch
continues with the same batches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_deepr.algorithm import randomness

_ORDER, _SHIFT = 101, 102  # random streams, separate from the rewiring's


class ResumableBatches(ABC):
    """A loader that can resume in the middle of an epoch. Lightning sets its epoch."""

    def __init__(self) -> None:
        self.epoch = 0
        self._next = 0

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches in an epoch."""

    @property
    def sampler(self) -> ResumableBatches:
        """This loader itself: Lightning calls ``set_epoch`` on a loader's sampler."""
        return self

    @property  # noqa: B027
    def batch_sampler(self) -> None:
        """None: Lightning also reads this attribute of a loader that has a sampler."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "next": self._next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch, self._next = state_dict["epoch"], state_dict["next"]

    def remaining(self) -> Iterator[int]:
        """Iterate over the numbers of the epoch's remaining batches."""
        first, self._next = (self._next if self._next < len(self) else 0), 0
        for i in range(first, len(self)):
            self._next = i + 1
            yield i


class TensorBatches(ResumableBatches):
    """An iterable over (images float [B, C, H, W], labels int64 [B]), resumable in the middle of an epoch.

    Subclasses make the images of a batch (:meth:`images_of`).

    Args:
        images: tensor of shape [n, ...].
        labels: int64 [n].
        batch_size: B.
        shuffle: whether every epoch has a new order.
        seed: seed of the order and of whatever else a subclass draws.
        drop_last: whether to leave out a smaller last batch.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__()
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole if self.drop_last or not rest else whole + 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.arange(len(self.labels))
        if self.shuffle:
            order = order[randomness.bits(randomness.key(self.seed, _ORDER, self.epoch), order).argsort()]
        for i in self.remaining():
            chosen = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield self.images_of(chosen, i), self.labels[chosen]

    @abstractmethod
    def images_of(self, chosen: Tensor, i: int) -> Tensor:
        """Make the images of the epoch's ``i``-th batch from their numbers ``chosen`` (int64 [B]): float [B, C, H, W]."""


class Batches(TensorBatches):
    """Batches of grey images in [0, 1], shifted on request: (images float [B, 1, H, W], labels int64 [B]).

    Args:
        images: uint8 [n, H, W].
        labels: int64 [n].
        batch_size: B; the last batch may be smaller.
        shuffle: whether every epoch has a new order.
        seed: seed of the order and of the shifts.
        shift_probability: probability that an image is shifted by -1, 0 or 1 pixel in each direction (all nine shifts are
            equally likely, the edge is filled with 0), as in ``recipes/mnist_best.yaml``.
        shift_epochs: number of epochs after which shifts end; a fraction ends them within an epoch.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        shift_probability: float = 0.0,
        shift_epochs: float = float("inf"),
    ) -> None:
        super().__init__(images, labels, batch_size, shuffle=shuffle, seed=seed)
        self.shift_probability, self.shift_epochs = shift_probability, shift_epochs
        height, width = images.shape[1:]
        self._padded = torch.nn.functional.pad(images, (1, 1, 1, 1)).flatten(1) if shift_probability else images.flatten(1)
        rows, columns = torch.arange(height), torch.arange(width)
        self._window = (rows[:, None] * (width + 2) + columns).view(-1)  # places of the image's pixels in the padded image

    def images_of(self, chosen: Tensor, i: int) -> Tensor:
        return self._bytes(chosen, i).div(255.0)

    def _bytes(self, chosen: Tensor, i: int) -> Tensor:
        height, width = self.images.shape[1:]
        if not self.shift_probability:
            return self._padded[chosen].view(-1, 1, height, width)
        corner = torch.full_like(chosen, width + 3)  # without a shift the window begins at row 1, column 1
        if self.epoch + i / len(self) < self.shift_epochs:
            draw = randomness.bits(randomness.key(self.seed, _SHIFT, self.epoch), chosen)
            shifted = (draw >> 8).bitwise_and_(0xFFFFFF) < self.shift_probability * (1 << 24)
            where = (draw >> 33).bitwise_and_(0x3FFFFFFF) % 9
            corner = torch.where(shifted, where // 3 * (width + 2) + where % 3, corner)
        pixels = corner[:, None] + self._window
        return self._padded[chosen].gather(1, pixels).view(-1, 1, height, width)
