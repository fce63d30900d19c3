"""Optimizers that hold another one, under the Trainer and under Fabric, train as in a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from lightning_deepr import DeepR
from lightning_deepr.algorithm.inner_optimizers import chain_of
from tests.helpers.regression import SEED, Regression, batches, loss_of, mlp, train
from tests.helpers.state import all_slots, assert_equal_states, state_of
from tests.helpers.trainer import trainer
from tests.helpers.wrapping_optimizers import Forwarding, HookedLookahead, LateLookahead, Lookahead, Nested, Twice

STEPS = 20
MAKE: dict[str, Callable[[Any], Any]] = {
    "forwarding": lambda p: Forwarding(torch.optim.Adam(p, lr=0.02)),
    "lookahead": lambda p: Lookahead(torch.optim.Adam(p, lr=0.02), "dict"),
    "late lookahead": lambda p: LateLookahead(torch.optim.Adam(p, lr=0.02), "groups"),
    "hooked lookahead": lambda p: HookedLookahead(torch.optim.Adam(p, lr=0.02), "flat"),
    "twice": lambda p: Twice(p, lr=0.02),
    "nested": lambda p: Nested(p, lr=0.02),
}


def callback(**options: Any) -> DeepR:
    return DeepR(l1=0.3, seed=SEED, check_invariants=True, distribution="uniform", **options)


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.filterwarnings("ignore")
def test_the_three_loops_agree(make: Callable[[Any], Any], scale: float) -> None:
    net = mlp()
    optimizer = make(net.parameters())
    plain = callback(lr_scale=scale)
    plain.attach(net, optimizer)
    train(net, optimizer, batches(STEPS))
    expected = state_of(net, chain_of(optimizer)[-1])
    assert [tensor.step for tensor in plain.tracked] == [STEPS, STEPS]
    assert any(int(slots.born.max()) > STEPS // 2 for slots in all_slots(net))

    module = Regression(make, STEPS)
    under_trainer = callback(connectivity=0.3, lr_scale=scale)
    runner = trainer(under_trainer)
    runner.fit(module)
    assert [tensor.step for tensor in under_trainer.tracked] == [STEPS, STEPS]
    assert_equal_states(expected, state_of(module.net, chain_of(runner.optimizers[0])[-1]))

    net = mlp()
    optimizer = make(net.parameters())
    under_fabric = callback(lr_scale=scale)
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[under_fabric])
    wrapped, at_fabric = fabric.setup(net, optimizer)
    for batch in batches(STEPS):
        at_fabric.zero_grad()
        fabric.backward(loss_of(wrapped, batch))
        at_fabric.step()
    assert [tensor.step for tensor in under_fabric.tracked] == [STEPS, STEPS]
    assert_equal_states(expected, state_of(net, chain_of(optimizer)[-1]))
