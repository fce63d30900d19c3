"""TIMIT as tensors and as a LightningDataModule, for LDC's full corpus and for the free sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_deepr.recipes.resumable import ResumableDataModule
from lightning_deepr.recipes.sequences import SequenceBatches
from lightning_deepr.recipes.timit_cache import Frames, cached_frames
from lightning_deepr.recipes.timit_corpus import Utterance, find_utterances
from lightning_deepr.recipes.timit_features import FeatureSettings
from lightning_deepr.recipes.timit_phones import targets
from lightning_deepr.recipes.timit_splits import Split, split


@dataclass
class TIMIT:
    """Normalized features and training targets.

    Attributes:
        train, val, test: features float32 [all frames, 39], labels int64 (-100: not scored), offsets int64 [utterances + 1].
        names: names of each part's utterances, such as "train/FVMH0/SI836".
        mean, std: float32 [39], mean and standard deviation of the training part's features before normalization.
    """

    train: Frames
    val: Frames
    test: Frames
    names: dict[str, list[str]]
    mean: Tensor
    std: Tensor


def load_timit(
    root: str | Path,
    *,
    rotation: int = 0,
    classes: int = 60,
    test_set: str = "core",
    sa: str = "auto",
    val_fraction: float = 0.05,
    allow_incomplete: bool = False,
    cache_dir: str | Path | None = None,
    features: FeatureSettings | None = None,
) -> TIMIT:
    """Load all of TIMIT into memory.

    Args:
        root: the folder that holds TRAIN and TEST, or dr1-fvmh0 and so on.
        rotation: rotation of the free sample's speakers, 0 to 3.
        classes: number of training targets: 60 phones (without ``q``) or the 39 scored classes.
        test_set, sa, val_fraction: see :func:`lightning_deepr.recipes.timit_splits.split`.
        allow_incomplete: whether to accept an incomplete corpus.
        cache_dir: folder of the feature cache; None: ``~/.cache/lightning-deepr``.
        features: settings of the features; None: the default settings.

    Raises:
        CorpusError: the corpus is missing, incomplete or damaged. The message names the files.
        ImportError: the audio libraries are missing (``pip install 'lightning-deepr[timit]'``).
        ValueError: a setting is out of its range.

    Example::

        data = load_timit("data/timit", rotation=0)
        x, y = data.train.utterance(0)  # [frames, 39], [frames]
    """
    utterances = find_utterances(root, allow_incomplete)
    parts = split(utterances, rotation=rotation, test_set=test_set, sa=sa, val_fraction=val_fraction)
    frames = cached_frames(utterances, features or FeatureSettings(), cache_dir)
    return _assemble(utterances, parts, frames, classes)


def _assemble(utterances: list[Utterance], parts: Split, frames: Frames, classes: int) -> TIMIT:
    chosen = {"train": parts.train, "val": parts.val, "test": parts.test}
    found = {part: frames.select(numbers) for part, numbers in chosen.items()}
    exact = found["train"].features.double()  # a sum of a million float32 values loses digits
    mean, std = exact.mean(0).float(), exact.std(0, correction=0).clamp(min=1e-5).float()
    for one in found.values():
        one.features = (one.features - mean) / std
        one.labels = targets(one.labels, classes)
    names = {part: [utterances[number].name for number in numbers] for part, numbers in chosen.items()}
    return TIMIT(**found, names=names, mean=mean, std=std)


class TIMITDataModule(ResumableDataModule):
    """TIMIT in batches of padded sequences.

    Training batches have whole utterances or chunks; validation and test batches have whole utterances.

    Args:
        root: the folder with the full corpus (TRAIN and TEST in it) or the free sample (dr1-fvmh0 and so on in it).
        batch_size: sequences per batch.
        chunk_frames: number of frames in a training chunk; None: train on whole utterances.
        rotation: rotation of the free sample's speakers, 0 to 3.
        classes: number of training targets: 60 phones or the 39 scored classes.
        test_set: test set of the full corpus: "core" | "complete".
        sa: use of the SA sentences: "auto" (for training in the sample, not at all in the full corpus) | "train" | "none".
        val_fraction: fraction of the full corpus' training utterances that is held out for validation.
        allow_incomplete: whether to accept an incomplete corpus.
        cache_dir: folder of the feature cache; None: ``~/.cache/lightning-deepr``.
        seed: seed of the order and of the offsets; None: the seed of ``seed_everything``.
    """

    def __init__(
        self,
        root: str = "data/timit",
        batch_size: int = 32,
        chunk_frames: int | None = None,
        rotation: int = 0,
        classes: int = 60,
        test_set: str = "core",
        sa: str = "auto",
        val_fraction: float = 0.05,
        allow_incomplete: bool = False,
        cache_dir: str | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.root, self.batch_size, self.chunk_frames = root, batch_size, chunk_frames
        self.rotation, self.classes, self.test_set, self.sa = rotation, classes, test_set, sa
        self.val_fraction, self.allow_incomplete, self.cache_dir, self.seed = val_fraction, allow_incomplete, cache_dir, seed
        self.data: TIMIT | None = None

    def prepare_data(self) -> None:
        """Fill the cache in one process; the other processes read the features from it."""
        cached_frames(find_utterances(self.root, self.allow_incomplete), FeatureSettings(), self.cache_dir)

    def setup(self, stage: str) -> None:
        if self.data is None:
            self.data = load_timit(
                self.root,
                rotation=self.rotation,
                classes=self.classes,
                test_set=self.test_set,
                sa=self.sa,
                val_fraction=self.val_fraction,
                allow_incomplete=self.allow_incomplete,
                cache_dir=self.cache_dir,
            )

    def train_dataloader(self) -> SequenceBatches:
        batches = SequenceBatches(
            self._loaded().train,
            self.batch_size,
            chunk_frames=self.chunk_frames,
            shuffle=True,
            seed=torch.initial_seed() if self.seed is None else self.seed,
        )
        return self.resuming(batches)

    def val_dataloader(self) -> SequenceBatches:
        return SequenceBatches(self._loaded().val, self.batch_size)

    def test_dataloader(self) -> SequenceBatches:
        return SequenceBatches(self._loaded().test, self.batch_size)

    def _loaded(self) -> TIMIT:
        assert self.data is not None, "setup comes first"
        return self.data
