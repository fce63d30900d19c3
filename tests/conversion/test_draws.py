"""What a conversion draws: the same at the first time, something else at the second."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import DeepR, connections, densify, load_state_dict, sparsify
from tests.helpers.state import all_slots


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 20))


def drawn(net: nn.Module) -> list[Tensor]:
    return [places.sort().values for _, places, _ in connections(net).values()]


def equal(one: list[Tensor], other: list[Tensor]) -> list[bool]:
    return [torch.equal(a, b) for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("seed", [0, 5])
def test_a_first_conversion_is_a_function_of_the_seed(seed: int) -> None:
    first = drawn(sparsify(make(), 0.2, seed=seed))
    for _ in range(3):  # what was converted before, and dense again, does not matter
        net = sparsify(make(), 0.2, seed=seed)
        assert all(equal(drawn(net), first)) and [slots.index for slots in all_slots(net)] == [0, 1]
        densify(net)
    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)
    assert all(equal(drawn(sparsify(other, 0.2, seed=seed)), first)), "the values of the weights do not matter"
    assert not any(equal(drawn(sparsify(make(), 0.2, seed=seed + 1)), first))


def test_a_second_conversion_of_a_module_draws_anew() -> None:
    net = sparsify(make(), 0.2)
    seen, signs = [drawn(net)], [all_slots(net)[0].sign_seed]
    for _ in range(3):
        sparsify(densify(net), 0.2)
        assert not any(any(equal(drawn(net), before)) for before in seen)
        assert all_slots(net)[0].sign_seed not in signs
        seen.append(drawn(net))
        signs.append(all_slots(net)[0].sign_seed)
    copied = drawn(sparsify(densify(copy.deepcopy(net)), 0.2))
    assert not any(any(equal(copied, before)) for before in seen), "a copy that was converted goes on, too"


def test_one_layer_that_was_dense_in_between() -> None:
    net: Any = sparsify(make(), 0.2)
    before = drawn(net)
    densify(net[2])
    sparsify(net, {"2": 0.2})
    assert equal(drawn(net), before) == [True, False]


def test_the_births_of_a_second_conversion_are_others() -> None:
    def train(net: nn.Module) -> list[Tensor]:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        rewiring = DeepR(l1=1e-2).attach(net, optimizer)
        torch.manual_seed(1)
        for _ in range(5):
            optimizer.zero_grad()
            net(torch.randn(8, 40)).square().mean().backward()
            optimizer.step()
        rewiring.remove()
        return drawn(net)

    net = sparsify(make(), 0.2)
    first = train(net)
    assert all(equal(train(sparsify(make(), 0.2)), first))
    again = sparsify(densify(sparsify(make(), 0.2)), 0.2)
    assert not any(equal(train(again), first))


def test_a_checkpoint_brings_its_own_numbers() -> None:
    net = sparsify(make(), 0.2)
    target = densify(sparsify(make(), 0.3))
    load_state_dict(target, net.state_dict())
    assert [slots.index for slots in all_slots(target)] == [0, 1]
    assert all(equal(drawn(target), drawn(net)))
