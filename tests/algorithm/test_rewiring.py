"""Algorithm 1 against the slow NumPy oracle, step by step and in distribution; uniform and exact re-activation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_deepr import sparsify
from lightning_deepr.algorithm import rewiring
from lightning_deepr.weights.k_slots import KSlots
from tests.helpers import oracle
from tests.helpers.optional import Optional
from tests.helpers.plain import PlainDeepR as DeepR
from tests.helpers.regression import DEVICES, SEED, Branches, batches, loss_of, plain_mlp
from tests.helpers.state import all_slots, oracle_of, thetas
from tests.helpers.statistics import chi_square_p

stats = Optional("scipy.stats")

LR, ALPHA = 0.3, 0.01
STEPS = 200
SMALLEST_P = 1e-4  # the seeds are fixed, so a test that passes once always passes


def slots_with(total: int, count: int, index: int = 0, seed: int = 0) -> tuple[torch.Tensor, KSlots]:
    places = rewiring.random_places(total, count, index, seed)
    return torch.rand(count) + 0.1, KSlots(torch.Size([1, total]), places, index, sign_seed=11 + index)


# -- against the oracle -------------------------------------------------------------------------------------------------------

DENSITIES = {
    "1 %": (0.01, (40, 30)),
    "30 %": (0.3, (12, 10)),
    "50 %": (0.5, (12, 10)),
    "60 %": (0.6, (12, 10)),
    "99 %": (0.99, (12, 10)),
    "100 %": (1.0, (12, 10)),
    "K = 1": ({"a": 1, "b": 1}, (12, 10)),
    "odd sizes, uneven": ({"a": 0.6, "b": 7}, (11, 7)),
    "layers in a chain": (0.4, (12, 10, 6)),
}


@pytest.mark.filterwarnings("ignore:connectivity.*int and means one single connection")
@pytest.mark.parametrize("temperature", [0.0, 2e-3], ids=["no noise", "noise"])
@pytest.mark.parametrize(("connectivity", "sizes"), DENSITIES.values(), ids=DENSITIES.keys())
def test_every_step_equals_the_oracle(connectivity: object, sizes: tuple[int, ...], temperature: float) -> None:
    net: nn.Module = Branches(sizes) if len(sizes) == 2 else plain_mlp(sizes)
    sparsify(net, connectivity, distribution="uniform", seed=SEED)
    slow = oracle_of(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    DeepR(l1=ALPHA, temperature=temperature, seed=SEED, check_invariants=True).attach(net, optimizer)
    counts = [theta.numel() for theta in thetas(net)]
    sign_of: list[dict[int, float]] = [{} for _ in counts]
    reborn = stopped = 0
    for step, batch in enumerate(batches(STEPS, sizes[0], sizes[-1])):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        gradients = [theta.grad.numpy() for theta in thetas(net)]
        # the size of the terms before they cancel: a CPU without fused multiply-add rounds three times, the oracle twice
        terms = [np.abs(t.detach().numpy()) + LR * np.abs(g) for t, g in zip(thetas(net), gradients, strict=True)]
        slow.descend(gradients, LR)
        slow.shrink_and_diffuse(step, LR, ALPHA, temperature)
        dormant = slow.rewire(step)
        optimizer.step()
        for i, (fast, slots, tensor) in enumerate(zip(thetas(net), all_slots(net), slow.tensors, strict=True)):
            died = (slots.born == step).nonzero().view(-1).tolist()
            assert died == dormant[i]
            assert slots.places.tolist() == tensor.places
            assert slots.born.tolist() == tensor.born
            assert slots.signs.tolist() == tensor.signs.tolist()
            assert fast.numel() == counts[i] == len(set(tensor.places))
            theta = fast.detach().numpy()
            stopped += int((theta == 0).sum())
            # the deviates of two libraries may differ in their last bits
            roundings = 5 * np.spacing(terms[i]) / 2 if not temperature else 3e-7
            assert (np.abs(theta - tensor.theta) <= roundings).all()
            assert (theta[died] == 0).all()
            tensor.theta = theta.copy()  # roundings of earlier steps must not add up
            for p, sign in zip(slots.places.tolist(), slots.signs.tolist(), strict=True):
                assert sign_of[i].setdefault(p, sign) == sign, "a connection came back with another sign"
            reborn += len(died)
    share = reborn / STEPS / sum(counts)
    if connectivity == 1.0:  # nothing can be rewired: theta < 0 becomes 0
        assert reborn == 0 and stopped > 0.02 * STEPS * sum(counts)
        return
    assert 0.02 < share < 0.6, f"{share:.1%} reborn per step: neither too few nor a collapse tests anything"


def test_a_free_run_in_double_precision_equals_an_oracle_with_gradients_of_its_own() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 8, bias=False), nn.Linear(8, 7, bias=False)).double()
    sparsify(net, 0.4, distribution="uniform", seed=SEED)
    slow = oracle_of(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR)
    DeepR(l1=ALPHA, seed=SEED).attach(net, optimizer)
    rebirths = 0
    for step, (x, y) in enumerate(batches(STEPS, 9, 7)):
        optimizer.zero_grad()
        loss_of(net, (x, y)).backward()
        optimizer.step()

        first, second = (tensor.dense().reshape(shape) for tensor, shape in zip(slow.tensors, [(8, 9), (7, 8)], strict=True))
        a, b = x.double().numpy(), y.double().numpy()
        hidden = a @ first.T
        error = 2 * (hidden @ second.T - b) / b.size
        for_weights = [((error @ second).T @ a).ravel(), (error.T @ hidden).ravel()]
        slow.descend([t.signs * dense[t.places] for t, dense in zip(slow.tensors, for_weights, strict=True)], LR)
        slow.shrink_and_diffuse(step, LR, ALPHA)
        rebirths += sum(map(len, slow.rewire(step)))

        for fast, slots, tensor in zip(thetas(net), all_slots(net), slow.tensors, strict=True):
            assert slots.places.tolist() == tensor.places
            np.testing.assert_allclose(fast.detach().numpy(), tensor.theta, rtol=1e-9, atol=1e-12)
    assert rebirths > 100


def test_with_noise_the_distribution_is_the_oracles() -> None:
    """The two sides use different seeds, so only their distributions can agree."""
    size, steps, lr, alpha, temperature = 32, 80, 0.1, 0.3, 0.1
    torch.manual_seed(0)
    wanted = torch.randn(size, size)

    def energy(weight: torch.Tensor) -> torch.Tensor:
        return 0.5 * (weight - wanted).square().sum()  # separable: the slots are nearly independent

    net = sparsify(nn.Linear(size, size, bias=False), 0.3, init="deepr", seed=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    DeepR(l1=alpha, temperature=temperature, seed=1).attach(net, optimizer)
    slow = oracle_of(sparsify(nn.Linear(size, size, bias=False), 0.3, init="deepr", seed=2), seed=2)
    deaths = np.zeros((2, steps))
    for step in range(steps):
        optimizer.zero_grad()
        energy(net.weight).backward()
        optimizer.step()
        deaths[0, step] = int((all_slots(net)[0].born == step).sum())

        (tensor,) = slow.tensors
        dense = tensor.dense() - wanted.numpy().ravel()
        slow.descend([tensor.signs * dense[tensor.places]], lr)
        slow.shrink_and_diffuse(step, lr, alpha, temperature)
        deaths[1, step] = len(slow.rewire(step)[0])

    settled = deaths[:, steps // 2 :]
    assert settled.mean() > 10
    standard_error = np.sqrt((settled.var(axis=1, ddof=1) / settled.shape[1]).sum())
    assert abs(settled[0].mean() - settled[1].mean()) < 4 * standard_error
    assert stats.ks_2samp(thetas(net)[0].detach().numpy(), slow.tensors[0].theta).pvalue > SMALLEST_P
    assert stats.ks_2samp(settled[0], settled[1]).pvalue > SMALLEST_P


# -- uniform, without replacement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count",
    [15, pytest.param(20, marks=pytest.mark.slow), pytest.param(21, marks=pytest.mark.slow), 30],
    ids=["rejection", "rejection at 1/2", "listing at 1/2", "listing"],
)
def test_reactivation_is_uniform_over_all_dormant_places(count: int) -> None:
    """Three of K slots die: the places that they leave are candidates, too, and each place is drawn at most once."""
    total, tensors, steps, dying = 40, 100, 40, torch.tensor([1, 4, 7])
    places = rewiring.random_places(total, count, 0, 5)
    kept = set(places.tolist()) - set(places[dying].tolist())
    candidates = sorted(set(range(total)) - kept)
    rank = torch.full((total,), -1)
    rank[torch.tensor(candidates)] = torch.arange(len(candidates))

    trials = []
    for step in range(steps):
        slots = [KSlots(torch.Size([1, total]), places.clone(), index, sign_seed=1) for index in range(tensors)]
        theta = [torch.ones(count).index_fill(0, dying, -0.1) for _ in range(tensors)]
        dormant = rewiring.dormant_slots(theta)
        trials += rewiring.reactivate(theta, slots, dormant, seed=9, step=step)
    drawn = rank[torch.stack(trials)]  # [trials, 3]

    assert int(drawn.min()) >= 0, "an active connection's place was drawn"
    n = len(candidates)
    assert n == total - count + 3
    for slot in range(3):
        assert chi_square_p(torch.bincount(drawn[:, slot], minlength=n)) > SMALLEST_P
    for a, b in ((0, 1), (1, 2), (0, 2)):
        pairs = torch.bincount(drawn[:, a] * n + drawn[:, b], minlength=n * n).view(n, n)
        assert int(pairs.diagonal().sum()) == 0, "a place was given to two slots"
        assert chi_square_p(pairs[~torch.eye(n, dtype=torch.bool)]) > SMALLEST_P
    triples = drawn.sort(dim=1).values
    spread = torch.bincount(triples[:, 0] * n + triples[:, 2], minlength=n * n).view(n, n)
    gaps = torch.arange(n)[None, :] - torch.arange(n)[:, None]
    ways = (gaps - 1).clamp(min=0).double()  # the number of middle places for each pair of smallest and largest
    by_gap = [(float(spread[gaps == g].sum()), float(ways[gaps == g].sum())) for g in range(2, n)]
    by_gap = [(seen, ways * len(drawn) * 6 / (n * (n - 1) * (n - 2))) for seen, ways in by_gap]
    assert chi_square_p([seen for seen, _ in by_gap], [expected for _, expected in by_gap]) > SMALLEST_P


def test_uniform_over_a_large_tensor_when_many_die_at_once() -> None:
    """Low and high places are equally likely, though hundreds of draws collide (an inexact draw favours low places)."""
    total, count = 2000, 1000
    tally = torch.zeros(total)
    for step in range(60):
        theta, slots = slots_with(total, count)
        theta[:900] = -1.0
        (new,) = rewiring.reactivate([theta], [slots], rewiring.dormant_slots([theta]), seed=2, step=step)
        assert new.unique().numel() == 900 and not set(new.tolist()) & set(slots.places[900:].tolist())
        tally[new] += 1
    candidates = torch.ones(total, dtype=torch.bool)
    candidates[slots_with(total, count)[1].places[900:]] = False
    seen = tally[candidates]
    # without replacement within a step: the counts vary less than those of independent draws
    share = 900 / 1900
    assert chi_square_p(seen.view(38, 50).sum(1)) > SMALLEST_P
    statistic = float(((seen - 60 * share) ** 2).sum() / (60 * share * (1 - share)))
    assert abs(statistic - 1900) < 4 * (2 * 1900) ** 0.5


# -- exact at any density -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "count"), [(1, 1), (2, 1), (3, 2), (7, 7), (100, 50), (100, 51), (100, 99), (1000, 990)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["one dies", "half die", "all die"])
def test_exact_at_any_density(total: int, count: int, share: float) -> None:
    for step in range(20):
        theta, slots = slots_with(total, count, seed=step)
        dying = torch.randperm(count, generator=torch.Generator().manual_seed(step))[: max(1, round(share * count))]
        theta[dying] = -1e-30
        before = slots.places.clone()
        staying = torch.ones(count, dtype=torch.bool).index_fill(0, dying, False)
        expected = theta.clone().index_fill(0, dying, 0.0)
        (new,) = rewiring.reactivate([theta], [slots], rewiring.dormant_slots([theta]), seed=0, step=step)
        assert new.numel() == dying.numel()
        assert slots.places.unique().numel() == count
        assert int(slots.places.min()) >= 0 and int(slots.places.max()) < total
        assert torch.equal(slots.places[staying], before[staying])
        assert torch.equal(theta, expected)
        assert torch.equal(slots.signs, slots.signs_at(slots.places))
        assert torch.equal(slots.born == step, ~staying)
        if count == total:
            assert set(new.tolist()) == set(before[dying].tolist()), (
                "at K = N only the places of this step's deaths are dormant"
            )


def test_zero_is_active_and_the_smallest_negative_number_is_not() -> None:
    theta = torch.tensor([0.0, -0.0, 1e-45, -1e-45, -1.0, 1.0])
    (dormant,) = rewiring.dormant_slots([theta])
    assert dormant.tolist() == [3, 4]
    first, second = rewiring.dormant_slots([theta[:4], theta[4:]])
    assert (first.tolist(), second.tolist()) == ([3], [0])


@pytest.mark.filterwarnings("ignore:A backward pass reached")
def test_a_connection_at_zero_receives_its_gradient() -> None:
    """A newborn survives by its gradient: the gradient must exist at theta = 0."""
    net = sparsify(nn.Linear(6, 5, bias=False), 0.5, seed=1)
    with torch.no_grad():
        thetas(net)[0].zero_()
    x = torch.randn(3, 6)
    net(x).sum().backward()
    (slots,) = all_slots(net)
    expected = slots.signs * x.sum(0)[slots.places % 6]
    torch.testing.assert_close(thetas(net)[0].grad, expected)


# -- the coordinates of a draw -- ---------------------------------------------------------------------------------------------


def reborn_at(total: int, count: int, dying: list[int], *, index: int = 0, seed: int = 0, step: int = 0) -> dict[int, int]:
    theta, slots = slots_with(total, count, index)
    theta[dying] = -1.0
    (new,) = rewiring.reactivate([theta], [slots], rewiring.dormant_slots([theta]), seed, step)
    return dict(zip(sorted(dying), new.tolist(), strict=True))


def test_a_draw_is_a_function_of_its_coordinates() -> None:
    total = 10**9 + 7
    dying = [0, 3, 17, 49]
    drawn = reborn_at(total, 50, dying, index=2, seed=5, step=12)
    stream = oracle.key(5, oracle.BIRTH, 12, 0)
    assert drawn == {slot: oracle.place(stream, 2 * 2**40 + slot, total) for slot in dying}
    # other dying slots and the number of slots do not matter
    for slot in dying:
        assert reborn_at(total, 50, [slot], index=2, seed=5, step=12)[slot] == drawn[slot]
        assert reborn_at(total, 500, [slot, 99], index=2, seed=5, step=12)[slot] == drawn[slot]
    # each coordinate matters
    for change in ({"index": 3}, {"seed": 6}, {"step": 13}):
        other = reborn_at(total, 50, dying, **{"index": 2, "seed": 5, "step": 12, **change})
        assert all(other[slot] != drawn[slot] for slot in dying)


def test_tensors_do_not_disturb_each_other() -> None:
    """Tensors draw the same places together, in another order and alone, with rejection and listing mixed."""
    shapes = [(50, 20), (40, 35), (1000, 10), (9, 9), (30, 12)]

    def dying() -> list[tuple[torch.Tensor, KSlots]]:
        made = [slots_with(total, count, index) for index, (total, count) in enumerate(shapes)]
        for theta, _ in made:
            theta[::2] = -1.0
        return made

    def run(order: list[int]) -> dict[int, list[int]]:
        made = [dying()[i] for i in order]
        theta, slots = [t for t, _ in made], [s for _, s in made]
        new = rewiring.reactivate(theta, slots, rewiring.dormant_slots(theta), seed=4, step=8)
        return {i: places.tolist() for i, places in zip(order, new, strict=True)}

    together = run([0, 1, 2, 3, 4])
    assert run([4, 2, 0, 3, 1]) == together
    for i in range(len(shapes)):
        assert run([i]) == {i: together[i]}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("total", "count"), [(300, 60), (300, 150), (300, 151), (300, 300), (2**40, 30)])
def test_the_start_is_the_oracles(total: int, count: int, device: str) -> None:
    assert rewiring.random_places(total, count, 3, 8, device).tolist() == oracle.start_places(total, count, 3, 8)
