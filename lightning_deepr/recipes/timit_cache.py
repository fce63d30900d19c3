"""A disk cache of the features and labels of all utterances; its key depends on the settings and the files."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_deepr.packages.messages import rank_zero_info
from lightning_deepr.recipes.timit_corpus import CorpusError, Utterance
from lightning_deepr.recipes.timit_features import VERSION, FeatureSettings, features
from lightning_deepr.recipes.timit_files import labels_at, read_audio, read_phones

_PROGRESS_FROM = 400
"""Number of utterances from which on a progress bar is shown: the free sample takes two seconds, the full corpus a minute."""


@dataclass
class Frames:
    """The frames of several utterances, concatenated.

    Attributes:
        features: float32 [all frames, features].
        labels: int64 [all frames], training targets or numbers of phones; negative for frames without a label.
        offsets: int64 [utterances + 1]; utterance u is ``features[offsets[u] : offsets[u + 1]]``.
    """

    features: Tensor
    labels: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Number of frames of each utterance: int64 [utterances]."""
        return self.offsets.diff()

    def utterance(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the features [frames, features] and labels [frames] of one utterance."""
        here = slice(int(self.offsets[number]), int(self.offsets[number + 1]))
        return self.features[here], self.labels[here]

    def select(self, chosen: Sequence[int]) -> Frames:
        """Copy the utterances with the given numbers."""
        parts = [self.utterance(number) for number in chosen]
        lengths = self.lengths[torch.as_tensor(list(chosen), dtype=torch.int64)]
        return Frames(
            torch.cat([x for x, _ in parts]) if parts else self.features[:0],
            torch.cat([y for _, y in parts]) if parts else self.labels[:0],
            torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        )


def default_cache() -> Path:
    """Return ``$XDG_CACHE_HOME/lightning-deepr``, by default ``~/.cache/lightning-deepr``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-deepr"


def cached_frames(utterances: Sequence[Utterance], settings: FeatureSettings, folder: str | Path | None = None) -> Frames:
    """Read the features from the cache, or compute them with :func:`extract` and write them to the cache.

    Args:
        utterances: utterances of the corpus.
        settings: settings of the features.
        folder: folder of the cache; None: :func:`default_cache`.

    Returns:
        frames whose labels are numbers of ``PHONES61``, -1 for frames outside the transcription.

    Raises:
        CorpusError: see :func:`extract`.
    """
    key = _cache_key(utterances, settings)
    path = Path(folder if folder is not None else default_cache()) / f"timit-{key[:24]}.safetensors"
    if path.exists():
        try:
            return _read(path, key)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            warnings.warn(f"The feature cache {path} is damaged ({error}) and is made again.", stacklevel=2)
    found = extract(utterances, settings)
    try:
        _write(path, found, key)
        rank_zero_info(f"TIMIT features of {len(utterances)} utterances were written to {path}.")
    except OSError as error:
        warnings.warn(
            f"The feature cache {path} can't be written ({error}): features are computed again next time.", stacklevel=2
        )
    return found


def _cache_key(utterances: Sequence[Utterance], settings: FeatureSettings) -> str:
    """Hash the settings and each file's name, size and modification time."""
    files = []
    for one in utterances:
        try:
            both = [file.stat() for file in (one.audio, one.phones)]
        except OSError as error:
            raise CorpusError(f"{one.name}: a file can't be read ({error}).") from error
        files.append([one.name, str(one.audio), *(number for stat in both for number in (stat.st_size, stat.st_mtime_ns))])
    return hashlib.sha256(json.dumps([VERSION, asdict(settings), files]).encode()).hexdigest()


def extract(utterances: Sequence[Utterance], settings: FeatureSettings) -> Frames:
    """Read every recording and transcription, and compute the features.

    Args:
        utterances: utterances of the corpus.
        settings: settings of the features.

    Returns:
        frames whose labels are numbers of ``PHONES61``, -1 for frames outside the transcription.

    Raises:
        CorpusError: a file can't be read, or an utterance is shorter than one window.
    """
    from tqdm.auto import tqdm

    offsets, all_features, all_labels = [0], [], []
    progress = tqdm(utterances, desc="TIMIT features", unit="utterance", disable=len(utterances) < _PROGRESS_FROM)
    for one in progress:
        samples = read_audio(one.audio)
        bounds, phones = read_phones(one.phones, len(samples))
        x = features(samples, settings)
        if len(x) == 0:
            raise CorpusError(
                f"{one.audio}: the recording is empty or shorter than one window: expected at least {settings.window} samples, "
                f"found {len(samples)}. Copy it again."
            )
        all_features.append(torch.from_numpy(np.ascontiguousarray(x)))
        all_labels.append(torch.from_numpy(labels_at(settings.centres(len(samples)), bounds, phones)))
        offsets.append(offsets[-1] + len(x))
    return Frames(torch.cat(all_features), torch.cat(all_labels), torch.tensor(offsets))


def _checksum(frames: Frames) -> str:
    digest = hashlib.sha256()
    for tensor in (frames.features, frames.labels.to(torch.int16), frames.offsets):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _write(path: Path, frames: Frames, key: str) -> None:
    """Write the cache under a temporary name and rename it, so that no reader sees an incomplete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"features": frames.features, "labels": frames.labels.to(torch.int16), "offsets": frames.offsets}
    packed = save(tensors, metadata={"key": key, "checksum": _checksum(frames)})
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(packed)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path, key: str) -> Frames:
    with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
        metadata = file.metadata() or {}
        found = Frames(file.get_tensor("features"), file.get_tensor("labels").long(), file.get_tensor("offsets"))
    if metadata.get("key") != key:
        raise ValueError("it belongs to other files or settings")
    if metadata.get("checksum") != _checksum(found):
        raise ValueError("its checksum differs")
    return found
