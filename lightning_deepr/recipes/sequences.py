"""Batches of labelled sequences that lie in memory as tensors: whole padded utterances, or chunks at random offsets.

Everything random is a function of (seed, epoch, batch), as in :mod:`lightning_deepr.recipes.batches`, so that a training that
stops in the middle of an epoch continues with the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_deepr.algorithm import randomness
from lightning_deepr.recipes.batches import ResumableBatches
from lightning_deepr.recipes.timit_cache import Frames
from lightning_deepr.recipes.timit_phones import IGNORED

_ORDER, _OFFSET = 111, 112  # random streams, separate from the rewiring's and the images'


class SequenceBatch(NamedTuple):
    """A batch of sequences, padded at the end.

    Attributes:
        features: float32 [batch, longest, features], 0 in the padding.
        labels: int64 [batch, longest], -100 in the padding and for frames without a label.
        lengths: int64 [batch], number of frames of each sequence.
    """

    features: Tensor
    labels: Tensor
    lengths: Tensor


class SequenceBatches(ResumableBatches):
    """An iterable over :class:`SequenceBatch`, resumable in the middle of an epoch.

    Args:
        frames: the utterances.
        batch_size: sequences per batch; the last batch may be smaller.
        chunk_frames: number of frames in a chunk. In each epoch an utterance gives as many chunks as cover it (its length over
            ``chunk_frames``, rounded up); each chunk has its own offset, uniform over all offsets inside the utterance. A
            shorter utterance is one chunk. None: each epoch has each utterance once, whole.
        shuffle: whether every epoch has a new order and new offsets. False: chunks follow each other without gaps, and the last
            one is moved back so that it fits.
        seed: seed of the order and of the offsets.
    """

    def __init__(
        self, frames: Frames, batch_size: int, *, chunk_frames: int | None = None, shuffle: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        if batch_size < 1 or (chunk_frames is not None and chunk_frames < 1):
            raise ValueError(
                f"expected batch_size >= 1 and chunk_frames >= 1 (or none), found {batch_size} and {chunk_frames}."
            )
        self.frames, self.batch_size, self.chunk_frames = frames, batch_size, chunk_frames
        self.shuffle, self.seed = shuffle, seed
        lengths = frames.lengths
        size = chunk_frames if chunk_frames is not None else int(lengths.max())
        pieces = (lengths + size - 1) // size
        self._utterance = torch.arange(len(frames)).repeat_interleave(pieces)
        self._piece = torch.arange(len(self._utterance)) - (pieces.cumsum(0) - pieces)[self._utterance]
        self._length = lengths[self._utterance].clamp(max=size)

    def __len__(self) -> int:
        return -(-len(self._utterance) // self.batch_size)

    def __iter__(self) -> Iterator[SequenceBatch]:
        every = torch.arange(len(self._utterance))
        free = self.frames.lengths[self._utterance] - self._length  # the largest offset of each chunk
        if self.shuffle:
            order = randomness.bits(randomness.key(self.seed, _ORDER, self.epoch), every).argsort()
            draw = (randomness.bits(randomness.key(self.seed, _OFFSET, self.epoch), every) >> 1) & randomness.LARGEST
            offset = draw % (free + 1)
        else:
            order, offset = every, torch.minimum(self._piece * (self.chunk_frames or 0), free)
        for i in self.remaining():
            chosen = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield self._batch(chosen, offset[chosen])

    def _batch(self, chosen: Tensor, offset: Tensor) -> SequenceBatch:
        lengths = self._length[chosen]
        start = self.frames.offsets[self._utterance[chosen]] + offset
        time = torch.arange(int(lengths.max()))
        inside = time < lengths[:, None]
        at = torch.where(inside, start[:, None] + time, 0)
        features = self.frames.features[at]
        if not bool(inside.all()):
            features.masked_fill_(~inside[:, :, None], 0.0)
        return SequenceBatch(features, self.frames.labels[at].masked_fill_(~inside, IGNORED), lengths)
