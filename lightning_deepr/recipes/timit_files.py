"""Reads single recordings (NIST SPHERE or RIFF) and phone transcriptions (.phn) of TIMIT."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from lightning_deepr.recipes.timit_corpus import CorpusError
from lightning_deepr.recipes.timit_phones import NUMBERS

RATE = 16_000
"""Samples per second of every recording."""

_TOLERANCE = 160
"""Number of samples (10 ms, one frame) by which a transcription may outlast the audio."""

INSTALL = "install them with: pip install 'lightning-deepr[timit]'"


def read_audio(path: Path) -> np.ndarray[Any, np.dtype[np.int16]]:
    """Read the samples of a recording: int16 [samples], 16 kHz, one channel.

    Raises:
        CorpusError: the file is unreadable, empty or shorter than its header says, or has another rate or number of channels.
        ImportError: ``soundfile`` is not installed.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(f"TIMIT recordings need `soundfile`, which can't be imported ({error}): {INSTALL}") from error
    promised = _promised_samples(path)
    try:
        samples, rate = soundfile.read(str(path), dtype="int16", always_2d=True)
    except (RuntimeError, OSError) as error:  # soundfile's own errors are RuntimeErrors
        raise CorpusError(f"{path}: expected a NIST SPHERE or RIFF recording, found {_beginning(path)} ({error}).") from error
    if rate != RATE or samples.shape[1] != 1:
        raise CorpusError(f"{path}: expected one channel at {RATE} Hz, found {samples.shape[1]} at {rate} Hz.")
    if promised is not None and len(samples) < promised:
        raise CorpusError(
            f"{path}: the recording is truncated: its header says {promised} samples, {len(samples)} are there. Copy it again."
        )
    if len(samples) == 0:
        raise CorpusError(f"{path}: the recording is empty. Copy it again.")
    return samples[:, 0]


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(12)
    return f"a file that begins with {start!r}" if start else "an empty file"


def _promised_samples(path: Path) -> int | None:
    """Read the number of samples from the header, since libsndfile reads a truncated file without an error.

    Returns:
        the number of samples; None for a header that does not have it.

    Raises:
        CorpusError: the file can't be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(8192)
    except OSError as error:
        raise CorpusError(f"{path}: can't be read ({error}).") from error
    if head.startswith(b"NIST_1A"):
        for line in head[:1024].split(b"\n"):
            if line.startswith(b"sample_count -i "):
                try:
                    return int(line.split()[2])
                except (ValueError, IndexError):
                    return None
        return None
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        at = 12
        while at + 8 <= len(head):
            size = struct.unpack("<I", head[at + 4 : at + 8])[0]
            if head[at : at + 4] == b"data":
                return int(size) // 2
            at += 8 + size + size % 2
    return None


def read_phones(path: Path, samples: int | None = None) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Read the segments of a .phn file.

    Args:
        path: file with lines "first-sample end-sample phone"; a segment does not include its end sample.
        samples: length of the recording, to compare the last segment with; None: no comparison.

    Returns:
        bounds int64 [segments, 2], and the phones' numbers in ``PHONES61``, int64 [segments].

    Raises:
        CorpusError: the file is unreadable or empty, a line is malformed, a phone is unknown, segments are out of order, or a
            segment ends after the audio.
    """
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: expected a transcription, found a file that can't be read ({error}).") from error
    bounds: list[tuple[int, int]] = []
    phones: list[int] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        words = line.split()
        if len(words) != 3 or not words[0].isdigit() or not words[1].isdigit():
            raise CorpusError(f'{where}: expected "first-sample end-sample phone", found {line!r}.')
        first, end, phone = int(words[0]), int(words[1]), words[2].lower()
        if phone not in NUMBERS:
            raise CorpusError(f"{where}: unknown phone {words[2]!r}; expected one of {', '.join(sorted(NUMBERS))}.")
        if end < first or (bounds and first < bounds[-1][1]):
            raise CorpusError(f"{where}: expected segments in order, found {line!r} after {bounds[-1:] or 'nothing'}.")
        bounds.append((first, end))
        phones.append(NUMBERS[phone])
    if not bounds:
        raise CorpusError(f"{path}: the transcription is empty (no segment). Copy it again.")
    if samples is not None and bounds[-1][1] > samples + _TOLERANCE:
        raise CorpusError(
            f"{path}: the transcription ends at sample {bounds[-1][1]}, past the end of the audio ({samples} samples): "
            "the two files do not belong together, or the recording was cut."
        )
    return np.array(bounds, dtype=np.int64), np.array(phones, dtype=np.int64)


def labels_at(
    centres: np.ndarray[Any, Any], bounds: np.ndarray[Any, Any], phones: np.ndarray[Any, Any]
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Look up the phone at each frame's centre: int64 [frames], -1 outside all segments.

    Args:
        centres: int64 [frames], sample numbers.
        bounds, phones: segments as :func:`read_phones` returns them.
    """
    segment = np.searchsorted(bounds[:, 0], centres, side="right") - 1
    inside = (segment >= 0) & (centres < bounds[segment.clip(0), 1])
    return np.where(inside, phones[segment.clip(0)], -1)
