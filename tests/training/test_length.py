"""How long a training is: what changes over it has to end where it ends."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, Timer
from torch.utils.data import DataLoader, IterableDataset

from lightning_deepr import DeepR, LinearDecay, MagnitudePruning, connectivity_report
from tests.helpers.classifier import Net, batches
from tests.helpers.trainer import trainer


class Noting(DeepR):
    """Notes alpha in every step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alphas: list[float] = []

    def after_step(self, stepped: Sequence[Any], optimizer: torch.optim.Optimizer) -> None:
        self.alphas.append(stepped[0].alpha)
        super().after_step(stepped, optimizer)


class Stream(IterableDataset):
    def __init__(self, length: int | None) -> None:
        self.rows = list(batches().dataset)[: length or 64]  # type: ignore[call-overload]
        if length is not None:
            type(self).__len__ = lambda self: len(self.rows)  # type: ignore[attr-defined, method-assign]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


class Sized(Stream):
    pass


def noting() -> Noting:
    return Noting(0.3, l1=LinearDecay(1.0, 0.0), rewire_until=0.5)


# the Trainer's settings, and the steps of a training over 12 batches per epoch
KNOWN: dict[str, tuple[dict[str, Any], int]] = {
    "epochs": ({"max_epochs": 3}, 36),
    "steps": ({"max_epochs": 9, "max_steps": 20}, 20),
    "steps alone": ({"max_epochs": -1, "max_steps": 20}, 20),
    "accumulation": ({"max_epochs": 3, "accumulate_grad_batches": 5}, 9),
    "scheduled": ({"max_epochs": 4, "callbacks": GradientAccumulationScheduler({1: 4, 3: 5})}, 12 + 3 + 3 + 3),
    "scheduled, steps": ({"max_epochs": 4, "max_steps": 14, "callbacks": GradientAccumulationScheduler({1: 4})}, 14),
    "limited": ({"max_epochs": 2, "limit_train_batches": 0.5}, 12),
    "limited, accumulation": ({"max_epochs": 2, "limit_train_batches": 7, "accumulate_grad_batches": 2}, 8),
    "time that suffices": ({"max_epochs": 2, "max_time": "00:01:00:00"}, 24),
}


@pytest.mark.feature("Length: epochs, steps, accumulation (fixed and by GradientAccumulationScheduler), limit_train_batches")
@pytest.mark.parametrize("name", KNOWN)
def test_a_schedule_ends_with_the_training(name: str) -> None:
    options, steps = KNOWN[name]
    options = dict(options)
    callback = noting()
    loop = trainer(callback, *[one for one in [options.pop("callbacks", None)] if one], **options)
    loop.fit(Net(), batches())
    assert loop.global_step == len(callback.alphas) == steps
    assert callback.total_steps == steps
    assert callback.alphas == pytest.approx([1 - step / steps for step in range(steps)])


@pytest.mark.feature("Length: iterable data with a length")
def test_iterable_data_with_a_length() -> None:
    callback = noting()
    loop = trainer(callback, max_epochs=2)
    loop.fit(Net(), DataLoader(Sized(40), batch_size=8))
    assert callback.total_steps == loop.global_step == 10


UNKNOWN = {
    "iterable data": ({"max_epochs": 2}, "training data has no length.*give the Trainer max_steps, or limit_train_batches"),
    "time alone": ({"max_epochs": -1, "max_time": "00:00:00:01"}, "max_time does not say how many steps"),
    "no end": ({"max_epochs": -1}, "Give the Trainer max_epochs or max_steps"),
}


@pytest.mark.feature("Length: data without a length, or max_time alone, with a schedule over the training", refused=True)
@pytest.mark.parametrize("name", UNKNOWN)
def test_a_length_that_nobody_knows(name: str) -> None:
    options, message = UNKNOWN[name]
    data = DataLoader(Stream(None), batch_size=8)
    with pytest.raises(ValueError, match=message):
        trainer(noting(), **options).fit(Net(), data if name == "iterable data" else batches())


@pytest.mark.feature("Length: data without a length, steered l1 (said once)")
def test_a_steered_alpha_without_a_length_is_told_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(DeepR(0.3), max_epochs=2).fit(Net(), DataLoader(Stream(None), batch_size=8))
    told = [str(one.message) for one in caught if "stays where it starts" in str(one.message)]
    assert len(told) == 1
    assert "has no length" in told[0]
    callback = noting()
    trainer(callback, max_steps=11, max_epochs=9).fit(Net(), DataLoader(Stream(None), batch_size=8))
    assert callback.total_steps == len(callback.alphas) == 11


def test_a_time_limit_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trainer(noting(), Timer(duration={"hours": 1}), max_epochs=1).fit(Net(), batches())
    assert "count on 12 steps; max_time (3600 s) may end it before" in caplog.text


CHANGED = {
    "longer": ({"max_epochs": 4}, 48, "goes on with 48 steps in all (in the checkpoint: 36) at step 12"),
    "shorter": ({"max_epochs": 2}, 24, "goes on with 24 steps in all (in the checkpoint: 36) at step 12"),
    "other accumulation": ({"max_epochs": 3, "accumulate_grad_batches": 4}, 12 + 3 + 3, "goes on with 18 steps in all"),
    "steps": ({"max_epochs": 9, "max_steps": 30}, 30, "goes on with 30 steps"),
    "the same": ({"max_epochs": 3}, 36, None),
}


@pytest.mark.feature("Length: another max_epochs, max_steps or accumulation on a resume (said)")
@pytest.mark.parametrize("name", CHANGED)
def test_another_length_on_a_resume(name: str, tmp_path: Path) -> None:
    options, total, message = CHANGED[name]
    save = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    trainer(noting(), save, max_epochs=3, enable_checkpointing=True).fit(Net(), batches())
    callback = noting()
    loop = trainer(callback, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.fit(Net(), batches(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert callback.total_steps == loop.global_step == total
    assert callback.alphas == pytest.approx([1 - step / total for step in range(12, total)])
    told = [str(one.message) for one in caught if "steps in all" in str(one.message)]
    assert [message in one for one in told] == ([True] if message else []), told  # type: ignore[operator]


@pytest.mark.feature("Length: a total that shrinks below what is done")
def test_a_training_that_is_cut_short_still_prunes(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    pruning = {"prune_from": 0.6, "prune_until": 0.8, "prunings": 2}
    trainer(MagnitudePruning(0.3, **pruning), save, max_epochs=9, enable_checkpointing=True).fit(Net(), batches())
    net = Net()
    loop = trainer(MagnitudePruning(0.3, check_invariants=True, **pruning), max_epochs=5)  # all prunings lie in the past
    loop.fit(net, batches(), ckpt_path=tmp_path / "epoch=3.ckpt")
    assert connectivity_report(net).to_dict()["connectivity"] == pytest.approx(0.3, abs=0.01)
