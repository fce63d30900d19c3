"""TIMIT from files to tensors: corpus, recordings, transcriptions, features, cache, splits.

All tests run on made-up files; some also run on NLTK's sample if LIGHTNING_DEEPR_DATA names its folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_deepr.recipes import timit_cache
from lightning_deepr.recipes.timit_cache import cached_frames
from lightning_deepr.recipes.timit_corpus import CORE_TEST, CorpusError, find_utterances
from lightning_deepr.recipes.timit_data import load_timit
from lightning_deepr.recipes.timit_features import FeatureSettings, deltas, features, mfcc
from lightning_deepr.recipes.timit_files import labels_at, read_audio, read_phones
from lightning_deepr.recipes.timit_phones import FOLD, IGNORED, PHONES39, PHONES60, PHONES61, folding, targets
from lightning_deepr.recipes.timit_splits import sample_speakers, split
from tests.helpers.made_up_timit import (
    full_speakers,
    make_full,
    make_full_names,
    make_sample,
    noise,
    real_sample,
    write_phones,
    write_riff,
    write_sphere,
)

pytest.importorskip("soundfile", reason="pip install 'lightning-deepr[timit]'")
pytest.importorskip("kaldi_native_fbank", reason="pip install 'lightning-deepr[timit]'")
SETTINGS = FeatureSettings()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sample(tmp_path_factory.mktemp("sample") / "timit")


@pytest.fixture(scope="module")
def full_names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_full_names(tmp_path_factory.mktemp("full") / "timit")


# -- phones -----------------------------------------------------------------------------------------------------------------


def test_the_folding_is_lee_and_hons() -> None:
    assert (len(PHONES61), len(PHONES60), len(PHONES39)) == (61, 60, 39)
    assert set(PHONES61) - set(PHONES60) == {"q"}
    groups = {folded: sorted(p for p in PHONES60 if FOLD[p] == folded) for folded in PHONES39}
    assert {folded: phones for folded, phones in groups.items() if len(phones) > 1} == {
        "aa": ["aa", "ao"],
        "ah": ["ah", "ax", "ax-h"],
        "er": ["axr", "er"],
        "hh": ["hh", "hv"],
        "ih": ["ih", "ix"],
        "l": ["el", "l"],
        "m": ["em", "m"],
        "n": ["en", "n", "nx"],
        "ng": ["eng", "ng"],
        "sh": ["sh", "zh"],
        "sil": ["bcl", "dcl", "epi", "gcl", "h#", "kcl", "pau", "pcl", "tcl"],
        "uw": ["uw", "ux"],
    }
    assert all(phones == [folded] for folded, phones in groups.items() if len(phones) == 1)


def test_folding_sums_posteriors() -> None:
    posteriors = torch.rand(7, 60).softmax(-1)
    folded = posteriors @ folding(60)
    assert torch.allclose(folded.sum(1), torch.ones(7))
    for number, phone in enumerate(PHONES39):
        slow = sum(posteriors[:, i] for i, p in enumerate(PHONES60) if FOLD[p] == phone)
        assert torch.allclose(folded[:, number], torch.as_tensor(slow))
    assert torch.equal(folding(39), torch.eye(39))
    with pytest.raises(ValueError, match="expected 60 or 39 classes"):
        folding(61)


def test_targets() -> None:
    labels = torch.tensor([PHONES61.index("q"), PHONES61.index("ao"), PHONES61.index("aa"), -1])
    assert targets(labels, 60).tolist() == [IGNORED, PHONES60.index("ao"), PHONES60.index("aa"), IGNORED]
    assert targets(labels, 39).tolist() == [IGNORED, PHONES39.index("aa"), PHONES39.index("aa"), IGNORED]


# -- finding the files --------------------------------------------------------------------------------------------------------


def test_full_corpus_is_split_as_is_customary(full_names: Path) -> None:
    utterances = find_utterances(full_names)
    assert len(utterances) == 6300
    parts = split(utterances)
    named = {part: [utterances[i] for i in getattr(parts, part)] for part in ("train", "val", "test")}
    assert {part: len(chosen) for part, chosen in named.items()} == {"train": 3511, "val": 185, "test": 192}  # 3,696 = 462 x 8
    assert not any(one.sentence.startswith("SA") for chosen in named.values() for one in chosen)
    assert {one.speaker for one in named["test"]} == CORE_TEST
    assert not {one.speaker for one in named["test"]} & {one.speaker for one in named["train"] + named["val"]}
    assert not set(parts.train) & set(parts.val)
    assert len({one.speaker for one in named["val"]}) > 100  # utterances, not speakers, are drawn
    assert len(split(utterances, test_set="complete").test) == 1344
    with_sa = split(utterances, sa="train")
    assert len(with_sa.train) == 3511 + 924
    assert with_sa.val == parts.val
    assert len(split(utterances, val_fraction=0.1).val) == 370


@pytest.mark.parametrize("below", ["", "TIMIT", "nltk/../corpora/timit"])
def test_names_in_either_case_and_folders_above(below: str, tmp_path: Path) -> None:
    where = tmp_path / "data" / below.replace("nltk/../", "")
    upper = make_full(where)
    found = find_utterances(tmp_path / "data", allow_incomplete=True)
    assert len(found) == 40
    assert {one.part for one in found} == {"train", "test"}
    assert found[0].audio.is_relative_to(upper)
    for file in sorted(upper.rglob("*"), reverse=True):
        file.rename(file.with_name(file.name.lower()))
    assert [one.name for one in find_utterances(tmp_path / "data", allow_incomplete=True)] == [one.name for one in found]


def test_converted_copies_beside_the_originals_are_one_utterance(tmp_path: Path) -> None:
    root = make_full(tmp_path / "timit")
    for file in list(root.rglob("SA1.WAV")):
        write_riff(file.with_name("SA1.WAV.wav"), noise(4000, 1))
    assert [one.audio.name for one in find_utterances(root, allow_incomplete=True) if one.sentence == "SA1"] == ["SA1.WAV"] * 4


def test_sample_splits_are_disjoint_by_speaker_and_cover_all(sample: Path) -> None:
    utterances = find_utterances(sample)
    tested: list[str] = []
    for rotation in range(4):
        parts = split(utterances, rotation=rotation)
        speakers = {part: {utterances[i].speaker for i in getattr(parts, part)} for part in ("train", "val", "test")}
        assert (len(speakers["train"]), len(speakers["val"]), len(speakers["test"])) == (10, 2, 4)
        assert len(set.union(*speakers.values())) == 16  # disjoint
        assert (len(parts.train), len(parts.val), len(parts.test)) == (100, 16, 32)  # SA sentences are for training only
        assert sorted(one[0] for one in speakers["test"]) == ["F", "F", "M", "M"]
        assert sorted(one[0] for one in speakers["val"]) == ["F", "M"]
        assert len(split(utterances, rotation=rotation, sa="none").train) == 80
        tested += sorted(speakers["test"])
    assert len(set(tested)) == len(tested) == 16
    # This split must never change: published figures depend on it.
    assert [sorted(sample_speakers(r)[2]) for r in range(4)] == [
        ["FTLG0", "FVMH0", "MADC0", "MADD0"],
        ["FAEM0", "FAPB0", "MAEB0", "MBCG0"],
        ["FALK0", "FBLV0", "MBGT0", "MCPM0"],
        ["FALR0", "FBCG1", "MARC0", "MBMA1"],
    ]


def test_settings_of_the_split_are_checked(sample: Path) -> None:
    utterances = find_utterances(sample)
    for bad, words in (
        ({"rotation": 4}, "rotation: expected 0 to 3, found 4"),
        ({"sa": "yes"}, "sa: expected one of auto, train, none"),
        ({"test_set": "all"}, "test_set: expected one of core, complete"),
        ({"val_fraction": 0.0}, "val_fraction: expected a fraction"),
    ):
        with pytest.raises(ValueError, match=words):
            split(utterances, **bad)  # type: ignore[arg-type]


def test_missing_corpus_says_what_to_get(tmp_path: Path) -> None:
    for root in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(CorpusError, match=r"(?s)not found in .*LDC93S1.*nltk\.download.*--data\.root"):
            find_utterances(root)
    (tmp_path / "TRAIN" / "DR1").mkdir(parents=True)
    with pytest.raises(CorpusError, match=r"(?s)No TIMIT recording.*LDC93S1"):
        find_utterances(tmp_path, allow_incomplete=True)


def test_half_copied_sample_names_the_files(tmp_path: Path) -> None:
    root = make_sample(tmp_path / "timit", 500, 1000)
    (root / "dr1-fvmh0" / "si1.wav").unlink()
    (root / "dr4-maeb0" / "sx2.phn").unlink()
    for file in (root / "dr5-ftlg0").iterdir():
        file.unlink()
    for suffix in ("wav", "phn"):
        (root / "dr6-fapb0" / f"sx5.{suffix}").unlink()
    with pytest.raises(CorpusError) as caught:
        find_utterances(root)
    message = str(caught.value)
    for words in ("dr1-fvmh0/si1.wav", "dr4-maeb0/sx2.phn", "dr5-ftlg0", "dr6-fapb0: expected 5 sentences SX*, found 4"):
        assert words in message
    assert "dr2-faem0" not in message
    assert "--data.allow_incomplete" in message
    with pytest.raises(CorpusError, match=r"si1\.wav"):  # a file without its counterpart is never left out silently
        find_utterances(root, allow_incomplete=True)


def test_half_copied_full_corpus_names_what_is_missing(tmp_path: Path) -> None:
    root = make_full(tmp_path / "timit")
    with pytest.raises(CorpusError, match=r"(?s)expected 462 speakers, found 2.*expected 168 speakers, found 2.*core test set"):
        find_utterances(root)
    assert len(load_timit(root, allow_incomplete=True, cache_dir=tmp_path).names["test"]) == 16


# -- recordings and transcriptions --------------------------------------------------------------------------------------------


def test_sphere_and_riff_give_the_same_samples(tmp_path: Path) -> None:
    samples = noise(3000, 0)
    write_riff(tmp_path / "a.wav", samples)
    write_sphere(tmp_path / "b.wav", samples)
    assert np.array_equal(read_audio(tmp_path / "a.wav"), samples)
    assert np.array_equal(read_audio(tmp_path / "b.wav"), samples)


@pytest.mark.parametrize("write", [write_riff, write_sphere])
def test_truncated_recording(write: Any, tmp_path: Path) -> None:
    path = tmp_path / "si1.wav"
    write(path, noise(3000, 0))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CorpusError, match=r"si1\.wav.*truncated.*says 3000 samples, 2500 are there"):
        read_audio(path)


def test_what_is_no_recording(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    for content, words in ((b"", "an empty file"), (b"<html>not found</html>", "begins with"), (b"RIFF", "begins with")):
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=f"expected a NIST SPHERE or RIFF recording, found.*{words}"):
            read_audio(path)
    write_riff(path, noise(3000, 0), rate=8000)
    with pytest.raises(CorpusError, match="expected one channel at 16000 Hz, found 1 at 8000"):
        read_audio(path)
    for write in (write_riff, write_sphere):
        write(path, np.zeros(0, dtype=np.int16))
        with pytest.raises(CorpusError, match="empty"):
            read_audio(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the transcription is empty"),
        ("0 100 h#\n100 200 zz\n", "line 2: unknown phone 'zz'; expected one of aa, ae"),
        ("0 100\n", 'line 1: expected "first-sample end-sample phone"'),
        ("0 1.5 h#\n", "line 1: expected"),
        ("0 100 h#\n50 200 iy\n", "line 2: expected segments in order"),
        ("0 100 h#\n300 200 iy\n", "line 2: expected segments in order"),
        ("0 1000 h#\n1000 1161 iy\n", "ends at sample 1161, past the end of the audio"),
    ],
)
def test_bad_transcriptions(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "si1.phn"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CorpusError, match=words) as caught:
        read_phones(path, 1000)
    assert "si1.phn" in str(caught.value)
    path.write_text("0 1000 h#\n1000 1160 iy\n", encoding="utf-8")  # one frame of excess is accepted
    assert read_phones(path, 1000)[1].tolist() == [PHONES61.index("h#"), PHONES61.index("iy")]


def test_labels_are_those_of_the_frames_centres(tmp_path: Path) -> None:
    write_phones(tmp_path / "a.phn", 5000, 3, segments=9)
    text = (tmp_path / "a.phn").read_text(encoding="utf-8").splitlines()[1:-1]  # the first and the last segment have no label
    (tmp_path / "a.phn").write_text("\n".join(text))
    segments = [(int(first), int(end), phone) for first, end, phone in (line.split() for line in text)]
    bounds, phones = read_phones(tmp_path / "a.phn", 5000)
    found = labels_at(SETTINGS.centres(5000), bounds, phones)
    expected = []
    for frame in range(1 + (5000 - 400) // 160):
        centre = frame * 160 + 200
        here = [PHONES61.index(phone) for first, end, phone in segments if first <= centre < end]
        expected.append(here[0] if here else -1)
    assert found.tolist() == expected
    assert -1 in expected


# -- features -----------------------------------------------------------------------------------------------------------------


def mfcc_by_the_book(samples: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Compute Kaldi's MFCC in float64: no DC, pre-emphasis, Povey's window, 23 mel bands, DCT, lifter."""
    length, shift, size, bands = 400, 160, 512, 23
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / (length - 1))) ** 0.85

    def mel(hertz: Any) -> Any:
        return 1127.0 * np.log(1 + hertz / 700.0)

    edges = np.linspace(mel(20.0), mel(8000.0), bands + 2)
    bins = mel(np.arange(size // 2) * 16_000 / size)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    bank = np.minimum(rising, falling).clip(0)
    dct = np.sqrt(2 / bands) * np.cos(np.pi / bands * np.arange(13)[:, None] * (np.arange(bands) + 0.5))
    dct[0] = np.sqrt(1 / bands)
    lifter = 1 + 11 * np.sin(np.pi * np.arange(13) / 22)
    rows = []
    for first in range(0, len(samples) - length + 1, shift):
        x = samples[first : first + length].astype(np.float64)
        x = x - x.mean()
        x = np.concatenate([[x[0] - 0.97 * x[0]], x[1:] - 0.97 * x[:-1]]) * window
        power = np.abs(np.fft.rfft(x, size))[: size // 2] ** 2
        rows.append(dct @ np.log(np.maximum(bank @ power, np.finfo(np.float32).eps)) * lifter)
    return np.array(rows)


def slopes_by_the_book(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Compute HTK's deltas with a loop over frames."""
    last = len(x) - 1
    rows = [sum(n * (x[min(t + n, last)] - x[max(t - n, 0)]) for n in (1, 2)) / 10.0 for t in range(len(x))]
    return np.array(rows)


def check_features(samples: np.ndarray[Any, Any]) -> None:
    found = features(samples)
    static = mfcc_by_the_book(samples)
    first = slopes_by_the_book(static)
    expected = np.concatenate([static, first, slopes_by_the_book(first)], axis=1)
    assert found.shape == expected.shape == (SETTINGS.frames(len(samples)), 39)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 5e-3  # the coefficients' standard deviations are about 10


def test_features_against_the_book() -> None:
    for seed, count in ((0, 6000), (1, 400), (2, 559), (3, 560)):
        check_features(noise(count, seed))
    assert features(noise(399, 0)).shape == (0, 39)
    ramp = np.outer(np.arange(9.0), [1.0, -2.0])
    assert np.allclose(deltas(ramp)[2:-2], [1.0, -2.0])


def test_features_against_the_book_on_real_recordings() -> None:
    root = real_sample()
    for one in find_utterances(root)[::20]:
        check_features(read_audio(one.audio))


def test_features_against_lhotse_on_real_recordings() -> None:
    """Compare with lhotse, a second library with Kaldi's conventions."""
    root = real_sample()
    layers = pytest.importorskip("lhotse.features.kaldi.layers", reason="pip install lhotse")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lhotse warns that it uses another number of frames by default
        other = layers.Wav2MFCC(
            sampling_rate=16_000, dither=0.0, use_energy=False, num_filters=23, num_ceps=13, snip_edges=True, high_freq=0.0
        )
    for one in find_utterances(root)[::8]:
        samples = read_audio(one.audio)
        expected = other(torch.from_numpy(samples.astype(np.float32))[None])[0].numpy()
        assert np.abs(mfcc(samples) - expected).max() < 5e-3


def test_alignment_of_all_real_sentences() -> None:
    """Each segment has as many frames as centres lie in it, and all segments together have the utterance's frames."""
    root = real_sample()
    utterances = find_utterances(root)
    segments, unlabelled, seen = 0, 0, set()
    for one in utterances:
        count = len(read_audio(one.audio))
        bounds, phones = read_phones(one.phones, count)
        labels = labels_at(SETTINGS.centres(count), bounds, phones)
        assert len(labels) == 1 + (count - 400) // 160
        at = 0
        for (first, end), phone in zip(bounds.tolist(), phones.tolist(), strict=True):
            before = [min(max(-(-(sample - 200) // 160), 0), len(labels)) for sample in (first, end)]
            frames = before[1] - before[0]
            assert (labels[at : at + frames] == phone).all()
            at += frames
        assert (labels[at:] == -1).all()
        unlabelled += len(labels) - at
        segments += len(phones)
        seen |= set(phones.tolist())
    assert (len(utterances), segments, len(seen)) == (160, 6185, 61)
    assert unlabelled == 17  # in MADC0's SI1367, whose transcription ends 2,802 samples before its recording


def test_settings_of_the_features_are_checked() -> None:
    for bad in ({"coefficients": 0}, {"coefficients": 24}, {"delta_window": 0}, {"shift_ms": 0.0}):
        with pytest.raises(ValueError, match="1 <= coefficients <= mel_bands"):
            FeatureSettings(**bad)  # type: ignore[arg-type]


def test_missing_libraries_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_riff(tmp_path / "a.wav", noise(1000, 0))
    monkeypatch.setitem(sys.modules, "soundfile", None)
    monkeypatch.setitem(sys.modules, "kaldi_native_fbank", None)
    with pytest.raises(ImportError, match=r"soundfile.*pip install 'lightning-deepr\[timit\]'"):
        read_audio(tmp_path / "a.wav")
    with pytest.raises(ImportError, match=r"kaldi-native-fbank.*pip install 'lightning-deepr\[timit\]'"):
        mfcc(noise(1000, 0))


# -- loaded -------------------------------------------------------------------------------------------------------------------


def test_loaded_tensors(sample: Path, tmp_path: Path) -> None:
    data = load_timit(sample, rotation=1, cache_dir=tmp_path)
    assert torch.allclose(data.train.features.mean(0), torch.zeros(39), atol=1e-4)
    assert torch.allclose(data.train.features.std(0), torch.ones(39), atol=1e-2)
    by_name = {one.name: one for one in find_utterances(sample)}
    for part, names in ((data.train, data.names["train"]), (data.test, data.names["test"])):
        for number in (0, len(names) - 1):
            one = by_name[names[number]]
            x, y = part.utterance(number)
            samples = read_audio(one.audio)
            assert torch.allclose(x * data.std + data.mean, torch.from_numpy(features(samples)), atol=1e-3)
            raw = torch.from_numpy(labels_at(SETTINGS.centres(len(samples)), *read_phones(one.phones)))
            assert torch.equal(y, targets(raw, 60))
    folded = load_timit(sample, rotation=1, classes=39, cache_dir=tmp_path)
    known = data.test.labels != IGNORED
    assert torch.equal(known, folded.test.labels != IGNORED)
    assert torch.equal(folding(60).argmax(1)[data.test.labels[known]], folded.test.labels[known])
    with pytest.raises(ValueError, match="expected 60 or 39"):
        load_timit(sample, classes=61, cache_dir=tmp_path)


def test_too_short_an_utterance_is_named(tmp_path: Path) -> None:
    root = make_full(tmp_path / "timit")
    bad = next(root.rglob("SX3.WAV"))
    write_sphere(bad, noise(399, 0))
    bad.with_suffix(".PHN").write_text("0 399 h#\n", encoding="utf-8")
    with pytest.raises(CorpusError, match=r"SX3\.WAV.*shorter than one window: expected at least 400 samples, found 399"):
        load_timit(root, allow_incomplete=True, cache_dir=tmp_path)


# -- cache --------------------------------------------------------------------------------------------------------------------


class Counted:
    """Count how often features are extracted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times, original = 0, timit_cache.extract

        def extract(*arguments: Any) -> Any:
            self.times += 1
            return original(*arguments)

        monkeypatch.setattr(timit_cache, "extract", extract)


def test_cache_is_keyed_by_settings_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    utterances = find_utterances(make_full(tmp_path / "timit"), allow_incomplete=True)
    folder = tmp_path / "cache"
    first = cached_frames(utterances, SETTINGS, folder)
    again = cached_frames(utterances, SETTINGS, folder)
    assert counted.times == 1
    assert torch.equal(first.features, again.features)
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.offsets, again.offsets)
    assert again.labels.dtype == torch.int64
    cached_frames(utterances, FeatureSettings(mel_bands=26), folder)
    assert counted.times == 2
    write_phones(utterances[3].phones, 4000, 99)  # another transcription
    changed = cached_frames(utterances, SETTINGS, folder)
    assert counted.times == 3
    assert not torch.equal(changed.labels, first.labels)
    os.utime(utterances[0].audio, ns=(1, 1))
    cached_frames(utterances, SETTINGS, folder)
    assert counted.times == 4
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "flipped", "another"])
def test_corrupt_cache_is_made_again_with_a_notice(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    utterances = find_utterances(make_full(tmp_path / "timit"), allow_incomplete=True)
    first = cached_frames(utterances, SETTINGS, tmp_path)
    path = next(tmp_path.glob("timit-*.safetensors"))
    content = path.read_bytes()
    if damage == "another":
        cached_frames(utterances[:20], SETTINGS, tmp_path / "other")
        content = next((tmp_path / "other").glob("timit-*.safetensors")).read_bytes()
        counted.times -= 1
    middle = len(content) // 2
    path.write_bytes(
        {
            "cut": content[:-500],
            "empty": b"",
            "garbage": b"no tensors here" * 9,
            "flipped": content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1 :],
            "another": content,
        }[damage]
    )
    with pytest.warns(UserWarning, match="feature cache .* is damaged .* and is made again"):
        again = cached_frames(utterances, SETTINGS, tmp_path)
    assert counted.times == 2
    assert torch.equal(first.features, again.features)
    cached_frames(utterances, SETTINGS, tmp_path)
    assert counted.times == 2


def test_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    utterances = find_utterances(make_full(tmp_path / "timit"), allow_incomplete=True)
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="can't be written"):
        assert len(cached_frames(utterances, SETTINGS, tmp_path / "file")) == len(utterances)


def test_interrupted_extraction_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    utterances = find_utterances(make_full(tmp_path / "timit"), allow_incomplete=True)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(timit_cache.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached_frames(utterances, SETTINGS, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
def test_import_is_light() -> None:
    """The audio libraries are optional: they are imported only to read a file."""
    code = (
        "import sys, lightning_deepr.recipes.timit_data, lightning_deepr.recipes.speech; "
        "print([m for m in ('soundfile', 'kaldi_native_fbank') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_the_made_up_corpus_has_the_true_number_of_speakers() -> None:
    speakers = full_speakers()
    assert (len(set(speakers["train"])), len(set(speakers["test"]))) == (462, 168)
    assert not {name for _, name in speakers["train"]} & {name for _, name in speakers["test"]}
