"""``scope="global"``: one K for the whole network, one parameter, and connections that move between layers."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_deepr import DeepR, connections, connectivity_report, densify, kernels, load_state_dict, sparsify
from lightning_deepr.algorithm.shared_rewiring import draw_layers
from lightning_deepr.conversion.sharing import join
from lightning_deepr.files.checkpoint import report_of_checkpoint, save_sparse
from lightning_deepr.weights.find import converted_tensors
from lightning_deepr.weights.k_slots import KSlots
from lightning_deepr.weights.shared import SharedSlots

from . import oracle
from .helpers_algorithm import (
    SEED,
    Regression,
    all_slots,
    assert_equal_states,
    batches,
    chi_square_p,
    loss_of,
    plain_mlp,
    state_of,
    train,
    trainer,
)

RULES = ("budget", "uniform")
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.05),
}
LAYER = 6  # the stream of draws among layers


# -- networks -----------------------------------------------------------------------------------------------------------------


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2)
        self.out = nn.Linear(8 * 2 * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.conv2(self.conv1(x).relu()).relu().flatten(1))
        return y


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(6, 7, bidirectional=True), nn.Linear(14, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.lstm(x)[0])
        return y


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.attention(x, x, x, need_weights=False)[0])
        return y


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (lambda: plain_mlp((12, 10, 8, 6)), lambda: torch.randn(8, 12)),
    "conv": (Images, lambda: torch.randn(4, 2, 6, 6)),
    "lstm": (Sequences, lambda: torch.randn(5, 3, 6)),
    "attention": (Attending, lambda: torch.randn(5, 3, 8)),
}


def network(name: str = "mlp", connectivity: Any = 0.25, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    return sparsify(NETWORKS[name][0](), connectivity, scope="global", seed=SEED, **options)


def small(connectivity: Any = 0.3, **options: Any) -> nn.Module:
    return sparsify(plain_mlp(), connectivity, scope="global", distribution="uniform", seed=SEED, **options)


def shared(net: nn.Module) -> nn.Parameter:
    """theta, which has to be one object, and one of the parameters."""
    found = {id(c.theta): c.theta for c in converted_tensors(net)}
    assert len(found) == 1, "the layers do not share one theta"
    theta = next(iter(found.values()))
    assert sum(p is theta for p in net.parameters()) == 1
    return theta


def counts(net: nn.Module) -> list[int]:
    return [slots.count for slots in all_slots(net)]


def assert_sound(net: nn.Module, total: int, least: int = 1) -> None:
    theta, seen = shared(net).detach(), 0
    assert theta.shape == (total,) and bool((theta >= 0).all())
    for slots in all_slots(net):
        assert slots.places.dtype == torch.int64 and slots.places.shape == slots.signs.shape == slots.born.shape
        assert slots.places.unique().numel() == slots.count and least <= slots.count <= slots.total
        assert bool(((slots.places >= 0) & (slots.places < slots.total)).all())
        assert torch.equal(slots.signs, slots.signs_at(slots.places))
        assert torch.equal(slots.own(theta), theta[seen : seen + slots.count]), "layers are not sorted in theta"
        seen += slots.count
    assert seen == total


def by_connection(net: nn.Module, *values: Tensor) -> dict[tuple[int, int], tuple[float, ...]]:
    """{(layer, place): what each tensor of theta's shape has there}."""
    theta, found, start = shared(net).detach(), {}, 0
    for layer, slots in enumerate(all_slots(net)):
        for i, place in enumerate(slots.places.tolist()):
            found[layer, place] = tuple(float(value[start + i]) for value in (theta, *values))
        start += slots.count
    return found


# -- what holds after every step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES)
def test_invariants(name: str, kind: str, rule: str) -> None:
    net, make_input = network(name), NETWORKS[name][1]
    total = sum(counts(net))
    parameter = shared(net)
    optimizer = OPTIMIZERS[kind](net.parameters())
    l1 = 0.3 if kind == "sgd" else 3.0
    DeepR(scope="global", reactivation=rule, l1=l1, temperature=1e-4, check_invariants=True, seed=SEED).attach(net, optimizer)
    torch.manual_seed(2)
    seen = set()
    for _ in range(10):
        optimizer.zero_grad()
        (net(make_input()) - 0.5).square().mean().backward()
        optimizer.step()
        assert shared(net) is parameter
        assert_sound(net, total)
        seen.add(tuple(counts(net)))
        for value in optimizer.state[parameter].values():
            assert value.shape in (parameter.shape, ())
    assert len(seen) > 3, "connections do not move between layers"


@pytest.mark.parametrize("every", [1, 3])
def test_steps_without_rewiring_keep_everything_where_it_is(every: int) -> None:
    net = small()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    options = {"rewire_every_n_steps": every, "rewire_until": 7}
    DeepR(scope="global", l1=0.5, check_invariants=True, **options).attach(net, optimizer)  # type: ignore[arg-type]
    changed = []
    for batch in batches(10):
        before = [slots.places.clone() for slots in all_slots(net)]
        train(net, optimizer, [batch])
        assert_sound(net, 54)
        changed.append(any(not torch.equal(a, s.places) for a, s in zip(before, all_slots(net), strict=True)))
    expected = [i < 7 and (i + 1) % every == 0 for i in range(10)]
    assert all(want or not found for want, found in zip(expected, changed, strict=True))
    assert sum(changed) >= sum(expected) - 1 > 0


# -- one step against a slow one in NumPy ------------------------------------------------------------------------------------


def slow_step(
    theta: list[float],
    layers: list[tuple[int, int, list[int]]],
    budgets: list[int],
    rule: str,
    least: int,
    seed: int,
    step: int,
) -> list[list[tuple[int, int | None]]]:
    """Who is where after a step: for each layer (place, old slot or None for a newborn), slot by slot.

    ``layers`` holds (N, index, places) of each.
    """
    alive: list[list[tuple[int, int | None]]] = []
    slot = 0
    for _, _, places in layers:
        alive.append([])
        for place in places:
            if theta[slot] >= 0:
                alive[-1].append((place, slot))
            slot += 1
    births = len(theta) - sum(len(one) for one in alive)
    owed: list[int] = []
    for layer, (total, _, _) in enumerate(layers):
        owed += [layer] * max(min(least, total) - len(alive[layer]), 0)
    owed = owed[:births]
    born: list[list[int]] = [[] for _ in layers]

    def within(number: list[int]) -> None:
        for layer, (total, index, _) in enumerate(layers):
            have, n = {place for place, _ in alive[layer]}, number[layer]
            if 2 * (len(have) + n) <= total:
                slots = [index * 2**40 + len(have) + i for i in range(n)]
                born[layer] += oracle.first_free((seed, oracle.BIRTH, step), slots, total, have)
            else:
                free = [p for p in range(total) if p not in have]
                born[layer] += oracle.shuffled(oracle.key(seed, oracle.BIRTH, step, 0), index, free)[:n]

    if rule == "budget":
        room = [total - len(alive[i]) - owed.count(i) for i, (total, _, _) in enumerate(layers)]
        chosen, waiting, attempt = dict[int, int](), list(range(births - len(owed))), 0
        while waiting:
            weights = [budget if free else 0 for budget, free in zip(budgets, room, strict=True)]
            weights = weights if sum(weights) else list(room)
            still = []
            for rank in waiting:
                draw = oracle.place(oracle.key(seed, LAYER, step, attempt), rank, sum(weights))
                layer = -1 if draw is None else next(i for i, end in enumerate(itertools.accumulate(weights)) if draw < end)
                if draw is None or not room[layer]:
                    still.append(rank)
                else:
                    room[layer] -= 1
                    chosen[rank] = layer
            waiting, attempt = still, attempt + 1
        within([(owed + list(chosen.values())).count(i) for i in range(len(layers))])
    else:
        within([owed.count(i) for i in range(len(layers))])
        starts = [sum(total for total, _, _ in layers[:i]) for i in range(len(layers))]
        size, rest = sum(total for total, _, _ in layers), births - len(owed)
        taken = {starts[i] + p for i, one in enumerate(alive) for p, _ in one} | {
            starts[i] + p for i, b in enumerate(born) for p in b
        }
        if 2 * (len(theta) + len(owed)) > size:
            free = [p for p in range(size) if p not in taken]
            drawn = oracle.shuffled(oracle.key(seed, LAYER, step, 0), 0, free)[:rest]
        else:
            drawn = oracle.first_free((seed, LAYER, step), list(range(rest)), size, taken)
        for place in drawn:
            layer = max(i for i, start in enumerate(starts) if start <= place)
            born[layer].append(place - starts[layer])
    return [one + [(place, None) for place in new] for one, new in zip(alive, born, strict=True)]


CASES = {
    "sparse": (0.1, 0.3),
    "half": (0.45, 0.4),
    "dense": (0.8, 0.3),
    "one_nearly_full": ({"0": 0.1, "2": 0.95, "4": 0.3}, 0.5),
    "full": (1.0, 0.2),
    "almost_all_die": (0.2, 0.97),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("least", [1, 4])
@pytest.mark.parametrize("kernel", [True, False])
def test_one_step_against_the_slow_one(rule: str, case: str, least: int, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernel:  # plain PyTorch
        monkeypatch.setattr(kernels, "available", lambda: False)
    connectivity, dying = CASES[case]
    net = sparsify(plain_mlp((12, 10, 8, 6)), connectivity, scope="global", distribution="uniform", seed=SEED)
    theta, budgets = shared(net), counts(net)
    # every slot is tagged in the optimizer's state and in the gradient, and the optimizer itself changes nothing
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=1.0)
    DeepR(scope="global", l1=0.0, reactivation=rule, least_per_layer=least, seed=SEED).attach(net, optimizer)
    rng = np.random.default_rng(4)
    for step in range(4):
        theta.grad = torch.zeros_like(theta)
        if step == 0:
            optimizer.state[theta]["momentum_buffer"] = torch.zeros_like(theta)
        values = np.where(rng.random(theta.numel()) < dying, -1.0, rng.random(theta.numel()) + 0.1)
        tags = torch.arange(theta.numel()).float() + 1000 * step + 1
        with torch.no_grad():
            theta.copy_(torch.from_numpy(values))
            optimizer.state[theta]["momentum_buffer"].copy_(tags)
            theta.grad.copy_(-tags / 2)  # momentum 1: the buffer has tags / 2 when the step is taken
        layers = [(slots.total, slots.index, slots.places.tolist()) for slots in all_slots(net)]
        old_born = torch.cat([slots.born for slots in all_slots(net)]).tolist()
        before = theta.detach().clone()
        expected = slow_step(before.tolist(), layers, budgets, rule, least, SEED, step)
        optimizer.step()
        assert counts(net) == [len(one) for one in expected]
        buffer, slot = optimizer.state[theta]["momentum_buffer"], 0
        for slots, one in zip(all_slots(net), expected, strict=True):
            assert slots.places.tolist() == [place for place, _ in one]
            assert torch.equal(slots.signs, slots.signs_at(slots.places))
            for i, (_, old) in enumerate(one):
                want = (0.0, 0.0, 0.0, step) if old is None else (before[old], tags[old] / 2, -tags[old] / 2, old_born[old])
                assert (theta[slot], buffer[slot], theta.grad[slot], slots.born[i]) == want
                slot += 1
        assert slot == theta.numel()


def test_every_state_tensor_moves_along() -> None:
    net = small()
    theta, optimizer = shared(net), torch.optim.Adam(net.parameters(), lr=0.02, amsgrad=True)
    DeepR(scope="global", l1=0.5, seed=SEED).attach(net, optimizer)
    moved = died = 0
    for batch in batches(12):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        state, layout = optimizer.state[theta], by_connection(net)
        values = {name: value.clone() for name, value in state.items() if value.shape == theta.shape}
        gradient = theta.grad.clone()  # type: ignore[union-attr]
        optimizer.step()
        after = by_connection(net, *(state[name] for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")))
        position = {connection: i for i, connection in enumerate(layout)}
        for connection, (value, mean, square, largest) in after.items():
            layer = all_slots(net)[connection[0]]
            born = int(layer.born[layer.places.tolist().index(connection[1])])
            if born == optimizer.state[theta]["step"] - 1:
                assert (value, mean, square, largest) == (0.0, 0.0, 0.0, 0.0)
                died += 1
            elif values:
                i = position[connection]
                np.testing.assert_allclose(mean, 0.9 * values["exp_avg"][i] + 0.1 * gradient[i], rtol=1e-4, atol=1e-7)
                np.testing.assert_allclose(
                    square, 0.999 * values["exp_avg_sq"][i] + 0.001 * gradient[i] ** 2, rtol=1e-4, atol=1e-9
                )
                moved += list(after).index(connection) != i
    assert moved > 20 and died > 10, (moved, died)


# -- which layer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_the_kernel_and_pytorch_train_alike(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for kernel in (True, False):
        with monkeypatch.context() as patch:
            if not kernel:
                patch.setattr(kernels, "available", lambda: False)
            net = sparsify(plain_mlp((40, 60, 30, 6)), 0.1, scope="global", seed=SEED, init="largest", compute="dense")
            assert any(slots.exceptions.numel() for slots in all_slots(net))
            optimizer = OPTIMIZERS["adam"](net.parameters())
            deepr = DeepR(scope="global", reactivation=rule, l1=1.0, temperature=1e-6, seed=SEED)
            deepr.attach(net, optimizer)
            average = AveragedModel(net, avg_fn=get_ema_avg_fn(0.9))
            for batch in batches(20, 40, 6):
                train(net, optimizer, [batch])
                average.update_parameters(net)
            ends.append((state_of(net, optimizer) + state_of(average.module), deepr.statistics()))
    assert_equal_states(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def births_by_layer(rule: str, steps: int = 150) -> tuple[np.ndarray, np.ndarray, np.ndarray, Counter[int]]:
    """Births, and how many each rule expects, when random slots die; places of births in the first layer."""
    net = sparsify(plain_mlp((20, 30, 10, 10)), {"0": 60, "2": 60, "4": 30}, scope="global", seed=SEED)
    theta, budgets = shared(net), np.array(counts(net))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    DeepR(scope="global", l1=0.0, reactivation=rule, seed=11).attach(net, optimizer)
    generator = torch.Generator().manual_seed(5)
    found, budget, uniform, places = np.zeros(3), np.zeros(3), np.zeros(3), Counter[int]()
    for step in range(steps):
        with torch.no_grad():
            theta.fill_(1.0)
            theta[torch.randperm(theta.numel(), generator=generator)[:30]] = -1.0
        alive = np.array([int((slots.own(theta) > 0).sum()) for slots in all_slots(net)])
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
        born = np.array([int((slots.born == step).sum()) for slots in all_slots(net)])
        dormant = np.array([slots.total for slots in all_slots(net)]) - alive
        found += born
        budget += 30 * budgets / budgets.sum()
        uniform += 30 * dormant / dormant.sum()
        first = all_slots(net)[0]
        places.update(first.places[first.born == step].tolist())
    return found, budget, uniform, places


@pytest.mark.parametrize("rule", RULES)
def test_layers_are_chosen_with_the_probabilities_of_the_rule(rule: str) -> None:
    found, budget, uniform, places = births_by_layer(rule)
    p_budget, p_uniform = chi_square_p(found, budget), chi_square_p(found, uniform)
    right, wrong = (p_budget, p_uniform) if rule == "budget" else (p_uniform, p_budget)
    assert right > 1e-3 and wrong < 1e-9, (found, budget, uniform)
    blocks = np.array([places[p] for p in range(600)]).reshape(20, 30).sum(1)
    assert chi_square_p(blocks) > 1e-3, "places within a layer are not uniform"


def test_a_full_layer_is_never_chosen_and_the_rest_keeps_its_proportions() -> None:
    weights, room, count = (8, 3, 1), (1, 2, 4), 4
    # exactly: one birth after the other, each in proportion to the weights of the layers that are not full
    expected: Counter[tuple[int, ...]] = Counter()

    def walk(left: tuple[int, ...], done: tuple[int, ...], probability: float) -> None:
        if sum(done) == count:
            expected[done] += probability  # type: ignore[assignment]
            return
        open_ = [w if r else 0 for w, r in zip(weights, left, strict=True)]
        for i, w in enumerate(open_):
            if w:
                step = [int(i == j) for j in range(3)]
                walk(
                    tuple(r - s for r, s in zip(left, step, strict=True)),
                    tuple(d + s for d, s in zip(done, step, strict=True)),
                    probability * w / sum(open_),
                )

    walk(room, (0, 0, 0), 1.0)
    found: Counter[tuple[int, ...]] = Counter()
    runs = 3000
    for step in range(runs):
        layers = draw_layers(torch.tensor(weights), torch.tensor(room), count, 7, step)
        found[tuple(torch.bincount(layers, minlength=3).tolist())] += 1
    assert set(found) <= set(expected)
    likely = [outcome for outcome in expected if expected[outcome] * runs >= 10]
    rest = runs - sum(found[o] for o in likely), runs * (1 - sum(expected[o] for o in likely))
    observed, wanted = [found[o] for o in likely], [runs * expected[o] for o in likely]
    if rest[1] >= 5:
        observed, wanted = [*observed, rest[0]], [*wanted, rest[1]]
    assert len(wanted) >= 3 and chi_square_p(observed, wanted) > 1e-3


def test_what_has_a_budget_is_full() -> None:
    layers = draw_layers(torch.tensor([5, 0, 0]), torch.tensor([2, 30, 10]), 30, 1, 1)
    assert torch.bincount(layers)[0] == 2 and layers.numel() == 30 and int(torch.bincount(layers)[1]) > 10


# -- the floor ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("least", [1, 3])
def test_a_layer_never_falls_below_the_floor(rule: str, least: int) -> None:
    net = sparsify(plain_mlp((30, 30, 10)), {"0": 200, "2": 4}, scope="global", seed=SEED)
    theta, optimizer = shared(net), torch.optim.SGD(net.parameters(), lr=0.0)
    DeepR(scope="global", l1=0.0, reactivation=rule, least_per_layer=least, check_invariants=True).attach(net, optimizer)
    for step in range(20):
        with torch.no_grad():
            theta.fill_(1.0)
            all_slots(net)[1].own(theta).fill_(-1.0)  # all of the last layer
            all_slots(net)[0].own(theta)[step] = -1.0
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
        assert_sound(net, 204, least)


@pytest.mark.parametrize("compute", ["dense", "sparse"])
@pytest.mark.parametrize("name", ["mlp", "conv", "lstm"])
def test_layers_may_go_empty_when_asked(name: str, compute: str) -> None:
    net, make_input = network(name, compute=compute), NETWORKS[name][1]
    total, theta = sum(counts(net)), shared(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    DeepR(scope="global", l1=0.0, least_per_layer=0, reactivation="uniform", check_invariants=True).attach(net, optimizer)
    last = all_slots(net)[-1]
    empty = 0
    for _ in range(12):
        optimizer.zero_grad()
        net(make_input()).square().mean().backward()
        assert theta.grad is not None
        with torch.no_grad():
            last.own(theta).fill_(-100.0)
        optimizer.step()
        assert_sound(net, total, least=0)
        empty += last.count == 0
        assert net(make_input()).isfinite().all()
        weight = next(c for c in converted_tensors(net) if c.slots is last)
        assert int((getattr(weight.module, weight.tensor_name) != 0).sum()) == int((last.own(theta) > 0).sum())
    assert empty > 0 or last.total > total, counts(net)
    copy.deepcopy(net)
    str(connectivity_report(net))


def test_an_empty_layer_comes_back() -> None:
    net = sparsify(plain_mlp((6, 5, 4)), {"0": 20, "2": 2}, scope="global", seed=SEED)
    theta, optimizer = shared(net), torch.optim.SGD(net.parameters(), lr=0.0)
    DeepR(scope="global", l1=0.0, least_per_layer=0, seed=SEED).attach(net, optimizer)
    seen = []
    for i in range(40):
        with torch.no_grad():
            theta.fill_(1.0)
            all_slots(net)[1].own(theta).fill_(-1.0)
            all_slots(net)[0].own(theta)[i % 10] = -1.0
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
        assert_sound(net, 22, 0)
        seen.append(all_slots(net)[1].count)
    assert 0 in seen and seen.index(0) < len(seen) - 1 and max(seen[seen.index(0) :]) > 0


# -- gradients -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("compute", ["dense", "sparse"])
def test_gradient_is_the_dense_weights(name: str, compute: str) -> None:
    net, make_input = network(name, compute=compute), NETWORKS[name][1]
    dense = NETWORKS[name][0]()
    dense.load_state_dict(densify(copy.deepcopy(net)).state_dict())
    theta, x = shared(net), make_input()
    for module in (net, dense):
        module(x).sin().sum().backward()
    gradients = []
    for converted in converted_tensors(net):
        prefix, _, tensor = converted.name.rpartition(".")
        gradient = getattr(dense.get_submodule(prefix), tensor).grad.reshape(-1)
        gradients.append(gradient[converted.slots.places] * converted.slots.signs)
    torch.testing.assert_close(theta.grad, torch.cat(gradients), rtol=1e-4, atol=1e-5)


def test_two_passes_and_layers_that_are_left_out() -> None:
    net = small()
    theta, (x, y) = shared(net), batches(1)[0]
    loss_of(net, (x, y)).backward()
    once = theta.grad.clone()  # type: ignore[union-attr]
    theta.grad = None
    for part in (slice(0, 4), slice(4, 8)):  # two micro-batches
        (loss_of(net, (x[part], y[part])) / 2).backward()
    torch.testing.assert_close(theta.grad, once)
    theta.grad = None
    first, second = loss_of(net, (x, y)) / 2, loss_of(net, (x, y)) / 2  # two passes before one backward
    (first + second).backward(retain_graph=True)
    torch.testing.assert_close(theta.grad, once)
    (first + second).backward()  # and again through the same graph
    torch.testing.assert_close(theta.grad, 2 * once)
    theta.grad = None
    net[0](x).sum().backward()  # type: ignore[operator, index]
    own = [slots.own(theta.grad) for slots in all_slots(net)]
    assert bool((own[0] != 0).any()) and bool((own[1] == 0).all())
    with torch.no_grad():
        net(x)
    with torch.inference_mode():
        net(x)
    theta.grad = None
    loss_of(net, (x, y)).backward()
    torch.testing.assert_close(theta.grad, once)


def test_one_split_serves_all_layers() -> None:
    net = small(compute="dense")
    x = batches(1)[0][0]
    names, nodes = Counter[str](), [net(x).sum().grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names[type(node).__name__] += 1
        nodes += [following for following, _ in node.next_functions]
    assert names["SplitWithSizesBackward0"] == 1 and names["AccumulateGrad"] == 3  # theta and two biases


def test_frozen_theta() -> None:
    net = small()
    theta, optimizer = shared(net), torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(scope="global", l1=0.5).attach(net, optimizer)
    theta.requires_grad_(False)
    before = theta.clone()
    train(net, optimizer, batches(3))
    assert torch.equal(theta, before)
    theta.requires_grad_(True)
    train(net, optimizer, batches(3))
    assert not torch.equal(theta, before)


@pytest.mark.parametrize("compute", ["dense", "sparse"])
def test_backward_through_the_connections_of_before_is_refused(compute: str) -> None:
    net = small(compute=compute)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(scope="global", l1=2.0).attach(net, optimizer)
    batch = batches(1)[0]
    loss = loss_of(net, batch)
    train(net, optimizer, [batch])
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        loss.backward()


@pytest.mark.parametrize("name", ["mlp", "conv", "lstm"])
def test_sparse_and_dense_compute_train_alike(name: str) -> None:
    ends = []
    for compute in ("dense", "sparse"):
        net = network(name, compute=compute).double()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        DeepR(scope="global", l1=0.3, seed=SEED).attach(net, optimizer)
        torch.manual_seed(3)
        for _ in range(8):
            optimizer.zero_grad()
            net(NETWORKS[name][1]().double()).square().mean().backward()
            optimizer.step()
        ends.append((counts(net), [s.places for s in all_slots(net)], shared(net).detach()))
    assert ends[0][0] == ends[1][0]
    assert all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))
    torch.testing.assert_close(ends[0][2], ends[1][2])


def test_a_compiled_network_computes_the_same() -> None:
    net = small(compute="dense")
    compiled = torch.compile(net, backend="eager")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(scope="global", l1=1.0, seed=SEED).attach(net, optimizer)
    seen = set()
    for batch in batches(4):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        gradient = shared(net).grad.clone()  # type: ignore[union-attr]
        optimizer.zero_grad()
        loss_of(compiled, batch).backward()  # type: ignore[arg-type]
        torch.testing.assert_close(shared(net).grad, gradient)
        optimizer.step()
        seen.add(tuple(counts(net)))
    assert len(seen) > 1


# -- copies, averages ------------------------------------------------------------------------------------------------------


def test_deepcopy_keeps_the_tie_and_nothing_else() -> None:
    net = small()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    DeepR(scope="global", l1=0.5, seed=SEED).attach(net, optimizer)
    train(net, optimizer, batches(5))
    before = state_of(net)
    replica = copy.deepcopy(net)
    assert shared(replica) is not shared(net)
    assert_equal_states(state_of(replica), before)
    other = OPTIMIZERS["adam"](replica.parameters())
    DeepR(scope="global", l1=0.5, seed=SEED).attach(replica, other)
    train(replica, other, batches(5))
    assert_sound(replica, 54)
    assert_equal_states(state_of(net), before)
    assert not torch.equal(shared(replica), shared(net))


def test_moving_keeps_the_tie() -> None:
    net = small()
    x = batches(1)[0][0]
    expected = net(x)
    net.double()
    assert shared(net).dtype == torch.float64
    torch.testing.assert_close(net(x.double()).float(), expected)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(scope="global", l1=0.5, check_invariants=True).attach(net, optimizer)
    train(net, optimizer, batches(3))
    assert_sound(net, 54)


def test_a_network_from_meta_is_tied_again() -> None:
    net, source = small().to("meta").to_empty(device="cpu"), small()
    net.load_state_dict(source.state_dict())
    module = Regression(lambda p: torch.optim.SGD(p, lr=0.1), steps=3)
    module.net = net  # type: ignore[assignment]
    trainer(DeepR(scope="global", check_invariants=True)).fit(module)
    assert_sound(net, 54)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averages_follow_between_layers(use_buffers: bool) -> None:
    net = small()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
    DeepR(scope="global", l1=0.3, seed=SEED).attach(net, optimizer)
    train(net, optimizer, batches(2))
    average = AveragedModel(net, avg_fn=get_ema_avg_fn(0.9), use_buffers=use_buffers)
    expected: dict[tuple[int, int], float] = {}
    births: dict[tuple[int, int], int] = {}
    begun = False
    for batch in batches(15):
        train(net, optimizer, [batch])
        now = {c: v[0] for c, v in by_connection(net, *[]).items()}
        born = {
            (layer, place): b
            for layer, s in enumerate(all_slots(net))
            for place, b in zip(s.places.tolist(), s.born.tolist(), strict=True)
        }
        kept = {c: (expected.get(c, 0.0) if births.get(c) == born[c] else 0.0) for c in now}
        expected = {c: 0.9 * kept[c] + 0.1 * now[c] if begun else now[c] for c in now}
        births, begun = born, True
        average.update_parameters(net)
        assert counts(average.module) == counts(net)
        for mine, theirs in zip(all_slots(average.module), all_slots(net), strict=True):
            assert torch.equal(mine.places, theirs.places) and torch.equal(mine.signs, theirs.signs) and mine is not theirs
        found = {c: v[0] for c, v in by_connection(average.module).items()}
        np.testing.assert_allclose([found[c] for c in now], [expected[c] for c in now], rtol=1e-4, atol=1e-6)
    assert len({tuple(c) for c in births}) == 54


# -- Trainer, Fabric, resuming ---------------------------------------------------------------------------------------------


def callback(**options: Any) -> DeepR:
    return DeepR(0.3, scope="global", distribution="uniform", l1=0.3, seed=SEED, check_invariants=True, **options)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("averaging", [False, True])
def test_resume_under_the_trainer_is_exact(tmp_path: Path, kind: str, averaging: bool) -> None:
    def others() -> list[pl.Callback]:
        return [WeightAveraging(avg_fn=get_ema_avg_fn(0.9))] if averaging else []

    whole, second = (Regression(OPTIMIZERS[kind], steps=10) for _ in range(2))
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=10, save_top_k=-1)
    trainer(callback(), *others(), saves, max_epochs=2, enable_checkpointing=True).fit(whole)
    path = next(p for p in tmp_path.glob("*.ckpt") if "step=10" in p.name)
    trainer(callback(), *others(), max_epochs=2).fit(second, ckpt_path=path)
    assert_equal_states(state_of(second), state_of(whole))
    recorded = [row["active"] for row in report_of_checkpoint(path)]
    started = [36, 18]
    assert sum(recorded) == sum(started) and recorded != started, "the checkpoint tests nothing: counts had not moved"


@pytest.mark.parametrize("rule", RULES)
def test_resume_in_a_plain_loop_is_exact(rule: str) -> None:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        net = small()
        optimizer = OPTIMIZERS["adam"](net.parameters())
        return net, optimizer, DeepR(scope="global", reactivation=rule, l1=0.5, seed=SEED).attach(net, optimizer)

    net, optimizer, _ = begin()
    train(net, optimizer, batches(20))
    other, its, rewiring = begin()
    train(other, its, batches(20)[:9])
    state = copy.deepcopy((other.state_dict(), its.state_dict(), rewiring.state_dict()))
    third, third_optimizer, third_rewiring = begin()
    for target, one in zip((third, third_optimizer, third_rewiring), state, strict=True):
        target.load_state_dict(one)
    assert counts(third) == counts(other)
    train(third, third_optimizer, batches(20)[9:])
    assert_equal_states(state_of(third, third_optimizer), state_of(net, optimizer))


def test_trainer_fabric_and_plain_loop_agree() -> None:
    module = Regression(OPTIMIZERS["sgd"], steps=15)
    trainer(callback()).fit(module)

    plain = small()
    optimizer = OPTIMIZERS["sgd"](plain.parameters())
    DeepR(scope="global", l1=0.3, seed=SEED).attach(plain, optimizer)
    train(plain, optimizer, batches(15))
    assert_equal_states(state_of(plain), state_of(module))

    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[DeepR(scope="global", l1=0.3, seed=SEED)])
    net = small()
    net, its = fabric.setup(net, OPTIMIZERS["sgd"](net.parameters()))
    for batch in batches(15):
        its.zero_grad()
        fabric.backward(loss_of(net, batch))
        its.step()
    assert_equal_states(state_of(net), state_of(plain))


def test_setup_joins_what_is_converted_with_k_per_tensor() -> None:
    module = Regression(OPTIMIZERS["sgd"], steps=8)
    sparsify(module.net, 0.3, distribution="uniform", seed=SEED)
    trainer(DeepR(scope="global", l1=0.3, seed=SEED)).fit(module)
    assert_sound(module, 54)
    other = Regression(OPTIMIZERS["sgd"], steps=8)
    trainer(DeepR(0.3, scope="global", distribution="uniform", l1=0.3, seed=SEED)).fit(other)
    assert_equal_states(state_of(module), state_of(other))
    theta = shared(module)
    trainer(DeepR(scope="global", l1=0.3, seed=SEED)).fit(module)  # a second fit goes on with the same theta
    assert shared(module) is theta
    assert_sound(module, 54)


def test_statistics_tell_where_the_connections_are() -> None:
    net = small()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    deepr = DeepR(scope="global", l1=0.5)
    deepr.attach(net, optimizer)
    train(net, optimizer, batches(5))
    found = deepr.statistics()
    for slots, name in zip(all_slots(net), ("0.weight", "2.weight"), strict=True):
        assert found[f"deepr/{name}/connectivity"] == slots.count / slots.total
        assert found[f"deepr/{name}/mature_deaths"] >= 0
    assert connectivity_report(net).active == 54


# -- checkpoints, densify --------------------------------------------------------------------------------------------------


def trained(steps: int = 8) -> nn.Module:
    net = small()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    DeepR(scope="global", l1=0.5, seed=SEED).attach(net, optimizer)
    train(net, optimizer, batches(steps))
    assert counts(net) != [36, 18]
    return net


def same(first: nn.Module, second: nn.Module) -> None:
    mine, theirs = connections(first), connections(second)
    assert list(mine) == list(theirs)
    for name in mine:
        assert torch.equal(mine[name][1], theirs[name][1]) and torch.equal(mine[name][2], theirs[name][2])
    x = batches(1)[0][0]
    torch.testing.assert_close(first(x), second(x))


def test_a_dense_model_is_converted_as_recorded(tmp_path: Path) -> None:
    net = trained()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    assert (tmp_path / "net.pt").stat().st_size < 20_000
    loaded = load_state_dict(plain_mlp(), tmp_path / "net.pt")
    same(loaded, net)
    assert_sound(loaded, 54)
    assert all_slots(loaded)[0].pool.budgets == [36, 18]  # type: ignore[union-attr]
    again = load_state_dict(small(), tmp_path / "net.pt")  # converted already, with other counts per layer
    same(again, net)


def test_loading_layer_by_layer() -> None:
    source, net = trained(), small()
    for i in (0, 2):
        net[i].load_state_dict(source[i].state_dict())  # type: ignore[index]
        if i == 0:
            with pytest.raises(RuntimeError, match=r"loaded in part: load `2\.weight`"):
                net(torch.zeros(1, 12))
    same(net, source)
    assert_sound(net, 54)


def test_save_sparse_writes_layers_of_their_own(tmp_path: Path) -> None:
    net = trained()
    path = save_sparse(net, tmp_path / "net.safetensors")
    loaded = load_state_dict(plain_mlp(), path)
    for name, (_, places, values) in connections(net).items():  # written in the order of the places
        order = places.argsort()
        assert torch.equal(connections(loaded)[name][1], places[order]) and torch.equal(
            connections(loaded)[name][2], values[order]
        )
    assert all(type(slots) is KSlots for slots in all_slots(loaded))
    assert len({id(c.theta) for c in converted_tensors(loaded)}) == 2


def test_loading_lets_averages_follow() -> None:
    net, source = small(), trained()
    average = AveragedModel(net)
    net.load_state_dict(source.state_dict())
    assert counts(average.module) == counts(net)
    assert [s.places.tolist() for s in all_slots(average.module)] == [s.places.tolist() for s in all_slots(net)]
    start = by_connection(small())
    for connection, (value,) in by_connection(average.module).items():
        assert value == start.get(connection, (0.0,))[0]


def test_densify() -> None:
    net = trained()
    x = batches(1)[0][0]
    expected = net(x)
    parameters = dict(densify(net).named_parameters())
    assert sorted(parameters) == ["0.bias", "0.weight", "2.bias", "2.weight"]
    torch.testing.assert_close(net(x), expected)


# -- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reactivation": "random"}, "reactivation: expected one of budget, uniform, found 'random'"),
        ({"least_per_layer": -1}, "least_per_layer: expected an int of at least 0, found -1"),
        ({"least_per_layer": True}, "least_per_layer"),
        ({"scope": "both"}, "scope: expected .* found 'both'"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepR(0.1, **{"scope": "global", **options})


def test_a_total_smaller_than_the_number_of_layers() -> None:
    with pytest.raises(ValueError, match="gives 2 connections to 3 tensors"):
        sparsify(plain_mlp((12, 10, 8, 6)), 2, scope="global")
    with pytest.raises(ValueError, match=r"0\.005 gives 1 connections to 3 tensors"):
        sparsify(plain_mlp((12, 10, 8, 6)), 0.005, scope="global")
    module = Regression(OPTIMIZERS["sgd"], steps=1)
    with pytest.raises(ValueError, match="least_per_layer = 40 needs 80 connections in 2 layers, found K = 54"):
        trainer(DeepR(0.3, scope="global", least_per_layer=40)).fit(module)
    with pytest.raises(ValueError, match="scope: expected"):
        sparsify(plain_mlp(), 0.3, scope="all")


def test_mixed_layers_are_refused_by_name() -> None:
    net = plain_mlp()
    net[2].double()
    with pytest.raises(ValueError, match=r"one dtype, found torch.float32 in `0\.weight` and torch.float64 in `2\.weight`"):
        sparsify(net, 0.3, scope="global")
    assert not list(converted_tensors(net))
    net = plain_mlp()
    net[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"one requires_grad, found True in `0\.weight` and False in `2\.weight`"):
        sparsify(net, 0.3, target_modules=["0", "2"], scope="global")
    assert not list(converted_tensors(net))


def test_scopes_that_do_not_fit() -> None:
    net = sparsify(plain_mlp(), 0.3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"a theta of its own in `0\.weight`, `2\.weight`: the optimizer holds them already"):
        DeepR(scope="global").attach(net, optimizer)
    net = small()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r'`0\.weight` shares one K with other layers \(scope="global"\)'):
        DeepR().attach(net, optimizer)
    with pytest.raises(ValueError, match=r"`net\.0\.weight` shares one theta .* with `2\.weight`"):
        trainer(DeepR(scope="global", target_modules=["net.0"])).fit(wrapped(net))
    with pytest.raises(ValueError, match="shares one theta"):
        densify(net[0])  # type: ignore[index]


def wrapped(net: nn.Module) -> Regression:
    module = Regression(OPTIMIZERS["sgd"], steps=1)
    module.net = net  # type: ignore[assignment]
    return module


def test_checkpoints_of_the_other_scope() -> None:
    with pytest.raises(RuntimeError, match="expected one K for all layers, found K slots of its own"):
        small().load_state_dict(sparsify(plain_mlp(), 0.3).state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="expected K slots of its own, found one K for all layers"):
        sparsify(plain_mlp(), 0.3).load_state_dict(small().state_dict())
    with pytest.raises(RuntimeError, match="expected K = 54 connections in all, found 90"):
        small().load_state_dict(small(0.5).state_dict())


def test_parameter_groups_and_optimizers_are_refused_by_name() -> None:
    def groups(module: Any) -> Any:
        net = module.net
        return torch.optim.SGD([{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.01}], lr=0.1)

    module = Regression(lambda p: None, steps=1)
    module.configure_optimizers = lambda: groups(module)  # type: ignore[method-assign]
    with pytest.raises(
        ValueError, match=r"more than one parameter group.*`net\.0\.weight`, `net\.2\.weight` have one parameter"
    ):
        trainer(callback()).fit(module)

    net = small()
    optimizers = [torch.optim.SGD(net[i].parameters(), lr=0.1) for i in (0, 2)]  # type: ignore[index]
    deepr = DeepR(scope="global")
    deepr.attach(net, optimizers[0])
    with pytest.raises(ValueError, match=r"`0\.weight`, `2\.weight` have one parameter, theta: .* found it in two"):
        deepr.attach(net, optimizers[1])
    with pytest.warns(UserWarning, match="duplicate"):
        twice = torch.optim.SGD([*net[0].parameters(), *net[2].parameters()], lr=0.1)  # type: ignore[index]
    with pytest.raises(ValueError, match="found it 2 times in one"):
        DeepR(scope="global").attach(small_like(net), twice)


def small_like(net: nn.Module) -> nn.Module:
    for slots in all_slots(net):
        slots.owner = lambda: None
    return net


def test_join_itself() -> None:
    net = sparsify(plain_mlp(), 0.3, distribution="uniform", seed=SEED)
    x = batches(1)[0][0]
    expected = net(x)
    pool = join(list(converted_tensors(net)))
    assert torch.equal(net(x), expected) and pool.count == 54 and pool.budgets == [36, 18]
    assert join(list(converted_tensors(net))) is pool
    assert pool.members == all_slots(net) and all(isinstance(slots, SharedSlots) for slots in pool.members)
    with pytest.raises(ValueError, match=r"`0\.weight` shares one theta"):
        join(list(converted_tensors(net))[:1])
