"""``scope="global"``: a step against a slow one in NumPy, the choice of a newborn's layer, and a layer's least connections."""

from __future__ import annotations

import copy
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lightning_deepr import connectivity_report, kernels, sparsify
from lightning_deepr.algorithm.shared_rewiring import draw_layers
from lightning_deepr.weights.find import converted_tensors
from tests.helpers import oracle
from tests.helpers.global_scope import NETWORKS, OPTIMIZERS, RULES, assert_sound, by_connection, counts, network, shared, small
from tests.helpers.plain import PlainDeepR as DeepR
from tests.helpers.regression import SEED, batches, loss_of, plain_mlp, train
from tests.helpers.state import all_slots, assert_equal_states, state_of
from tests.helpers.statistics import chi_square_p

LAYER = 6  # the stream of the draws of layers


# -- invariants of every step -- --------------------------------------------------------------------------------------------


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


# -- one step against a slow one in NumPy -------------------------------------------------------------------------------------


def slow_step(
    theta: list[float],
    layers: list[tuple[int, int, list[int]]],
    budgets: list[int],
    rule: str,
    least: int,
    seed: int,
    step: int,
) -> list[list[tuple[int, int | None]]]:
    """Compute the slots of each layer after a step: (place, old slot or None for a newborn), slot by slot.

    ``layers`` has (N, index, places) of each layer.
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
    # the optimizer's state and the gradient tag every slot, and the optimizer changes no theta
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


# -- which layer --------------------------------------------------------------------------------------------------------------


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
    """Kill random slots. Returns births, the expected births of the rule, and the places of births in the first layer."""
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
    # exact: one birth after the other, with probabilities proportional to the weights of the layers that are not full
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


# -- least_per_layer -- -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("least", [1, 3])
def test_a_layer_never_falls_below_the_floor(rule: str, least: int) -> None:
    net = sparsify(plain_mlp((30, 30, 10)), {"0": 200, "2": 4}, scope="global", seed=SEED)
    theta, optimizer = shared(net), torch.optim.SGD(net.parameters(), lr=0.0)
    DeepR(scope="global", l1=0.0, reactivation=rule, least_per_layer=least, check_invariants=True).attach(net, optimizer)
    for step in range(20):
        with torch.no_grad():
            theta.fill_(1.0)
            all_slots(net)[1].own(theta).fill_(-1.0)  # all connections of the last layer
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
