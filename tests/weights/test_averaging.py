"""Averages of the weights follow the rewiring: a reborn slot's average restarts, and places are never averaged.

The oracle is a slow reference: one Python float per slot, set to 0 when the slot is reborn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from lightning_deepr import DeepR, load_state_dict, sparsify
from tests.helpers.classifier import Net, batches, fit_plain
from tests.helpers.state import assert_connected, slots_by_name, theta_of
from tests.helpers.trainer import trainer

TENSORS = ("fc1.weight", "fc2.weight")
DECAY = 0.9
Fold = Callable[[float, float, int], float]


def equal_weights(average: float, value: float, count: int) -> float:
    return average + (value - average) / (count + 1)


def exponential(average: float, value: float, count: int) -> float:
    return DECAY * average + (1 - DECAY) * value


class Reference:
    """The expected average of each slot."""

    def __init__(self, net: nn.Module, fold: Fold) -> None:
        self.fold = fold
        self.count = 0
        self.reborn = 0
        self.born = self._born(net)
        self.average = self._theta(net)

    @staticmethod
    def _born(net: nn.Module) -> dict[str, list[int]]:
        return {name: slots_by_name(net)[name].born.tolist() for name in TENSORS}

    @staticmethod
    def _theta(net: nn.Module) -> dict[str, list[float]]:
        return {name: theta_of(net, name).detach().double().tolist() for name in TENSORS}

    def after_step(self, net: nn.Module) -> None:
        born = self._born(net)
        for name in TENSORS:
            for slot, (before, now) in enumerate(zip(self.born[name], born[name], strict=True)):
                if before != now:
                    self.average[name][slot] = 0.0
                    self.reborn += 1
        self.born = born

    def update(self, net: nn.Module) -> None:
        for name, values in self._theta(net).items():
            for slot, value in enumerate(values):
                average = self.average[name][slot]
                self.average[name][slot] = self.fold(average, value, self.count) if self.count else value
        self.count += 1

    def check(self, average: nn.Module, net: nn.Module) -> None:
        assert_connected(average)
        for name in TENSORS:
            mine, current = slots_by_name(average)[name], slots_by_name(net)[name]
            assert mine is not current
            assert torch.equal(mine.places, current.places), "the average has other connections"
            assert torch.equal(mine.signs, current.signs)
            self.check_values(average, name)

    def check_values(self, module: nn.Module, name: str) -> None:
        expected = torch.tensor(self.average[name])
        torch.testing.assert_close(theta_of(module, name).detach(), expected, rtol=1e-4, atol=1e-6)


def network(norm: bool = True) -> tuple[Net, torch.optim.Optimizer]:
    net = Net(norm=norm)
    sparsify(net, 0.3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.5)
    DeepR(l1=0.02, check_invariants=True).attach(net, optimizer)
    return net, optimizer


KINDS = {
    "equal_weights": ({}, equal_weights),
    "ema_avg_fn": ({"avg_fn": get_ema_avg_fn(DECAY)}, exponential),
    "ema_multi_avg_fn": ({"multi_avg_fn": get_ema_multi_avg_fn(DECAY)}, exponential),
}


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.feature("Loops: AveragedModel in a plain loop")
def test_averaged_model_in_a_plain_loop(kind: str, use_buffers: bool, every: int) -> None:
    options, fold = KINDS[kind]
    net, optimizer = network()
    fit_plain(net, optimizer, 4)  # averaging may begin in the middle of a training
    average = AveragedModel(net, use_buffers=use_buffers, **options)
    reference = Reference(net, fold)
    steps = 0

    def each_step() -> None:
        nonlocal steps
        steps += 1
        reference.after_step(net)
        reference.check(average.module, net)
        if steps % every == 0:
            average.update_parameters(net)
            reference.update(net)
            reference.check(average.module, net)

    fit_plain(net, optimizer, 40, each_step)
    assert reference.reborn > 40, "nothing was rewired: nothing was tested"
    for name in TENSORS:
        assert not torch.equal(theta_of(average.module, name), theta_of(net, name))
    for name in TENSORS:  # the averaged network computes with the averages
        slots = slots_by_name(net)[name]
        weight = torch.zeros(slots.total)
        weight[slots.places] = torch.tensor(reference.average[name]) * slots.signs
        found = average.module.get_submodule(name.removesuffix(".weight")).weight
        torch.testing.assert_close(found, weight.view(slots.shape), rtol=1e-4, atol=1e-6)

    alone, optimizer = network()  # averaging does not change the training
    fit_plain(alone, optimizer, 4)
    fit_plain(alone, optimizer, 40)
    for name, value in alone.state_dict().items():
        assert torch.equal(value, net.state_dict()[name]), name


def test_a_checkpoint_loaded_after_the_average_was_made() -> None:
    net, optimizer = network()
    fit_plain(net, optimizer, 10)
    state = copy.deepcopy(net.state_dict())
    net, optimizer = network()
    average = AveragedModel(net)
    net.load_state_dict(state)
    for name in TENSORS:
        assert torch.equal(slots_by_name(average.module)[name].places, slots_by_name(net)[name].places)
    reference = Reference(net, equal_weights)
    average.update_parameters(net)
    reference.update(net)
    reference.check(average.module, net)
    copied = AveragedModel(Net(norm=True))  # the average's own state can be restored, too
    sparsify(copied.module, 0.3, seed=4)
    copied.load_state_dict(average.state_dict())
    reference.check(copied.module, net)


class Recorder(Callback):
    """A callback that updates the reference after an averaging callback that is listed before it."""

    def __init__(self, averaging: WeightAveraging, fold: Fold, every: int) -> None:
        self.averaging, self.fold, self.every = averaging, fold, every
        self.validations = 0
        self.reference: Reference | None = None

    def on_train_start(self, trainer: Any, net: Any) -> None:
        if self.reference is None:
            self.reference = Reference(net, self.fold)

    def on_train_batch_end(self, trainer: Any, net: Any, *args: Any) -> None:
        assert self.reference is not None
        self.reference.after_step(net)
        if (trainer.global_step - 1) % self.every == 0:
            self.reference.update(net)
        self.reference.check(self.averaging._average_model.module, net)

    def on_validation_epoch_start(self, trainer: Any, net: Any) -> None:
        if self.reference is not None and not trainer.sanity_checking:
            self.validations += 1
            self.training = {name: theta_of(net, name).detach().clone() for name in TENSORS}  # the average's state: swapped
            for name in TENSORS:
                self.reference.check_values(net, name)
            assert_connected(net)

    def on_validation_epoch_end(self, trainer: Any, net: Any) -> None:
        if self.reference is not None and not trainer.sanity_checking:
            self.reference.check(self.averaging._average_model.module, net)
            for name in TENSORS:  # swapped back
                assert not torch.equal(theta_of(net, name), self.training[name])


AVERAGING = {
    "equal_weights": (lambda: WeightAveraging(), equal_weights, 1),
    "equal_weights_without_buffers": (lambda: WeightAveraging(use_buffers=False), equal_weights, 1),
    "ema": (lambda: EMAWeightAveraging(decay=DECAY), exponential, 1),
    "ema_every_3": (lambda: EMAWeightAveraging(decay=DECAY, update_every_n_steps=3), exponential, 3),
}


@pytest.mark.parametrize("kind", AVERAGING)
@pytest.mark.feature("Callbacks: EMAWeightAveraging and WeightAveraging")
def test_averaging_under_the_trainer(kind: str) -> None:
    make, fold, every = AVERAGING[kind]
    averaging = make()
    recorder = Recorder(averaging, fold, every)
    net = Net(norm=True)
    callback = DeepR(0.3, l1=0.02, check_invariants=True)
    options: dict[str, Any] = {"max_epochs": 2, "val_check_interval": 4}
    trainer(callback, averaging, recorder, **options).fit(net, batches(), batches(2))
    reference = recorder.reference
    assert reference is not None and reference.reborn > 20 and recorder.validations == 6
    reference.check(averaging._average_model.module, net)
    for name in TENSORS:
        reference.check_values(net, name)  # a fit leaves the average in the module

    alone = Net(norm=True)
    trainer(DeepR(0.3, l1=0.02), **options).fit(alone, batches(), batches(2))
    assert alone.losses == net.losses, "averaging changed the training"
    for name in TENSORS:
        assert torch.equal(slots_by_name(alone)[name].places, slots_by_name(net)[name].places)


@pytest.mark.parametrize("norm", [False, True], ids=["without_norm", "with_batch_norm"])
@pytest.mark.feature("Callbacks: StochasticWeightAveraging")
def test_stochastic_weight_averaging(norm: bool) -> None:
    averaging = StochasticWeightAveraging(swa_lrs=0.2, swa_epoch_start=2, annealing_epochs=1)
    seen: list[Reference] = []

    class Follow(Callback):
        def on_train_epoch_start(self, trainer: Any, net: Any) -> None:
            if not seen:
                seen.append(Reference(net, equal_weights))
            if 1 <= trainer.current_epoch <= 4:
                seen[0].update(net)
            seen[0].check(averaging._average_model, net)
            if trainer.current_epoch == 5:  # a network with batch norm: the statistics are computed with the average
                for name in TENSORS:
                    seen[0].check_values(net, name)

        def on_train_batch_end(self, trainer: Any, net: Any, *args: Any) -> None:
            seen[0].after_step(net)

    net = Net(norm=norm)
    trainer(DeepR(0.3, l1=0.02, check_invariants=True), averaging, Follow(), max_epochs=5).fit(net, batches())
    assert seen[0].count == 4 and seen[0].reborn > 20
    assert_connected(net)
    for name in TENSORS:
        assert torch.equal(slots_by_name(averaging._average_model)[name].places, slots_by_name(net)[name].places)
        if not norm:  # (with batch norm Lightning's extra epoch ends in an optimizer step on stale gradients, dense or not)
            seen[0].check_values(net, name)


@pytest.mark.feature("Checkpoints: an average resumed exactly")
def test_an_average_goes_on_exactly_after_a_resume(tmp_path: Path) -> None:
    def fit(net: Net, epochs: int, folder: str, **options: Any) -> EMAWeightAveraging:
        averaging = EMAWeightAveraging(decay=DECAY)
        save = ModelCheckpoint(tmp_path / folder, filename="last", save_top_k=1)
        loop = trainer(DeepR(0.3, l1=0.02), averaging, save, max_epochs=epochs, enable_checkpointing=True)
        loop.fit(net, batches(), batches(2), **options)
        return averaging

    straight, resumed = Net(norm=True), Net(norm=True)
    fit(straight, 4, "straight")
    fit(Net(norm=True), 2, "first")
    file = tmp_path / "first" / "last.ckpt"
    fit(resumed, 4, "second", ckpt_path=file, weights_only=True)
    assert resumed.losses == straight.losses[len(straight.losses) // 2 :]
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    # a checkpoint of an averaged run has the average with its places, and loads like any other
    checkpoint = torch.load(file, weights_only=True)
    loaded = load_state_dict(Net(norm=True), file)
    for name in TENSORS:
        key = name.replace("weight", "parametrizations.weight.")
        assert torch.equal(theta_of(loaded, name), checkpoint["state_dict"][key + "original"])
        assert not torch.equal(theta_of(loaded, name), checkpoint["current_model_state"][key + "original"])
        assert torch.equal(checkpoint["state_dict"][key + "0.places"], checkpoint["current_model_state"][key + "0.places"])
    assert_connected(loaded)
