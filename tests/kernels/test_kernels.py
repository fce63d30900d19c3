"""The compiled step gives the same places, signs, births, thetas and states as the PyTorch functions and the oracle."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, optim

from lightning_deepr import kernels
from lightning_deepr.kernels import available
from tests.helpers.kernel_steps import (
    ALPHA,
    LR,
    OPTIMIZERS,
    SHARES,
    SIZES,
    Run,
    Size,
    let_die,
    network,
    pretrained,
    signs_by_place,
    step_separately,
)
from tests.helpers.paths import ROOT
from tests.helpers.plain import PlainDeepR as DeepR
from tests.helpers.regression import SEED
from tests.helpers.state import all_slots, assert_equal_states, oracle_of, state_of, thetas

pytestmark = [
    pytest.mark.skipif(not available(), reason="no kernels here"),
    pytest.mark.filterwarnings("ignore:.*an int and means one single connection"),
]


@pytest.mark.parametrize("temperature", [0.0, 1e-3], ids=["no noise", "noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_a_step_equals_pytorchs_and_the_oracles(
    sizes: list[Size], dtype: torch.dtype, temperature: float, pytorch: Run
) -> None:
    fast, plain = network(sizes, dtype), network(sizes, dtype)
    slow = oracle_of(fast)
    made = []
    for net in (fast, plain):
        made.append(optim.SGD(net.parameters(), lr=LR, momentum=0.0))
        DeepR(l1=ALPHA, temperature=temperature, seed=SEED, check_invariants=True).attach(net, made[-1])
    for step, share in enumerate(SHARES):
        for net in (fast, plain):
            let_die(net, share, step)
        slow.descend([theta.grad.numpy() for theta in thetas(fast)], LR)
        slow.shrink_and_diffuse(step, LR, ALPHA, temperature)
        dormant = slow.rewire(step)
        made[0].step()
        pytorch(made[1].step)
        exact = temperature == 0.0
        for i, tensor in enumerate(slow.tensors):
            for net in (fast, plain):
                slots, theta = all_slots(net)[i], thetas(net)[i].detach().numpy()
                assert (slots.born == step).nonzero().view(-1).tolist() == dormant[i]
                assert slots.places.tolist() == tensor.places
                assert slots.signs.tolist() == tensor.signs.tolist() and slots.signs.dtype == dtype
                assert slots.born.tolist() == tensor.born
                if exact and net is fast:
                    np.testing.assert_array_equal(theta, thetas(plain)[i].detach().numpy())
                np.testing.assert_allclose(theta, tensor.theta, rtol=2e-6 if dtype == torch.float32 else 1e-12, atol=1e-7)
            tensor.theta = thetas(fast)[i].detach().numpy().copy()
            thetas(plain)[i].data.copy_(thetas(fast)[i].data)  # two libraries' deviates may differ in the last bits
        if share == 1.0:
            assert [len(d) for d in dormant] == [count if count < rows * columns else 0 for rows, columns, count in sizes]


@pytest.mark.parametrize("sizes", [[(100, 100, 4500)], [(400, 500, 100_000)], [(300, 300, 40_000), (100, 100, 4999)]], ids=str)
def test_very_many_reborn_at_a_high_density(sizes: list[Size], pytorch: Run) -> None:
    """At 40 to 50 %, many drawn places are taken: slots draw again and again, in the same order."""
    fast, plain = network(sizes), network(sizes)
    steps = []
    for net in (fast, plain):
        optimizer = optim.SGD(net.parameters(), lr=LR)
        DeepR(l1=0.0, seed=SEED).attach(net, optimizer)
        steps.append(optimizer.step)
    for step, share in enumerate((1.0, 0.5, 0.01)):
        for net in (fast, plain):
            let_die(net, share, step)
        steps[0]()
        pytorch(steps[1])
        assert_equal_states(state_of(fast), state_of(plain))
        for slots in all_slots(fast):
            assert slots.places.unique().numel() == slots.count


def test_the_orders_of_sparse_compute_follow_either_way(pytorch: Run) -> None:
    sizes = [(60, 50, 900), (40, 30, 1000), (10, 7, 70)]
    fast, plain = network(sizes, compute="sparse"), network(sizes, compute="sparse")
    steps = []
    for net in (fast, plain):
        optimizer = optim.SGD(net.parameters(), lr=LR)
        DeepR(l1=0.0, seed=SEED).attach(net, optimizer)
        steps.append(optimizer.step)
    for step, share in enumerate(SHARES):
        for net in (fast, plain):
            let_die(net, share, step)
        steps[0]()
        pytorch(steps[1])
        for a, b in zip(all_slots(fast), all_slots(plain), strict=True):
            assert a.order is not None and torch.equal(a.order.buffer, b.ordered().buffer)
            assert not a.order.is_stale(a.places)


# rows, columns, K; no tensor is small enough to be put in order anew
LARGE_ORDERS: dict[str, Size] = {
    "many short lines": (15_000, 12_000, 10_000),
    "several in a line": (4_000, 5_000, 64 * 300),
    "one long line": (1, 50_000, 17_000),
    "few long lines": (60_000, 3, 20_001),
    "nearly full": (150, 130, 19_000),
    "more than 2 to the 31 places": (60_000, 50_000, 9_999),
}


def assert_in_order(slots: Any) -> None:
    """Check the order that sparse compute reads against NumPy's sort of the places and signs."""
    order, places, negative = slots.order, slots.places.numpy(), slots.signs.numpy() < 0
    base = order.buffer.data_ptr()
    starts = [(address - base) // 4 for address in order.addresses]
    rows, columns = places // order.columns, places % order.columns
    for side, (line, across, lines) in enumerate(((rows, columns, order.rows), (columns, rows, order.columns))):
        lengths = (lines + 1, order.count, order.count)
        start, found, slot = (order.buffer[at : at + n].numpy() for at, n in zip(starts[3 * side :], lengths, strict=False))
        expected = np.lexsort((across, line))
        np.testing.assert_array_equal(start, np.searchsorted(line[expected], np.arange(lines + 1)))
        np.testing.assert_array_equal(found, across[expected])
        np.testing.assert_array_equal(slot & 0x7FFFFFFF, expected)
        np.testing.assert_array_equal(slot < 0, negative[expected])


@pytest.mark.parametrize("size", LARGE_ORDERS.values(), ids=LARGE_ORDERS)
def test_the_orders_of_a_large_tensor_follow(size: Size) -> None:
    net = network([size], compute="sparse")
    optimizer = optim.SGD(net.parameters(), lr=LR)
    DeepR(l1=0.0, seed=SEED).attach(net, optimizer)
    (slots,) = all_slots(net)
    for step, share in enumerate((*SHARES, 15 / size[2], 16 / size[2], 0.002, 0.12)):
        before = slots.places.clone()
        let_die(net, share, step)
        optimizer.step()
        assert int((slots.born == step).sum()) == (min(size[2], max(1, round(share * size[2]))) if share else 0)
        assert torch.equal(slots.places, before) == (share == 0.0)
        assert_in_order(slots)


@pytest.mark.parametrize("name", ["last column", "square", "two clusters", "descending"])
def test_the_orders_of_places_that_are_unevenly_spread(name: str) -> None:
    """The sort begins with the leading bits. They tell evenly spread places apart, but not these."""
    side, count = 30_000, 9_000
    spread = np.random.default_rng(SEED).permutation(count)
    places = {
        "last column": spread * side + side - 1,
        "square": spread // 100 * side + spread % 100,
        "two clusters": np.where(spread % 2 == 0, spread, side * side - 1 - spread),
        "descending": np.arange(count)[::-1] * (side * side // count),
    }[name]
    (slots,) = all_slots(network([(side, side, count)], compute="sparse"))
    slots.places.copy_(torch.from_numpy(places.copy()))
    slots.refresh_order()
    assert_in_order(slots)


# -- the signs of a pretrained network ----------------------------------------------------------------------------------------


def test_a_connection_of_a_pretrained_network_comes_back_with_its_own_sign(
    pytorch: Run,
) -> None:
    fast, plain = pretrained(1), pretrained(1)
    own = signs_by_place(fast)
    assert all(slots.exceptions.numel() > 50 for slots in all_slots(fast))
    steps = []
    for net in (fast, plain):
        optimizer = optim.SGD(net.parameters(), lr=LR)
        DeepR(l1=0.0, seed=SEED, check_invariants=True).attach(net, optimizer)
        steps.append(optimizer.step)
    came_back = 0
    for step in range(12):
        for net in (fast, plain):
            let_die(net, 0.6, step)
        steps[0]()
        pytorch(steps[1])
        assert_equal_states(state_of(fast), state_of(plain))
        for slots, before in zip(all_slots(fast), own, strict=True):
            exceptions = set(slots.exceptions.tolist())
            for slot in (slots.born == step).nonzero().view(-1).tolist():
                place = int(slots.places[slot])
                if place in before:
                    assert float(slots.signs[slot]) == before[place]
                    came_back += place in exceptions
    assert came_back > 100


def test_other_exceptions_are_followed_after_a_load() -> None:
    """The kernel gets addresses: the address of a tensor that a load has replaced would point to freed memory."""
    net, other = pretrained(1), pretrained(2)
    optimizer = optim.SGD(net.parameters(), lr=LR)
    DeepR(l1=0.0, seed=SEED, check_invariants=True).attach(net, optimizer)
    for step in range(3):
        let_die(net, 0.5, step)
        optimizer.step()
    net.load_state_dict(other.state_dict())
    own = signs_by_place(other)
    for step in range(10):
        let_die(net, 0.6, step)
        optimizer.step()
        for slots, before in zip(all_slots(net), own, strict=True):
            assert torch.equal(slots.signs, slots.signs_at(slots.places))
            assert all(before.get(p, s) == s for p, s in zip(slots.places.tolist(), slots.signs.tolist(), strict=True))


# -- the optimizer's state ----------------------------------------------------------------------------------------------------


START = {"momentum": 0.0, "Adam": 0.0, "Adam fused": 0.0, "Adagrad": 0.1, "RMSprop": 0.0, "Rprop": None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_the_reborn_starts_anew(name: str, dtype: torch.dtype, pytorch: Run) -> None:
    sizes = [(30, 20, 100), (20, 10, 90), (7, 5, 30)]
    fast, plain = network(sizes, dtype), network(sizes, dtype)
    made = []
    for net in (fast, plain):
        made.append(OPTIMIZERS[name](net.parameters()))
        DeepR(l1=0.1, seed=SEED).attach(net, made[-1])
    reborn = 0
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(thetas(fast), thetas(plain), strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=dtype)
            b.grad = a.grad.clone()
        made[0].step()
        pytorch(made[1].step)
        assert_equal_states(state_of(fast, made[0]), state_of(plain, made[1]))
        for slots, theta in zip(all_slots(fast), thetas(fast), strict=True):
            born = slots.born == step
            reborn += int(born.sum())
            own = {k: v for k, v in made[0].state[theta].items() if isinstance(v, Tensor) and v.shape == theta.shape}
            assert own
            for key, value in own.items():
                start = START.get(name, float(key[-1]) if key[-1].isdigit() else 0.5)
                if start is not None:
                    assert bool((value[born] == start).all()) and not bool((value[~born] == start).all()), key
    assert reborn > 20


# -- steps of other kinds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"rewire_every_n_steps": 3}, {"rewire_until": 4}], ids=str)
def test_steps_that_do_not_rewire(options: dict[str, int], pytorch: Run) -> None:
    sizes = [(30, 20, 100), (20, 10, 190)]
    fast, plain = network(sizes), network(sizes)
    steps = []
    for net in (fast, plain):
        optimizer = optim.SGD(net.parameters(), lr=LR)
        DeepR(l1=ALPHA, temperature=1e-4, seed=SEED, check_invariants=True, **options).attach(net, optimizer)
        steps.append(optimizer.step)
    for step in range(9):
        before = [slots.places.clone() for slots in all_slots(fast)]
        for net in (fast, plain):
            let_die(net, 0.3, step)
        steps[0]()
        pytorch(steps[1])
        rewires = (step + 1) % 3 == 0 if "rewire_every_n_steps" in options else step < 4
        for slots, theta, old in zip(all_slots(fast), thetas(fast), before, strict=True):
            assert torch.equal(slots.places, old) != rewires
            assert int((theta == 0).sum()) >= round(0.3 * theta.numel()) and float(theta.detach().min()) == 0.0
        for a, b in zip(state_of(fast), state_of(plain), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_tensors_that_do_not_always_step_together(pytorch: Run) -> None:
    """Two optimizers, a tensor without a gradient, two dtypes: each tensor has its own count of steps."""
    nets = step_separately(pytorch, ALPHA, 8)
    assert all(int((slots.born >= 0).sum()) > slots.count // 2 for slots in all_slots(nets[0]))


def test_a_callback_that_was_copied_leaves_the_first_network_alone() -> None:
    """The tables of the kernels hold addresses: a copy has to make its own tables."""
    net = network([(30, 20, 100)])
    optimizer = optim.SGD(net.parameters(), lr=LR)
    rewiring = DeepR(l1=ALPHA, seed=SEED).attach(net, optimizer)
    let_die(net, 0.5, 0)
    optimizer.step()
    state = state_of(net)
    twin, twin_rewiring = copy.deepcopy(net), copy.deepcopy(rewiring)
    twin_rewiring.remove()
    twin_optimizer = optim.SGD(twin.parameters(), lr=LR)
    DeepR(l1=ALPHA, seed=SEED).attach(twin, twin_optimizer)
    let_die(twin, 0.5, 1)
    twin_optimizer.step()
    assert_equal_states(state_of(net), state)
    assert not torch.equal(all_slots(twin)[0].places, all_slots(net)[0].places)


# -- finite or not ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_what_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype)
    finite = torch.tensor([largest.max, -largest.max, largest.tiny, -largest.smallest_normal / 8, 0.0, -0.0, 1.0], dtype=dtype)
    for length in range(1, 41):
        for offset in (0, 1):  # aligned to a vector or not
            values = finite.repeat(8)[offset : offset + length].clone() if offset == 0 else finite.repeat(8)[1 : 1 + length]
            assert kernels.all_finite([values])
            for position in range(length):
                for bad in (float("inf"), float("-inf"), float("nan"), -float("nan")):
                    damaged = torch.cat([values.new_zeros(offset), values])[offset:]
                    damaged[position] = bad
                    assert not kernels.all_finite([damaged]), (length, offset, position, bad)


def test_what_is_not_finite_is_found_in_any_of_several_tensors() -> None:
    values = [torch.randn(5), torch.randn(0), torch.randn(70).double(), torch.randn(3, 3)]
    assert kernels.all_finite(values) and kernels.all_finite([])
    for i in (0, 2, 3):
        damaged = [value.clone() for value in values]
        damaged[i].view(-1)[-1] = float("nan")
        assert not kernels.all_finite(damaged)
    # a tensor that no kernel can read is not called finite: the caller checks it
    assert not kernels.all_finite([torch.ones(4, dtype=torch.bfloat16)])
    assert not kernels.all_finite([torch.ones(8)[::2]]) and not kernels.all_finite([torch.ones(1).expand(100)])


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("where", ["theta", "gradient"])
def test_a_value_that_is_not_finite_stops_the_step_and_is_named(bad: float, where: str) -> None:
    net = network([(30, 20, 100), (20, 10, 77)])
    optimizer = optim.SGD(net.parameters(), lr=LR)
    DeepR(l1=ALPHA, seed=SEED).attach(net, optimizer)
    let_die(net, 0.3, 0)
    optimizer.step()
    theta = thetas(net)[1]
    (theta.grad if where == "gradient" else theta.data)[76] = bad
    before = state_of(net)
    with pytest.raises(RuntimeError, match=rf"{where}.*1\.weight|1\.weight.*{where}"):
        optimizer.step()
    for a, b in zip(state_of(net), before, strict=True):
        assert torch.equal(a.nan_to_num(5.0), b.nan_to_num(5.0))


@pytest.mark.parametrize(
    "make", [lambda n: torch.zeros(1).expand(n), lambda n: torch.zeros(2 * n)[::2]], ids=["expanded", "strided"]
)
def test_a_gradient_with_strides(make: Callable[[int], Tensor]) -> None:
    net = network([(30, 20, 100)])
    optimizer = optim.SGD(net.parameters(), lr=LR)
    DeepR(l1=ALPHA, seed=SEED, check_invariants=True).attach(net, optimizer)
    thetas(net)[0].grad = make(100)
    optimizer.step()
    assert int((all_slots(net)[0].born == 0).sum()) == 0


# -- without kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_oracle_is_met_without_kernels_too() -> None:
    """A process whose environment turns the kernels off runs the essential test of Algorithm 1 again."""
    names = "odd or a_free_run"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n0",
            "-p",
            "no:cacheprovider",
            "tests/algorithm/test_rewiring.py",
            "-k",
            f"oracle and ({names})",
        ],
        env={**os.environ, "LIGHTNING_DEEPR_KERNELS": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
