"""A callback on a converted network: the connectivity that it asks for is the one that is there, or it says so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_deepr import SET, DeepR, MagnitudePruning, SoftDeepR, connections, sparsify
from tests.helpers.classifier import Net, batches
from tests.helpers.small import unchanged
from tests.helpers.trainer import trainer


def counts(net: nn.Module) -> dict[str, int]:
    return {name: places.numel() for name, (_, places, _) in connections(net).items()}


MISFITS = [
    (0.3, {}, 0.1, {}),
    (0.1, {}, 0.3, {}),
    (100, {}, 50, {}),
    (0.3, {}, {"fc1": 0.3, "fc2": 0.9}, {}),
    ({"fc1": 0.3}, {}, 0.1, {}),  # a part of the network
    ({"fc1": 0.3}, {}, {"fc1": 0.2, "fc2": 0.3}, {}),
    (0.3, {"scope": "global"}, 0.1, {"scope": "global"}),
    (0.3, {"distribution": "uniform"}, 0.2, {"distribution": "erk"}),
]


@pytest.mark.parametrize("method", [DeepR, SET])
@pytest.mark.parametrize(("found", "options", "asked", "arguments"), MISFITS)
def test_another_connectivity_is_refused(method: Any, found: Any, options: Any, asked: Any, arguments: Any) -> None:
    if method is SET and "scope" in arguments:
        pytest.skip("SET works with K per tensor")
    net = sparsify(Net(), found, **options)
    total = sum(counts(net).values())
    with unchanged(net), pytest.raises(ValueError, match=r"converted already, with K = .*connectivity=None") as told:
        trainer(method(asked, **arguments)).fit(net, batches())
    assert f"K = {total:,} (" in str(told.value) and f"(connectivity={asked!r}) asks for K = " in str(told.value)
    with unchanged(net), pytest.raises(ValueError, match="converted already"):
        method(asked, **arguments).prepare(net)


FITS = [
    (0.3, {}, 0.3, {}),
    (0.3, {"distribution": "uniform"}, 0.3, {"distribution": "erk"}),  # the same K in all
    (100, {}, 100, {}),
    ({"fc1": 0.3}, {}, 0.3, {}),  # a part
    ({"fc1": 0.3}, {}, 50, {}),  # a number for both: it says nothing about the part
    ({"fc1": 30, "fc2": 20}, {}, 50, {}),
    (0.3, {}, None, {}),
    (0.3, {"scope": "global"}, 0.3, {"scope": "global"}),
]


@pytest.mark.parametrize(("found", "options", "asked", "arguments"), FITS)
def test_the_same_connectivity_goes_on(found: Any, options: Any, asked: Any, arguments: Any) -> None:
    net = sparsify(Net(), found, **options)
    before = counts(net)
    trainer(DeepR(asked, check_invariants=True, **arguments)).fit(net, batches(2))
    if options.get("scope") == "global":
        assert sum(counts(net).values()) == sum(before.values())
    else:
        assert before.items() <= counts(net).items()


def test_a_second_fit_and_a_resumed_one(tmp_path: Any) -> None:
    net, callback = Net(), DeepR(0.3)
    loop = trainer(callback)
    loop.fit(net, batches(2))
    loop.save_checkpoint(tmp_path / "last.ckpt")
    trainer(callback).fit(net, batches(2))
    trainer(copy.deepcopy(callback)).fit(net, batches(2))
    trainer(DeepR(0.3)).fit(net, batches(2))
    trainer(DeepR(0.3), max_epochs=2).fit(Net(), batches(2), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"asks for K = 26 connections"):
        trainer(DeepR(0.1)).fit(net, batches(2))


@pytest.mark.parametrize(
    "make",
    [
        lambda c: SoftDeepR(c, temperature=1e-3, l1=0.1, theta_min=-1e-3),
        lambda c: MagnitudePruning(c),
    ],
)
def test_methods_with_a_theta_for_every_place(make: Any) -> None:
    net = make(0.3).prepare(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)))
    with pytest.raises(ValueError, match=r"asks for K = 26 connections .* converted already, with K = 77"):
        make(0.1).prepare(net)
    callback = make(0.3)
    optimizer = torch.optim.SGD(callback.prepare(net).parameters(), lr=0.1)
    callback.attach(net, optimizer, total_steps=100)


@pytest.mark.parametrize("method", [DeepR, SET])
def test_a_difference_to_dense_weights_is_no_sparse_network(method: Any) -> None:
    net = Net()
    DeepR(0.1, of="difference").prepare(net)
    with unchanged(net), pytest.raises(ValueError, match=r'asks for sparse weights, but `fc1\.weight`.*of="difference"'):
        trainer(method(0.1)).fit(net, batches())
    trainer(method(0.1, of="difference")).fit(net, batches())
