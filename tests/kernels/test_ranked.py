"""Dense tensors begin in the order of their places, and newborns get theirs by rank; a tensor with K = N is never rewired."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from lightning_deepr import load_state_dict, sparsify
from lightning_deepr.algorithm import rewiring
from lightning_deepr.weights.base import FORMAT_KEY
from tests.helpers.kernel_steps import ALPHA, LR, SHARES, Run, Size, let_die, network
from tests.helpers.plain import PlainDeepR as DeepR
from tests.helpers.regression import SEED
from tests.helpers.sparse_linear import needs_kernels
from tests.helpers.state import all_slots, assert_equal_states, oracle_of, state_of, thetas

# N is no multiple of 64; with places by rank, births are drawn by rejection up to three quarters
SIZES: list[Size] = [(33, 51, 90), (33, 51, 168), (33, 51, 900), (32, 50, 1200), (32, 50, 1201), (33, 51, 1500), (33, 51, 1682)]


def by_rank(net: nn.Module) -> nn.Module:
    for slots in all_slots(net):
        slots.ranked = True
    return net


def dense(share: float = 0.5, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return sparsify(
        nn.Sequential(nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 120)), share, seed=SEED, distribution="uniform", **options
    )


@needs_kernels
@pytest.mark.parametrize("compute", ["dense", "sparse"])
def test_a_step_equals_pytorchs_and_the_oracles(compute: str, pytorch: Run) -> None:
    fast, plain = (by_rank(network(SIZES, compute=compute)) for _ in range(2))
    slow = oracle_of(fast)
    for tensor in slow.tensors:
        tensor.ranked = True
    made = []
    for net in (fast, plain):
        made.append(optim.SGD(net.parameters(), lr=LR))
        DeepR(l1=ALPHA, seed=SEED, check_invariants=True).attach(net, made[-1])
    for step, share in enumerate(SHARES):
        for net in (fast, plain):
            let_die(net, share, step)
        slow.descend([theta.grad.numpy() for theta in thetas(fast)], LR)
        slow.shrink_and_diffuse(step, LR, ALPHA)
        slow.rewire(step)
        made[0].step()
        pytorch(made[1].step)
        assert_equal_states(state_of(fast), state_of(plain))
        for slots, tensor in zip(all_slots(fast), slow.tensors, strict=True):
            assert slots.places.tolist() == tensor.places and slots.born.tolist() == tensor.born
            assert slots.signs.tolist() == tensor.signs.tolist()
        for theta, tensor in zip(thetas(fast), slow.tensors, strict=True):
            tensor.theta = theta.detach().numpy().copy()


@needs_kernels
def test_many_places_at_every_density(pytorch: Run) -> None:
    sizes: list[Size] = [(300, 400, round(share * 120_000)) for share in (0.07, 0.3, 0.5, 0.74, 0.76, 0.9, 0.999)]
    fast, plain = (by_rank(network(sizes)) for _ in range(2))
    steps = []
    for net in (fast, plain):
        optimizer = optim.SGD(net.parameters(), lr=LR)
        DeepR(l1=0.0, seed=SEED, check_invariants=True).attach(net, optimizer)
        steps.append(optimizer.step)
    for step, share in enumerate((0.05, 0.9, 0.001)):
        for net in (fast, plain):
            let_die(net, share, step)
        steps[0]()
        pytorch(steps[1])
        assert_equal_states(state_of(fast), state_of(plain))


@pytest.mark.parametrize("density", [0.1, 0.5, 0.7, 0.9])
def test_rebirth_is_uniform_over_all_dormant_places(density: float) -> None:
    """Counted over many steps in which a tenth dies: a chi-square per place against a flat share."""
    from scipy import stats

    net = by_rank(network([(20, 24, round(density * 480))]))
    optimizer = optim.SGD(net.parameters(), lr=LR)
    DeepR(l1=0.0, seed=SEED).attach(net, optimizer)
    (slots,) = all_slots(net)
    seen = torch.zeros(480)
    for step in range(700):
        let_die(net, 1.0, step)  # all die: every place is dormant, and K of N are drawn
        optimizer.step()
        assert bool((slots.places.diff() > 0).all())
        if step >= 300:
            seen[slots.places] += 1
    statistic = float(((seen - 400 * density) ** 2).sum() / (400 * density * (1 - density))) * 479 / 480
    assert 1e-4 < stats.chi2.sf(statistic, 479) < 1 - 1e-4


def test_by_rank_for_slots_in_any_order() -> None:
    slots, places = torch.tensor([7, 2, 9, 0]), torch.tensor([40, 10, 30, 20])
    assert rewiring.by_rank(slots, places).tolist() == [30, 20, 40, 10]


@pytest.mark.parametrize("init", ["module", "deepr", "largest"])
def test_dense_tensors_begin_in_the_order_of_their_places(init: str) -> None:
    net = dense(0.5, init=init)
    for slots in all_slots(net):
        assert slots.ranked and not slots.stays and bool((slots.places.diff() > 0).all())
    small, thin = sparsify(nn.Linear(50, 40), 0.5, init=init, seed=SEED), sparsify(nn.Linear(2000, 1000), 0.05, seed=SEED)
    assert not all_slots(small)[0].ranked and not all_slots(thin)[0].ranked
    unordered = rewiring.random_places(200 * 150, all_slots(net)[0].count, 0, SEED)
    if init != "largest":
        assert torch.equal(unordered.sort().values, all_slots(net)[0].places), "the set of places is that of every version"


def train(net: nn.Module, steps: range, optimizer: optim.Optimizer) -> None:
    for step in steps:
        let_die(net, 0.1, step)
        optimizer.step()


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("old", [True, False], ids=["older", "present"])
def test_a_training_goes_on_from_a_checkpoint_as_it_began(share: float, old: bool) -> None:
    nets = [dense(share), dense(share), dense(0.5 if share == 1.0 else share)]
    if old:  # as an older version writes it
        for slots in (s for net in nets[:1] for s in all_slots(net)):
            slots.ranked = slots.rests = False
        nets[1] = copy.deepcopy(nets[0])
    callbacks, optimizers = [], []
    for net in nets[:2]:
        optimizers.append(optim.SGD(net.parameters(), lr=LR))
        callbacks.append(DeepR(l1=0.0, seed=SEED).attach(net, optimizers[-1]))
    for net, optimizer in zip(nets, optimizers, strict=False):
        train(net, range(3), optimizer)
    state = copy.deepcopy(nets[0].state_dict())
    versions = {int(value) for name, value in state.items() if name.endswith(FORMAT_KEY)}
    assert versions == ({1} if old and share < 1 else {2} if old else {3} if share < 1 else {4})
    resumed = load_state_dict(nn.Sequential(nn.Linear(200, 150), nn.ReLU(), nn.Linear(150, 120)), state)
    assert [(s.ranked, s.stays, s.rests) for s in all_slots(resumed)] == [
        (s.ranked, s.stays, s.rests) for s in all_slots(nets[0])
    ]
    optimizer = optim.SGD(resumed.parameters(), lr=LR)
    callback = DeepR(l1=0.0, seed=SEED).attach(resumed, optimizer)
    callback.load_state_dict(callbacks[0].state_dict())
    train(resumed, range(3, 6), optimizer)
    train(nets[1], range(3, 6), optimizers[1])
    assert_equal_states(state_of(resumed), state_of(nets[1]))


def test_where_all_places_have_a_connection_nothing_is_rewired() -> None:
    """The step is that of projected SGD with momentum: nothing is reborn, and no state starts anew."""
    net = dense(1.0)
    expected = [theta.detach().double().clone() for theta in thetas(net)]
    momenta = [torch.zeros_like(theta) for theta in expected]
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    callback = DeepR(l1="auto", seed=SEED, check_invariants=True)
    callback.attach(net, optimizer, total_steps=20)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        for theta, known, momentum in zip(thetas(net), expected, momenta, strict=True):
            theta.grad = torch.randn(theta.shape, generator=generator) * 0.05
            momentum.mul_(0.9).add_(theta.grad.double())
            known.sub_(0.1 * momentum).clamp_(min=0)
        optimizer.step()
    for theta, known, slots in zip(thetas(net), expected, all_slots(net), strict=True):
        np.testing.assert_allclose(theta.detach().numpy(), known.numpy(), atol=1e-6)
        assert int(slots.born.max()) == -1 and bool((theta == 0).any())
    values = {name.rpartition("/")[2]: value for name, value in callback.statistics("network").items()}
    assert values["turnover"] == 0.0 and all(tensor.last_alpha == 0.0 for tensor in callback.tracked)
