"""The counter-based draws: equal integers in PyTorch and NumPy, uniform in their lowest bits, and no generator is used."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lightning_deepr import DeepR, sparsify
from lightning_deepr.algorithm import randomness
from tests.helpers import oracle
from tests.helpers.optional import Optional
from tests.helpers.regression import DEVICES, batches, mlp, plain_mlp, train
from tests.helpers.state import all_slots, state_of
from tests.helpers.statistics import chi_square_p

stats = Optional("scipy.stats")

SMALLEST_P = 1e-4  # the seeds are fixed, so a test that passes once always passes
SEEDS = range(4)

COUNTERS = torch.tensor([0, 1, 2, 3, 1000, 2**31, 2**32 + 1, 2**40 - 1, 2**40, 7 * 2**40 + 5, 2**62, 2**63 - 1, -1, -(2**63)])


# -- the same integers everywhere ---------------------------------------------------------------------------------------------


def test_the_hash_is_splitmix64() -> None:
    """The hash reproduces SplitMix64's published first outputs for seed 0."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]
    found = randomness.bits(0, torch.arange(1, 6)).tolist()
    assert [word % 2**64 for word in found] == published


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("coordinates", [(), (0,), (0, 0), (1, 4, 17, 2), (-1, 5, 2**40), (2**63 - 1, 3, 9)])
def test_numpy_and_torch_agree_on_keys_bits_and_signs(coordinates: tuple[int, ...], device: str) -> None:
    stream = randomness.key(*coordinates)
    assert stream == oracle.key(*coordinates)
    expected = oracle.bits(stream, COUNTERS.numpy())
    assert np.array_equal(randomness.bits(stream, COUNTERS.to(device)).cpu().numpy().astype(np.uint64), expected)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        signs = randomness.signs_of(stream, COUNTERS.to(device), dtype)
        assert signs.dtype == dtype and np.array_equal(signs.double().cpu().numpy(), oracle.signs(stream, COUNTERS.numpy()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("total", [1, 2, 3, 7, 784 * 300, 2**40, 2**40 - 1, 3 * 2**61, 2**62 + 1, 2**63 - 1])
def test_numpy_and_torch_agree_on_places(total: int, device: str) -> None:
    stream = randomness.key(6, 1, total)
    counters = torch.arange(200, device=device)
    found = randomness.uniform_places(stream, counters, torch.tensor(total, device=device)).tolist()
    expected = [oracle.place(stream, counter, total) for counter in counters.tolist()]
    assert found == [-1 if p is None else p for p in expected]


@pytest.mark.parametrize("device", DEVICES)
def test_numpy_and_torch_agree_on_deviates(device: str) -> None:
    stream = randomness.key(1, 2, 3)
    counters = torch.arange(10_000)
    found = randomness.normal(stream, counters.to(device)).cpu().numpy()
    np.testing.assert_allclose(found, oracle.normal(stream, counters), rtol=1e-12, atol=1e-12)


def test_keys_keep_their_coordinates_apart() -> None:
    """Neighbouring coordinates and different streams have different keys."""
    keys = {randomness.key(*c) for c in np.ndindex(6, 6, 20, 6)} | {randomness.key(*c) for c in np.ndindex(30, 30)}
    assert len(keys) == 6 * 6 * 20 * 6 + 900
    streams = (randomness.START_PLACES, randomness.START_THETA, randomness.SIGN, randomness.BIRTH, randomness.NOISE)
    assert len(set(streams)) == 5


def test_a_counter_belongs_to_one_slot_of_one_tensor() -> None:
    slots = torch.tensor([0, 1, 2**40 - 1])
    counters = torch.cat([randomness.counters(index, slots) for index in (0, 1, 2, 2**23 - 1)])
    assert counters.unique().numel() == counters.numel() and int(counters.min()) >= 0


# -- places -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_low_bits_of_places_are_uniform_at_a_large_total(seed: int) -> None:
    """Float draws have no low bits at N = 2**40: float32 `rand * 2**33` never gives an odd place."""
    total, count = 2**40, 2**18
    places = randomness.uniform_places(randomness.key(seed, randomness.BIRTH, 1, 0), torch.arange(count), torch.tensor(total))
    assert int(places.min()) >= 0 and int(places.max()) < total
    odd = int((places % 2).sum())
    assert abs(odd - count / 2) < 4 * (count / 4) ** 0.5
    for shift in (0, 8, 16, 24, 32):
        assert chi_square_p(torch.bincount((places >> shift) % 256, minlength=256)) > SMALLEST_P
    # neighbouring slots do not draw neighbouring places
    pair = (places[1:] % 64) * 64 + places[:-1] % 64
    assert chi_square_p(torch.bincount(pair, minlength=4096)) > SMALLEST_P
    steps = (places[1:] - places[:-1]) % total
    assert chi_square_p(torch.bincount(steps * 256 // total, minlength=256)) > SMALLEST_P


@pytest.mark.parametrize("total", [3, 10, 49, 1000])
def test_places_of_a_small_total_are_uniform(total: int) -> None:
    counts = torch.zeros(total)
    for step in range(20):  # over slots and over steps
        draw = randomness.uniform_places(randomness.key(0, randomness.BIRTH, step, 0), torch.arange(5000), torch.tensor(total))
        counts += torch.bincount(draw, minlength=total)
    assert int(counts.sum()) == 100_000
    assert chi_square_p(counts) > SMALLEST_P


def counter_of(draw: int, stream: int) -> int:
    """Return the counter with the hash ``draw``: every step of the hash is a bijection, so it can be inverted."""

    def unshift(word: int, by: int) -> int:
        result = word
        for _ in range(64 // by + 1):
            result = word ^ (result >> by)
        return result

    word = unshift(draw, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    word = unshift(word, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    counter = (unshift(word, 30) - stream) * pow(oracle.GOLDEN, -1, 2**64) % 2**64
    return counter - 2**64 if counter >= 2**63 else counter


@pytest.mark.parametrize(
    "total", [1, 2, 3, 5, 784 * 300, 10**12 + 39, 2**40, 2**61 + 1, 3 * 2**61, 2**62, 2**63 - 2, 2**63 - 1]
)
def test_the_remainder_favours_no_place(total: int) -> None:
    """The accepted draws are exactly 0 ... m * N - 1 with the largest m, so each place has m draws."""
    accepted = 2**63 // total * total
    stream = randomness.key(3, total)
    last = [accepted - 1, accepted - 2, 0, 1, total - 1] if total > 1 else [accepted - 1, 0]
    counters = torch.tensor([counter_of(draw, stream) for draw in last])
    assert [word % 2**63 for word in randomness.bits(stream, counters).tolist()] == last
    places = randomness.uniform_places(stream, counters, torch.tensor(total)).tolist()
    assert places == [draw % total for draw in last]
    rejected = [draw for draw in (accepted, accepted + 1, 2**63 - 1) if accepted <= draw < 2**63]
    assert bool(rejected) == (2**63 % total != 0)
    for draw in rejected:
        counter = torch.tensor([counter_of(draw, stream)])
        assert randomness.uniform_places(stream, counter, torch.tensor(total)).tolist() == [-1]


def test_a_plain_remainder_would_show() -> None:
    """At N = 3 * 2**61, half of all draws would fall into the lowest third with a plain remainder."""
    total = 3 * 2**61
    places = randomness.uniform_places(randomness.key(1), torch.arange(40_000), torch.tensor(total))
    rejected = places < 0
    assert chi_square_p([int(rejected.sum()), int((~rejected).sum())], [10_000, 30_000]) > SMALLEST_P
    assert chi_square_p(torch.bincount(places[~rejected] // 2**61, minlength=3)) > SMALLEST_P


# -- signs --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_signs_are_balanced_by_row_column_and_block(seed: int) -> None:
    """In a layer of LeNet-300-100 the signs are balanced in each row, each column and the 16 patterns of 2 x 2 blocks."""
    rows, columns = 300, 784
    sign_seed = randomness.key(seed, randomness.SIGN, 0) & randomness.LARGEST
    signs = randomness.signs_of(sign_seed, torch.arange(rows * columns), torch.float64).view(rows, columns)
    for sums, length, n in ((signs.sum(1), columns, rows), (signs.sum(0), rows, columns)):
        z = sums / length**0.5
        assert SMALLEST_P < stats.chi2.sf(float(z.square().sum()), n) < 1 - SMALLEST_P
        assert float(z.abs().max()) < 5
    up = (signs > 0).long()
    for top, left in ((0, 0), (1, 0), (0, 1), (1, 1)):
        grid = up[top : rows - top, left : columns - left]
        pattern = 8 * grid[::2, ::2] + 4 * grid[::2, 1::2] + 2 * grid[1::2, ::2] + grid[1::2, 1::2]
        assert chi_square_p(torch.bincount(pattern.view(-1), minlength=16)) > SMALLEST_P
    for distance in (1, 2, 4, 8, 16, 28, 56, 784, 1568):  # neighbours in a row, in a column and in the picture
        product = signs.view(-1)[distance:] * signs.view(-1)[:-distance]
        assert abs(float(product.sum())) < 4.5 * product.numel() ** 0.5


def test_signs_of_two_tensors_are_unrelated() -> None:
    places = torch.arange(50_000)
    signs = [
        randomness.signs_of(randomness.key(0, randomness.SIGN, i) & randomness.LARGEST, places, torch.float64) for i in (0, 1)
    ]
    assert abs(float((signs[0] * signs[1]).sum())) < 4 * 50_000**0.5


# -- deviates -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_deviates_are_normal(seed: int) -> None:
    count = 100_000
    nu = [randomness.normal(randomness.key(seed, randomness.NOISE, step), torch.arange(count)) for step in (0, 1)]
    for values in nu:
        assert values.dtype == torch.float64 and bool(values.isfinite().all())
        assert stats.kstest(values.numpy(), "norm").pvalue > SMALLEST_P
        assert abs(float(values.mean())) < 4 * count**-0.5
        assert abs(float(values.var()) - 1) < 4 * (2 / count) ** 0.5
        assert abs(float((values**4).mean()) - 3) < 4 * (96 / count) ** 0.5
        assert 4 < float(values.abs().max()) < 6.8
    for a, b in ((nu[0], nu[1]), (nu[0][1:], nu[0][:-1]), (nu[0].square() - 1, nu[1].square() - 1)):
        scale = float(a.std() * b.std())
        assert abs(float((a * b).mean())) / scale < 4 * count**-0.5, "steps or slots are correlated"


# -- the global generators -- -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["module", "deepr", "largest"])
def test_no_global_generator_is_used(init: str) -> None:
    net = plain_mlp()
    data = batches(20)
    states = (
        torch.get_rng_state(),
        np.random.get_state()[1].copy(),  # type: ignore[union-attr]  # noqa: NPY002
        random.getstate(),
    )
    sparsify(net, 0.3, init=init)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    DeepR(l1=0.5, temperature=1e-4, check_invariants=True).attach(net, optimizer)
    train(net, optimizer, data)
    assert all(int(slots.born.max()) > 0 for slots in all_slots(net)), "nothing was rewired"
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (
        np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[union-attr]  # noqa: NPY002
        and random.getstate() == states[2]
    )


def test_the_seed_and_nothing_else_decides() -> None:
    def run(global_seed: int, seed: int) -> list[torch.Tensor]:
        net = mlp(seed=seed)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
        DeepR(l1=0.01, temperature=1e-4, seed=seed).attach(net, optimizer)
        torch.manual_seed(global_seed)
        train(net, optimizer, batches(20))
        return state_of(net)

    first = run(0, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, run(123, 5), strict=True))
    other = run(0, 6)
    places = [i for i, value in enumerate(first) if value.dtype == torch.int64]
    assert all(not torch.equal(first[i], other[i]) for i in places)
