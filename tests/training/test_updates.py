"""A training that is too short for the interval of its method says how many updates are to come."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_deepr import SET, DeepR, FixedRandom, RigL, sparsify
from lightning_deepr.training.updates_check import updates_to_come
from tests.helpers.classifier import Net, batches
from tests.helpers.regression import batches as plain_batches
from tests.helpers.regression import loss_of, plain_mlp
from tests.helpers.trainer import trainer


def said(method: Any, total: int | None) -> list[str]:
    net = sparsify(nn.Linear(12, 6), 0.3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        method.attach(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=total)
    return [str(one.message) for one in told if "to come" in str(one.message)]


@pytest.mark.parametrize(
    ("method", "total", "count"),
    [
        (SET(), 100, 0),  # until 75
        (SET(), 132, 0),
        (SET(), 133, 1),  # until 99.75: 99 steps are done before the one that rewires
        (RigL(), 60, 0),
        (RigL(), 398, 2),
        (SET(rewire_until=None), 100, 1),
        (SET(rewire_until=150), 1000, 1),
        (SET(rewire_every_n_steps=10), 20, 1),
        (DeepR(rewire_every_n_steps=50), 99, 1),
        (DeepR(rewire_until=0.5), 3, 2),
        (DeepR(rewire_every_n_steps=500, rewire_until=400), None, 0),
    ],
)
def test_few_updates_are_told(method: Any, total: int | None, count: int) -> None:
    (line,) = said(method, total)
    name = type(method).__name__
    assert line.startswith(f"{name}: {count} update{'s' * (count != 1)} of the connectivity to come")
    assert ("as under FixedRandom" in line) == (count == 0)
    assert total is None or f"in {total} steps (rewire_every_n_steps={method.rewire_every_n_steps}, " in line


@pytest.mark.parametrize(
    ("method", "total"),
    [
        (SET(), 400),
        (RigL(rewire_every_n_steps=2), 8),
        (SET(rewire_until=None), None),  # nobody knows the length
        (DeepR(), 1),  # each step rewires
        (DeepR(rewire_until=0), 100),  # asked for
        (DeepR(rewire_until=0.0), 100),
        (FixedRandom(), 1),
    ],
)
def test_no_word_otherwise(method: Any, total: int | None) -> None:
    assert said(method, total) == []


@pytest.mark.parametrize("every", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("until", [None, 4, 9, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("total", [1, 5, 10, 21])
def test_the_count_is_that_of_the_steps_that_rewire(every: int, until: Any, total: int) -> None:
    method = SET(rewire_every_n_steps=every, rewire_until=until)
    method.total_steps = float(total)
    assert updates_to_come(every, until, float(total)) == sum(method.rewires(done) for done in range(total))


def test_under_the_trainer_once() -> None:
    net, method = Net(), SET(0.3)
    with pytest.warns(UserWarning, match=r"SET: 0 updates of the connectivity to come in 4 steps") as told:
        trainer(method).fit(net, batches(4))
    assert sum("to come" in str(one.message) for one in told) == 1


def test_a_training_that_goes_on_is_not_new(tmp_path: Any) -> None:
    options = {"rewire_every_n_steps": 2, "rewire_until": 0.75}
    loop = trainer(SET(0.3, **options), max_epochs=2)
    loop.fit(Net(), batches(4))
    loop.save_checkpoint(tmp_path / "last.ckpt")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(SET(0.3, **options), max_epochs=3).fit(Net(), batches(4), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert not [one for one in told if "to come" in str(one.message)]


def test_what_it_says_is_true() -> None:
    net = sparsify(plain_mlp(), 0.3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="0 updates"):
        SET().attach(net, optimizer, total_steps=20)
    before = {name: value.clone() for name, value in net.state_dict().items() if name.endswith("places")}
    for batch in plain_batches(20):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        optimizer.step()
    assert before and all(torch.equal(net.state_dict()[name], places) for name, places in before.items())
