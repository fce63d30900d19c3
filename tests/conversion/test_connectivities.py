"""Where a network starts, if its places are given: weights that are not 0, masks, places, matrices, files, other networks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_deepr import (
    DeepR,
    FixedRandom,
    MagnitudePruning,
    Topology,
    connections,
    connectivity_report,
    densify,
    save_sparse,
    sparsify,
    zoo,
)
from lightning_deepr.algorithm import randomness
from lightning_deepr.models import LeNet300100
from tests.helpers.classifier import Net, batches
from tests.helpers.optional import Optional
from tests.helpers.state import all_slots, assert_equal_states, slots_by_name, state_of, thetas
from tests.helpers.trainer import trainer

sparse = Optional("scipy.sparse")

SEED = 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 15), nn.Tanh(), nn.Conv1d(3, 4, 2), nn.LSTM(5, 6), nn.Linear(15, 4))


def with_zeros(share: float = 0.7) -> nn.Module:
    net = network()
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            if parameter.dim() > 1:
                off = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(i)) < share
                parameter.masked_fill_(off, 0.0)
    return net


def values_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items() if value.dim() > 1}


# -- nonzero -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["module", "largest"])
@pytest.mark.parametrize("how", ["sparsify", "callback"])
def test_nonzero_takes_the_weights_as_they_are(how: str, init: str) -> None:
    net = with_zeros()
    before = values_of(net)
    if how == "sparsify":
        sparsify(net, "nonzero", init=init)
    else:
        DeepR("nonzero", init=init).prepare(net)
    for name, slots in slots_by_name(net).items():
        assert slots.places.tolist() == before[name].reshape(-1).nonzero().view(-1).tolist()
    again = densify(net)
    for name, value in before.items():
        assert torch.equal(again.state_dict()[name], value), name


def test_nonzero_and_a_new_start() -> None:
    """init="deepr" keeps the places and draws values and signs anew."""
    net = with_zeros()
    before = values_of(net)
    sparsify(net, "nonzero", init="deepr", seed=SEED)
    for i, (name, slots) in enumerate(slots_by_name(net).items()):
        weight = torch.zeros(slots.total)
        weight[slots.places] = 1
        assert torch.equal(weight.view(slots.shape) != 0, before[name] != 0)
        assert torch.equal(slots.signs, randomness.signs_of(slots.sign_seed, slots.places, torch.float32)), i


def test_tensors_without_a_zero_are_left_out_and_said() -> None:
    net = network()
    with torch.no_grad():
        net[0].weight[:, ::2] = 0
    with pytest.warns(UserWarning, match=r'connectivity="nonzero": `2.weight`, `3.weight_ih_l0`.* without a zero: left dense'):
        sparsify(net, "nonzero")
    assert list(slots_by_name(net)) == ["0.weight"] and "2.weight" in connectivity_report(net).left_out


def test_a_round_trip_and_a_theta_of_zero() -> None:
    net = sparsify(network(), 0.2, seed=SEED)
    with torch.no_grad():
        thetas(net)[0][:3] = 0
    known = {name: places for name, (_, places, _) in connections(net).items()}
    counts = [slots.count for slots in all_slots(net)]
    dense = densify(copy.deepcopy(net))
    lost = sparsify(copy.deepcopy(dense), "nonzero")
    assert [slots.count for slots in all_slots(lost)] == [counts[0] - 3, *counts[1:]]
    kept = sparsify(copy.deepcopy(dense), known, init="largest")  # the places say what a value of 0 can't
    assert [slots.count for slots in all_slots(kept)] == counts
    for one, other in zip(all_slots(kept), all_slots(net), strict=True):
        assert torch.equal(one.places, other.places) and torch.equal(one.signs[3:], other.signs[3:])
    for one, other in zip(thetas(kept), thetas(net), strict=True):
        assert torch.equal(one, other)


def test_training_goes_on_equally_after_a_round_trip() -> None:
    def train(net: nn.Module) -> nn.Module:
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        DeepR(l1=0.02, seed=SEED, check_invariants=True).attach(net, optimizer)
        for step in range(20):
            optimizer.zero_grad()
            net(torch.randn(8, 20, generator=torch.Generator().manual_seed(step))).square().mean().backward()
            optimizer.step()
        return net

    def dense() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(20, 15), nn.Tanh(), nn.Linear(15, 4))

    first = sparsify(dense(), 0.2, seed=SEED)
    state = densify(copy.deepcopy(first)).state_dict()
    second = dense()
    second.load_state_dict(state)
    sparsify(second, "nonzero", seed=SEED)
    order = [slots.places.argsort() for slots in all_slots(first)]  # the slots of the second one are in the order of places
    places = {name: slots.places[o] for (name, slots), o in zip(slots_by_name(first).items(), order, strict=True)}
    third = dense()
    third.load_state_dict(state)
    sparsify(third, places, init="largest", seed=SEED)
    assert_equal_states(state_of(train(second)), state_of(train(third)))
    fourth = dense()
    fourth.load_state_dict(state)
    sparsify(fourth, {name: slots.places for name, slots in slots_by_name(first).items()}, init="largest", seed=SEED)
    assert_equal_states(state_of(train(first)), state_of(train(fourth)))  # and the order of the slots, if it is given


MODELS = zoo.list_models()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "lenet300_100.deepr_1pct" in name else pytest.mark.slow) for name in MODELS]
)
def test_a_model_of_the_zoo_is_the_same_after_densify_and_nonzero(name: str) -> None:
    sparse, again = zoo.load(name), zoo.load(name, dense=True)
    seeds = {slots.sign_seed for slots in all_slots(sparse)}
    seed = next(
        (s for s in range(100) if randomness.key(s, randomness.SIGN, all_slots(sparse)[0].index) & randomness.LARGEST in seeds),
        0,
    )
    zeros = sum(int((theta == 0).sum()) for theta in thetas(sparse))
    sparsify(again, "nonzero", seed=seed)
    again.eval()
    shape = (1, 28, 28) if "lenet" in name else (3, 24, 24) if "cifar" in name else (40, 39)
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    x = x.flatten(1) if "lenet" in name else x
    if "shakespeare" in name:
        x = torch.randint(65, (4, 32), generator=torch.Generator().manual_seed(0))
    if "timit" in name:
        x = x.transpose(0, 1) if not getattr(sparse, "batch_first", True) else x
    with torch.no_grad():
        one, other = sparse(x), again(x)
    if zeros:  # connections of value 0 are lost, so that sums are taken in another order
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
        return
    assert torch.equal(one, other)
    for net in (sparse, again):
        for slots in all_slots(net):
            slots.born.fill_(-1)
        net.train()
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        FixedRandom(seed=seed).attach(net, optimizer)
        for step in range(100):
            optimizer.zero_grad()
            net(x + step if x.is_floating_point() else (x + step) % 65).square().mean().backward()
            optimizer.step()
    for name, slots in slots_by_name(sparse).items():
        assert torch.equal(slots.places, slots_by_name(again)[name].places)
    for a, b in zip(thetas(sparse), thetas(again), strict=True):
        assert torch.equal(a, b)


# -- torch.nn.utils.prune ----------------------------------------------------------------------------------------------------


def pruned(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    net = network()
    tensors = [(net[0], "weight"), (net[2], "weight"), (net[4], "weight")]
    if kind == "global":
        prune.global_unstructured(tensors, prune.L1Unstructured, amount=0.9)
    else:
        for module, name in tensors:
            prune.random_unstructured(module, name, amount=0.5)
            prune.ln_structured(module, name, amount=0.3, n=2, dim=0)
        with torch.no_grad():  # a weight of 0 within the mask is a connection
            place = net[0].weight_mask.nonzero()[0]
            net[0].weight_orig[tuple(place)] = 0
    return net, {f"{i}.weight": net[i].weight_mask.clone() for i in (0, 2, 4)}


@pytest.mark.parametrize("kind", ["global", "several"])
def test_a_pruned_network_is_taken_over(kind: str) -> None:
    net, masks = pruned(kind)
    x = torch.randn(5, 20)
    with torch.no_grad():
        expected = net[4](net[1](net[0](x)))
    with pytest.warns(UserWarning, match="`3.weight_ih_l0`.*left dense"):
        sparsify(net, "nonzero")
    for name, mask in masks.items():
        assert slots_by_name(net)[name].places.tolist() == mask.reshape(-1).nonzero().view(-1).tolist()
    torch.testing.assert_close(net[4](net[1](net[0](x))), expected)
    assert not any("orig" in name or name.endswith("mask") for name in net.state_dict() if "parametrizations" not in name)


def test_a_pruned_network_is_as_before_after_an_error() -> None:
    net, _ = pruned("global")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"candidates: the pattern 'nothing' names no tensor"):
        sparsify(net, "nonzero", target_modules=["0", "2", "4"], candidates={"nothing": lambda r, c: r == c})
    assert net.state_dict().keys() == before.keys() and prune.is_pruned(net)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    with torch.no_grad():
        net[0](torch.randn(2, 20))


# -- places of other kinds -----------------------------------------------------------------------------------------------------

MASK = torch.rand(15, 20, generator=torch.Generator().manual_seed(5)) < 0.3
PLACES = MASK.view(-1).nonzero().view(-1)
GIVEN: dict[str, Callable[[], Any]] = {
    "mask": lambda: MASK,
    "list": lambda: PLACES.tolist(),
    "tensor": lambda: PLACES,
    "array": lambda: PLACES.numpy(),
    "array of bool": lambda: MASK.numpy(),
    "COO": lambda: (MASK.float() * 3).to_sparse_coo(),
    "CSR": lambda: MASK.double().to_sparse_csr(),
    "scipy CSR": lambda: sparse.csr_matrix(MASK.numpy().astype(np.float32)),
    "scipy COO": lambda: sparse.coo_array(MASK.numpy()),
    "dense weight": lambda: MASK * torch.randn(15, 20),
}


@pytest.mark.parametrize("init", ["module", "largest", "deepr"])
@pytest.mark.parametrize("kind", GIVEN)
def test_places_of_every_kind(kind: str, init: str) -> None:
    net = network()
    own = net[0].weight.detach().clone().view(-1)
    sparsify(net, {"0": GIVEN[kind](), "4": 0.5}, init=init, seed=SEED)
    (first, second), theta = all_slots(net), thetas(net)[0].detach()
    assert first.places.tolist() == PLACES.tolist() and second.count == 30
    if init == "largest":
        assert torch.equal(theta * first.signs, own[PLACES])
    elif init == "module":
        torch.testing.assert_close(theta, own[PLACES].abs() * (300 / len(PLACES)) ** 0.5)
    assert init == "largest" or torch.equal(first.signs, randomness.signs_of(first.sign_seed, PLACES, torch.float32))


def test_kernels_may_be_given_as_a_matrix_of_their_rows() -> None:
    mask = torch.rand(4, 3, 2) < 0.5
    for given in (
        mask,
        mask.flatten(1).to_sparse_coo(),
        mask.float().to_sparse_coo(),
        sparse.csr_array(mask.flatten(1).numpy()),
    ):
        net = sparsify(network(), {"2": given})
        assert all_slots(net)[0].places.sort().values.tolist() == mask.view(-1).nonzero().view(-1).tolist()


def test_a_state_dict_with_zeros_gives_places_but_no_values(tmp_path: Path) -> None:
    source = with_zeros()
    state = source.state_dict()
    torch.save(state, tmp_path / "dense.pt")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "lightning.ckpt")
    for given in (state, Topology(state), Topology(tmp_path / "dense.pt"), Topology(str(tmp_path / "lightning.ckpt"))):
        net = sparsify(network(), given, init="deepr")
        assert list(slots_by_name(net)) == ["0.weight", "2.weight", "3.weight_ih_l0", "3.weight_hh_l0", "4.weight"]
        for name, slots in slots_by_name(net).items():
            assert slots.places.tolist() == state[name].reshape(-1).nonzero().view(-1).tolist()


def test_the_topology_of_files_models_and_networks(tmp_path: Path) -> None:
    name = "lenet300_100.deepr_1pct_mnist"
    source = zoo.load(name)
    expected = {tensor: sorted(slots.places.tolist()) for tensor, slots in slots_by_name(source).items()}
    torch.save(source.state_dict(), tmp_path / "net.pt")
    path = save_sparse(source, tmp_path / "net.safetensors")
    for given in (name, path, str(tmp_path / "net.pt"), source, source.state_dict()):
        net = LeNet300100()
        DeepR(Topology(given)).prepare(net)
        assert {tensor: sorted(slots.places.tolist()) for tensor, slots in slots_by_name(net).items()} == expected
        assert not torch.equal(thetas(net)[0].sort().values, thetas(source)[0].sort().values)  # the values are new


def test_a_trainer_starts_from_places() -> None:
    net = Net()
    tensors = {name: torch.arange(value.numel())[::3] for name, value in net.named_parameters() if value.dim() == 2}
    trainer(DeepR(tensors, l1=1e-3, check_invariants=True), max_epochs=1).fit(net, batches())
    assert {name: slots.count for name, slots in slots_by_name(net).items()} == {n: len(p) for n, p in tensors.items()}


# -- refused -------------------------------------------------------------------------------------------------------------------


def spoiled() -> nn.Module:
    net = with_zeros()
    with torch.no_grad():
        net[0].weight[0, 0] = float("nan")
    return net


BAD: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "no zero": (network, "nonzero", r'"nonzero" expects weights with zeros.*found none in `0.weight`'),
    "NaN": (spoiled, "nonzero", r"`0.weight`: expected finite weights .*found 1 that are NaN"),
    "meta": (lambda: with_zeros().to("meta"), "nonzero", r"`0.weight` is on the meta device"),
    "shape": (network, {"0": MASK.T}, r"`0.weight`: expected a mask of shape \(15, 20\).*found \(20, 15\)"),
    "device": (network, {"0": MASK.to("meta")}, r"`0.weight`: expected its connectivity on cpu.*found it on meta"),
    "all False": (network, {"0": MASK & False}, r"`0.weight`: expected a connection, found none"),
    "twice": (network, {"0": [5, 5]}, r"`0.weight`: expected different places, found 2 of which 1 differ"),
    "outside": (network, {"0": [5, 300]}, r"`0.weight`: expected places from 0 to 299.*found 300"),
    "negative": (network, {"0": [-1, 3]}, r"`0.weight`: expected places from 0 to 299.*found -1"),
    "matrix": (network, lambda: {"0": sparse.eye(15, format="csr")}, r"`0.weight`: expected a matrix .*found \(15, 15\)"),
    "word": (network, "zeros", r"connectivity: expected a float .*found 'zeros'.*Topology\(path\)"),
    "name": (network, {"9": MASK}, r"connectivity: the pattern '9' matches no tensor"),
    "numbers": (network, {"0": MASK.long()}, r"`0.weight`: expected a bool mask of shape \(15, 20\) or a list of places"),
    "weight with NaN": (network, {"0": MASK.float() / 0}, r"`0.weight`: expected finite values, found NaN"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_places_that_do_not_fit_are_refused_and_nothing_is_converted(bad: str) -> None:
    make, given, message = BAD[bad]
    if bad == "matrix":
        given = given()
    for convert in (lambda net: sparsify(net, given), lambda net: DeepR(given).prepare(net)):
        net = make()
        with pytest.raises((ValueError, TypeError), match=message):
            convert(net)
        assert not slots_by_name(net)


def test_a_method_with_a_theta_for_every_place_takes_numbers() -> None:
    with pytest.raises(ValueError, match=r"`0.weight`: this method has a theta for every place.*found places"):
        MagnitudePruning({"0": MASK}).prepare(network())


def test_places_outside_of_the_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match=rf"`0.weight`: expected {len(PLACES)} places among those that .*found \d+ elsewhere"):
        sparsify(network(), {"0": MASK}, candidates={"0": lambda r, c: r != 3})
