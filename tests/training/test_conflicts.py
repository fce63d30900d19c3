"""What can't work says what to do: two callbacks on one weight, spawned processes, a learning rate below 0."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import nn, optim
from torch.utils.data import DataLoader

from lightning_deepr import SET, DeepR, FixedRandom, SoftDeepR, sparsify
from tests.helpers.optimizers import sgd
from tests.helpers.regression import Regression, batches, loss_of, mlp, train
from tests.helpers.state import all_slots, assert_connected, thetas
from tests.helpers.trainer import trainer

ROOT = Path(__file__).parents[2]

# -- two callbacks ------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("Callbacks: two methods for one weight", refused=True)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: DeepR(0.3), lambda: SET(0.3)),
        (lambda: SET(0.3), lambda: DeepR(0.3)),
        (lambda: DeepR(0.3, target_modules=["net.2"]), lambda: SET(0.3, target_modules=["net.2"])),
        (lambda: DeepR(0.3, target_modules=["net.2"]), lambda: SET({"net.2": 0.3})),
        (lambda: DeepR(0.3, target_modules=["net.2"]), lambda: SET(0.3, target_modules=["net.0", "net.2"])),
        (lambda: DeepR(0.3), lambda: FixedRandom(0.3, target_modules=r"net\.2")),
        (lambda: SoftDeepR(0.3, temperature=1e-4), lambda: DeepR(0.3, target_modules="all-linear")),
    ],
)
def test_two_methods_for_one_weight_are_refused_by_name(first: Any, second: Any) -> None:
    one, other = first(), second()
    names = rf"{type(other).__name__} and {type(one).__name__} both ask for `net\.[02]\.weight`.*exclude_modules"
    with pytest.raises(ValueError, match=names):
        trainer(one, other).fit(Regression(sgd))


@pytest.mark.feature("Callbacks: two methods for different weights")
def test_two_methods_for_different_weights_train() -> None:
    module = Regression(sgd)
    callbacks = [DeepR(0.3, target_modules=["net.0"]), SET(0.3, exclude_modules=["net.0"], rewire_every_n_steps=5)]
    trainer(*callbacks).fit(module)
    assert [[t.name for t in c.tracked] for c in callbacks] == [["net.0.weight"], ["net.2.weight"]]
    # the second one asks for everything, and takes what is left
    rest = [DeepR(0.3, target_modules=["net.0"]), SET(0.3, rewire_every_n_steps=5)]
    trainer(*rest).fit(Regression(sgd))
    assert [[t.name for t in c.tracked] for c in rest] == [["net.0.weight"], ["net.2.weight"]]


def test_lightnings_pruning_is_told_that_it_sees_no_converted_weight() -> None:
    with pytest.raises(ValueError, match=r"ModelPruning is listed before DeepR, and asks for `net\.0\.weight`"):
        trainer(ModelPruning("l1_unstructured", amount=0.5), DeepR(0.3)).fit(Regression(sgd))
    with pytest.warns(UserWarning, match="ModelPruning does not see converted weights"):
        trainer(DeepR(0.3), ModelPruning("l1_unstructured", amount=0.5)).fit(Regression(sgd))
    module = Regression(sgd)
    pruning = ModelPruning("l1_unstructured", [(module.net[2], "weight")], amount=0.5)  # type: ignore[index]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ModelPruning")
        trainer(DeepR(0.3, exclude_modules=["net.2"]), pruning).fit(module)


def test_a_pattern_that_matches_nothing_is_still_told() -> None:
    with pytest.raises(ValueError, match=r"the pattern 'net\.9' matches no tensor"):
        trainer(DeepR(0.3, target_modules=["net.0"]), SET(0.3, target_modules=["net.9"])).fit(Regression(sgd))


# -- processes that are started by spawn or fork ------------------------------------------------------------------------------


class Converted(pl.LightningModule):
    def __init__(self, convert: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(12, 6)
        if convert:
            sparsify(self.net, 0.3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        return sgd(self.parameters())

    def train_dataloader(self) -> Any:
        return DataLoader(batches(8), batch_size=None)  # type: ignore[arg-type]


@pytest.mark.feature("Ranks: ddp_spawn with a network that is converted before", refused=True)
def test_spawn_with_a_converted_network_says_what_works() -> None:
    with pytest.raises(RuntimeError, match=r'by pickle, and the network has converted weights\. Expected strategy="ddp"'):
        trainer(DeepR(), strategy="ddp_spawn", devices=2).fit(Converted())


def forked(strategy: str) -> None:
    module = Converted()
    slots, theta = all_slots(module)[0], next(module.parameters()).detach().clone()
    before = slots.places.clone()
    trainer(DeepR(l1=0.3), strategy=strategy, devices=2).fit(module)
    assert_connected(module)
    assert not torch.equal(before, slots.places) or not torch.equal(theta, next(module.parameters()))
    born = int(slots.born.max())
    assert born >= 0
    callback = DeepR(l1=0.3)
    trainer(callback).fit(module)  # and goes on here: no draw is repeated
    assert callback.tracked[0].step > born + 8


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
@pytest.mark.feature("Ranks: ddp_fork and ddp_notebook with a network that is converted before")
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_notebook"])
def test_forked_processes_return_a_converted_network(strategy: str) -> None:
    # In a process of its own: torch refuses a backward in a fork of a process whose autograd has started threads,
    # as checkpointed and re-entrant backwards in other tests do.
    code = f"from tests.training.test_conflicts import forked; forked({strategy!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.feature("Ranks: ddp_notebook with a network that the callback would convert", refused=True)
def test_forked_processes_do_not_convert() -> None:
    with pytest.raises(Exception, match=r'"ddp_fork" and "ddp_notebook" work, too'):
        trainer(DeepR(0.3), strategy="ddp_notebook", devices=2).fit(Converted(convert=False))


# -- values -------------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("Optimizers: a learning rate below 0", refused=True)
@pytest.mark.parametrize("make", [DeepR, lambda: SET(rewire_every_n_steps=2, rewire_until=None), FixedRandom])
def test_a_learning_rate_below_0_is_refused_by_name(make: Any) -> None:
    net = mlp()
    optimizer = sgd(net.parameters())
    make().attach(net, optimizer)
    train(net, optimizer, batches(2))
    optimizer.param_groups[0]["lr"] = -0.1
    before = [value.clone() for value in net.state_dict().values()]
    with pytest.raises(
        ValueError, match=r"`0\.weight`, step 2: expected a learning rate of at least 0 .*found -0\.1.*maximize"
    ):
        train(net, optimizer, batches(1))
    assert all(torch.equal(now, old) for now, old in zip(net.state_dict().values(), before, strict=True))


def test_a_learning_rate_of_0_is_none() -> None:
    net = mlp()
    optimizer = sgd(net.parameters())
    DeepR(l1=0.1, temperature=1e-3, check_invariants=True).attach(net, optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    before = [slots.places.clone() for slots in all_slots(net)]
    train(net, optimizer, batches(3))
    assert all(torch.equal(slots.places, old) for slots, old in zip(all_slots(net), before, strict=True))


# -- least_per_layer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l1", [0.0, 0.5])
@pytest.mark.parametrize("reactivation", ["budget", "uniform"])
@pytest.mark.parametrize("least", [2, 9])
def test_a_layer_that_starts_with_fewer_than_the_least_waits_for_births(l1: float, reactivation: str, least: int) -> None:
    """The check alarms only if other layers got births before it."""
    torch.manual_seed(0)
    callback = DeepR(
        {"0": 60, "2": 1}, scope="global", least_per_layer=least, reactivation=reactivation, l1=l1, check_invariants=True
    )
    net = callback.prepare(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)))
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    callback.attach(net, optimizer)
    for _ in range(12):
        optimizer.zero_grad()
        net(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
    counts = [slots.count for slots in all_slots(net)]
    assert sum(counts) == 61
    assert counts[1] == 1 if l1 == 0.0 else counts[1] >= least


def test_the_check_finds_births_that_went_past_a_layer() -> None:
    callback = DeepR({"0": 60, "2": 1}, scope="global", least_per_layer=2, l1=0.5, check_invariants=True)
    net = callback.prepare(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)))
    (pool,) = {id(slots.pool): slots.pool for slots in all_slots(net)}.values()  # type: ignore[attr-defined]
    theta = thetas(net)[0].detach()
    second = all_slots(net)[1]
    assert second.problem(theta, torch.arange(0), [], least=2) is None
    pool.births = [3, 0]
    assert "expected at least 2 connections before other layers get births" in str(
        second.problem(theta, torch.arange(0), [], least=2)
    )
