"""The text recipe: the data's checks, windows that cover the text, interruption, and a short training."""

from __future__ import annotations

import hashlib
import lzma
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_deepr import DeepR, connectivity_report
from lightning_deepr.recipes import text
from lightning_deepr.recipes.characters import CHARACTERS, encode
from lightning_deepr.recipes.language import CharacterModel
from tests.helpers.crashes import Crash, CrashAt

SPEECH = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n" * 40


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a short text in the place of Tiny Shakespeare."""
    (tmp_path / text.FOLDER).mkdir()
    (tmp_path / text.FOLDER / f"{text.FILE}.xz").write_bytes(lzma.compress(SPEECH.encode()))
    monkeypatch.setattr(text, "SHA256", hashlib.sha256(SPEECH.encode()).hexdigest())
    return tmp_path


# -- data ---------------------------------------------------------------------------------------------------------------------


def test_a_missing_text_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "URL", "http://127.0.0.1:9/input.txt")  # no network
    with pytest.raises(FileNotFoundError, match=r"(?s)was not found: expected .*input.txt.*--data.root.*not be downloaded"):
        text.ShakespeareDataModule(str(tmp_path)).prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_kept_and_checked(made_up: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = made_up / "source.txt"
    source.write_text(SPEECH, encoding="utf-8", newline="\n")
    empty = tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "URL", source.as_uri())
        text.ShakespeareDataModule(str(empty)).prepare_data()
        assert text.read(empty) == SPEECH == text.read(made_up)
        patch.setattr(text, "SHA256", "0" * 64)
        with pytest.raises(ValueError, match=r"expected Tiny Shakespeare with sha256 0000.*found another text"):
            text.ShakespeareDataModule(str(empty)).prepare_data()


def test_unknown_characters_are_named() -> None:
    with pytest.raises(ValueError, match="found '7', '\u00e9': leave them out"):
        encode("caf\u00e9 7")


def test_the_parts_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up text as long as Tiny Shakespeare, of its characters: the parts that nanoGPT and the Hub have."""
    raw = (CHARACTERS * 17_160)[:1_115_394]
    (tmp_path / text.FOLDER).mkdir()
    (tmp_path / text.FOLDER / text.FILE).write_bytes(raw.encode())
    monkeypatch.setattr(text, "SHA256", hashlib.sha256(raw.encode()).hexdigest())
    parts = text.ShakespeareDataModule(str(tmp_path)).load()
    assert [len(part) for part in parts] == [1_003_854, 55_770, 55_770]
    assert "".join(CHARACTERS[number] for number in torch.cat(parts).tolist()) == raw
    assert len(set(CHARACTERS)) == 65 and "".join(sorted(CHARACTERS)) == CHARACTERS


def test_the_windows_of_an_epoch_cover_the_text_once() -> None:
    numbers = torch.arange(1000)
    loader = text.TextBatches(numbers, 7, 16, shuffle=True, seed=3)
    firsts = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader) and sum(len(x) for x, _ in batches) == loader.windows
        x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
        assert torch.equal(y, x + 1)
        seen = x.flatten().sort().values
        assert torch.equal(seen, torch.arange(int(seen[0]), int(seen[0]) + len(seen)))  # once each, without gaps
        assert int(seen[0]) < 16 and len(seen) > 1000 - 2 * 16
        firsts.append((int(seen[0]), x[0].tolist()))
    assert firsts[0] == firsts[2] != firsts[1]
    plain = torch.cat([x for x, _ in text.TextBatches(numbers, 7, 16)])
    assert torch.equal(plain.flatten(), numbers[: len(plain) * 16]) and len(plain) == 999 // 16


@pytest.mark.parametrize("first", range(16))
def test_every_offset_fits_into_the_text(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text.randomness, "key", lambda *numbers: first)
    for length in (33, 47, 48, 49):
        batches = list(text.TextBatches(torch.arange(length), 2, 16, shuffle=True))
        assert max(int(y.max()) for _, y in batches) < length


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"context": 0}, {"context": 10_000}])
def test_wrong_sizes_are_refused(wrong: dict[str, int], made_up: Path) -> None:
    with pytest.raises(ValueError, match=r"expected batch_size"):
        text.ShakespeareDataModule(str(made_up), **wrong).val_dataloader()


# -- training -----------------------------------------------------------------------------------------------------------------


def fit(root: Path, out: Path, *callbacks: Any, resume: Path | None = None) -> tuple[CharacterModel, Trainer]:
    seed_everything(4, verbose=False)
    model = CharacterModel(width=32, layers=1, heads=2, context=16)
    data = text.ShakespeareDataModule(str(root), batch_size=8, context=16)
    rewiring = DeepR(0.2, target_modules=["*.layers.*"], seed=1)
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[rewiring, *callbacks], enable_checkpointing=bool(callbacks), default_root_dir=out, gradient_clip_val=1.0,
    )  # fmt: skip
    trainer.fit(model, datamodule=data, ckpt_path=None if resume is None else str(resume))
    return model, trainer


def test_training_and_its_numbers(made_up: Path, tmp_path: Path) -> None:
    model, trainer = fit(made_up, tmp_path)
    found = trainer.test(model, datamodule=trainer.datamodule, verbose=False)[0]
    batches = list(trainer.datamodule.test_dataloader())
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in batches]).double()
    labels = torch.cat([y for _, y in batches])
    chosen = logits.log_softmax(-1).gather(2, labels[..., None])
    assert found["test_loss"] == pytest.approx(-float(chosen.mean()), rel=1e-5)
    assert found["test_bits"] == pytest.approx(-float(chosen.mean()) / 0.6931472, rel=1e-5)
    assert found["test_accuracy"] == pytest.approx(float((logits.argmax(-1) == labels).double().mean()), abs=1e-6)
    assert found["test_loss"] < 3.6 < 4.17  # of 65 characters alike
    assert connectivity_report(model).active == round(0.2 * 12 * 32 * 32)


def test_an_interrupted_training_ends_in_the_same_network(made_up: Path, tmp_path: Path) -> None:
    whole, trainer = fit(made_up, tmp_path / "whole")
    steps = trainer.global_step
    saving = ModelCheckpoint(dirpath=tmp_path / "saved", filename="last", every_n_train_steps=1, enable_version_counter=False)
    with pytest.raises(Crash):
        fit(made_up, tmp_path / "cut", saving, CrashAt(steps // 2 + 3))
    again, _ = fit(made_up, tmp_path / "again", resume=tmp_path / "saved/last.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_wrong_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup: expected a share"):
        CharacterModel(warmup=1.0)
