"""Strategies that nobody here knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_deepr import DeepR
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.classifier import Net, batches
from tests.helpers.trainer import trainer


class Whole(SingleDeviceStrategy):
    """A strategy of the user's that keeps parameters whole."""


class Shards(SingleDeviceStrategy):
    """A strategy of the user's that keeps a part of each parameter."""

    def setup(self, trainer: Any) -> None:
        for converted in converted_tensors(self.lightning_module):  # type: ignore[arg-type]
            theta = converted.theta.detach()
            converted.holder._parameters["original"] = nn.Parameter(theta[: len(theta) // 2].clone())
        super().setup(trainer)


@pytest.mark.feature("Ranks: a strategy of one's own that keeps parameters whole")
def test_a_strategy_that_keeps_parameters_whole() -> None:
    nets = []
    for strategy in ("auto", Whole(device=torch.device("cpu"))):
        nets.append(Net())
        trainer(DeepR(0.3, check_invariants=True), strategy=strategy, accelerator="cpu").fit(nets[-1], batches())
    expected, found = (net.state_dict() for net in nets)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.feature("Sharding: a strategy that is not known, and shards", refused=True)
def test_a_strategy_that_shards_is_refused_before_the_first_step() -> None:
    net = Net()
    with pytest.raises((ValueError, RuntimeError), match=r"`fc1\.weight`.*expected"):
        trainer(DeepR(0.3), strategy=Shards(device=torch.device("cpu"))).fit(net, batches())
    assert not net.losses


def test_the_name_of_no_strategy() -> None:
    with pytest.raises(ValueError, match="strategy"):
        trainer(DeepR(0.3), strategy="no_such_strategy")
