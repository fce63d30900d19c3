"""Splits the utterances into training, validation and test.

Full corpus: the training part, and the 24-speaker core test set (or the complete test set of 168 speakers). SA sentences are
left out, as is customary. A random 5 % of the training utterances are for validation, as in the paper.

Free sample (this project's split): 10 speakers for training, 2 for validation, 4 for test. Let f_i and m_i be the woman and the
man of dialect region i (0 to 7). Rotation r (0 to 3) tests on f_r, f_(r+4), m_(r+2), m_(r+6) and validates on f_(r+1), m_(r+5),
indices modulo 8. The four test sets are disjoint and cover all 16 speakers; each has two women and two men of four regions. SA
sentences, which all speakers read, are for training only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_deepr.recipes.timit_corpus import CORE_TEST, SAMPLE_SPEAKERS, CorpusError, Utterance

ROTATIONS = 4
_SA_CHOICES = ("auto", "train", "none")
_TEST_SETS = ("core", "complete")


@dataclass(frozen=True)
class Split:
    """Indices into the list of utterances, by part."""

    train: list[int]
    val: list[int]
    test: list[int]


def sample_speakers(rotation: int) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """Return the training, validation and test speakers of the free sample.

    Raises:
        ValueError: the rotation is not 0 to 3.

    Example::

        >>> [len(speakers) for speakers in sample_speakers(0)], sorted(sample_speakers(0)[2])
        ([10, 2, 4], ['FTLG0', 'FVMH0', 'MADC0', 'MADD0'])
    """
    if rotation not in range(ROTATIONS):
        raise ValueError(f"rotation: expected 0 to {ROTATIONS - 1}, found {rotation!r}.")
    women, men = zip(*SAMPLE_SPEAKERS, strict=True)
    test = frozenset({women[rotation], women[rotation + 4], men[(rotation + 2) % 8], men[(rotation + 6) % 8]})
    val = frozenset({women[(rotation + 1) % 8], men[(rotation + 5) % 8]})
    return frozenset({*women, *men}) - test - val, val, test


def split(
    utterances: Sequence[Utterance],
    *,
    rotation: int = 0,
    test_set: str = "core",
    sa: str = "auto",
    val_fraction: float = 0.05,
) -> Split:
    """Split the utterances that :func:`lightning_deepr.recipes.timit_corpus.find_utterances` found.

    Args:
        utterances: utterances of the full corpus or of the sample.
        rotation: rotation of the sample's speakers, 0 to 3.
        test_set: test set of the full corpus: "core" | "complete".
        sa: use of the SA sentences: "train" (those of training speakers) | "none" | "auto" ("train" in the sample, "none" in
            the full corpus).
        val_fraction: fraction of the full corpus' training utterances that is held out for validation. A hash of the names
            chooses the utterances, so that they are always the same.

    Raises:
        ValueError: a setting is out of its range.
        CorpusError: a part is empty.
    """
    for name, value, known in (("sa", sa, _SA_CHOICES), ("test_set", test_set, _TEST_SETS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, found {value!r}.")
    if not 0 < val_fraction < 1:
        raise ValueError(f"val_fraction: expected a fraction between 0 and 1, found {val_fraction!r}.")
    _, validating, testing = sample_speakers(rotation)
    is_sample = any(one.part == "sample" for one in utterances)
    with_sa = sa == "train" or (sa == "auto" and is_sample)
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for number, one in enumerate(utterances):
        if one.part == "sample":
            part = "test" if one.speaker in testing else "val" if one.speaker in validating else "train"
        elif one.part == "test":
            if test_set == "core" and one.speaker not in CORE_TEST:
                continue
            part = "test"
        else:
            part = "train"
        if not one.sentence.startswith("SA") or (with_sa and part == "train"):
            parts[part].append(number)
    if not is_sample:
        # SA sentences are never used for validation, since every speaker reads them.
        order = sorted(
            (number for number in parts["train"] if not utterances[number].sentence.startswith("SA")),
            key=lambda number: hashlib.sha256(utterances[number].name.encode()).digest(),
        )
        parts["val"] = sorted(order[: max(1, round(val_fraction * len(order)))])
        held_out = set(parts["val"])
        parts["train"] = [number for number in parts["train"] if number not in held_out]
    for part, chosen in parts.items():
        if not chosen:
            raise CorpusError(
                f"TIMIT: no utterance is left for {part}: of {len(utterances)} utterances, {_counts(utterances)}."
            )
    return Split(**parts)


def _counts(utterances: Sequence[Utterance]) -> str:
    return ", ".join(f"{sum(one.part == part for one in utterances)} {part}" for part in ("train", "test", "sample"))
