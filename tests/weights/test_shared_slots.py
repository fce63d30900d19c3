"""Slots that share a theta: their construction from K slots, their interface, and checkpoints of versions without the class."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import lightning_deepr
from lightning_deepr import DeepR, load_state_dict, sparsify
from lightning_deepr.algorithm.rewiring import start_anew
from lightning_deepr.conversion.sharing import join
from lightning_deepr.weights.find import converted_tensors
from lightning_deepr.weights.k_slots import KSlots
from lightning_deepr.weights.shared import SharedSlots
from tests.data import make_shared
from tests.helpers.regression import SEED, batches, mlp, plain_mlp, train
from tests.helpers.state import all_slots

PACKAGE = Path(lightning_deepr.__file__).parent


def shared_mlp(sizes: tuple[int, ...] = (12, 10, 6)) -> nn.Module:
    return sparsify(plain_mlp(sizes), 0.3, scope="global", distribution="uniform", seed=SEED)


def moved() -> nn.Module:
    """Make a network whose connections have moved between layers: counts and budgets differ."""
    net = shared_mlp()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    DeepR(scope="global", l1=0.5, seed=SEED).attach(net, optimizer)
    train(net, optimizer, batches(8))
    assert [slots.count for slots in all_slots(net)] != [36, 18], "nothing has moved: nothing was tested"
    return net


# -- the interface -- ---------------------------------------------------------------------------------------------------------


def test_k_slots_know_nothing_of_pools() -> None:
    assert "pool" not in (PACKAGE / "weights" / "k_slots.py").read_text(encoding="utf-8").lower()


def test_nobody_asks_whether_there_is_a_pool() -> None:
    asks = re.compile(r"pool\s+is\s+(not\s+)?None|getattr\([^()]*[\"']pool[\"']")
    files = [file for file in PACKAGE.rglob("*.py") if asks.search(file.read_text(encoding="utf-8"))]
    assert len(list(PACKAGE.rglob("*.py"))) > 100 and files == []


def test_who_shares_with_whom() -> None:
    alone, together = mlp(), shared_mlp()
    assert [type(slots) for slots in all_slots(alone)] == [KSlots, KSlots]
    assert [slots.shares for slots in all_slots(alone)] == [[], []] and [s.wanted for s in all_slots(alone)] == [36, 18]
    first, second = all_slots(together)
    assert first.shares == second.shares == ["0.weight", "2.weight"] and first.wanted == second.wanted == 54
    assert [slots for slots, _ in first.shared_with()] == [first, second]
    theta = next(converted_tensors(together)).theta
    assert torch.equal(torch.cat([first.own(theta), second.own(theta)]), theta)
    assert all_slots(alone)[0].own(theta) is theta


# -- joining ------------------------------------------------------------------------------------------------------------------


def test_join_keeps_all_that_is_known_of_the_slots() -> None:
    net = mlp(compute="sparse")
    before = all_slots(net)
    owner = weakref.ref(net)
    seen: list[Any] = []
    for slots in before:
        slots.owner = owner
        slots.register_forward_hook(lambda *given: seen.append(given[0]))
        slots.watch(True)
        slots.born.fill_(4)
    kept = [(s.places, s.born, s.signs, s.order, s.notice, s.sign_seed, s.index, s.policy, s.compute) for s in before]
    pool = join(list(converted_tensors(net)))
    after = all_slots(net)
    assert [type(slots) for slots in after] == [SharedSlots, SharedSlots]
    for mine, old in zip(after, kept, strict=True):
        now = (
            mine.places,
            mine.born,
            mine.signs,
            mine.order,
            mine.notice,
            mine.sign_seed,
            mine.index,
            mine.policy,
            mine.compute,
        )
        assert all(a is b or a == b for a, b in zip(now, old, strict=True))
        assert (
            mine.owner is owner and mine.is_watched and mine.last_birth() == 4 and mine.pool is pool  # type: ignore[attr-defined]
        )
    assert all(
        net[i].weight.shape == slots.shape  # type: ignore[index, union-attr]
        for i, slots in zip((0, 2), after, strict=True)
    )
    assert seen == after, "the slots lost their hooks"
    seen.clear()
    gone = [weakref.ref(slots) for slots in before]
    del before, slots
    gc.collect()
    assert [ref() for ref in gone] == [None, None], "the old K slots are still referenced"


def test_a_pool_takes_in_another_layer() -> None:
    """Slots that already share a theta stay the same objects and keep their budgets."""
    net = plain_mlp((12, 10, 6, 4))
    sparsify(net, 0.3, target_modules=["0", "2"], scope="global", distribution="uniform", seed=SEED)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    rewiring = DeepR(scope="global", l1=0.5, seed=SEED).attach(net, optimizer)
    train(net, optimizer, batches(8, size_out=4))
    rewiring.remove()
    first, second = all_slots(net)
    assert [first.count, second.count] != [36, 18], "nothing has moved: nothing was tested"
    x = batches(1)[0][0]
    sparsify(net, 0.3, target_modules=["4"], seed=SEED)
    expected = net(x)
    pool = join(list(converted_tensors(net)))
    assert all_slots(net)[:2] == [first, second] and pool.members == all_slots(net)
    assert pool.budgets == [36, 18, 7] and pool.count == 61 and pool.names == ["0.weight", "2.weight", "4.weight"]
    assert torch.equal(net(x), expected)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(scope="global", l1=0.5, seed=SEED, check_invariants=True).attach(net, optimizer)
    train(net, optimizer, batches(3, size_out=4))


def test_copies_have_a_pool_of_their_own() -> None:
    net = shared_mlp()
    net.load_state_dict(moved().state_dict())
    replica = copy.deepcopy(net)
    mine, theirs = all_slots(net), all_slots(replica)
    assert [type(slots) for slots in theirs] == [SharedSlots, SharedSlots]
    pools = {id(slots.pool): slots.pool for slots in theirs}  # type: ignore[attr-defined]
    assert len(pools) == 1 and mine[0].pool is not theirs[0].pool  # type: ignore[attr-defined]
    (pool,) = pools.values()
    assert pool.members == theirs and [slots.position for slots in theirs] == [0, 1]  # type: ignore[attr-defined]
    assert pool.budgets == [36, 18] and [slots.copied_from() for slots in theirs] == mine
    layer = copy.deepcopy(net[2])  # type: ignore[index]
    assert layer.parametrizations.weight[0].shares == ["0.weight", "2.weight"]  # type: ignore[union-attr, index]


# -- invariants ---------------------------------------------------------------------------------------------------------------


def spoil_place(slots: Any, theta: Tensor, state: Tensor) -> None:
    slots.places[1] = slots.places[0]


def spoil_range(slots: Any, theta: Tensor, state: Tensor) -> None:
    slots.places[0] = slots.total


def spoil_sign(slots: Any, theta: Tensor, state: Tensor) -> None:
    slots.signs[0] *= -1


def spoil_theta(slots: Any, theta: Tensor, state: Tensor) -> None:
    slots.own(theta)[0] = -1.0


def spoil_value(slots: Any, theta: Tensor, state: Tensor) -> None:
    slots.own(theta)[0] = torch.inf


def spoil_birth(slots: Any, theta: Tensor, state: Tensor) -> None:
    slots.own(theta)[2] = 0.5


def spoil_state(slots: Any, theta: Tensor, state: Tensor) -> None:
    slots.own(state)[2] = 0.5


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_place, "two slots are at one place"),
        (spoil_range, r"a place lies outside 0 \.\.\. 59"),
        (spoil_sign, "a sign is not that of its place"),
        (spoil_theta, r"expected theta >= 0, found -1\.0"),
        (spoil_value, "theta is not finite"),
        (spoil_birth, "a reborn slot does not start at theta = 0"),
        (spoil_state, r"the optimizer's momentum of a reborn slot is not at its start, 0\.25"),
    ],
)
def test_a_problem_is_found_in_slots_of_either_kind(scope: str, spoil: Any, message: str) -> None:
    converted = list(converted_tensors(mlp() if scope == "layer" else shared_mlp()))[1]
    slots, theta, born = converted.slots, converted.theta.detach(), torch.tensor([2])
    state = torch.full_like(theta, 7.0)
    start_anew([(theta, 0.0), (state, 0.25)], born if scope == "layer" else born + 36)
    states = [("momentum", state, 0.25)]
    assert slots.problem(theta, born, states) is None
    assert slots.problem(theta, born, states, least=100) is None  # nothing was born yet
    if scope == "global":
        slots.pool.births = [1] * len(slots.pool.counts)
        found = slots.problem(theta, born, states, least=30)
        assert found is not None and "expected at least 30 connections before other layers get births, found 18" in found
        slots.pool.births = []
    spoil(slots, theta, state)
    assert re.fullmatch(message, slots.problem(theta, born, states))
    if spoil is spoil_theta:
        assert slots.problem(theta, born, states, signed=True) is None


def test_a_newborn_starts_anew() -> None:
    theta, moment, rate = torch.ones(4), torch.ones(4, dtype=torch.float64), torch.ones(4)
    start_anew(iter([(theta, 0.0), (moment, 0.0), (rate, 0.5)]), torch.tensor([3, 1]))
    assert theta.tolist() == moment.tolist() == [1, 0, 1, 0] and rate.tolist() == [1, 0.5, 1, 0.5]


# -- loading ------------------------------------------------------------------------------------------------------------------


def test_an_average_takes_over_the_budgets_that_are_loaded() -> None:
    net = shared_mlp()
    average = AveragedModel(net)
    state = moved().state_dict()
    for i, budget in ((0, 20), (2, 34)):
        state[f"{i}.parametrizations.weight.0.pool"][4] = budget
    net.load_state_dict(state)
    for part in (net, average.module):
        assert all_slots(part)[0].pool.budgets == [20, 34]  # type: ignore[attr-defined]


def test_a_load_that_fails_leaves_the_module_dense() -> None:
    state = shared_mlp().state_dict()
    del state["2.bias"]
    net = plain_mlp()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"2\.bias"):
        load_state_dict(net, state)
    after = net.state_dict()
    assert sorted(after) == sorted(before) and all(torch.equal(after[name], before[name]) for name in before)


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = torch.load(Path(make_shared.__file__).with_name("shared.pt"), weights_only=True)
    return found


def same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    found = {name: value for name, value in found.items() if not name.endswith(".fingerprint")}  # newer than the checkpoint
    """Compare two states: names and integers are equal; values agree up to the rounding of another machine."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
        else:
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("through", ["dense", "converted"])
def test_a_checkpoint_of_before_loads_and_trains_on(through: str) -> None:
    """Network, optimizer, callback and average continue as in the version that wrote them."""
    record = recorded()
    if through == "dense":
        net = load_state_dict(make_shared.dense(), record["net"])
    else:
        net = make_shared.begin()[0]
        assert [slots.count for slots in all_slots(net)] == [36, 18]
        net.load_state_dict(record["net"])
    assert [name for name in net.state_dict() if not name.endswith(".fingerprint")] == list(record["net"])
    same_state(net.state_dict(), record["net"])
    assert all(isinstance(slots, SharedSlots) for slots in all_slots(net))
    assert all_slots(net)[0].pool.budgets == [36, 18]  # type: ignore[attr-defined]
    torch.testing.assert_close(net(make_shared.batches()[0][0]), record["output"])
    if through == "dense":
        return

    net, optimizer, rewiring, average = make_shared.begin()
    for part, name in ((net, "net"), (optimizer, "optimizer"), (rewiring, "rewiring"), (average, "average")):
        part.load_state_dict(record[name])
    same_state(average.state_dict(), record["average"])
    make_shared.train(net, optimizer, average, make_shared.batches()[make_shared.STEPS :])
    places = "2.parametrizations.weight.0.places"
    assert not torch.equal(net.state_dict()[places], record["net"][places]), "nothing has moved: nothing was tested"
    same_state(net.state_dict(), record["later"]["net"])
    same_state(average.state_dict(), record["later"]["average"])
