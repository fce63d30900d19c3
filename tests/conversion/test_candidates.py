"""Where connections may be: the places of each form, uniform births among them, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import (
    SET,
    Band,
    Blocks,
    DeepR,
    FixedRandom,
    L1Shrinkage,
    Local,
    MagnitudePruning,
    NoSelf,
    RigL,
    SoftDeepR,
    connectivity_report,
    densify,
    kernels,
    load_state_dict,
    save_sparse,
    sparsify,
)
from lightning_deepr.algorithm import rewiring
from lightning_deepr.algorithm.allowed import BITMAP, Allowed, bind
from lightning_deepr.algorithm.units import Units
from lightning_deepr.weights.k_slots import KSlots
from tests.helpers import oracle
from tests.helpers.forms import FORMS, codes_of, mask_of
from tests.helpers.plain import PlainDeepR
from tests.helpers.regression import SEED
from tests.helpers.state import all_slots, assert_equal_states, slots_by_name, state_of, thetas
from tests.helpers.statistics import chi_square_p

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(12, 12),
    "Linear 24 x 12": lambda: nn.Linear(12, 24),
    "LSTM": lambda: nn.LSTM(12, 12),
    "Conv2d": lambda: nn.Conv2d(12, 12, (2, 3)),
    "Conv1d in groups": lambda: nn.Conv1d(24, 24, 2, groups=2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(12, 12, 2),
    "ConvTranspose1d in groups": lambda: nn.ConvTranspose1d(24, 24, 3, groups=2),
    "Embedding": lambda: nn.Embedding(12, 12),
}
RULED = [name for name, form in FORMS.items() if not isinstance(form.candidates, Tensor)]


def bound(name: str) -> Allowed:
    size = FORMS[name].size
    return bind(FORMS[name].candidates, Units(1, size, size), (size, size))


@pytest.mark.parametrize("form", RULED)
@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_reads_a_form_by_its_units(layer: str, form: str) -> None:
    if layer == "Linear 24 x 12" and FORMS[form].square:
        with pytest.raises(ValueError, match=r"of `weight`: NoSelf: expected as many .*found a matrix of 24 x 12"):
            sparsify(LAYERS[layer](), 10, candidates=FORMS[form].candidates)
        return
    made = LAYERS[layer]()
    tensor = "weight_hh_l0" if layer == "LSTM" else "weight"
    expected = mask_of(made, form, tuple(getattr(made, tensor).shape))
    net = sparsify(made, {tensor: 20}, candidates={tensor: FORMS[form].candidates})
    slots = slots_by_name(net)[tensor]
    assert slots.allowed is not None
    np.testing.assert_array_equal(slots.allowed.mask().numpy().reshape(expected.shape), expected)
    assert slots.allowed.count == expected.sum()
    assert sorted(slots.allowed.places().tolist()) == np.flatnonzero(expected).tolist()
    assert expected.reshape(-1)[slots.places.numpy()].all()


@pytest.mark.parametrize("layer", ["LSTM", "Conv2d", "Conv1d in groups"])
def test_a_mask_may_have_the_shape_of_one_matrix(layer: str) -> None:
    net, mask = LAYERS[layer](), FORMS["mask"].candidates
    tensor = "weight_hh_l0" if layer == "LSTM" else "weight"
    shape = tuple(getattr(net, tensor).shape)
    slots = slots_by_name(sparsify(net, {tensor: 20}, candidates={tensor: mask}))[tensor]
    found = slots.allowed.mask().view(shape)  # type: ignore[union-attr]
    for i in range(0, shape[0], 12):
        part = found[i : i + 12]
        assert torch.equal(part.reshape(12, 12, -1), mask[:, :, None].expand(12, 12, part[0, 0].numel()))


# -- draws -------------------------------------------------------------------------------------------------------------------


def births_of_first_slots(slots: list[KSlots], places: Tensor, step: int) -> Tensor:
    """Let the first slot of each tensor die, by the compiled step where there is one. They begin with the same places."""
    thetas = [torch.ones(len(places)) for _ in slots]
    for theta, one in zip(thetas, slots, strict=True):
        theta[0] = -1
        one.places.copy_(places)
    if kernels.available():
        from lightning_deepr.kernels.cpu.step import Table

        size = len(slots)
        Table(slots, 4).step(thetas, [0.0] * size, [0.0] * size, [True] * size, [[]] * size, -1, SEED, step)
        return torch.stack([one.places[0] for one in slots])
    return torch.cat(rewiring.new_places(slots, [torch.zeros(1, dtype=torch.long)] * len(slots), SEED, step))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("form", FORMS)
def test_births_are_uniform_among_the_allowed_dormant_places(form: str, share: float) -> None:
    """One slot of many equal tensors is reborn, each by a draw of its own."""
    allowed = bound(form)
    places = allowed.places()
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(3))
    count = max(1, min(round(share * len(places)), len(places) - 1))
    mine = places[order[:count]]
    free = sorted({*places.tolist()} - {*mine[1:].tolist()})  # the first slot dies
    tensors = 2 * len(free) + 20
    shape = torch.Size((allowed.units.rows, allowed.units.columns))
    slots = [KSlots(shape, mine.clone(), i, 1, allowed=allowed) for i in range(tensors)]
    found = [births_of_first_slots(slots, mine, step) for step in range(10)]
    births = torch.cat(found)
    counts = torch.bincount(births, minlength=allowed.units.total)
    assert int(counts.sum()) == int(counts[free].sum()) == len(found) * tensors, "a place is taken or not allowed"
    if len(free) > 1:
        assert chi_square_p(counts[free]) > 1e-4


@pytest.mark.parametrize("wanted", [10_000, pytest.param(300_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_births_of_each_form_stay_within(form: str, wanted: int) -> None:
    """All slots die in each step, of a tensor that draws by rejection and of one that draws from a list."""
    allowed = bound(form)
    size, births, inside = FORMS[form].size, 0, allowed.mask()
    net = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(2))
    counts = {"0": max(1, allowed.count // 3), "1": max(1, int(0.9 * allowed.count))}
    sparsify(net, counts, candidates=FORMS[form].candidates, seed=SEED)
    optimizer = torch.optim.SGD(thetas(net), lr=1.0)
    PlainDeepR(l1=0.0, seed=SEED).attach(net, optimizer)
    if not kernels.available() or form == "few":
        wanted //= 30
    while births < wanted:
        for theta in thetas(net):
            theta.grad = theta.detach() + 1
        optimizer.step()
        for slots in all_slots(net):
            assert bool(inside[slots.places].all()) and len(slots.places.unique()) == len(slots.places)
            births += slots.count


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("form", FORMS)
def test_the_oracle_draws_the_same_places(form: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    size, allowed = FORMS[form].size, bound(form)
    count = max(1, round(share * allowed.count))
    nets = []
    for compiled in (True, False):
        with monkeypatch.context() as patch:
            if not compiled:
                patch.setattr(kernels, "available", lambda: False)
            net = nn.Linear(size, size, bias=False, dtype=torch.float64)
            sparsify(net, {"weight": count}, candidates=FORMS[form].candidates, seed=SEED, init="deepr")
            (theta,) = thetas(net)
            (slots,) = all_slots(net)
            start = theta.detach().clone()
            slow = oracle.Network([oracle.Tensor(size * size, 0, SEED, start.numpy().copy(), codes=codes_of(form, size))], SEED)
            assert slots.places.tolist() == slow.tensors[0].places
            optimizer = torch.optim.SGD([theta], lr=0.5)
            PlainDeepR(l1=0.01, seed=SEED, check_invariants=True).attach(net, optimizer)
            for step in range(4):
                dying = torch.randperm(count, generator=torch.Generator().manual_seed(step))[: max(1, count // 2)]
                theta.grad = torch.zeros_like(theta)
                theta.grad[dying] = 2 * theta.detach()[dying] + 1
                slow.descend([theta.grad.numpy()], 0.5)
                optimizer.step()
                slow.shrink_and_diffuse(step, 0.5, 0.01)
                slow.rewire(step)
                assert slots.places.tolist() == slow.tensors[0].places and slots.born.tolist() == slow.tensors[0].born
                np.testing.assert_array_equal(theta.detach().numpy(), slow.tensors[0].theta)
                np.testing.assert_array_equal(slots.signs.numpy(), slow.tensors[0].signs)
            nets.append(net)
    assert_equal_states(state_of(nets[0]), state_of(nets[1]))


def test_a_band_of_a_million_by_a_million_keeps_nothing_of_that_size() -> None:
    with torch.device("meta"):
        net = nn.Linear(10**6, 10**6, bias=False)
    sparsify(net, 500, candidates=Band(100) & NoSelf(), init="deepr", device="cpu")
    (slots,) = all_slots(net)
    assert slots.allowed is not None and slots.allowed.items.numel() == 0
    assert slots.allowed.count == 10**6 * 201 - 2 * sum(range(1, 101)) - 10**6
    off = (slots.places // 10**6 - slots.places % 10**6).abs()
    assert int(off.max()) <= 100 and int(off.min()) >= 1


def test_a_mask_is_kept_as_bits_or_as_a_list_of_few() -> None:
    units = Units(1, 512, 512)
    for share, words in ((0.2, 512 * 512 // 64), (0.1, None), (0.01, None)):
        mask = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) < share
        allowed = bind(mask, units, (512, 512))
        assert allowed.items.numel() == (int(mask.sum()) if words is None else words)
        assert (allowed.forms[-1].kind == BITMAP) == (words is not None)
        assert torch.equal(allowed.mask().view(512, 512), mask)
        numbers, items = allowed.record()  # a state_dict never takes more than the bits
        assert items.numel() <= 512 * 512 // 64
        for record in ((numbers, items), allowed.record(lists=True)):
            again = Allowed.of_record(*record, 512 * 512)
            assert again == allowed and again.count == allowed.count


# -- methods -----------------------------------------------------------------------------------------------------------------

METHODS: dict[str, Callable[[], Any]] = {
    "DeepR": lambda: DeepR(l1=0.05, check_invariants=True),
    "DeepR, one K": lambda: DeepR(l1=0.05, scope="global", check_invariants=True),
    "DeepR, one K, uniform": lambda: DeepR(l1=0.05, scope="global", reactivation="uniform", check_invariants=True),
    "SET": lambda: SET(rewire_every_n_steps=2, check_invariants=True),
    "RigL": lambda: RigL(rewire_every_n_steps=2, check_invariants=True),
    "FixedRandom": lambda: FixedRandom(check_invariants=True),
    "MagnitudePruning": lambda: MagnitudePruning(prune_from=0.2, prune_until=0.6, check_invariants=True),
    "L1Shrinkage": lambda: L1Shrinkage(l1=0.01, check_invariants=True),
}
WITHIN = {"0": NoSelf() & Band(4), "2": torch.arange(72).view(4, 18) % 3 == 0}


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 18, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), x[:, :4].argmax(1)).backward()
        optimizer.step()


@pytest.mark.parametrize("share", [0.1, 0.26], ids=["few", "more than half of them"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_stays_within(method: str, share: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(18, 18), nn.Tanh(), nn.Linear(18, 4))
    callback = METHODS[method]()
    callback.connectivity, callback.distribution, callback.candidates = share, "uniform", WITHIN
    callback.prepare(net)
    starts = {name: slots.places.clone() for name, slots in slots_by_name(net).items() if isinstance(slots, KSlots)}
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    callback.attach(net, optimizer, total_steps=40)
    row, column = torch.arange(18)[:, None], torch.arange(18)[None, :]
    for steps in (range(20), range(20, 40)):
        train(net, optimizer, steps)
        weight = net[0].weight.detach() + 0
        assert not bool(weight[(row - column).abs() > 4].any()) and not bool(weight.diagonal().any())
        assert not bool((net[2].weight.detach() + 0)[~WITHIN["2"]].any())
        assert int((weight != 0).sum()) > 10
    if method not in ("FixedRandom", "MagnitudePruning", "L1Shrinkage"):
        assert any(not torch.equal(starts[name], slots.places) for name, slots in slots_by_name(net).items())


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_resumed_training_is_the_uninterrupted_one(scope: str) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(18, 18), nn.Tanh(), nn.Linear(18, 4))
        sparsify(net, 0.1, distribution="uniform", candidates=WITHIN, scope=scope)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        return net, optimizer, DeepR(l1=0.05, scope=scope, check_invariants=True).attach(net, optimizer)

    whole, optimizer, _ = start()
    train(whole, optimizer, range(20))
    first, optimizer, rewiring = start()
    train(first, optimizer, range(10))
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), rewiring.state_dict()))
    second, optimizer, rewiring = start()
    for part, state in zip((second, optimizer, rewiring), saved, strict=True):
        part.load_state_dict(state)
    train(second, optimizer, range(10, 20))
    assert_equal_states(state_of(whole), state_of(second))


def test_files_state_dicts_and_copies_keep_the_rules(tmp_path: Any) -> None:
    def dense() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(36, 36), nn.Conv2d(12, 12, 2), nn.LSTM(12, 12), nn.Linear(12, 12))

    rules = {
        "0": FORMS["few"].candidates,
        "1": FORMS["local"].candidates,
        "weight_hh_l0": NoSelf(),
        "3": FORMS["mask"].candidates,
    }
    counts = {"0": 8, "1": 40, "2": 60, "3": 9}
    net = sparsify(dense(), counts, candidates=rules)
    sparse_file = load_state_dict(dense(), save_sparse(net, tmp_path / "net.safetensors"))
    checkpoint = load_state_dict(dense(), net.state_dict())
    same = sparsify(dense(), counts, candidates=rules, seed=5)
    same.load_state_dict(net.state_dict())
    plain = sparsify(dense(), counts, seed=5)
    plain.load_state_dict(net.state_dict())
    expected = [slots.allowed for slots in all_slots(net)]
    assert sum(one is not None for one in expected) == 4
    for other in (sparse_file, checkpoint, same, plain, copy.deepcopy(net)):
        assert [slots.allowed for slots in all_slots(other)] == expected
    assert save_sparse(sparse_file, tmp_path / "again.safetensors").read_bytes() == (tmp_path / "net.safetensors").read_bytes()
    table = str(connectivity_report(net))
    assert "NoSelf" in table and "Local(3x4, 1.41421)" in table and f"{int(FORMS['mask'].candidates.sum())}" in table
    other = sparsify(dense(), counts, candidates={**rules, "weight_hh_l0": NoSelf() & Band(9)}, seed=5)
    with pytest.raises(RuntimeError, match=r"weight_hh_l0`: expected connections among .*Band\(9\).*give the candidates"):
        other.load_state_dict(net.state_dict())
    torch.testing.assert_close(densify(copy.deepcopy(net))[0].weight, net[0].weight + 0)


# -- refused -----------------------------------------------------------------------------------------------------------------


def misshapen(rows: Tensor, columns: Tensor) -> Tensor:
    return rows[:1] == 0


BAD: dict[str, tuple[Any, str]] = {
    "shape": (torch.ones(3, 4, dtype=torch.bool), r"of `0.weight`: expected a mask of shape \(18, 18\), found \(3, 4\)"),
    "device": (torch.ones(18, 18, dtype=torch.bool, device="meta"), r"`0.weight`: expected a mask on .*, found it on meta"),
    "none": (torch.zeros(18, 18, dtype=torch.bool), r"`0.weight`: allow none of the 324 places"),
    "type": (torch.ones(18, 18), r"candidates\['0'\]: expected a mask of dtype bool .*found torch.float32"),
    "too few": (Band(0), r"`0.weight`: expected at most 18 connections, .*Band\(0\) allows .*found K = 40"),
    "shape of an answer": (misshapen, r"`0.weight`: expected a bool tensor .*\(324,\).*found torch.bool of shape \(1,\)"),
    "type of an answer": (lambda r, c: r - c, r"`0.weight`: expected a bool tensor .*found torch.int64"),
    "blocks": (Blocks(19), r"`0.weight`: Blocks: expected at most 18 blocks in a matrix of 18 x 18, found 19"),
    "grid": (Local((4, 4), 1), r"`0.weight`: Local: expected a multiple of 4 x 4 = 16 inputs, found 18"),
    "outputs": (Local((3, 6), 1, outputs=(4, 4)), r"`0.weight`: Local: expected a multiple of 4 x 4 = 16 outputs, found 18"),
    "nothing": ("band", r"candidates\['0'\]: expected a bool mask, Band\(width\).*found 'band'"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_candidates_are_refused_and_nothing_is_converted(bad: str) -> None:
    net = nn.Sequential(nn.Linear(18, 18), nn.Linear(18, 18))
    given, message = BAD[bad]
    with pytest.raises((ValueError, TypeError), match=message):
        sparsify(net, {"0": 40, "1": 40}, candidates={"0": given})
    assert sorted(net.state_dict()) == ["0.bias", "0.weight", "1.bias", "1.weight"]


def test_a_pattern_that_names_no_tensor_is_refused() -> None:
    net = nn.Sequential(nn.Linear(18, 18), nn.Linear(18, 18))
    for connectivity in ({"0": 40}, 0.1):
        with pytest.raises(ValueError, match=r"candidates: the pattern '(1|fc)' names no tensor that is converted"):
            sparsify(net, connectivity, candidates={"1" if isinstance(connectivity, dict) else "fc": NoSelf()})
    callback = DeepR({"0": 40}, candidates={"1": NoSelf()})
    with pytest.raises(ValueError, match=r"candidates: the pattern '1' names no tensor"):
        callback.prepare(net)
    with pytest.raises(ValueError, match="soft-DEEP R has a random walk at every place"):
        SoftDeepR(0.1, temperature=1e-6, candidates=NoSelf())
    for wrong in (lambda: Band(-1), lambda: Blocks(0), lambda: Local((3,), 1), lambda: Local((3, 3), -1.0)):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="expected"):
            wrong()


def test_a_function_that_changes_its_answers_is_found() -> None:
    shift = [0]
    net = sparsify(nn.Linear(18, 18), 40, candidates=lambda r, c: (r + c + shift[0]) % 2 == 0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(check_invariants=True).attach(net, optimizer)
    net(torch.ones(2, 18)).sum().backward()
    optimizer.step()
    shift[0] = 1
    with pytest.raises(RuntimeError, match=r"`weight`, step 1: .*gives another answer than at the conversion at place \d+"):
        optimizer.step()


def test_a_callback_restricts_a_converted_network_or_refuses_it() -> None:
    net = sparsify(nn.Linear(18, 18), 40, candidates=NoSelf())
    DeepR(candidates=NoSelf()).attach(net, torch.optim.SGD(net.parameters(), lr=0.1)).remove()
    with pytest.raises(ValueError, match=r"`weight` is converted already, .* among NoSelf.*other candidates \(Band"):
        DeepR(candidates=Band(4)).attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    free = sparsify(nn.Linear(18, 18), 300)
    with pytest.raises(ValueError, match=r"`weight` is converted already: expected its connections among Band\(2\).*elsewhere"):
        DeepR(candidates=Band(2)).attach(free, torch.optim.SGD(free.parameters(), lr=0.1))
    inside = sparsify(nn.Linear(18, 18), {"weight": [0, 19, 38]})
    DeepR(candidates=Band(2)).attach(inside, torch.optim.SGD(inside.parameters(), lr=0.1))
    assert all_slots(inside)[0].allowed is not None
