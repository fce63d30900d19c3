"""Finds the utterances of TIMIT, either LDC's full corpus or NLTK's free sample, and checks that none is missing.

LDC93S1:        TRAIN|TEST/DR1..DR8/SPEAKER/SENTENCE.{WAV,PHN}, names in upper or lower case
NLTK's sample:  dr1-fvmh0/sa1.{wav,phn}, 16 speakers
Either may lie in a folder ``timit`` (or ``corpora/timit``) inside the given folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SENTENCES = {"SA": 2, "SI": 3, "SX": 5}
"""Number of sentences that each speaker reads, by kind."""

SAMPLE_SPEAKERS: tuple[tuple[str, str], ...] = (
    ("FVMH0", "MCPM0"),
    ("FAEM0", "MARC0"),
    ("FALK0", "MADC0"),
    ("FALR0", "MAEB0"),
    ("FTLG0", "MBGT0"),
    ("FAPB0", "MBMA1"),
    ("FBLV0", "MADD0"),
    ("FBCG1", "MBCG0"),
)
"""The 16 speakers of NLTK's sample: a woman and a man of each of the 8 dialect regions."""

CORE_TEST = frozenset(
    speaker
    for group in (  # two men and a woman of each region: regions 1 and 2, 3 and 4, ...
        ("MDAB0", "MWBT0", "FELC0", "MTAS1", "MWEW0", "FPAS0"),
        ("MJMP0", "MLNT0", "FPKT0", "MLLL0", "MTLS0", "FJLM0"),
        ("MBPM0", "MKLT0", "FNLP0", "MCMJ0", "MJDH0", "FMGD0"),
        ("MGRT0", "MNJM0", "FDHC0", "MJLN0", "MPAM0", "FMLD0"),
    )
    for speaker in group
)
"""The 24 speakers of the core test set (table 3 of the corpus' readme.doc)."""

_FULL_SPEAKERS = {"train": 462, "test": 168}

_WHAT_TO_GET = (
    "Get LDC93S1 from https://catalog.ldc.upenn.edu/LDC93S1 (licensed) and give the folder that holds TRAIN and TEST. "
    "Or get the free sample of 160 sentences, "
    "`python -c \"import nltk; nltk.download('timit', download_dir='data')\"` (unzip data/corpora/timit.zip if NLTK did not), "
    "and give the folder that holds dr1-fvmh0 and so on. The option is --data.root."
)


class CorpusError(RuntimeError):
    """Raised if the corpus is missing or incomplete, or if one of its files can't be read."""


@dataclass(frozen=True)
class Utterance:
    """One sentence of one speaker.

    Attributes:
        part: "train" or "test" for the full corpus, "sample" for the free sample.
        region: dialect region, 1 to 8.
        speaker, sentence: names in upper case, such as "FVMH0" and "SI836".
        audio, phones: paths of the recording and of its transcription.
    """

    part: str
    region: int
    speaker: str
    sentence: str
    audio: Path
    phones: Path

    @property
    def name(self) -> str:
        """Name of the utterance, such as "train/FVMH0/SI836"."""
        return f"{self.part}/{self.speaker}/{self.sentence}"


def find_utterances(root: str | Path, allow_incomplete: bool = False) -> list[Utterance]:
    """Find all utterances below a folder, sorted by name.

    Args:
        root: the folder that holds the corpus, see above.
        allow_incomplete: whether to accept a corpus without some speakers or sentences.

    Raises:
        CorpusError: the corpus is missing or incomplete (the message names the files), or a recording or transcription has no
            counterpart.
    """
    top, sample = _locate(Path(root))
    found: list[Utterance] = []
    problems: list[str] = []
    for part, region, speaker, folder in _speakers(top, sample):
        of_speaker, unpaired = _sentences(part, region, speaker, folder)
        found += of_speaker
        problems += unpaired
        if not allow_incomplete:
            problems += _missing_sentences(of_speaker, folder, bool(unpaired))
    if not allow_incomplete:
        problems += _missing_speakers(found, sample, top)
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise CorpusError(
            f"The TIMIT corpus in {top.resolve()} is incomplete:\n  {shown}\n"
            "Copy these again, or train on what is there with --data.allow_incomplete true (remove unpaired files first)."
        )
    if not found:
        raise CorpusError(f"No TIMIT recording (*.wav with its *.phn) was found in {top.resolve()}. {_WHAT_TO_GET}")
    return sorted(found, key=lambda one: one.name)


def _folders(folder: Path) -> dict[str, Path]:
    """Map the lower-case names of a folder's subfolders to their paths."""
    return {one.name.lower(): one for one in sorted(folder.iterdir()) if one.is_dir()} if folder.is_dir() else {}


def _locate(root: Path) -> tuple[Path, bool]:
    """Find the folder of the corpus, and whether it is the sample.

    Raises:
        CorpusError: there is no corpus.
    """
    candidates, level = [root], [root]
    for _ in range(3):
        level = [one for folder in level for name, one in _folders(folder).items() if name in ("timit", "corpora", "ldc93s1")]
        candidates += level
    for folder in candidates:
        names = _folders(folder)
        if any(_sample_folder(name) for name in names):
            return folder, True
        if "train" in names or "test" in names:
            return folder, False
    there = "which is not a folder" if not root.is_dir() else f"which holds {', '.join(_listed(root)) or 'nothing'}"
    raise CorpusError(f"The TIMIT corpus was not found in {root.resolve()}, {there}. {_WHAT_TO_GET}")


def _listed(folder: Path) -> list[str]:
    names = sorted(one.name for one in folder.iterdir())
    return [*names[:8], "..."] if len(names) > 8 else names


def _sample_folder(name: str) -> bool:
    """Whether a lower-case name is like "dr1-fvmh0"."""
    return len(name) > 4 and name.startswith("dr") and name[2] in "12345678" and name[3] == "-"


def _speakers(top: Path, sample: bool) -> Iterator[tuple[str, int, str, Path]]:
    """Iterate over the part, region, speaker and folder of each speaker."""
    if sample:
        for name, folder in _folders(top).items():
            if _sample_folder(name):
                yield "sample", int(name[2]), name[4:].upper(), folder
        return
    for part, regions in _folders(top).items():
        if part not in _FULL_SPEAKERS:
            continue
        for region, speakers in _folders(regions).items():
            if len(region) == 3 and region.startswith("dr") and region[2] in "12345678":
                for speaker, folder in _folders(speakers).items():
                    yield part, int(region[2]), speaker.upper(), folder


def _sentences(part: str, region: int, speaker: str, folder: Path) -> tuple[list[Utterance], list[str]]:
    """Find a speaker's utterances, and describe the missing counterparts of unpaired files."""
    files: dict[str, dict[str, Path]] = {"wav": {}, "phn": {}}
    words: set[str] = set()  # sentences with any file
    for file in sorted(folder.iterdir()):
        # Some copies hold both SA1.WAV (SPHERE) and SA1.WAV.wav (RIFF): the first name is used.
        stem, *suffixes = file.name.lower().split(".")
        if not suffixes or stem[:2].upper() not in SENTENCES:
            continue
        words.add(stem.upper())
        if suffixes[-1] in files:
            files[suffixes[-1]].setdefault(stem.upper(), file)
    problems = [
        f"{folder.resolve() / name.lower()}.{suffix} (this sentence has other files)"
        for name in sorted(words)
        for suffix in ("wav", "phn")
        if name not in files[suffix]
    ]
    both = sorted(files["wav"].keys() & files["phn"].keys())
    return [Utterance(part, region, speaker, name, files["wav"][name], files["phn"][name]) for name in both], problems


def _missing_sentences(found: Iterable[Utterance], folder: Path, unpaired: bool) -> list[str]:
    if unpaired:  # these are reported already
        return []
    counts = dict.fromkeys(SENTENCES, 0)
    for one in found:
        counts[one.sentence[:2]] += 1
    return [
        f"{folder.resolve()}: expected {wanted} sentences {kind}*, found {counts[kind]}"
        for kind, wanted in SENTENCES.items()
        if counts[kind] < wanted
    ]


def _missing_speakers(found: Iterable[Utterance], sample: bool, top: Path) -> list[str]:
    speakers: dict[str, set[str]] = {"train": set(), "test": set(), "sample": set()}
    for one in found:
        speakers[one.part].add(one.speaker)
    if sample:
        return [
            f"{top.resolve() / f'dr{region}-{speaker.lower()}'}: the folder is missing or empty"
            for region, pair in enumerate(SAMPLE_SPEAKERS, 1)
            for speaker in pair
            if speaker not in speakers["sample"]
        ]
    return [
        f"{top.resolve() / part.upper()}: expected {wanted} speakers, found {len(speakers[part])}"
        for part, wanted in _FULL_SPEAKERS.items()
        if len(speakers[part]) < wanted
    ] + [
        f"{top.resolve() / 'TEST'}: {speaker} of the core test set is missing"
        for speaker in sorted(CORE_TEST - speakers["test"])
    ]
