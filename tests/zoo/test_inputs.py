"""A model says how it wants its input: from raw images and recordings to the recorded accuracy, and what is refused."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_deepr import densify, zoo
from lightning_deepr.recipes.characters import CHARACTERS
from lightning_deepr.recipes.cifar10 import CIFAR10DataModule
from lightning_deepr.recipes.crops import Crops
from lightning_deepr.recipes.digits import MNISTDataModule, embedded_digits
from lightning_deepr.recipes.text import read
from lightning_deepr.recipes.timit_phones import PHONES39
from lightning_deepr.zoo import inputs, registry
from lightning_deepr.zoo.inputs import ImageInput, SpeechInput, TextInput, input_of, recorded
from lightning_deepr.zoo.waves import resample, samples_of
from tests.helpers.made_up_timit import real_sample
from tests.helpers.optional import Optional

Image = Optional("PIL.Image")

DATA = os.environ.get("LIGHTNING_DEEPR_DATA", "")
LENET, CNN, LSTM = "lenet300_100.deepr_1pct_mnist", "cifar10_cnn.deepr_2pct_cifar10", "timit_blstm.deepr_1pct_timit_sample"
TRANSFORMER = "char_transformer.deepr_10pct_shakespeare"
needs = pytest.mark.skipif(not DATA, reason="set LIGHTNING_DEEPR_DATA to a folder with MNIST, CIFAR-10 and tinyshakespeare")


def picture(size: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# -- the same input in every form ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", zoo.list_models())
def test_every_model_says_how_it_wants_its_input(model: str) -> None:
    net, record = zoo.load(model), zoo.info(model)
    assert recorded(net.preprocess) == record["input"]
    shape = [50 if size is None else size for size in net.preprocess.shape]
    assert net(torch.zeros(2, *shape, dtype=net.preprocess.dtype)).shape[-1] == (
        60 if record["input"]["kind"] == "speech" else len(net.preprocess.classes)
    )
    assert input_of({"input": record["input"]}, None) == net.preprocess


def test_forms_of_a_grey_image_give_one_input() -> None:
    prepare = zoo.load(LENET).preprocess
    raw = embedded_digits()[2][3]
    wanted = raw.float()[None] / 255
    forms: list[Any] = [
        raw,
        raw[None],
        raw[:, :, None],
        raw.numpy(),
        raw.float() / 255,
        raw.double() / 255,
        Image.fromarray(raw.numpy()),
        Image.fromarray(raw.numpy()).convert("RGB"),
        Image.fromarray(raw.numpy()).convert("RGBA"),
    ]
    for form in forms:
        assert torch.equal(prepare(form), wanted)
    assert torch.equal(prepare(raw.expand(4, 1, 28, 28)), wanted.expand(4, 1, 28, 28))


def test_forms_of_a_colour_image_give_the_test_sets_input() -> None:
    prepare, raw = zoo.load(CNN).preprocess, picture()
    wanted = next(iter(Crops(raw[None], torch.zeros(1, dtype=torch.int64), 1)))[0][0]
    pixels = np.ascontiguousarray(raw.permute(1, 2, 0).numpy())
    for form in (raw, pixels, raw.float() / 255, Image.fromarray(pixels)):
        found = prepare(form)
        assert torch.equal(found, wanted) and found.is_contiguous()
    assert prepare(Image.fromarray(pixels).convert("P")).shape == (3, 24, 24)
    two = prepare(torch.stack([raw, picture(seed=1)]))
    assert two.shape == (2, 3, 24, 24) and torch.allclose(two[0], wanted, atol=1e-6)


def test_square_images_of_another_size_are_resized() -> None:
    prepare, raw = zoo.load(LENET).preprocess, embedded_digits()[2][0]
    large = raw.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.allclose(prepare(large), prepare(raw), atol=0.25)
    assert zoo.predict(LENET, large) == pytest.approx(zoo.predict(LENET, large.numpy()))
    assert zoo.predict(LENET, large).label == zoo.predict(LENET, raw).label


@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        ("7.png", TypeError, "a PIL image, an array or a tensor, found str"),
        (torch.zeros(28, 20), ValueError, "28 x 28 pixels or of that shape in another size, found 28 x 20"),
        (torch.zeros(3, 28, 28), ValueError, r"1 channel, \[1, 28, 28\].*found shape \[3, 28, 28\]. A PIL image is converted"),
        (torch.zeros(28), ValueError, r"found shape \[28\]"),
        (torch.zeros(0, 28), ValueError, r"found shape \[0, 28\]"),
        (torch.full((28, 28), 255.0), ValueError, "floats in 0 to 1, found 255 to 255.*without a normalization"),
        (torch.full((28, 28), -0.42), ValueError, "found -0.42"),
        (torch.full((28, 28), float("nan")), ValueError, "found nan"),
        (torch.zeros(28, 28, dtype=torch.int64), ValueError, "uint8.*found torch.int64"),
        (lambda: Image.new("I;16", (28, 28)), ValueError, 'found mode "I;16"'),
        (lambda: Image.new("RGBA", (28, 28)), ValueError, "transparent"),
    ],
)
def test_what_is_no_such_image_is_refused(image: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        zoo.load(LENET).preprocess(image() if callable(image) else image)


# -- predictions --------------------------------------------------------------------------------------------------------------


def test_one_line_to_the_name_of_a_class() -> None:
    _, _, images, labels = embedded_digits()
    net = zoo.load(LENET).train()
    found = zoo.predict(net, images[:200, None])
    assert net.training and len(found) == 200
    assert sum(one.label == str(int(label)) for one, label in zip(found, labels, strict=False)) > 190
    assert found[0] == pytest.approx(zoo.predict(LENET, images[0])) and 0 < found[0].probability <= 1
    assert zoo.predict(CNN, picture()).label in inputs.CIFAR10


def test_the_recipe_of_the_input_goes_with_the_network(tmp_path: Path) -> None:
    net = zoo.load(LENET)
    for one in (copy.deepcopy(net), zoo.load(LENET, dense=True), densify(zoo.load(LENET))):
        assert one.preprocess == net.preprocess
    assert pickle.loads(pickle.dumps(net.preprocess)) == net.preprocess
    assert not any("preprocess" in key for key in net.state_dict())
    path = zoo.save(net, tmp_path / "net.safetensors", input=recorded(net.preprocess))
    assert zoo.load(path).preprocess == net.preprocess and zoo.info(path)["input"] == recorded(net.preprocess)
    unknown = zoo.save(net, tmp_path / "other.safetensors")
    assert "input" not in zoo.info(unknown) and not hasattr(zoo.load(unknown), "preprocess")
    with pytest.raises(ValueError, match=r"expected a network with net\.preprocess"):
        zoo.predict(zoo.load(unknown), torch.zeros(28, 28))


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ("28 x 28 pixels", None),
        ({"kind": "video"}, None),
        ({"kind": "image"}, "missing"),
        ({"kind": "image", "height": 28, "width": 28, "channels": 2}, "channels"),
        ({"kind": "image", "height": 8, "width": 8, "channels": 1, "crop": 9}, "crop"),
        ({"kind": "image", "height": "8", "width": 8, "channels": 1}, "not supported"),
        ({"kind": "speech", "mean": [0.0], "std": [0.0]}, "above 0"),
    ],
    ids=str,
)
def test_another_record_is_none_and_the_file_loads(record: Any, told: str | None, tmp_path: Path) -> None:
    path = zoo.save(zoo.load(LENET), tmp_path / "net.safetensors", input=record)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net = zoo.load(path)
    assert not hasattr(net, "preprocess") and [told in str(one.message) for one in caught if told] == [True] * bool(told)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert zoo.info(path)["input"] == record and "task" not in zoo.info(path)


# -- lists --------------------------------------------------------------------------------------------------------------------


def test_lists_by_task_connectivity_and_bytes() -> None:
    everything = zoo.list_models()
    by_task = [zoo.list_models(task=task) for task in ("image-classification", "audio-classification", "text-generation")]
    assert sorted(name for names in by_task for name in names) == sorted(everything) and all(by_task)
    few = zoo.list_models(connectivity=0.011)
    assert few and all(zoo.info(name)["connectivity"]["connectivity"] <= 0.011 for name in few)
    between = zoo.list_models("lenet*", connectivity=(0.05, 0.2))
    assert {name.split("_")[2] for name in between} >= {"5pct", "10pct"} and not set(between) & set(few)
    assert all(zoo.info(name)["bytes"] <= 30_000 for name in zoo.list_models(max_bytes=30_000))
    with pytest.raises(
        ValueError, match="expected audio-classification, image-classification or text-generation, found 'text'"
    ):
        zoo.list_models(task="text")
    for bad in (1.5, (0.5, 0.1), float("nan")):
        with pytest.raises(ValueError, match="connectivity: expected a share"):
            zoo.list_models(connectivity=bad)  # type: ignore[arg-type]


def test_a_task_whose_models_are_not_in_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ENTRIES", tuple(entry for entry in registry.ENTRIES if entry.in_wheel))
    assert zoo.list_models(task="text-generation") == [] and zoo.list_models(task="audio-classification")


# -- recordings ---------------------------------------------------------------------------------------------------------------


def tone(rate: int, hertz: float, seconds: float = 0.5) -> Any:
    return np.round(8000 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.int16)


@pytest.mark.parametrize("rate", [44_100, 48_000, 22_050])
def test_a_higher_rate_is_converted(rate: int) -> None:
    found, wanted = resample(tone(rate, 1000), rate, 16_000).astype(float), tone(16_000, 1000).astype(float)
    inner = slice(200, min(len(found), len(wanted)) - 200)
    assert np.abs(found[inner] - wanted[inner]).max() < 40  # of 8,000
    if rate > 2 * 9000:
        assert np.abs(resample(tone(rate, 9500), rate, 16_000)[200:-200]).max() < 400  # above half of the new rate


@pytest.mark.parametrize(
    ("wave", "rate", "error", "words"),
    [
        ("a.wav", None, TypeError, "found str"),
        (np.zeros((2, 16_000), np.int16), None, ValueError, r"one channel.*found shape \[2, 16000\]"),
        (np.zeros(16_000, np.int32), None, ValueError, "found int32"),
        (np.full(16_000, 3.0), None, ValueError, "floats in -1 to 1, found 3"),
        (np.full(16_000, np.nan), None, ValueError, "found nan"),
        (np.zeros(16_000, np.int16), 8_000, ValueError, "at least 16,000 samples per second, found 8000"),
        (np.zeros(16_000, np.int16), 0, ValueError, "found 0"),
    ],
)
def test_what_is_no_such_recording_is_refused(wave: Any, rate: int | None, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        zoo.load(LSTM).preprocess(wave, rate)


def test_forms_of_a_recording_give_the_same_features() -> None:
    pytest.importorskip("kaldi_native_fbank")
    prepare, wave = zoo.load(LSTM).preprocess, tone(16_000, 700)
    wanted = prepare(wave)
    assert wanted.shape == (48, 39) and wanted.dtype is torch.float32
    for form in (torch.from_numpy(wave), torch.from_numpy(wave)[None], wave / 32768, (wave / 32768).astype(np.float32)):
        assert torch.equal(prepare(form), wanted)
    assert np.array_equal(samples_of(wave), wave)
    with pytest.raises(ValueError, match=r"at least 25 ms, found 6\.2 ms"):
        prepare(wave[:100])
    found = zoo.predict(LSTM, wave)
    assert len(found) == 48 and {one.label for one in found} <= set(PHONES39)


def test_the_recorded_statistics_are_those_of_the_sample() -> None:
    from lightning_deepr.recipes.timit_data import load_timit

    prepare = zoo.load(LSTM).preprocess
    assert isinstance(prepare, SpeechInput)
    found = load_timit(real_sample())
    assert torch.equal(found.mean, torch.tensor(prepare.mean)) and torch.equal(found.std, torch.tensor(prepare.std))


# -- the recorded accuracy, from raw data -------------------------------------------------------------------------------------


# -- texts --------------------------------------------------------------------------------------------------------------------


def test_a_text_becomes_numbers_and_the_next_character() -> None:
    net = zoo.load(TRANSFORMER)
    x = net.preprocess("ROMEO:")
    assert x.tolist() == [CHARACTERS.index(one) for one in "ROMEO:"] and x.dtype is torch.int64
    long = "to be, or not to be: " * 10
    assert torch.equal(net.preprocess(long), net.preprocess(long[-64:])) and len(net.preprocess(long)) == 64
    found = zoo.predict(net, "Now is the winter of our disconten")
    with torch.no_grad():
        logits = net(net.preprocess("Now is the winter of our disconten")[None])[0, -1]
    assert found.number == int(logits.argmax()) and found.label == CHARACTERS[found.number] == "t"
    assert found.probability == pytest.approx(float(logits.softmax(0).max()))


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("", ValueError, "at least one character, found an empty one"),
        ("Zo\u00eb 7", ValueError, "found '7', '\u00eb': leave them out"),
        (b"bytes", TypeError, "a string.*found bytes"),
        (["a", "b"], TypeError, "a string.*found list"),
        (torch.zeros(3), TypeError, "a string.*found Tensor"),
    ],
)
def test_texts_that_do_not_fit_are_refused(text: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        zoo.predict(TRANSFORMER, text)


def test_a_record_of_a_text_that_can_not_be_is_none() -> None:
    good = recorded(TextInput(8, ("a", "b")))
    assert input_of({"input": good}, None) == TextInput(8, ("a", "b"))
    for wrong in ({"context": 0}, {"classes": ["a", "a"]}, {"classes": ["ab"]}):
        with pytest.warns(UserWarning, match="can't be read"):
            assert input_of({"input": {**good, **wrong}}, None) is None


@pytest.mark.slow
@needs
@pytest.mark.parametrize("model", zoo.list_models(task="text-generation"))
def test_the_recorded_accuracy_from_raw_text(model: str) -> None:
    """Each window of the test text, as a string: the network's characters against those that follow."""
    net, text = zoo.load(model), read(DATA)
    part = text[int(0.95 * len(text)) :]
    size = net.preprocess.context
    windows = range((len(part) - 1) // size)
    x = torch.stack([net.preprocess(part[i * size : (i + 1) * size]) for i in windows])
    y = torch.stack([net.preprocess(part[i * size + 1 : (i + 1) * size + 1]) for i in windows])
    with torch.no_grad():
        right = sum(int((net(a).argmax(-1) == b).sum()) for a, b in zip(x.split(64), y.split(64), strict=True))
    metric = zoo.info(model)["metrics"]["test_accuracy"]
    assert y.numel() == metric["examples"] and abs(right - metric["correct"]) <= 1


@pytest.mark.slow
@needs
@pytest.mark.parametrize("model", zoo.list_models(task="image-classification"))
def test_the_recorded_accuracy_from_raw_images(model: str) -> None:
    net = zoo.load(model)
    module = MNISTDataModule(DATA) if "mnist" in model else CIFAR10DataModule(DATA)
    _, _, images, labels = module.load()
    if images.dim() == 3:
        images = images[:, None]
    with torch.no_grad():
        right = sum(
            int((net(net.preprocess(images[i : i + 1000])).argmax(1) == labels[i : i + 1000]).sum())
            for i in range(0, len(images), 1000)
        )
    assert abs(right - zoo.info(model)["metrics"]["test_accuracy"]["correct"]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("model", zoo.list_models(task="audio-classification"))
def test_the_recorded_accuracy_from_raw_recordings(model: str) -> None:
    from lightning_deepr.recipes.timit_corpus import find_utterances
    from lightning_deepr.recipes.timit_data import load_timit
    from lightning_deepr.recipes.timit_files import read_audio
    from lightning_deepr.zoo.verification import counting

    sample = real_sample()
    net, data, right, frames = zoo.load(model), load_timit(sample), 0, 0
    by_name = {one.name: one for one in find_utterances(sample)}
    for number, name in enumerate(data.names["test"]):
        x, labels = net.preprocess(read_audio(by_name[name].audio)), data.test.utterance(number)[1]
        with torch.no_grad():
            hit, counted = counting("timit_blstm")(net(x[None]), labels[None])
        right, frames = right + hit, frames + counted
    recorded_metric = zoo.info(model)["metrics"]["test_frame_accuracy"]
    assert frames == recorded_metric["examples"] and abs(right - recorded_metric["correct"]) <= 1


def test_an_input_of_ones_own() -> None:
    prepare = ImageInput(10, 12, 3, crop=8)
    raw = torch.rand(3, 10, 12)
    assert prepare.shape == (3, 8, 8) and torch.allclose(prepare(raw), raw[:, 1:9, 2:10], atol=3e-3)
