"""One test for each defect that another implementation of sparse training has or had.

The implementations are ports of DEEP R and general tools for sparse training. Each test says what went wrong there.
"""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_deepr import DeepR, connections, load_state_dict, sparsify
from lightning_deepr.weights.k_slots import KSlots
from tests.helpers.classifier import Net, batches, fit_plain
from tests.helpers.state import assert_connected, slots_by_name, theta_of
from tests.helpers.trainer import trainer


def network(connectivity: Any = 0.3, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return sparsify(  # type: ignore[return-value]
        nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), connectivity, **options
    )


def active(net: nn.Module) -> int:
    return sum(int((theta_of(net, name) >= 0).sum()) for name in connections(net))


def test_exactly_k_connections_for_300_steps() -> None:
    """1. Candidates drawn with repetition counted as activations, and births at 0 counted as dead: 36 to 40 of 40."""
    net = network(40)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(l1=0.01, temperature=1e-4).attach(net, optimizer)
    births = 0

    def each_step() -> None:
        nonlocal births
        places = {(name, place) for name, (_, found, _) in connections(net).items() for place in found.tolist()}
        assert len(places) == 40 == active(net)
        births += sum(int((slots.born == slots.born.max()).sum()) for slots in slots_by_name(net).values())

    fit_plain(net, optimizer, 300, each_step)
    assert births > 300


def test_a_copy_computes_with_its_own_weights_and_state_can_be_pickled() -> None:
    """2. `forward` was a closure over the module: a deep copy computed with the original's weights, pickle failed."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    DeepR(l1=0.02).attach(net, optimizer)
    fit_plain(net, optimizer, 5)
    x = torch.randn(7, 12)
    replica, expected = copy.deepcopy(net), net(x).detach()
    state = pickle.loads(pickle.dumps(net.state_dict()))
    fit_plain(net, optimizer, 5)
    assert not torch.equal(net(x), expected)
    assert torch.equal(replica(x), expected), "training the original changed the copy"
    other = network(seed=9)
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)


def test_grown_weights_start_at_zero_and_nothing_of_the_old_stays() -> None:
    """3. The result of a `torch.where` was thrown away: regrown weights came back with their old value."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    DeepR(l1=0.05, lr_scale=1.0, newborn="start").attach(net, optimizer)
    before = slots_by_name(copy.deepcopy(net))
    grown = 0

    def each_step() -> None:
        nonlocal before, grown
        for name, (shape, places, values) in connections(net).items():
            slots = slots_by_name(net)[name]
            reborn = slots.born != before[name].born
            grown += int(reborn.sum())
            assert bool((values[reborn] == 0).all())
            weight = net.get_submodule(name.removesuffix(".weight")).weight.detach().reshape(-1)
            assert bool((weight[before[name].places[reborn]] == 0).all()), "an old value is left at the old place"
            assert int((weight != 0).sum()) <= places.numel() and weight.numel() == shape.numel()
        before = slots_by_name(copy.deepcopy(net))

    fit_plain(net, optimizer, 60, each_step)
    assert grown > 60


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_moments_stay_with_their_connection(kind: str) -> None:
    """4. Slots were sorted again after rewiring, and the optimizer's moments stayed where they were."""
    net = network()
    if kind == "momentum":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    DeepR(l1=0.03).attach(net, optimizer)
    # the moment of each connection, by its place instead of its slot
    moments: dict[str, dict[int, float]] = {name: {} for name in connections(net)}
    data = list(batches())
    rebirths = 0
    for step in range(60):
        x, y = data[step % len(data)]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        born = {name: slots.born.clone() for name, slots in slots_by_name(net).items()}
        for name, slots in slots_by_name(net).items():
            gradient = theta_of(net, name).grad
            for place, g in zip(slots.places.tolist(), gradient.tolist(), strict=True):
                m = moments[name].get(place, 0.0)
                moments[name][place] = 0.9 * m + (g if kind == "momentum" else 0.1 * g)
        optimizer.step()
        for name, slots in slots_by_name(net).items():
            state = optimizer.state[theta_of(net, name)]["momentum_buffer" if kind == "momentum" else "exp_avg"]
            reborn = slots.born != born[name]
            rebirths += int(reborn.sum())
            moments[name] = {
                place: 0.0 if new else moments[name][place]
                for place, new in zip(slots.places.tolist(), reborn.tolist(), strict=True)
            }
            expected = torch.tensor([moments[name][place] for place in slots.places.tolist()])
            torch.testing.assert_close(state, expected, rtol=1e-4, atol=1e-6)
    assert rebirths > 60


def test_a_checkpoint_holds_the_topology_after_rewiring(tmp_path: Path) -> None:
    """5. `state_dict` held values only: after the first rewiring no checkpoint could be restored."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    DeepR(l1=0.05, lr_scale=1.0, newborn="start").attach(net, optimizer)
    start = {name: slots.places.clone() for name, slots in slots_by_name(net).items()}
    fit_plain(net, optimizer, 30)
    assert all(not torch.equal(slots.places, start[name]) for name, slots in slots_by_name(net).items())
    torch.save(net.state_dict(), tmp_path / "net.pt")
    x = torch.randn(7, 12)
    torch.manual_seed(5)
    dense = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    for other in (load_state_dict(dense, tmp_path / "net.pt"), network(seed=123)):
        other.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
        assert torch.equal(other(x), net(x))


def test_a_weight_of_zero_has_a_sign_and_can_live() -> None:
    """6. `sign(0)` was 0: a weight that started at exactly 0 could never live."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    nn.init.zeros_(net[2].weight)
    sparsify(net, 0.5)
    slots, theta = slots_by_name(net)["2.weight"], theta_of(net, "2.weight")
    assert bool((theta == 0).all()) and bool((slots.signs.abs() == 1).all()) and slots.signs.unique().numel() == 2
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(l1=0.0).attach(net, optimizer)
    fit_plain(net, optimizer, 20)
    values = connections(net)["2.weight"][2]
    assert bool((values > 0).any()) and bool((values < 0).any())


def test_the_first_count_is_k_and_a_sign_never_changes() -> None:
    """7. Places were drawn with replacement, so fewer than K started; signs were drawn again at each rewiring."""
    for seed in range(20):
        layer = sparsify(nn.Linear(10, 10), 60, seed=seed)
        assert connections(layer)["weight"][1].unique().numel() == 60 == active(layer)
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    DeepR(l1=0.05, lr_scale=1.0, newborn="start").attach(net, optimizer)
    signs: dict[tuple[str, int], float] = {}
    seen_again = 0

    def each_step() -> None:
        nonlocal seen_again
        for name, slots in slots_by_name(net).items():
            for place, sign, born in zip(slots.places.tolist(), slots.signs.tolist(), slots.born.tolist(), strict=True):
                seen_again += (name, place) in signs and born == int(slots.born.max())
                assert signs.setdefault((name, place), sign) == sign

    fit_plain(net, optimizer, 80, each_step)
    assert seen_again > 50 and len(signs) > 120


def test_l1_and_noise_act_outside_the_optimizer_with_the_plain_learning_rate() -> None:
    """8. There was no noise, and L1 was added to the gradient, where Adam divides it by its own size."""
    lr, alpha, temperature = 0.01, 0.5, 1e-3
    thetas: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, options in {
        "plain": {"l1": 0.0},
        "l1": {"l1": alpha},
        "noise": {"l1": 0.0, "temperature": temperature},
    }.items():
        torch.manual_seed(0)
        net = sparsify(nn.Linear(300, 100, bias=False), 0.1)
        theta = theta_of(net, "weight")
        with torch.no_grad():
            theta.add_(1.0)  # far from 0: nothing goes dormant
        optimizer = torch.optim.Adam(net.parameters(), lr=lr)
        DeepR(**options).attach(net, optimizer)
        net(torch.randn(8, 300, generator=torch.Generator().manual_seed(1))).square().mean().backward()
        optimizer.step()
        thetas[name], moments[name] = theta.detach().clone(), optimizer.state[theta]["exp_avg"].clone()
    assert torch.equal(moments["plain"], moments["l1"]) and torch.equal(moments["plain"], moments["noise"])
    torch.testing.assert_close(thetas["plain"] - thetas["l1"], torch.full_like(thetas["l1"], lr * alpha), rtol=1e-3, atol=1e-6)
    noise = thetas["noise"] - thetas["plain"]
    scale = math.sqrt(2 * lr * temperature)
    assert noise.std().item() == pytest.approx(scale, rel=0.05)
    assert abs(noise.mean().item()) < 4 * scale / math.sqrt(noise.numel())


def test_a_training_checkpoint_keeps_the_connectivity(tmp_path: Path) -> None:
    """9. Masks were removed from every checkpoint; a resumed run had zeros, but was dense. Only "weight" could be sparse."""
    net = Net()
    loop = trainer(DeepR(0.3, l1=0.02), ModelCheckpoint(tmp_path, filename="full"), enable_checkpointing=True)
    loop.fit(net, batches())
    loop.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    places = {name: slots.places for name, slots in slots_by_name(net).items()}
    for name in ("full", "weights"):
        loaded = load_state_dict(Net(), tmp_path / f"{name}.ckpt")
        assert all(torch.equal(slots.places, places[n]) for n, slots in slots_by_name(loaded).items())
        assert torch.equal(loaded(torch.ones(2, 12)), net(torch.ones(2, 12)))
    resumed = Net()
    loop = trainer(DeepR(0.3, l1=0.02, check_invariants=True), max_epochs=2)
    loop.fit(resumed, batches(), ckpt_path=tmp_path / "full.ckpt", weights_only=True)
    assert_connected(resumed, {name: p.numel() for name, p in places.items()})
    assert loop.global_step == 24
    attention = sparsify(nn.MultiheadAttention(8, 2), 0.2)
    assert connections(attention).keys() == {"in_proj_weight", "out_proj.weight"}


def test_unknown_modes_raise_and_no_device_is_hard_wired() -> None:
    """10. An unknown growth mode only printed a line; the device was always "cuda"; a coin per weight chose the start."""
    for options in ({"distribution": "snip"}, {"init": "ones"}, {"compute": "cuda"}):
        with pytest.raises(ValueError, match="expected one of"):
            DeepR(0.1, **options)
        with pytest.raises(ValueError, match="expected one of"):
            network(**options)
    net = network()
    assert all(tensor.device.type == "cpu" for tensor in net.state_dict().values())
    shadow = copy.deepcopy(net).to("meta")  # the only second device that every machine has
    assert all(
        tensor.device.type == "meta" for slots in slots_by_name(shadow).values() for tensor in (slots.places, slots.signs)
    )
    assert sum(p.numel() for _, p, _ in connections(network(77)).values()) == 77


def test_connections_do_not_depend_on_the_ranks_seed() -> None:
    """11. Global random draws differed between the ranks of a distributed run, whose seeds differ."""
    states = []
    for rank in range(2):
        net = network()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
        DeepR(l1=0.05, temperature=1e-5).attach(net, optimizer)
        torch.manual_seed(100 + rank)
        fit_plain(net, optimizer, 30, lambda: torch.rand(3))
        states.append(net.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_one_step_equals_the_authors_arithmetic() -> None:
    """12. An independent port had to show this: equal to a float32 ulp after a step without noise, and the same dormant set."""
    net = network(0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    DeepR(l1=0.05, lr_scale=1.0, newborn="start").attach(net, optimizer)
    dormant_in_all = 0
    for x, y in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        expected, ulp = {}, {}
        for name, slots in slots_by_name(net).items():
            theta, sign = theta_of(net, name).detach().numpy(), slots.signs.numpy()
            gradient = theta_of(net, name).grad.numpy() * sign  # dE/dw at the places
            # the optimizer's multiply-add rounds once
            moved = (theta - np.float64(np.float32(0.3)) * (sign * gradient).astype(np.float64)).astype(np.float32)
            expected[name] = moved - np.float32(0.3 * 0.05)
            ulp[name] = np.spacing(np.maximum(np.abs(theta), np.abs(moved)))
        before = {name: slots.born.clone() for name, slots in slots_by_name(net).items()}
        optimizer.step()
        for name, slots in slots_by_name(net).items():
            dormant = slots.born.numpy() != before[name].numpy()
            dormant_in_all += int(dormant.sum())
            assert np.array_equal(dormant, expected[name] < 0)
            apart = np.abs(theta_of(net, name).detach().numpy() - expected[name])
            assert expected[name].dtype == np.float32 and bool((apart <= ulp[name])[~dormant].all())
    assert dormant_in_all > 10


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_updates_of_recurrent_weights_arrive(kind: Any) -> None:
    """13. A parametrization silently disabled the updates of recurrent weights."""
    torch.manual_seed(0)
    layer = sparsify(kind(6, 5, bidirectional=True), 0.4)
    x = torch.randn(4, 2, 6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    DeepR(l1=0.01).attach(layer, optimizer)
    for _ in range(15):
        before = layer(x)[0].detach()
        optimizer.zero_grad()
        layer(x)[0].square().sum().backward()
        assert all(bool((theta_of(layer, name).grad != 0).any()) for name in connections(layer))
        optimizer.step()
        assert not torch.equal(layer(x)[0], before)
    for name, slots in slots_by_name(layer).items():  # in every tensor, the next forward uses a changed place
        assert isinstance(slots, KSlots)
        before = layer(x)[0].detach()
        with torch.no_grad():
            theta_of(layer, name).fill_(1.0)
            slots.places.copy_((slots.places + 1) % slots.total)
        assert not torch.equal(layer(x)[0], before), name
