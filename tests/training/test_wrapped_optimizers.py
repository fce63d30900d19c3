"""Optimizers that hold another one, and nested state: one rewiring per step, where it ends, and nothing of the dead is left."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from lightning_deepr import DeepR, SoftDeepR
from lightning_deepr.algorithm.inner_optimizers import chain_of
from tests.helpers.regression import SEED, batches, loss_of, mlp, train
from tests.helpers.state import all_slots, assert_equal_states, state_of, thetas
from tests.helpers.wrapping_optimizers import SAM, Forwarding, HookedLookahead, LateLookahead, Lookahead, Nested, Twice

ALPHA = 0.3


def adam(params: Any) -> optim.Optimizer:
    return optim.Adam(params, lr=0.02)


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "forwarding": lambda p: Forwarding(adam(p)),
    "forwarding twice": lambda p: Forwarding(Forwarding(adam(p))),
    **{
        f"lookahead, {kind}{', hooks' if hooks else ''}": lambda p, k=kind, h=hooks: (HookedLookahead if h else Lookahead)(
            adam(p), k
        )  # type: ignore[misc]
        for kind in ("dict", "id", "flat", "groups")
        for hooks in (False, True)
    },
    "late lookahead": lambda p: LateLookahead(adam(p), "dict"),
    "forwarding lookahead": lambda p: Forwarding(Lookahead(adam(p), "dict")),
    "a step that calls super's": lambda p: Twice(p, lr=0.02),
    "nested": lambda p: Nested(p, lr=0.02),
    "forwarding nested": lambda p: Forwarding(Nested(p, lr=0.02)),
}
EVERY = pytest.mark.parametrize("make", WRAPPERS.values(), ids=WRAPPERS)


def tensors_in(value: Any, theta: nn.Parameter) -> Iterator[torch.Tensor]:
    """Yield all tensors of theta's shape that an object holds at any depth, except theta and its gradient."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        one = stack.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            if one.shape == theta.shape and one is not theta:
                yield one
        elif isinstance(one, dict):
            mine = [v for k, v in one.items() if not isinstance(k, torch.Tensor) or k is theta]
            stack += mine
        elif isinstance(one, (list, tuple)):
            stack += one
        elif isinstance(one, optim.Optimizer):
            stack += [vars(one), one.state.get(theta, {})]


@EVERY
@pytest.mark.parametrize("newborn", ["start", "neutral"])
def test_nothing_of_the_dead_is_left(make: Callable[[Any], Any], newborn: str) -> None:
    """Tensors of the two layers have different sizes: a tensor of theta's size belongs to theta."""
    net = mlp()
    optimizer = make(net.parameters())
    callback = DeepR(l1=ALPHA, seed=SEED, check_invariants=True, newborn=newborn)
    callback.attach(net, optimizer)
    reborn = 0
    for step, batch in enumerate(batches(25)):
        train(net, optimizer, [batch])
        assert [tensor.step for tensor in callback.tracked] == [step + 1, step + 1], "not once per step"
        for theta, slots in zip(thetas(net), all_slots(net), strict=True):
            born = slots.born == step
            assert bool((theta >= 0).all()) and bool((theta[born] == 0).all())
            kept = list(tensors_in(optimizer, theta))
            assert kept
            for value in kept:
                assert value[born].unique().numel() <= 1
                if newborn == "start":
                    assert bool((value[born] == 0).all()) or bool((value[born] == 2).all())
                assert value[~born].unique().numel() > 1
            reborn += int(born.sum())
    assert reborn > 25


def test_nested_states_start_at_their_own_start_and_the_generators_are_left_alone() -> None:
    net = mlp()
    optimizer = Nested(net.parameters(), lr=0.02)
    DeepR(l1=ALPHA, seed=SEED, check_invariants=True, newborn="start", lr_scale="auto").attach(net, optimizer)
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    train(net, optimizer, batches(10))
    drawn = torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
    for theta, slots in zip(thetas(net), all_slots(net), strict=True):
        born = slots.born == 9
        assert bool(born.any()) and bool((optimizer.state[theta]["Q"][0][born] == 2.0).all())
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    for _ in range(10 * len(list(net.parameters()))):
        torch.rand(1)
    assert drawn == (torch.rand(1), random.random(), np.random.rand())  # noqa: NPY002


@pytest.mark.parametrize("name", ["forwarding", "forwarding twice", "a step that calls super's"])
@pytest.mark.parametrize("options", [{}, {"lr_scale": "auto"}, {"l1": "auto"}, {"l1": None}, {"newborn": "neutral"}], ids=str)
def test_a_wrapper_that_only_forwards_changes_nothing(name: str, options: dict[str, Any]) -> None:
    nets = [mlp(), mlp()]
    made = [WRAPPERS[name](nets[0].parameters()), adam(nets[1].parameters())]
    for net, optimizer in zip(nets, made, strict=True):
        DeepR(**{"l1": ALPHA, "seed": SEED, **options}).attach(net, optimizer, total_steps=25)
        train(net, optimizer, batches(25))
    inner = chain_of(made[0])[-1]
    assert_equal_states(state_of(nets[0], inner), state_of(nets[1], made[1]))


@pytest.mark.parametrize("calls", ["closure", "two"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.feature("Optimizers: SAM")
def test_sam(calls: str, scale: float) -> None:
    net = mlp()
    optimizer = SAM(net.parameters(), lr=0.02)
    callback = DeepR(l1=ALPHA, seed=SEED, check_invariants=True, lr_scale=scale, newborn="start")
    callback.attach(net, optimizer)
    for step, batch in enumerate(batches(15)):

        def closure(batch: Any = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(net, batch)
            loss.backward()
            return loss

        if calls == "closure":
            optimizer.step(closure)
        else:
            closure()
            optimizer.first_step()
            closure()
            optimizer.second_step()
        assert [tensor.step for tensor in callback.tracked] == [step + 1, step + 1]
        for theta, slots in zip(thetas(net), all_slots(net), strict=True):
            born = slots.born == step
            for value in (*optimizer.base_optimizer.state[theta].values(), optimizer.state[theta]["old_p"]):
                assert value.dim() == 0 or bool((value[born] == 0).all())
    assert any(int(slots.born.max()) > 10 for slots in all_slots(net))


def test_a_step_that_the_wrapper_leaves_out_is_no_step() -> None:
    """As accelerate does between the micro-batches of an accumulated gradient."""
    net = mlp()
    optimizer = Forwarding(adam(net.parameters()))
    callback = DeepR(l1=ALPHA, seed=SEED)
    callback.attach(net, optimizer)
    for i, batch in enumerate(batches(12)):
        optimizer.accumulates = i % 3 != 2
        before = [theta.detach().clone() for theta in thetas(net)]
        loss_of(net, batch).backward()
        optimizer.step()
        if optimizer.accumulates:
            assert all(torch.equal(theta, old) for theta, old in zip(thetas(net), before, strict=True))
        else:
            optimizer.zero_grad()
        assert callback.tracked[0].step == (i + 1) // 3


@pytest.mark.parametrize("name", ["forwarding", "lookahead, dict, hooks", "a step that calls super's"])
def test_after_an_exception_within_a_step_the_next_one_is_seen(name: str) -> None:
    net = mlp()
    optimizer = WRAPPERS[name](net.parameters())
    callback = DeepR(l1=ALPHA, seed=SEED)
    callback.attach(net, optimizer)

    def failing() -> Any:
        raise KeyError("on purpose")

    train(net, optimizer, batches(2))
    with pytest.raises(KeyError):
        optimizer.step(failing)
    train(net, optimizer, batches(3))
    assert [tensor.step for tensor in callback.tracked] == [5, 5]


@EVERY
def test_a_step_of_the_inner_optimizer_alone_is_seen(make: Callable[[Any], Any]) -> None:
    net = mlp()
    optimizer = make(net.parameters())
    callback = DeepR(l1=ALPHA, seed=SEED, check_invariants=True)
    callback.attach(net, optimizer)
    train(net, chain_of(optimizer)[-1], batches(3))
    train(net, optimizer, batches(3))
    assert [tensor.step for tensor in callback.tracked] == [6, 6]


@EVERY
def test_nothing_is_left_on_the_optimizers_after_remove(make: Callable[[Any], Any]) -> None:
    net = mlp()
    optimizer = make(net.parameters())
    before = [set(vars(one)) for one in chain_of(optimizer)]
    callback = DeepR(l1=ALPHA, seed=SEED)
    rewiring = callback.attach(net, optimizer)
    train(net, optimizer, batches(2))
    rewiring.remove()
    for one, names in zip(chain_of(optimizer), before, strict=True):
        assert set(vars(one)) - {"_zero_grad_profile_name"} == names - {"_zero_grad_profile_name"}
        assert not vars(one).get("_optimizer_step_post_hooks") and not vars(one).get("_optimizer_step_pre_hooks")
    train(net, optimizer, batches(2))
    assert callback.tracked[0].step == 2


def test_a_scheduler_around_a_wrapped_step() -> None:
    """A scheduler that is made later puts its own function around the step: after `remove` ours does nothing."""
    net = mlp()
    optimizer = Forwarding(adam(net.parameters()))
    callback = DeepR(l1=ALPHA, seed=SEED)
    rewiring = callback.attach(net, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="A backward pass reached")
        scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        train(net, optimizer, batches(3), scheduler)
        assert callback.tracked[0].step == 3
        rewiring.remove()
        train(net, optimizer, batches(3), scheduler)
    assert callback.tracked[0].step == 3


def test_two_optimizers_in_one_that_is_resumed() -> None:
    """An optimizer of several, each with some of the thetas; and an exact resume through it."""

    class Both(optim.Optimizer):
        def __init__(self, net: nn.Module) -> None:
            first = thetas(net)[0]
            rest = [p for p in net.parameters() if p is not first]
            self.parts = [adam([first]), optim.Adagrad(rest, lr=0.1, initial_accumulator_value=0.5)]
            self.param_groups = [group for part in self.parts for group in part.param_groups]
            self.state, self.defaults = {}, {}  # type: ignore[assignment]

        def zero_grad(self, set_to_none: bool = True) -> None:
            for part in self.parts:
                part.zero_grad(set_to_none)

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for part in self.parts:
                part.step()

    def begin() -> tuple[nn.Module, Any, Any, Any]:
        net = mlp()
        optimizer = Both(net)
        callback = DeepR(l1=ALPHA, seed=SEED, check_invariants=True, newborn="start")
        return net, optimizer, callback.attach(net, optimizer), callback

    net, optimizer, rewiring, callback = begin()
    data = batches(20)
    train(net, optimizer, data[:10])
    assert [tensor.step for tensor in callback.tracked] == [10, 10]
    for part, name, start in zip(optimizer.parts, ("exp_avg_sq", "sum"), (0.0, 0.5), strict=True):
        (theta,) = (theta for theta in thetas(net) if theta in part.state)
        slots = next(s for s, t in zip(all_slots(net), thetas(net), strict=True) if t is theta)
        born = slots.born == 9
        assert bool((part.state[theta][name][born] == start).all())
    parts = optimizer.parts
    saved = copy.deepcopy([net.state_dict(), *[part.state_dict() for part in parts], rewiring.state_dict()])
    train(net, optimizer, data[10:])
    again = begin()
    for thing, state in zip([again[0], *again[1].parts, again[2]], saved, strict=True):
        thing.load_state_dict(state)
    train(again[0], again[1], data[10:])
    assert_equal_states(state_of(net), state_of(again[0]))


# -- what is refused, and what is told ----------------------------------------------------------------------------------------


def test_an_optimizer_that_is_never_seen_is_told_once() -> None:
    net = mlp()
    attached = optim.SGD(net.parameters(), lr=0.1)
    DeepR(l1=ALPHA, seed=SEED).attach(net, attached)
    other = optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="DeepR has seen no step of an optimizer") as told:
        train(net, other, batches(20))
    assert (len(told) == 1 and "`0.weight`" in str(told[0].message)) or "`2.weight`" in str(told[0].message)


@pytest.mark.parametrize("what", ["steps", "accumulation", "loads", "soft"])
def test_other_trainings_are_told_nothing(what: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if what == "soft":
            callback: Any = SoftDeepR(0.3, temperature=1e-4, l1=1e-3, distribution="uniform")
            net = callback.prepare(nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6)))
        else:
            callback, net = DeepR(l1=ALPHA, seed=SEED), mlp()
        optimizer = optim.SGD(net.parameters(), lr=0.05)
        callback.attach(net, optimizer)
        for i, batch in enumerate(batches(20)):
            loss_of(net, batch).backward()
            if what == "loads" and i < 4:
                net.load_state_dict(copy.deepcopy(net.state_dict()))
            elif what != "accumulation" or i % 10 == 9:
                optimizer.step()
                optimizer.zero_grad()


class ScheduleFree(optim.SGD):
    """Parameters hold an average in evaluation."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        self.train_mode = True

    def train(self) -> None:
        self.train_mode = True

    def eval(self) -> None:
        self.train_mode = False


@pytest.mark.parametrize("wrap", [lambda o: o, Forwarding], ids=["itself", "wrapped"])
def test_averages_in_thetas_place_are_refused(wrap: Any) -> None:
    net = mlp()
    with pytest.raises(ValueError, match=r"ScheduleFree puts an average of theta .* DeepR expects"):
        DeepR().attach(net, wrap(ScheduleFree(net.parameters(), 0.1)))
    assert all(slots.owner() is None for slots in all_slots(net))


def test_lbfgs_is_refused_in_a_wrapper_too() -> None:
    net = mlp()
    with pytest.raises(ValueError, match=r"LBFGS.*another optimizer"):
        DeepR().attach(net, Forwarding(optim.LBFGS(net.parameters())))


# -- packages of others -------------------------------------------------------------------------------------------------------


@pytest.mark.feature("Optimizers: timm's Lookahead and Kron")
def test_timms_lookahead_and_kron() -> None:
    timm = pytest.importorskip("timm.optim")
    for make in (lambda p: timm.Lookahead(adam(p), k=3), lambda p: timm.kron.Kron(p, lr=0.01)):
        net = mlp()
        optimizer = make(net.parameters())
        callback = DeepR(l1=ALPHA, seed=SEED, check_invariants=True)
        callback.attach(net, optimizer)
        for step, batch in enumerate(batches(20)):
            train(net, optimizer, [batch])
            assert [tensor.step for tensor in callback.tracked] == [step + 1, step + 1]
            for theta, slots in zip(thetas(net), all_slots(net), strict=True):
                born = slots.born == step
                for value in tensors_in(chain_of(optimizer)[-1].state[theta], theta):
                    assert value[born].unique().numel() <= 1
        assert any(int(slots.born.max()) > 10 for slots in all_slots(net))


@pytest.mark.feature("Optimizers: schedulefree", refused=True)
def test_schedulefree_is_refused() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    for make in (
        lambda p: schedulefree.ScheduleFreeWrapper(optim.SGD(p, lr=0.1)),
        lambda p: schedulefree.AdamWScheduleFree(p, lr=0.1),
    ):
        net = mlp()
        with pytest.raises(ValueError, match=r"ScheduleFree.* puts an average of theta"):
            DeepR().attach(net, make(net.parameters()))


@pytest.mark.feature("Others: accelerate's prepared optimizer")
def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    net = mlp()
    net, optimizer = accelerator.prepare(net, adam(net.parameters()))
    callback = DeepR(l1=ALPHA, seed=SEED, check_invariants=True)
    callback.attach(net, optimizer)
    for batch in batches(10):
        with accelerator.accumulate(net):
            accelerator.backward(loss_of(net, batch))
            optimizer.step()
            optimizer.zero_grad()
    assert [tensor.step for tensor in callback.tracked] == [5, 5]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
def test_distributed_wrappers() -> None:
    import torch.distributed as dist
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = mlp()
        optimizer = ZeroRedundancyOptimizer(net.parameters(), optimizer_class=optim.Adam, lr=0.02)
        callback = DeepR(l1=ALPHA, seed=SEED, check_invariants=True)
        callback.attach(net, optimizer)
        plain = mlp()
        reference = adam(plain.parameters())
        DeepR(l1=ALPHA, seed=SEED).attach(plain, reference)
        for one, other in ((net, optimizer), (plain, reference)):
            train(one, other, batches(20))
        assert [tensor.step for tensor in callback.tracked] == [20, 20]
        assert_equal_states(state_of(net, optimizer.optim), state_of(plain, reference))
        averager = PeriodicModelAverager(period=2)
        third = mlp()
        local = PostLocalSGDOptimizer(adam(third.parameters()), averager)
        with pytest.raises(ValueError, match="PostLocalSGDOptimizer averages the weights of ranks"):
            DeepR().attach(third, local)
    finally:
        dist.destroy_process_group()
