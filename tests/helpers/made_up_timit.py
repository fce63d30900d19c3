"""Small corpora in the layout of TIMIT, with noise as speech and random phones: the licensed corpus is not needed."""

from __future__ import annotations

import os
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_deepr.recipes.timit_corpus import CORE_TEST, SAMPLE_SPEAKERS
from lightning_deepr.recipes.timit_phones import PHONES61

SENTENCES = ("sa1", "sa2", "si1", "si2", "si3", "sx1", "sx2", "sx3", "sx4", "sx5")
Samples = np.ndarray[Any, Any]


def real_sample() -> Path:
    """Return the free sample, if it exists in the folder that LIGHTNING_DEEPR_DATA names."""
    given = os.environ.get("LIGHTNING_DEEPR_DATA")
    for folder in (Path(given), Path(given) / "timit-sample", Path(given) / "corpora" / "timit") if given else ():
        if (folder / "dr1-fvmh0").is_dir():
            return folder
    pytest.skip(
        "NLTK's timit sample is not at hand: set LIGHTNING_DEEPR_DATA to a folder that holds timit-sample or corpora/timit"
    )


def noise(samples: int, seed: int) -> Samples:
    """Make int16 samples: low-pass noise over a tone, so that frames differ."""
    generator = np.random.default_rng(seed)
    rough = generator.normal(0, 3000, samples + 7)
    smooth = np.convolve(rough, np.ones(8) / 8, mode="valid")
    return (smooth + 2000 * np.sin(np.arange(samples) * generator.uniform(0.05, 0.5))).astype(np.int16)


def write_riff(path: Path, samples: Samples, rate: int = 16_000) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())


def write_sphere(path: Path, samples: Samples) -> None:
    fields = (
        ("channel_count", "-i", 1),
        ("sample_count", "-i", len(samples)),
        ("sample_rate", "-i", 16_000),
        ("sample_n_bytes", "-i", 2),
        ("sample_byte_format", "-s2", "01"),
        ("sample_sig_bits", "-i", 16),
    )
    head = "NIST_1A\n   1024\n" + "".join(f"{name} {kind} {value}\n" for name, kind, value in fields) + "end_head\n"
    path.write_bytes(head.encode().ljust(1024) + samples.astype("<i2").tobytes())


def write_phones(path: Path, samples: int, seed: int, segments: int = 6) -> None:
    generator = np.random.default_rng(seed)
    bounds = [0, *sorted(generator.choice(np.arange(200, samples - 200), segments - 1, replace=False).tolist()), samples]
    phones = ["h#", *generator.choice(PHONES61, segments - 2).tolist(), "h#"]
    lines = [f"{first} {end} {phone}\n" for first, end, phone in zip(bounds, bounds[1:], phones, strict=False)]
    path.write_text("".join(lines))


def make_sample(root: Path, shortest: int = 4000, longest: int = 8000) -> Path:
    """Write 16 speakers with 10 sentences of .25 to .5 s each. As in the original, one file is SPHERE."""
    seed = 0
    for region, pair in enumerate(SAMPLE_SPEAKERS, 1):
        for speaker in pair:
            folder = root / f"dr{region}-{speaker.lower()}"
            folder.mkdir(parents=True)
            for sentence in SENTENCES:
                count = shortest + seed * 977 % (longest - shortest)
                write = write_sphere if seed == 5 else write_riff
                write(folder / f"{sentence}.wav", noise(count, seed))
                write_phones(folder / f"{sentence}.phn", count, seed)
                seed += 1
    return root


def full_speakers() -> dict[str, list[tuple[int, str]]]:
    """Return region and name of 462 speakers for training and 168 for testing, including the core test set."""
    others = [f"M{letter}{number:02d}" for letter in "ABCDEFGH" for number in range(100)]
    test = sorted(CORE_TEST) + others[:144]
    train = others[144 : 144 + 462]
    return {part: [(i % 8 + 1, name) for i, name in enumerate(names)] for part, names in (("train", train), ("test", test))}


def make_full_names(root: Path, upper: bool = True) -> Path:
    """Write the full corpus' 6,300 sentences as empty files, in LDC's layout."""
    case = str.upper if upper else str.lower
    for part, speakers in full_speakers().items():
        for region, speaker in speakers:
            folder = root / case(part) / case(f"dr{region}") / case(speaker)
            folder.mkdir(parents=True)
            for sentence in SENTENCES:
                for suffix in (".wav", ".phn"):
                    (folder / case(sentence + suffix)).touch()
    return root


def make_full(root: Path, speakers: int = 2) -> Path:
    """Write LDC's layout in upper case with few speakers and only SPHERE files: incomplete, but with sound."""
    seed = 0
    for part, listed in full_speakers().items():
        for region, speaker in listed[:speakers]:
            folder = root / part.upper() / f"DR{region}" / speaker
            folder.mkdir(parents=True)
            for sentence in SENTENCES:
                write_sphere(folder / f"{sentence.upper()}.WAV", noise(4000, seed))
                write_phones(folder / f"{sentence.upper()}.PHN", 4000, seed)
                seed += 1
    return root
