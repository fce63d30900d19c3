"""Signs by a table: Dale's law and signs that are given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_deepr import (
    SET,
    Dale,
    DeepR,
    FixedRandom,
    NoSelf,
    RigL,
    connectivity_report,
    densify,
    kernels,
    load_state_dict,
    save_sparse,
    sparsify,
)
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.plain import PlainDeepR
from tests.helpers.processes import Processes
from tests.helpers.state import all_slots, assert_equal_states, slots_by_name, state_of, thetas

SEED = 3
LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Linear": (lambda: nn.Linear(20, 12), "weight"),
    "LSTM": (lambda: nn.LSTM(7, 20), "weight_hh_l0"),
    "Conv2d": (lambda: nn.Conv2d(20, 6, 3), "weight"),
    "Conv2d in groups": (lambda: nn.Conv2d(20, 8, 3, groups=4), "weight"),
    "depthwise": (lambda: nn.Conv1d(20, 40, 3, groups=20), "weight"),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(20, 6, 2), "weight"),
    "ConvTranspose1d in groups": (lambda: nn.ConvTranspose1d(20, 8, 3, groups=4), "weight"),
    "Embedding": (lambda: nn.Embedding(20, 6), "weight"),
    "attention": (lambda: nn.MultiheadAttention(20, 2), "in_proj_weight"),
}


def by_input(layer: nn.Module, weight: Tensor) -> list[Tensor]:
    """Return the weights from each input unit, by what the layer computes."""
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return list(weight.flatten(1))
    if isinstance(layer, nn.modules.conv._ConvNd):
        inside, outputs = weight.shape[1], weight.shape[0] // layer.groups
        return [weight[g * outputs : (g + 1) * outputs, i].flatten() for g in range(layer.groups) for i in range(inside)]
    return list(weight if isinstance(layer, nn.Embedding) else weight.T)


def signs_of_inputs(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return the sign of each input unit; fail if it has both, and 0 if it has no connection."""
    found = [column.sign().unique() for column in by_input(layer, weight)]
    signs = [values[values != 0] for values in found]
    assert all(values.numel() <= 1 for values in signs), "an input unit with both signs"
    return torch.stack([values.sum() for values in signs])


@pytest.mark.parametrize("layer", LAYERS)
def test_every_input_unit_has_one_sign(layer: str) -> None:
    make, tensor = LAYERS[layer]
    net = sparsify(make(), {tensor: 0.6}, signs={tensor: Dale(0.7)}, seed=SEED)
    weight = getattr(net, tensor).detach() + 0
    signs = signs_of_inputs(net, weight)
    assert signs.shape == (20,) and int((signs > 0).sum()) == 14 and int((signs < 0).sum()) == 6
    vector = signs > 0
    same = sparsify(make(), {tensor: 0.6}, signs={tensor: Dale(vector)})
    assert torch.equal(signs_of_inputs(same, getattr(same, tensor).detach() + 0), signs)


def test_the_share_is_exact_and_the_draw_depends_on_the_seed() -> None:
    def negative(dale: Dale, index: int = 0, seed: int = SEED) -> Tensor:
        net = nn.Sequential(nn.Linear(50, 40), nn.Linear(50, 30))
        table = all_slots(sparsify(net, 0.2, signs=dale, seed=seed))[index].sign_table
        assert table is not None
        return table.are_negative(torch.arange(50))

    for share in (0, 0.25, 0.5, 0.8, 1, 1.0):
        assert int(negative(Dale(share)).sum()) == 50 - round(50 * share)
    assert not torch.equal(negative(Dale(0.5)), negative(Dale(0.5), 1))
    assert not torch.equal(negative(Dale(0.5)), negative(Dale(0.5), seed=4))
    assert torch.equal(negative(Dale(0.5, seed=7)), negative(Dale(0.5, seed=7), 1, seed=4))


@pytest.mark.parametrize("share", [0.5, 0.8, 0.1, 1.0])
@pytest.mark.parametrize("init", ["module", "deepr"])
def test_the_start_keeps_the_variance_and_is_balanced(init: str, share: float) -> None:
    def start(signs: Any) -> Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(600, 500, bias=False)
        return sparsify(layer, 0.1, init=init, signs=signs, seed=SEED).weight.detach() + 0

    x = torch.randn(400, 600, generator=torch.Generator().manual_seed(1))
    usual, dale = start("place"), start(Dale(share))
    variance = [(x @ weight.T).var() for weight in (usual, dale)]
    torch.testing.assert_close(variance[0], variance[1], rtol=0.1, atol=0.0)  # over 40 seeds the ratio is 1.00 +- .03
    if share < 1:  # rates above 0 cancel, too
        assert abs(float(dale.sum() / dale.abs().sum())) < 0.05
        loose = start(Dale(share, balanced=False))
        assert abs(float(loose.sum() / loose.abs().sum()) - (2 * share - 1)) < 0.05


def run(net: nn.Module, callback: Any, optimizer: torch.optim.Optimizer, steps: range, look: bool = True) -> Any:
    rewiring = callback.attach(net, optimizer, total_steps=5000)
    for step in steps:
        for theta in thetas(net):
            theta.grad = torch.randn(theta.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        if look and step % 50 == 0:
            signs_of_inputs(net[0], net[0].weight.detach() + 0)
    return rewiring


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
}
METHODS: dict[str, Callable[[], Any]] = {
    "DeepR": lambda: DeepR(l1=0.02, check_invariants=True),
    "DeepR, one K": lambda: DeepR(l1=0.02, scope="global", check_invariants=True),
    "SET": lambda: SET(signs="place", rewire_every_n_steps=5, check_invariants=True),
    "SET, free": lambda: SET(rewire_every_n_steps=5, check_invariants=True),  # a table is kept under every method
    "RigL": lambda: RigL(signs=Dale(0.8, seed=1), rewire_every_n_steps=1000, check_invariants=True),
    "FixedRandom": lambda: FixedRandom(check_invariants=True),
}


def start(scope: str = "layer", signs: Any = None) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 10))
    return sparsify(net, 0.2, signs=signs or Dale(0.8, seed=1), candidates={"0": NoSelf()}, scope=scope, seed=SEED)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_training_keeps_the_signs_of_the_units(method: str, optimizer: str, steps: int) -> None:
    callback = METHODS[method]()
    net = start(callback.scope)
    before = signs_of_inputs(net[0], net[0].weight.detach() + 0)
    places = [slots.places.clone() for slots in all_slots(net)]
    callback.rewire_until = None if hasattr(callback, "rewire_until") and method == "DeepR" else callback.rewire_until
    run(net, callback, OPTIMIZERS[optimizer](net.parameters()), range(min(steps, 900) if method == "RigL" else steps))
    after = signs_of_inputs(net[0], net[0].weight.detach() + 0)
    assert not bool(((before != 0) & (after != 0) & (before != after)).any())
    if method not in ("FixedRandom", "RigL"):
        assert any(not torch.equal(old, slots.places) for old, slots in zip(places, all_slots(net), strict=True))


def on_a_rank(rank: int) -> tuple[list[Tensor], Tensor, Tensor, int]:
    net = start()
    ddp = DistributedDataParallel(net)
    before, places = signs_of_inputs(net[0], net[0].weight.detach() + 0), [slots.places.clone() for slots in all_slots(net)]
    optimizer = OPTIMIZERS["Adam"](net.parameters())
    rewiring = DeepR(signs=Dale(0.8, seed=1), check_invariants=True).attach(net, optimizer, total_steps=60)
    for step in range(60):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(2 * step + rank))
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()
    rewiring.remove()
    moved = sum(not torch.equal(old, slots.places) for old, slots in zip(places, all_slots(net), strict=True))
    return state_of(net), before, signs_of_inputs(net[0], net[0].weight.detach() + 0), moved


@pytest.mark.slow
def test_ranks_keep_the_signs_of_the_units(processes: Processes) -> None:
    (mine, before, after, moved), (theirs, *_) = processes.run(on_a_rank)
    assert_equal_states(mine, theirs)
    assert moved == 2 and not bool(((before != 0) & (after != 0) & (before != after)).any())


def test_the_compiled_step_and_pytorchs_give_the_same_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.randn(20, 20, generator=torch.Generator().manual_seed(0)).sign()
    states = []
    for compiled in (True, False):
        with monkeypatch.context() as patch:
            if not compiled:
                patch.setattr(kernels, "available", lambda: False)
            net = start(signs={"0": given, "1": Dale(0.3)})
            run(net, PlainDeepR(l1=0.1), OPTIMIZERS["momentum"](net.parameters()), range(30), look=False)
            states.append(state_of(net))
            slots = all_slots(net)[0]
            assert torch.equal(slots.signs, given.view(-1)[slots.places])
    assert_equal_states(*states)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_resumed_training_is_the_uninterrupted_one(scope: str) -> None:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        net = start(scope)
        return net, OPTIMIZERS["Adam"](net.parameters()), DeepR(l1=0.02, scope=scope)

    whole, optimizer, callback = begin()
    run(whole, callback, optimizer, range(40), look=False)
    first, optimizer, callback = begin()
    rewiring = run(first, callback, optimizer, range(20), look=False)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), rewiring.state_dict()))
    second, optimizer, callback = begin()
    rewiring = callback.attach(second, optimizer, total_steps=5000)
    for part, state in zip((second, optimizer, rewiring), saved, strict=True):
        part.load_state_dict(state)
    for step in range(20, 40):
        for theta in thetas(second):
            theta.grad = torch.randn(theta.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    assert_equal_states(state_of(whole), state_of(second))


def test_files_state_dicts_and_copies_keep_the_table(tmp_path: Path) -> None:
    given = torch.randn(10, 20, generator=torch.Generator().manual_seed(0)).sign()
    net = start(signs={"0": Dale(0.8), "1": given})
    tables = [slots.sign_table for slots in all_slots(net)]
    dense = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 10))
    read = load_state_dict(copy.deepcopy(dense), save_sparse(net, tmp_path / "net.safetensors"))
    again = load_state_dict(copy.deepcopy(dense), net.state_dict())
    plain = sparsify(copy.deepcopy(dense), 0.2)
    plain.load_state_dict(net.state_dict())
    for other in (read, again, plain, copy.deepcopy(net)):
        assert [slots.sign_table for slots in all_slots(other)] == tables
        for one, slots in zip(all_slots(net), all_slots(other), strict=True):
            everywhere = torch.arange(one.total)
            assert torch.equal(one.signs_at(everywhere), slots.signs_at(everywhere))
    assert save_sparse(read, tmp_path / "again.safetensors").read_bytes() == (tmp_path / "net.safetensors").read_bytes()
    assert [row["signs"] for row in connectivity_report(net)] == ["Dale(0.8)", "given"]
    other = start(signs={"0": Dale(0.8, seed=9), "1": given})
    with pytest.raises(RuntimeError, match=r"0.weight`: expected signs by Dale\(0.8\), found .* other signs.*give the signs"):
        other.load_state_dict(net.state_dict())
    hashed = sparsify(copy.deepcopy(dense), 0.2)
    with pytest.raises(RuntimeError, match=r"0.weight`: expected signs by Dale\(0.8\), found .* by the hash of their places"):
        other.load_state_dict(hashed.state_dict())


def test_a_network_with_dales_law_can_be_taken_over() -> None:
    net = start()
    table = all_slots(net)[0].sign_table
    assert table is not None
    units = ~table.are_negative(torch.arange(20))
    dense = densify(net)
    sparsify(dense, "nonzero", signs={"0": Dale(units)}, target_modules=["0"])
    assert all_slots(dense)[0].sign_table == table


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "largest": ({"connectivity": 0.1, "init": "largest", "signs": Dale(0.5)},
                r'`0.weight`: init="largest" keeps the weights\' own signs.*Dale\(0.5\) has the opposite one at.*Say which'),
    "nonzero": ({"connectivity": {"0": "nonzero"}, "signs": Dale(0.5)},
                r'`0.weight`: connectivity="nonzero" keeps the weights\' own signs.*Say which wins'),
    "units": ({"connectivity": 0.1, "signs": {"0": Dale([True] * 19)}}, r"`0.weight`: .*for 20 input units, found 19"),
    "shape": ({"connectivity": 0.1, "signs": {"0": torch.ones(20)}}, r"`0.weight`: .*shape \(20, 20\), found \(20,\)"),
    "zero": ({"connectivity": 0.1, "signs": {"0": torch.zeros(20, 20)}}, r"`0.weight`: expected a sign.*found 0.0 at place 0"),
    "NaN": ({"connectivity": 0.1, "signs": {"0": torch.zeros(20, 20) / 0}}, r"`0.weight`: expected a sign.*found nan"),
    "pattern": ({"connectivity": 0.1, "signs": {"fc": Dale()}}, r"signs: the pattern 'fc' names no tensor"),
    "word": ({"connectivity": 0.1, "signs": "dale"}, r"signs: expected \"place\", Dale\(excitatory=0.8\).*found 'dale'"),
    "free": ({"connectivity": 0.1, "signs": "free"}, r"signs: .*a connection whose sign would change goes dormant"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_signs_that_do_not_fit_are_refused(bad: str) -> None:
    arguments, message = BAD[bad]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 10))
    with torch.no_grad():
        net[0].weight[::2] = 0
    with pytest.raises(ValueError, match=message):
        sparsify(net, **arguments)
    assert not list(converted_tensors(net))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_outside_of_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"Dale: excitatory: expected a share from 0 to 1, found"):
        Dale(share)


def test_a_callback_with_other_signs_is_refused() -> None:
    net = start()
    with pytest.raises(ValueError, match=r"`1.weight` is converted already, with signs Dale\(0.8\): .*Dale\(0.2\)"):
        DeepR(signs={"1": Dale(0.2)}).attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    DeepR(signs=Dale(0.8, seed=1)).attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r'found "free": here a connection whose sign would change'):
        DeepR(0.1, signs="free")
    assert list(slots_by_name(net)) == ["0.weight", "1.weight"]
