"""The start of training: the places, values and signs of each ``init``, and modules on the meta device."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import connections, sparsify
from lightning_deepr.algorithm.randomness import signs_of
from lightning_deepr.algorithm.rewiring import random_places, reactivate
from tests.helpers.layers import LAYERS, Layer, flat
from tests.helpers.optional import Optional
from tests.helpers.state import assert_connected, slots_by_name, theta_of

stats = Optional("scipy.stats")

P_VALUE = 1e-3  # the seeds are fixed: a test that passes once always passes


# -- places -------------------------------------------------------------------------------------------------------------------


def test_places_are_a_function_of_the_seed() -> None:
    def places(**options: Any) -> list[int]:
        return connections(sparsify(nn.Linear(40, 30), 100, **options))["weight"][1].tolist()

    for init in ("module", "deepr"):
        assert places(init=init) == places(init=init), "repeated calls agree, whatever the global generator does"
        assert places(init=init, seed=1) != places(init=init)
    assert places(init="deepr") == places(init="module")
    two = connections(sparsify(nn.Sequential(nn.Linear(40, 30), nn.Linear(40, 30)), 200, distribution="uniform"))
    assert two["0.weight"][1].tolist() != two["1.weight"][1].tolist(), "tensors of one network draw differently"


@pytest.mark.parametrize(("total", "count"), [(1, 1), (7, 7), (64, 32), (64, 33), (1000, 999), (5, 1)])
def test_places_are_unique_at_any_density(total: int, count: int) -> None:
    for seed in range(20):
        places = random_places(total, count, index=0, seed=seed)
        assert places.unique().numel() == count == places.numel()
        assert int(places.min()) >= 0 and int(places.max()) < total


@pytest.mark.parametrize(("total", "count"), [(60, 12), (60, 45)], ids=["by_rejection", "from_a_list"])
def test_places_are_uniform(total: int, count: int) -> None:
    draws = 3000
    found = torch.stack([random_places(total, count, index=seed % 7, seed=seed) for seed in range(draws)])
    share = count / total
    counted = torch.bincount(found.view(-1), minlength=total).double()
    # drawn without replacement, so the counts vary less than a multinomial's
    statistic = ((counted - draws * share) ** 2).sum() / (draws * share * (1 - share)) * (total - 1) / total
    assert P_VALUE < stats.chi2.sf(float(statistic), total - 1) < 1 - P_VALUE
    for slot in (0, count - 1):  # no slot prefers a place
        assert stats.chisquare(torch.bincount(found[:, slot], minlength=total)).pvalue > P_VALUE


@pytest.mark.parametrize(("total", "count"), [(7, 3), (6, 4)], ids=["by_rejection", "from_a_list"])
def test_every_set_of_places_is_equally_likely(total: int, count: int) -> None:
    found = Counter(tuple(sorted(random_places(total, count, 0, seed).tolist())) for seed in range(3500))
    sets = list(itertools.combinations(range(total), count))
    assert set(found) == set(sets)
    assert stats.chisquare([found[one] for one in sets]).pvalue > P_VALUE


def test_places_among_a_trillion() -> None:
    total, count = 2**40, 20_000
    places = random_places(total, count, index=3, seed=0)
    assert places.unique().numel() == count and places.dtype == torch.int64
    assert stats.kstest(places.double().numpy() / total, "uniform").pvalue > P_VALUE
    for modulus in (2, 3, 64):  # float draws would never give an odd place
        assert stats.chisquare(torch.bincount(places % modulus, minlength=modulus)).pvalue > P_VALUE


# -- values: "module" ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_module_takes_the_layers_own_magnitudes(layer: Layer) -> None:
    plain = layer.build()
    sparse = sparsify(layer.build(), 0.3, target_modules=layer.target)
    for name, (shape, places, values) in connections(sparse).items():
        own = plain.get_parameter(name).detach().reshape(-1)
        torch.testing.assert_close(theta_of(sparse, name).detach(), own[places].abs() * math.sqrt(shape.numel() / len(places)))
        slots = slots_by_name(sparse)[name]
        assert torch.equal(slots.signs, signs_of(slots.sign_seed, places, torch.float32)), "the signs are the hash's"
        assert torch.equal(values.sign()[values != 0], slots.signs[values != 0])


@pytest.mark.parametrize(
    ("make", "size"),
    [(lambda: nn.Linear(600, 400, bias=False), (200, 600)), (lambda: nn.Conv2d(32, 64, 3, bias=False), (4, 32, 12, 12))],
    ids=["linear", "conv"],
)
@pytest.mark.parametrize("connectivity", [0.02, 0.2, 1.0])
def test_module_keeps_the_variance_of_the_output(make: Any, size: tuple[int, ...], connectivity: float) -> None:
    torch.manual_seed(0)
    plain, x = make(), torch.randn(*size)
    dense = flat(plain(x)).var().item()
    found = flat(sparsify(plain, connectivity)(x)).var().item()
    assert found == pytest.approx(dense, rel=0.08)


# -- values: "deepr" ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "fan_in"),
    [
        (lambda: nn.Linear(200, 100), {"weight": 200}),
        (lambda: nn.Conv2d(16, 32, 3), {"weight": 16 * 9}),
        (lambda: nn.Conv2d(64, 32, 3, groups=4), {"weight": 16 * 9}),
        (lambda: nn.ConvTranspose1d(24, 40, 5), {"weight": 24 * 5}),
        (lambda: nn.Bilinear(12, 14, 30), {"weight": 12 * 14}),
        (lambda: nn.LSTM(30, 50), {"weight_ih_l0": 30, "weight_hh_l0": 50}),
        (lambda: nn.MultiheadAttention(64, 4), {"in_proj_weight": 64, "out_proj.weight": 64}),
    ],
    ids=["linear", "conv", "conv_groups", "conv_transpose", "bilinear", "lstm", "attention"],
)
def test_deepr_is_half_normal_over_the_root_of_the_dense_fan_in(make: Any, fan_in: dict[str, int]) -> None:
    module = sparsify(make(), 0.3, init="deepr", distribution="uniform")
    assert connections(module).keys() == fan_in.keys()
    for name, inputs in fan_in.items():
        theta = theta_of(module, name).detach()
        assert theta.numel() > 900 and bool((theta >= 0).all())
        assert stats.kstest(theta.numpy() * math.sqrt(inputs), "halfnorm").pvalue > P_VALUE


# -- values: "largest" --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_largest_keeps_the_k_largest_with_their_signs(layer: Layer) -> None:
    plain = layer.build()
    sparse = sparsify(layer.build(), 0.3, target_modules=layer.target, init="largest")
    for name, (_, places, values) in connections(sparse).items():
        own = plain.get_parameter(name).detach().reshape(-1)
        assert torch.equal(values, own[places])
        assert set(places.tolist()) == set(own.abs().topk(len(places)).indices.tolist())
        slots = slots_by_name(sparse)[name]
        assert slots.exceptions.numel() <= len(places) and torch.equal(slots.exceptions, slots.exceptions.sort().values)
        assert set(slots.exceptions.tolist()) <= set(places.tolist())
        everywhere = torch.arange(slots.total)
        hashed = signs_of(slots.sign_seed, everywhere, torch.float32)
        differs = everywhere[slots.signs_at(everywhere) != hashed]
        assert torch.equal(differs, slots.exceptions), "the hash holds at every other place"
    assert_connected(sparse)


def test_a_connection_that_comes_back_has_its_own_sign() -> None:
    torch.manual_seed(0)
    layer = sparsify(nn.Linear(8, 6), 10, init="largest")
    slots, theta = slots_by_name(layer)["weight"], theta_of(layer, "weight").detach()
    exceptions = set(slots.exceptions.tolist())
    assert exceptions, "this seed has no exceptions"
    first = dict(zip(slots.places.tolist(), slots.signs.tolist(), strict=True))
    left: set[int] = set()
    came_back: set[int] = set()
    for step in range(40):
        before = set(slots.places.tolist())
        dormant = torch.arange(step % 2, 10, 2)
        reactivate([theta], [slots], [dormant], seed=0, step=step)
        left |= before - set(slots.places.tolist())
        came_back |= left & set(slots.places.tolist())
        now = dict(zip(slots.places.tolist(), slots.signs.tolist(), strict=True))
        assert all(now[place] == first[place] for place in now.keys() & first.keys())
    assert came_back & exceptions == exceptions, "every one of them has left and come back"


def test_largest_of_weights_that_are_zero() -> None:
    layer = nn.Linear(10, 10, bias=False)
    nn.init.zeros_(layer.weight)
    sparsify(layer, 40, init="largest")
    slots = slots_by_name(layer)["weight"]
    assert slots.signs.abs().eq(1).all() and slots.exceptions.numel() == 0
    assert bool((theta_of(layer, "weight") == 0).all())


# -- the meta device ----------------------------------------------------------------------------------------------------------


def test_a_layer_of_a_trillion_weights() -> None:
    started = time.process_time()  # of this process alone, whatever else the machine does
    layer = sparsify(nn.Linear(1_000_000, 1_000_000, device="meta"), 1000, device="cpu")
    shape, places, values = connections(layer)["weight"]
    assert time.process_time() - started < 60  # a pass over all weights would take an hour
    assert shape == (1_000_000, 1_000_000) and places.numel() == values.numel() == 1000
    assert int(places.max()) > 2**35 and layer.bias.device.type == "cpu"
    bound = 1 / math.sqrt(1_000_000) * math.sqrt(1e12 / 1000)
    assert stats.kstest(values.abs().detach().numpy() / bound, "uniform").pvalue > P_VALUE
    assert layer.weight.shape == (1_000_000, 1_000_000) and layer.weight.dtype == torch.float32
    assert layer(torch.zeros(1, 1_000_000)).shape == (1, 1_000_000)
    for read in (lambda: layer.weight.sum(), lambda: layer.weight[0], lambda: layer.weight.detach()):
        with pytest.raises(RuntimeError, match=r"more than 1 GiB.*lightning_deepr\.connections\(module\)"):
            read()
    slots = slots_by_name(layer)["weight"]
    reactivate([theta_of(layer, "weight").detach()], [slots], [torch.arange(500)], seed=0, step=0)
    assert_connected(layer, {"weight": 1000})


# The magnitudes of a user's own layer are not known: see the last test.
ON_META = [(layer, init) for layer in LAYERS for init in ("module", "deepr") if (layer.name, init) != ("own_layer", "module")]


@pytest.mark.parametrize(("layer", "init"), ON_META, ids=str)
def test_a_module_on_meta_is_materialized(layer: Layer, init: str) -> None:
    with torch.device("meta"):
        module = layer.make()
    sparsify(module, 0.3, target_modules=layer.target, init=init, device="cpu")
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    assert all(tensor.device.type == "cpu" and bool(torch.isfinite(tensor).all()) for tensor in tensors)
    assert_connected(module)
    assert bool(torch.isfinite(flat(module(*layer.feed()))).all())
    twin = sparsify(layer.build(), 0.3, target_modules=layer.target, init=init)
    for name, (shape, places, values) in connections(module).items():
        assert shape == connections(twin)[name][0]
        assert torch.equal(places, connections(twin)[name][1]), "the same places as in a layer on a real device"
        if init == "deepr":
            assert torch.equal(values, connections(twin)[name][2])
        else:  # the same distribution, by its spread
            assert values.std().item() == pytest.approx(connections(twin)[name][2].std().item(), rel=0.4)


def test_what_stays_dense_on_meta_is_reset_by_itself() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30), nn.LayerNorm(30), nn.Embedding(5, 30), nn.Linear(30, 10))
    sparsify(net, {"0": 0.1})
    assert connections(net).keys() == {"0.weight"}
    assert torch.equal(net[1].running_var, torch.ones(30)) and torch.equal(net[2].weight, torch.ones(30))
    assert net[4].weight.abs().max() <= 1 / math.sqrt(30) + 1e-6 and net[4].weight.std() > 0.05
    assert net[0].bias.abs().max() <= 1 / math.sqrt(20) + 1e-6 and net[0].bias.std() > 0.05


def test_what_cannot_be_materialized_is_refused() -> None:
    with torch.device("meta"):
        own = next(layer for layer in LAYERS if layer.name == "own_layer").make()
        linear = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r'starts its weight is not known: expected init="deepr"'):
        sparsify(own, 0.3, target_modules=["weight"])
    with pytest.raises(ValueError, match=r'init="largest" needs a trained layer'):
        sparsify(linear, 0.3, init="largest")
    assert not connections(own) and not connections(linear)
    assert own.weight.device.type == "meta"
