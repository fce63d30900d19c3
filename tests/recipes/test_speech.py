"""Sequences from batch to loss to recipe: padding without effect, a masked loss, resumed training."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

from lightning_deepr import DeepR, connections, sparsify
from lightning_deepr.models import BLSTMClassifier
from lightning_deepr.recipes import running
from lightning_deepr.recipes.best_weights import BestWeights
from lightning_deepr.recipes.sequences import SequenceBatches
from lightning_deepr.recipes.speech import FrameClassifier, disturbed, frame_errors, frame_loss
from lightning_deepr.recipes.timit_cache import Frames
from lightning_deepr.recipes.timit_phones import FOLD, IGNORED, PHONES39, PHONES60, folding
from tests.helpers.crashes import Crash, CrashAt
from tests.helpers.made_up_timit import make_full, make_sample
from tests.helpers.optional import needs


def some_frames(lengths: tuple[int, ...] = (30, 17, 44, 8, 25, 31, 12), features: int = 39) -> Frames:
    """Every frame's first feature is its number, so that a test can find the origin of a frame."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    x = torch.randn(total, features, generator=generator)
    x[:, 0] = torch.arange(total)
    labels = torch.randint(0, 60, (total,), generator=generator)
    labels[torch.rand(total, generator=generator) < 0.1] = IGNORED
    return Frames(x, labels, torch.tensor([0, *lengths]).cumsum(0))


def small_frames(**kwargs: Any) -> Frames:
    frames = some_frames(**kwargs)
    frames.features[:, 0] /= 100  # scaled like the other features
    return frames


# -- batches ------------------------------------------------------------------------------------------------------------------


def test_whole_utterances_come_once_per_epoch_padded() -> None:
    frames = some_frames()
    loader = SequenceBatches(frames, 3, shuffle=True, seed=5)
    orders = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        seen = []
        for features, labels, lengths in loader:
            assert features.shape[1] == labels.shape[1] == lengths.max()
            for x, y, length in zip(features, labels, lengths.tolist(), strict=True):
                number = int((frames.offsets == x[0, 0]).nonzero())
                assert torch.equal(x[:length], frames.utterance(number)[0])
                assert torch.equal(y[:length], frames.utterance(number)[1])
                assert (x[length:] == 0).all()
                assert (y[length:] == IGNORED).all()
                seen.append(number)
        orders.append(seen)
    assert len(loader) == 3
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(7))
    assert orders[0] == orders[2] != orders[1]


def test_chunks_lie_anywhere_in_their_utterance() -> None:
    frames = some_frames()
    loader = SequenceBatches(frames, 4, chunk_frames=10, shuffle=True)
    counts = torch.zeros(len(frames.labels))
    for epoch in range(300):
        loader.set_epoch(epoch)
        per_utterance = [0] * 7
        for features, labels, lengths in loader:
            for x, y, length in zip(features, labels, lengths.tolist(), strict=True):
                first = int(x[0, 0])
                number = int((frames.offsets <= first).sum()) - 1
                assert length == min(10, int(frames.lengths[number]))
                assert first + length <= int(frames.offsets[number + 1])
                assert torch.equal(x[:length], frames.features[first : first + length])
                assert torch.equal(y[:length], frames.labels[first : first + length])
                per_utterance[number] += 1
                counts[first] += 1
        assert per_utterance == [3, 2, 5, 1, 3, 4, 2]  # length over 10, rounded up
    starts = counts[:21]  # 900 chunks of the first utterance with 30 frames
    assert starts.sum() == 900
    assert ((starts - 900 / 21) ** 2 / (900 / 21)).sum() < 50  # chi-squared with 20 degrees of freedom
    assert counts[21:30].sum() == 0


def test_chunks_without_shuffling_cover_everything() -> None:
    frames = some_frames()
    seen = torch.cat([x[:, :, 0][y != IGNORED].flatten() for x, y, _ in SequenceBatches(frames, 4, chunk_frames=10)])
    assert torch.equal(seen.unique(), torch.arange(len(frames.labels))[frames.labels != IGNORED].float())


@pytest.mark.parametrize("chunk", [None, 10])
def test_batches_go_on_in_the_middle_of_an_epoch(chunk: int | None) -> None:
    def make() -> SequenceBatches:
        loader = SequenceBatches(some_frames(), 2, chunk_frames=chunk, shuffle=True)
        loader.set_epoch(3)
        return loader

    whole, first, second = list(make()), make(), make()
    stream = iter(first)
    next(stream), next(stream)
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert len(rest) == len(whole) - 2
    for found, expected in zip(rest, whole[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(list(second)) == len(whole)  # the epoch after it is whole


def test_settings_of_the_batches_are_checked() -> None:
    for bad in ({"batch_size": 0}, {"batch_size": 2, "chunk_frames": 0}):
        with pytest.raises(ValueError, match="batch_size >= 1 and chunk_frames >= 1"):
            SequenceBatches(some_frames(), **bad)


# -- network and loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connectivity", [None, 0.3])
@pytest.mark.parametrize("layers", [1, 2])
def test_padding_is_invisible(layers: int, connectivity: float | None) -> None:
    torch.manual_seed(0)
    net = BLSTMClassifier(hidden=8, layers=layers)
    if connectivity:
        sparsify(net, connectivity, distribution="uniform")
    frames = small_frames()
    batch = SequenceBatches(frames, 7)._batch(torch.arange(7), torch.zeros(7, dtype=torch.int64))
    logits = net(batch.features, batch.lengths)
    past = torch.arange(44) >= batch.lengths[:, None]
    spoiled = batch.features.masked_fill(past[:, :, None], 1e3)
    other = net(spoiled, batch.lengths)
    with torch.no_grad():  # without a backward pass the network packs the sequences
        assert torch.allclose(net(spoiled, batch.lengths)[~past], logits[~past], atol=1e-6)
    for number, length in enumerate(batch.lengths.tolist()):
        alone = net(frames.utterance(number)[0][None])[0]
        assert torch.allclose(logits[number, :length], alone, atol=1e-6)
        assert torch.equal(other[number, :length], logits[number, :length])
    # The check can fail: a backward direction that reads the padding gives another result.
    assert not torch.allclose(net(spoiled)[3, :8], logits[3, :8], atol=1e-2)


def test_lengths_are_checked() -> None:
    net = BLSTMClassifier(hidden=4)
    with pytest.raises(ValueError, match=r"lengths: expected one per sequence, shape \(2,\), found \(3,\)"):
        net(torch.zeros(2, 5, 39), torch.tensor([5, 5, 5]))
    with pytest.raises(ValueError, match="lengths: expected 1 to 5 frames, found 0 to 6"):
        net(torch.zeros(2, 5, 39), torch.tensor([0, 6]))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("compute", [None, "dense", "sparse"])
def test_the_loss_is_that_of_a_loop_over_utterances(compute: str | None, layers: int) -> None:
    torch.manual_seed(0)
    net = BLSTMClassifier(hidden=8, layers=layers).double()
    if compute:
        sparsify(net, 0.3, compute=compute)
    frames = small_frames()
    frames.features = frames.features.double()
    batch = SequenceBatches(frames, 7)._batch(torch.arange(7), torch.zeros(7, dtype=torch.int64))
    found = frame_loss(net(batch.features, batch.lengths), batch.labels)
    grads = torch.autograd.grad(found, list(net.parameters()))
    total, count = torch.zeros((), dtype=torch.float64), 0
    for number in range(7):
        x, y = frames.utterance(number)
        log_posteriors = net(x[None])[0].log_softmax(-1)
        for frame, label in enumerate(y.tolist()):
            if label != IGNORED:
                total = total - log_posteriors[frame, label]
                count += 1
    slow = total / count
    assert torch.allclose(found, slow, rtol=1e-10)
    for grad, expected in zip(grads, torch.autograd.grad(slow, list(net.parameters())), strict=True):
        assert torch.allclose(grad, expected, rtol=1e-7, atol=1e-12)
    nothing = frame_loss(torch.randn(1, 3, 60, requires_grad=True), torch.full((1, 3), IGNORED))
    assert nothing.item() == 0
    nothing.backward()


@pytest.mark.parametrize("classes", [60, 39])
def test_frame_errors_are_those_of_the_folded_classes(classes: int) -> None:
    torch.manual_seed(1)
    logits, labels = torch.randn(3, 40, classes) * 2, torch.randint(0, classes, (3, 40))
    labels[0, 5:] = IGNORED
    names = PHONES60 if classes == 60 else PHONES39
    expected = []
    for row, label in zip(logits.softmax(-1).flatten(0, 1).tolist(), labels.flatten().tolist(), strict=True):
        if label == IGNORED:
            continue
        sums = dict.fromkeys(PHONES39, 0.0)
        for name, posterior in zip(names, row, strict=True):
            sums[FOLD.get(name, name) if classes == 60 else name] += posterior
        truth = FOLD[names[label]] if classes == 60 else names[label]
        expected.append(float(max(sums, key=lambda name: sums[name]) != truth))
    assert frame_errors(logits, labels, folding(classes)).tolist() == expected
    assert 0 < sum(expected) < len(expected)


# -- training -----------------------------------------------------------------------------------------------------------------


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: dict[str, Tensor], *_: Any) -> None:
        self.losses.append(float(outputs["loss"].detach()))


def fit(folder: Path, *callbacks: Callback, steps: int = 9, ckpt_path: str | None = None, **settings: Any) -> FrameClassifier:
    """Train on chunks of 7 utterances, 9 batches an epoch."""
    seed_everything(3)
    module = FrameClassifier(
        **{
            "hidden": 8,
            "lr": 0.02,
            "schedule": "cosine",
            "input_noise": 0.5,
            "input_offset": 0.5,
            "dropout": 0.3,
            "layers": 2,
            **settings,
        }
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[DeepR(0.3, l1=0.3, seed=3, check_invariants=True), *callbacks],
    )
    loader = SequenceBatches(small_frames(), 2, chunk_frames=12, shuffle=True, seed=1)
    trainer.fit(module, loader, SequenceBatches(small_frames(), 4), ckpt_path=ckpt_path)
    return module


def average() -> EMAWeightAveraging:
    return EMAWeightAveraging(use_buffers=False, decay=0.9)


@pytest.mark.parametrize(("saved", "crash"), [(4, 6), (5, 12), (9, 11)])
def test_interrupted_training_goes_on_to_equal_weights(saved: int, crash: int, tmp_path: Path) -> None:
    """With noise, dropout, rewiring and averaging, an interruption in the first epoch, in the second or between them."""
    straight, first, rest = Losses(), Losses(), Losses()
    expected = fit(tmp_path / "a", straight, average(), steps=13)
    checkpoints = ModelCheckpoint(dirpath=tmp_path / "b", every_n_train_steps=saved, save_top_k=1, filename="at")
    with pytest.raises(Crash):
        fit(tmp_path / "b", CrashAt(crash), first, average(), checkpoints, steps=13)
    found = fit(tmp_path / "b", rest, average(), steps=13, ckpt_path=str(tmp_path / "b" / "at.ckpt"))
    done = crash // saved * saved
    assert len(straight.losses) == 13
    assert len(rest.losses) == 13 - done
    assert first.losses[:done] + rest.losses == straight.losses
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_noise_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    module = FrameClassifier(hidden=4, input_noise=0.5, dropout=0.5, seed=1)
    module.log = lambda *_, **__: None  # type: ignore[method-assign,assignment]
    batch = SequenceBatches(small_frames(), 7)._batch(torch.arange(7), torch.zeros(7, dtype=torch.int64))
    torch.manual_seed(11)
    before, seed = torch.get_rng_state(), torch.initial_seed()
    losses = [module.training_step(batch, i).item() for i in (0, 1, 0)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.initial_seed() == seed
    assert losses[0] == losses[2] != losses[1]
    module.eval()
    assert torch.equal(module(*batch[::2]), module(*batch[::2]))


def test_the_offset_is_the_same_in_all_frames_of_a_sequence() -> None:
    features = torch.zeros(400, 7, 5)
    torch.manual_seed(0)
    offset = disturbed(features, 0.0, 0.5)
    assert torch.equal(offset, offset[:, :1].expand_as(offset)) and abs(float(offset[:, 0].std()) - 0.5) < 0.03
    both = disturbed(features, 0.3, 0.5)
    assert abs(float((both - both.mean(1, keepdim=True)).var() * 7 / 6) - 0.09) < 0.01
    assert abs(float(both.var()) - 0.34) < 0.03
    assert disturbed(features, 0.0, 0.0) is features


def test_every_tensor_of_both_directions_is_rewired(tmp_path: Path) -> None:
    class Places(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            self.before = {name: places.clone() for name, (_, places, _) in connections(pl_module).items()}

    places = Places()
    module = fit(tmp_path, places, steps=16, layers=1)
    after = connections(module)
    assert set(after) == {
        "net.head.weight",
        *(f"net.lstm.weight_{kind}_l0{end}" for kind in ("ih", "hh") for end in ("", "_reverse")),
    }
    for name, (_, now, _) in after.items():
        assert len(now) == len(places.before[name])
        assert set(now.tolist()) != set(places.before[name].tolist()), name


def test_best_weights_are_those_of_the_best_validation(tmp_path: Path) -> None:
    losses: list[float] = []

    class FirstIsBest(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            pl_module.log("rank", float(len(losses)))
            losses.append(float(trainer.callback_metrics["val_loss"]))

    checkpoint = ModelCheckpoint(dirpath=tmp_path, monitor="rank", filename="best", save_on_train_epoch_end=False)
    module = fit(tmp_path, average(), FirstIsBest(), BestWeights(), checkpoint, steps=40)
    assert len(losses) >= 4
    module.eval()
    batches = list(SequenceBatches(small_frames(), 4))
    frames = torch.tensor([float((labels != IGNORED).sum()) for _, labels, _ in batches])
    with torch.no_grad():
        found = torch.stack([frame_loss(module(x, lengths), labels) for x, labels, lengths in batches])
    assert float((found * frames).sum() / frames.sum()) == pytest.approx(losses[0], rel=1e-5)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-2)
    with pytest.raises(ValueError, match="BestWeights: expected a ModelCheckpoint with a monitor"):
        fit(tmp_path, BestWeights(), steps=1)


def test_settings_of_the_module_are_checked() -> None:
    with pytest.raises(ValueError, match="schedule: expected one of constant, cosine, found 'linear'"):
        FrameClassifier(schedule="linear")
    with pytest.raises(ValueError, match="input_noise: expected a standard deviation"):
        FrameClassifier(input_noise=-1.0)
    with pytest.raises(ValueError, match="input_offset: expected a standard deviation"):
        FrameClassifier(input_offset=-1.0)
    with pytest.raises(ValueError, match="expected 60 or 39 classes"):
        FrameClassifier(classes=61)


# -- recipes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timit_sample", "timit"])
def test_recipes_train_on_made_up_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("soundfile", reason="pip install 'lightning-deepr[timit]'")
    pytest.importorskip("kaldi_native_fbank", reason="pip install 'lightning-deepr[timit]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(sys, "argv", ["lightning-deepr"])
    data = make_sample(tmp_path / "timit") if name == "timit_sample" else make_full(tmp_path / "timit", speakers=5)
    recipe = tmp_path / f"{name}.yaml"
    text, times = re.subn(
        r"every_n_train_steps: \d+", "every_n_train_steps: 3", Path(running.find_recipe(name)).read_text(encoding="utf-8")
    )
    assert times == 1
    recipe.write_text(text, encoding="utf-8")
    arguments = [
        "fit", "--config", str(recipe), "--data.root", str(data), "--data.cache_dir", str(tmp_path / "cache"),
        "--data.allow_incomplete", str(name == "timit").lower(), "--trainer.max_epochs", "-1", "--model.hidden", "64",
        "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    done = running.train([*arguments, "--trainer.max_steps", "7"])
    assert done.trainer.global_step == 7
    assert "test_frame_error" in done.trainer.callback_metrics
    left = tmp_path / "runs" / name
    assert (left / "sparse.safetensors").is_file()
    assert (left / "checkpoints" / "best.ckpt").is_file()
    last = left / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 6  # an epoch has 2 or 4 batches
    again = running.train([*arguments, "--trainer.max_steps", "10", "--ckpt_path", str(last)])
    assert again.trainer.global_step == 10
    assert torch.load(last, weights_only=True)["global_step"] == 9


@needs("jsonargparse")
def test_recipe_without_the_corpus_says_what_to_get(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(sys, "argv", ["lightning-deepr"])
    with pytest.raises(RuntimeError, match=r"(?s)corpus was not found in .*nowhere.*LDC93S1.*nltk\.download.*--data\.root"):
        running.train(["fit", "--config", "timit_sample", "--data.root", "nowhere"])
