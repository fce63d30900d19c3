"""Fixed random connectivity is masked training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import optim

from lightning_deepr import FixedRandom
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.comparisons import dense_twin
from tests.helpers.optimizers import adam, sgd
from tests.helpers.regression import batches, loss_of, mlp, plain_mlp, train
from tests.helpers.state import all_slots, thetas

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("signs", ["fixed", "free"])
def test_fixed_random_is_masked_training(signs: str, make: Callable[[Any], optim.Optimizer]) -> None:
    net = mlp().double()
    twin = dense_twin(plain_mlp().double(), net)
    optimizer, twin_optimizer = make(net.parameters()), make(twin.parameters())
    before = [slots.places.clone() for slots in all_slots(net)]
    FixedRandom(signs=signs, check_invariants=True, lr_scale=1.0).attach(net, optimizer)
    masks = [torch.zeros(s.total, dtype=torch.float64).index_fill_(0, s.places, 1).view(s.shape) for s in all_slots(net)]
    constant = [
        torch.zeros(s.total, dtype=torch.float64).index_copy_(0, s.places, s.signs.double()).view(s.shape)
        for s in all_slots(net)
    ]
    weights = [twin.get_parameter(converted.name) for converted in converted_tensors(net)]
    clamped = 0
    for batch in batches(25):
        train(net, optimizer, [batch])
        twin_optimizer.zero_grad()
        loss_of(twin, batch).backward()
        for weight, mask in zip(weights, masks, strict=True):
            weight.grad *= mask
        twin_optimizer.step()
        if signs == "fixed":
            for weight, sign in zip(weights, constant, strict=True):
                clamped += int((weight.data * sign < 0).sum())
                weight.data[weight.data * sign < 0] = 0.0
        for converted, weight in zip(converted_tensors(net), weights, strict=True):
            torch.testing.assert_close(
                getattr(converted.module, "weight") + 0,  # noqa: B009
                weight.data,
                rtol=1e-9,
                atol=1e-12,
            )
    assert all(torch.equal(slots.places, places) for slots, places in zip(all_slots(net), before, strict=True))
    if signs == "fixed":
        assert clamped > 5 and min(float(theta.min()) for theta in thetas(net)) == 0.0
    else:
        assert min(float(theta.min()) for theta in thetas(net)) < 0
