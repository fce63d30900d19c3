"""``newborn="neutral"``: second moments of a reborn slot start at the mean of the living slots, under any optimizer."""

from __future__ import annotations

import copy
import statistics
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim

from lightning_deepr import SET, DeepR
from lightning_deepr.algorithm import newborns
from lightning_deepr.algorithm.newborns import State
from lightning_deepr.algorithm.optimizer_state import StartingState
from lightning_deepr.algorithm.second_moments import SecondMoments, second_moments
from lightning_deepr.recipes import running
from tests.algorithm.test_optimizers import CASES, EVERY_CASE, STEPS, Case
from tests.helpers import oracle_newborns
from tests.helpers.optional import needs
from tests.helpers.regression import SEED, Twin, batches, loss_of, mlp, train
from tests.helpers.state import all_slots, assert_equal_states, state_of, thetas

# the states of torch's optimizers, and of those in the table, of which newborns get the mean
AVERAGED = {
    "adam": {"exp_avg_sq"},
    "adam amsgrad": {"exp_avg_sq", "max_exp_avg_sq"},
    "adamw": {"exp_avg_sq"},
    "rmsprop": {"square_avg"},
    "adagrad": {"sum"},
    "nadam": {"exp_avg_sq"},
    "radam": {"exp_avg_sq"},
    "adamax": {"exp_inf"},
    "adadelta": {"square_avg", "acc_delta"},
    "adafactor": {"variance"},
    "custom": {"level"},
    "sgd": set[str](),
    "rprop": set[str](),  # its step size is no moment
    "asgd": set[str](),
}


def averaged(name: str) -> set[str]:
    """Return the averaged states of a case, by the longest name that begins its own."""
    if name == "adam fused amsgrad":
        return AVERAGED["adam amsgrad"]
    return AVERAGED[max((known for known in AVERAGED if name.startswith(known)), key=len)]


class Lion(optim.Optimizer):
    """Lion (Chen et al. 2023): the sign of a momentum."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state, (first, second) = self.state[p], group["betas"]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                p.sub_((state["exp_avg"] * first + p.grad * (1 - first)).sign(), alpha=group["lr"])
                state["exp_avg"].mul_(second).add_(p.grad, alpha=1 - second)


class Late(optim.Optimizer):
    """Like SOAP, the first step only sets up the state. Further states: a step size, a count, and integers."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["second"], state["first"] = torch.zeros_like(p), torch.zeros_like(p)
                    state["rate"], state["age"] = torch.full_like(p, group["lr"]), torch.zeros_like(p)
                    state["seen"] = torch.zeros(p.shape, dtype=torch.int64)
                    continue
                state["second"].mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
                state["first"].mul_(0.9).add_(p.grad, alpha=0.1)
                state["rate"].mul_(1.1)
                state["age"] += 1
                state["seen"] += 1
                p.sub_(state["rate"] * state["first"] / (state["second"].sqrt() + 1e-8))


class Stubborn(optim.Optimizer):
    """An optimizer of which no second one can take a step."""

    def __init__(self, params: Any, lr: float, *, name: str) -> None:
        super().__init__(params, {"lr": lr})
        self.first = self.param_groups[0]["params"][0]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.param_groups[0]["params"][0] is not self.first:
            raise RuntimeError("Not mine.")
        for p in self.param_groups[0]["params"]:
            level = self.state[p].setdefault("level", torch.zeros_like(p))
            level.addcmul_(p.grad, p.grad)
            p.addcdiv_(p.grad, level.sqrt().add_(1e-8), value=-self.param_groups[0]["lr"])


# -- which states are averaged ------------------------------------------------------------------------------------------------


def found(optimizer: optim.Optimizer, theta: nn.Parameter) -> dict[str, bool]:
    theta.grad = torch.ones_like(theta)
    optimizer.step()
    return {state.name: state.averaged for state in SecondMoments().mark(StartingState(), optimizer, 0, theta)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_second_moments_are_found(name: str, dtype: torch.dtype) -> None:
    theta = nn.Parameter(torch.ones(4, dtype=dtype))
    states = found(CASES[name].make([("theta", theta)]), theta)
    assert {one for one, is_averaged in states.items() if is_averaged} == averaged(name)


@pytest.mark.parametrize("lr", [0.0, 1e-6, 0.5])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}, {"maximize": True}], ids=str)
def test_the_options_of_the_group_do_not_matter(options: dict[str, Any], lr: float) -> None:
    for kind, names in ((optim.Adam, {"exp_avg_sq"}), (optim.RMSprop, {"square_avg"}), (optim.Adagrad, {"sum"})):
        theta = nn.Parameter(torch.ones(4))
        states = found(kind([theta], lr=lr, **options), theta)
        assert {one for one, is_averaged in states.items() if is_averaged} == names


def test_an_accumulator_that_starts_at_the_learning_rate_is_no_step_size() -> None:
    theta = nn.Parameter(torch.ones(4))
    assert found(optim.Adagrad([theta], lr=0.1, initial_accumulator_value=0.1), theta) == {"sum": True}


def test_other_states_are_told_apart() -> None:
    theta = nn.Parameter(torch.ones(4))
    optimizer = Late([theta], lr=0.1)
    assert found(optimizer, theta) == {"second": True, "first": False, "rate": False, "age": True, "seen": False}
    theta = nn.Parameter(torch.ones(4))
    assert found(Lion([theta], lr=0.1), theta) == {"exp_avg": False}


def test_the_probe_leaves_the_optimizer_alone() -> None:
    theta, fired = nn.Parameter(torch.ones(4)), []
    optimizer = optim.Adam([theta], lr=0.1, amsgrad=True)
    theta.grad = torch.ones(4)
    optimizer.step()
    hooks = [
        optimizer.register_step_pre_hook(lambda *args: fired.append(args)),
        optimizer.register_step_post_hook(lambda *args: fired.append(args)),
    ]
    before, weight = copy.deepcopy(optimizer.state_dict()), theta.detach().clone()
    names = second_moments(optimizer, optimizer.param_groups[0], theta, {"exp_avg": 0.0, "exp_avg_sq": 0.0})
    for hook in hooks:
        hook.remove()
    assert names == {"exp_avg_sq"} and not fired
    assert str(optimizer.state_dict()) == str(before) and torch.equal(theta, weight)


def test_a_probe_that_fails_says_so_once() -> None:
    """Newborns then start as under "start"; the next steps say nothing."""
    nets = [mlp(), mlp()]
    made = [Stubborn(net.parameters(), 0.1, name="mine") for net in nets]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for net, optimizer, word in zip(nets, made, ("neutral", "start"), strict=True):
            DeepR(l1=0.3, seed=SEED, newborn=word, check_invariants=True).attach(net, optimizer)
            train(net, optimizer, batches(5))
    messages = [str(one.message) for one in said if "newborn=" in str(one.message)]
    assert len(messages) == 1 and 'newborn="neutral"' in messages[0] and "Stubborn" in messages[0]
    assert_equal_states(state_of(nets[0], made[0]), state_of(nets[1], made[1]))
    assert any(int((slots.born >= 0).sum()) for slots in all_slots(nets[0]))


# -- the mean -----------------------------------------------------------------------------------------------------------------

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 63, 64, 65, 127, 128, 129, 1000])
def test_the_mean_is_the_trees(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    for dtype in (torch.float32, torch.float64):
        for share in (0.0, 0.3, 1.0):
            value = torch.rand(count, generator=generator, dtype=dtype) ** 8
            reborn = torch.rand(count, generator=generator) <= share
            slots = reborn.nonzero().view(-1)
            expected = value.numpy().copy()
            expected[slots.numpy()] = oracle_newborns.newborn_value(value.numpy(), slots.tolist(), 0.25)
            marked = value.clone()
            newborns.start_newborns([State("", value, 0.25, averaged=True)], slots)
            newborns.start_marked([State("", marked, 0.25, averaged=True)], reborn)
            np.testing.assert_array_equal(value.numpy(), expected)
            np.testing.assert_array_equal(marked.numpy(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_mean_is_rounded_to_the_dtype(dtype: torch.dtype) -> None:
    value = (torch.arange(50) / 7).to(dtype)
    exact = float(np.mean(value.double().numpy()[1:]))
    newborns.start_newborns([State("", value, 0.0, averaged=True)], torch.tensor([0]))
    assert value.dtype == dtype and abs(float(value[0]) / exact - 1) < torch.finfo(dtype).eps


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_mean_that_is_not_finite_spreads_nowhere(bad: float) -> None:
    for write in (
        lambda states: newborns.start_newborns(states, torch.tensor([1])),
        lambda states: newborns.start_marked(states, torch.tensor([False, True, False])),
    ):
        value = torch.tensor([1.0, 2.0, bad])
        write([State("", value, 0.5, averaged=True)])
        assert value[:2].tolist() == [1.0, 0.5]


# -- trainings ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_reborn_are_neutral_and_the_others_go_on(name: str) -> None:
    case, means = CASES[name], 0
    net = mlp()
    optimizer = case.make(net.named_parameters())
    DeepR(l1=case.alpha, seed=SEED, check_invariants=True, newborn="neutral").attach(net, optimizer)
    for step, batch in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        twin = Twin(net, optimizer, case.make)
        optimizer.step()
        for p, slots in zip(thetas(net), all_slots(net), strict=True):
            would_be = next(twin.params[n] for n, one in net.named_parameters() if one is p)
            reborn = (slots.born == step).nonzero().view(-1).tolist()
            for key, value in optimizer.state[p].items():
                if not isinstance(value, Tensor) or value.shape != p.shape:
                    continue
                wanted, start = twin.optimizer.state[would_be][key].numpy().copy(), case.starts.get(key, 0.0)
                newborn = oracle_newborns.newborn_value(wanted, reborn, start) if key in averaged(name) else start
                wanted[reborn] = newborn
                np.testing.assert_array_equal(value.numpy(), wanted, err_msg=key)
                means += bool(reborn) and newborn != start
    assert means > STEPS // 2 or not averaged(name)


@EVERY_CASE
def test_a_single_connection_has_no_one_to_take_the_mean_of(case: Case) -> None:
    nets = [mlp({"0": 2, "2.weight": 0.01}) for _ in range(2)]
    for net, word in zip(nets, ("neutral", "start"), strict=True):
        optimizer = case.make(net.named_parameters())
        DeepR(l1=1e4 * case.alpha, seed=SEED, check_invariants=True, newborn=word).attach(net, optimizer)
        train(net, optimizer, batches(6))  # all slots die in each step
    assert_equal_states(state_of(nets[0]), state_of(nets[1]))
    assert all(bool((slots.born == 5).all()) for slots in all_slots(nets[0]))


PLAIN = [name for name in CASES if not averaged(name) and not name.startswith("rprop")]  # (Rprop's steps die out)


def first_step(case: Case, word: str, steps: int = 150) -> float:
    """Return the median, over late steps, of a newborn's first step over the median of the other slots' steps.

    All gradients have the same distribution. Each step, a tenth of the slots dies, and no others do.
    """
    net = mlp(0.4)
    optimizer = case.make(net.named_parameters())
    DeepR(l1=0.0, seed=SEED, newborn=word).attach(net, optimizer)
    generator, ratios = torch.Generator().manual_seed(0), list[float]()
    for step in range(steps):
        young = [slots.born == step - 1 for slots in all_slots(net)]
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        for theta in thetas(net):
            theta.data.fill_(10.0)
            theta.data[torch.rand(theta.shape, generator=generator) < 0.1] = -10.0
        before = [theta.detach().clone() for theta in thetas(net)]
        optimizer.step()
        for theta, slots, old, born in zip(thetas(net), all_slots(net), before, young, strict=True):
            moved, lives = (theta.detach() - old).abs(), slots.born < step
            if step > steps // 2:
                ratios += (moved[born & lives] / moved[~born & lives].median()).tolist()
    assert len(ratios) > 100
    return statistics.median(ratios)


@pytest.mark.parametrize("name", [name for name in CASES if averaged(name)])
def test_the_first_step_of_a_newborn_is_no_longer_than_the_others(name: str) -> None:
    """Up to the spread of the medians: without momentum the steps are alike."""
    neutral, start = first_step(CASES[name], "neutral"), first_step(CASES[name], "start")
    assert 0.1 < neutral < 1.2
    # (the last two start with a large second moment, Adadelta with a small numerator)
    assert start > 1.9 * neutral or name in ("adadelta", "custom, odd constructor", "custom, hidden start")


@pytest.mark.parametrize("name", PLAIN)
def test_nothing_changes_without_a_second_moment(name: str) -> None:
    nets = [mlp(), mlp()]
    made = [CASES[name].make(net.named_parameters()) for net in nets]
    for net, optimizer, word in zip(nets, made, ("neutral", "start"), strict=True):
        DeepR(l1=CASES[name].alpha, seed=SEED, newborn=word).attach(net, optimizer)
        train(net, optimizer, batches(20))
    assert_equal_states(state_of(nets[0], made[0]), state_of(nets[1], made[1]))
    assert any(int(slots.born.max()) > 10 for slots in all_slots(nets[0]))


@EVERY_CASE
def test_a_resumed_run_equals_the_uninterrupted_one(case: Case) -> None:
    data = batches(30)

    def begin() -> tuple[Any, ...]:
        net = mlp()
        optimizer = case.make(net.named_parameters())
        callback = DeepR(l1=case.alpha, temperature=1e-6, seed=SEED, check_invariants=True, newborn="neutral")
        return net, optimizer, callback.attach(net, optimizer)

    net, optimizer, rewiring = begin()
    train(net, optimizer, data[:15])
    saved = copy.deepcopy([thing.state_dict() for thing in (net, optimizer, rewiring)])
    train(net, optimizer, data[15:])
    again = begin()
    for thing, state in zip(again, saved, strict=True):
        thing.load_state_dict(state)
    train(again[0], again[1], data[15:])
    assert_equal_states(state_of(net, optimizer), state_of(again[0], again[1]))
    assert any(int(slots.born.max()) >= 15 for slots in all_slots(net)), "nothing was reborn after the resume"


def test_groups_with_options_of_their_own_and_several_optimizers() -> None:
    """Each tensor has its own mean, whichever optimizer and group it is in."""
    net = mlp()
    first, second = thetas(net)
    rest = [p for p in net.parameters() if p is not first and p is not second]
    adam = optim.Adam([{"params": [first], "amsgrad": True}, {"params": rest}], lr=0.02)
    adagrad = optim.Adagrad([second], lr=0.1, initial_accumulator_value=0.1)
    callback = DeepR(l1=0.3, seed=SEED, check_invariants=True, newborn="neutral")
    for optimizer in (adam, adagrad):
        callback.attach(net, optimizer)
    for step, batch in enumerate(batches(20)):
        for optimizer in (adam, adagrad):
            optimizer.zero_grad()
        loss_of(net, batch).backward()
        for optimizer in (adam, adagrad):
            optimizer.step()
        moments = [adam.state[first]["max_exp_avg_sq"], adam.state[first]["exp_avg_sq"], adagrad.state[second]["sum"]]
        for value, slots in zip(moments, [*all_slots(net)[:1] * 2, all_slots(net)[1]], strict=True):
            reborn = (slots.born == step).nonzero().view(-1).tolist()
            if 0 < len(reborn) < slots.count:
                expected = oracle_newborns.newborn_value(value.numpy(), reborn, 0.0)
                assert {float(value[slot]) for slot in reborn} == {float(expected)}
    assert all(int(slots.born.max()) > 10 for slots in all_slots(net))


def test_set_starts_what_it_grows_neutrally() -> None:
    net = mlp()
    optimizer = optim.Adam(net.parameters(), lr=0.02)
    SET(rewire_every_n_steps=5, rewire_until=1000, seed=SEED, check_invariants=True, newborn="neutral").attach(net, optimizer)
    train(net, optimizer, batches(10))
    for theta, slots in zip(thetas(net), all_slots(net), strict=True):
        born = slots.born == 9
        state = optimizer.state[theta]
        assert bool(born.any()) and bool((state["exp_avg"][born] == 0).all())
        torch.testing.assert_close(state["exp_avg_sq"][born], state["exp_avg_sq"][~born].mean().expand(int(born.sum())))


def test_gradient_accumulation_averages_once_per_step() -> None:
    nets = [mlp(), mlp()]
    made = [optim.Adam(net.parameters(), lr=0.02) for net in nets]
    for net, optimizer in zip(nets, made, strict=True):
        DeepR(l1=0.3, seed=SEED, newborn="neutral", check_invariants=True).attach(net, optimizer)
    data = batches(20)
    for a, b in zip(data[::2], data[1::2], strict=True):
        for net, optimizer, in_parts in zip(nets, made, (True, False), strict=True):
            optimizer.zero_grad()
            losses = [loss_of(net, a), loss_of(net, b)]
            if in_parts:
                for loss in losses:
                    loss.backward()
            else:
                sum(losses).backward()  # type: ignore[union-attr]
            optimizer.step()
    for one, other in zip(state_of(nets[0], made[0]), state_of(nets[1], made[1]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("spoil", ["exp_avg", "exp_avg_sq"])
def test_the_invariants_know_what_a_newborn_has(spoil: str) -> None:
    net = mlp()
    optimizer = optim.Adam(net.parameters(), lr=0.02)

    class Spoiled(DeepR):
        def after_step(self, stepped: Any, optimizer: Any) -> None:
            super().after_step(stepped, optimizer)
            for item in stepped:
                if item.reborn.births:
                    optimizer.state[item.tensor.theta][spoil][item.reborn.slots] *= 1.5
                    optimizer.state[item.tensor.theta][spoil][item.reborn.slots] += 0.001

    Spoiled(l1=0.3, seed=SEED, check_invariants=True, newborn="neutral").attach(net, optimizer)
    with pytest.raises(RuntimeError, match=rf"check_invariants: .*the optimizer's {spoil} of a reborn slot"):
        train(net, optimizer, batches(10))


@pytest.mark.parametrize("value", ["", "mean", None, 1])
def test_other_words_are_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="newborn: expected one of neutral, start"):
        DeepR(0.1, newborn=value)


@needs("jsonargparse")
@pytest.mark.parametrize("method", ["DeepR", "SET", "RigL", "FixedRandom"])
def test_it_is_an_argument_of_every_method_on_k_slots_in_yaml_too(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-deepr"])
    lines = f"sparsity:\n  class_path: lightning_deepr.{method}\n  init_args: {{connectivity: 0.02, newborn: neutral}}\n"
    Path("method.yaml").write_text(lines)
    made = running.train(["--config", "mnist_quickstart", "--config", "method.yaml"], run=False).trainer.callbacks[0]
    assert type(made).__name__ == method and made.newborn == "neutral"
    assert "newborn: a reborn slot's state" in (type(made).__doc__ or "")
