"""Batches of CIFAR-10 with the TensorFlow tutorial's augmentation, computed on whole tensors.

Augmenting single images takes longer than the network's step; for a whole batch it is one gather and some sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_deepr.algorithm import randomness
from lightning_deepr.recipes.batches import TensorBatches

_CROP, _COLOUR = 103, 104  # random streams, separate from the order's


class Crops(TensorBatches):
    """Batches (images float [B, 3, size, size], labels int64 [B]): distorted for training, the central crop for testing.

    The distortion is the tutorial's ``distorted_inputs``:

    1. Take a random crop.
    2. Flip it at random.
    3. Change the brightness: add a random number. This class leaves the step out, since step 5 subtracts the number again and
       the tutorial does not clip in between.
    4. Change the contrast: multiply each channel's distance from its own mean by a random factor.
    5. Subtract the image's mean and divide by its standard deviation (at least 1 / sqrt(number of values), as in TensorFlow).

    Images have the channels-last memory format, which makes convolutions on the CPU a quarter faster.

    Args:
        images: uint8 [n, 3, H, W].
        labels: int64 [n].
        batch_size: B.
        distort: whether to crop, flip and change the contrast at random, for training; False takes the central crop.
        size: side of a crop in pixels, at most H and W.
        contrast: range of the contrast's factor; (1, 1) leaves the contrast unchanged.
        shuffle, seed, drop_last: as in :class:`lightning_deepr.recipes.batches.TensorBatches`.

    Raises:
        ValueError: the images have another shape or are smaller than a crop.

    Example::

        >>> batches = Crops(torch.zeros(5, 3, 32, 32, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64), 2, distort=True)
        >>> next(iter(batches))[0].shape
        torch.Size([2, 3, 24, 24])
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        distort: bool = False,
        size: int = 24,
        contrast: tuple[float, float] = (0.2, 1.8),
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        super().__init__(images, labels, batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
        if images.dim() != 4 or images.shape[1] != 3 or size > min(images.shape[2:]):
            raise ValueError(f"expected images [n, 3, H, W] of at least {size} x {size}, found {list(images.shape)}.")
        self.distort, self.size, self.contrast = distort, size, contrast
        # The three bytes of a pixel lie together, so that a crop gathers whole pixels.
        self._pixels = images.permute(0, 2, 3, 1).reshape(-1, 3).contiguous()

    def images_of(self, chosen: Tensor, i: int) -> Tensor:
        height, width = self.images.shape[2:]
        rows = columns = torch.arange(self.size)
        if self.distort:
            draw = randomness.bits(randomness.key(self.seed, _CROP, self.epoch), chosen)
            top = (draw >> 8).bitwise_and_(0xFFFFFF) % (height - self.size + 1)
            left = (draw >> 33).bitwise_and_(0xFFFFFF) % (width - self.size + 1)
            flipped = (draw & 1).bool()
            columns = torch.where(flipped[:, None], self.size - 1 - columns, columns) + left[:, None]
            rows = rows + top[:, None]
        else:
            rows = (rows + (height - self.size) // 2).expand(len(chosen), -1)
            columns = (columns + (width - self.size) // 2).expand(len(chosen), -1)
        where = (chosen * (height * width))[:, None, None] + (rows * width)[:, :, None] + columns[:, None, :]
        crops = self._pixels.index_select(0, where.view(-1)).view(len(chosen), -1, 3).float()
        mean = crops.mean(1, keepdim=True)
        crops -= mean
        if self.distort and self.contrast != (1, 1):
            low, high = self.contrast
            draw = randomness.bits(randomness.key(self.seed, _COLOUR, self.epoch), chosen)
            factor = (draw >> 8).bitwise_and_(0xFFFFFF).double().mul_((high - low) / (1 << 24)).add_(low)
            crops *= factor.float()[:, None, None]
        # The contrast does not change the channels' means, but they contribute to the image's standard deviation.
        mean -= mean.mean(2, keepdim=True)
        crops += mean
        values = crops.shape[1] * 3
        deviation = crops.flatten(1).square().mean(1).sqrt_().clamp_(min=values**-0.5)
        crops /= deviation[:, None, None]
        return crops.view(len(chosen), self.size, self.size, 3).permute(0, 3, 1, 2)
