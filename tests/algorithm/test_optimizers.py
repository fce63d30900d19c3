"""Any optimizer works: a reborn slot gets the optimizer's starting state, and the other slots keep theirs.

L1 and noise use the plain learning rate of theta's parameter group.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_deepr.algorithm.optimizer_state import StartingState
from tests.helpers import oracle
from tests.helpers.plain import PlainDeepR as DeepR
from tests.helpers.regression import SEED, Named, Regression, Twin, batches, loss_of, mlp, train
from tests.helpers.state import all_slots, assert_equal_states, state_of, thetas
from tests.helpers.trainer import trainer


class Odd(optim.Optimizer):
    """An optimizer with a dict and a required keyword. ``step`` starts its K-shaped ``level`` at ``start`` and decays it."""

    def __init__(self, named: dict[str, nn.Parameter], *, rate: float, start: float = 1.0) -> None:
        self.start = start
        super().__init__(list(named.values()), {"lr": rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["level"], state["count"] = torch.full_like(p, self.start), torch.zeros(())
                state["count"] += 1
                state["level"].mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
                p.addcdiv_(p.grad, state["level"].sqrt(), value=-group["lr"])


class Hidden(Odd):
    """An optimizer with an ordinary constructor whose starting value is in no parameter group."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.1, start: float = 1.0) -> None:
        super().__init__(dict(enumerate(params)), rate=lr, start=start)  # type: ignore[arg-type]


@dataclass
class Case:
    make: Callable[[Named], optim.Optimizer]
    starts: dict[str, float] = field(default_factory=dict)  # the starting value of each state tensor, by name; the default is 0
    alpha: float = 0.05


def case(kind: Any, lr: float, starts: dict[str, float] | None = None, **options: Any) -> Case:
    return Case(lambda named: kind([p for _, p in named], lr=lr, **options), starts or {}, alpha=0.004 / lr)


CASES = {
    "sgd": case(optim.SGD, 0.1),
    "sgd weight decay": case(optim.SGD, 0.1, weight_decay=0.1),
    "sgd momentum": case(optim.SGD, 0.05, momentum=0.9),
    "sgd dampening": case(optim.SGD, 0.05, momentum=0.9, dampening=0.3),
    "sgd nesterov": case(optim.SGD, 0.05, momentum=0.9, nesterov=True),
    "sgd foreach": case(optim.SGD, 0.05, momentum=0.9, foreach=True),
    "sgd fused": case(optim.SGD, 0.05, momentum=0.9, fused=True),
    "adam": case(optim.Adam, 0.02),
    "adam amsgrad": case(optim.Adam, 0.02, amsgrad=True),
    "adam foreach": case(optim.Adam, 0.02, foreach=True),
    "adam fused": case(optim.Adam, 0.02, fused=True),
    "adam fused amsgrad": case(optim.Adam, 0.02, fused=True, amsgrad=True),
    "adam tensor lr": case(optim.Adam, 0.02),
    "adamw": case(optim.AdamW, 0.02),
    "adamw fused": case(optim.AdamW, 0.02, fused=True),
    "rmsprop": case(optim.RMSprop, 0.01),
    "rmsprop momentum centered": case(optim.RMSprop, 0.005, momentum=0.5, centered=True),
    "adagrad": case(optim.Adagrad, 0.1),
    "adagrad initial": case(optim.Adagrad, 0.1, {"sum": 0.5}, initial_accumulator_value=0.5),
    "adagrad fused": case(optim.Adagrad, 0.1, {"sum": 0.25}, initial_accumulator_value=0.25, fused=True),
    "rprop": case(optim.Rprop, 0.02, {"step_size": 0.02}),
    "nadam": case(optim.NAdam, 0.02),
    "radam": case(optim.RAdam, 0.02),
    "adamax": case(optim.Adamax, 0.02),
    "adadelta": case(optim.Adadelta, 1.0),
    "asgd": case(optim.ASGD, 0.1),
    "adafactor": case(optim.Adafactor, 0.02),
    "custom, odd constructor": Case(lambda named: Odd(dict(named), rate=0.05, start=3.0), {"level": 3.0}),
    "custom, hidden start": Case(lambda named: Hidden([p for _, p in named], 0.05, start=3.0), {"level": 3.0}),
}
CASES["adam tensor lr"].make = lambda named: optim.Adam([p for _, p in named], lr=torch.tensor(0.02), foreach=False)
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
STEPS = 50


# -- the state of reborn slots -- ---------------------------------------------------------------------------------------------


@EVERY_CASE
def test_the_reborn_start_anew_and_the_others_go_on(case: Case) -> None:
    net = mlp()
    optimizer = case.make(net.named_parameters())
    DeepR(l1=case.alpha, seed=SEED, check_invariants=True).attach(net, optimizer)
    reborn_total = survived_total = 0
    for step, batch in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        twin = Twin(net, optimizer, case.make)
        optimizer.step()
        reborn_of = {theta: slots.born == step for theta, slots in zip(thetas(net), all_slots(net), strict=True)}
        for p, expected in zip(net.parameters(), twin.params.values(), strict=True):
            theta = expected.detach().clone()
            reborn = reborn_of.get(p)
            if reborn is not None:
                theta -= optimizer.param_groups[0]["lr"] * case.alpha
                assert torch.equal(reborn, theta < 0)
                theta[reborn] = 0.0
                reborn_total += int(reborn.sum())
                survived_total += int((~reborn).sum())
            assert torch.equal(p, theta)
            state, would_be = optimizer.state[p], twin.optimizer.state[expected]
            assert state.keys() == would_be.keys()
            for name, value in state.items():
                if not isinstance(value, Tensor):
                    assert value == would_be[name]
                    continue
                wanted = would_be[name].clone()
                if reborn is not None and value.shape == p.shape:
                    wanted[reborn] = case.starts.get(name, 0.0)
                assert torch.equal(value, wanted), name
    assert reborn_total > STEPS and survived_total > STEPS, "too few rebirths or survivors: nothing was tested"


@pytest.mark.filterwarnings("ignore:A backward pass reached")
def test_every_name_in_the_table_exists() -> None:
    """Every expected state exists in the optimizer; an unknown name would test nothing."""
    for case_ in CASES.values():
        net = mlp()
        optimizer = case_.make(net.named_parameters())
        loss_of(net, batches(1)[0]).backward()
        optimizer.step()
        assert set(case_.starts) <= set(optimizer.state[thetas(net)[0]])


@EVERY_CASE
def test_a_single_connection(case: Case) -> None:
    """K = 1: theta has one element, and so do some state tensors that do not belong to a slot."""
    net = mlp({"0": 2, "2.weight": 0.01})
    assert thetas(net)[1].shape == (1,)
    optimizer = case.make(net.named_parameters())
    DeepR(l1=10 * case.alpha, seed=SEED, check_invariants=True).attach(net, optimizer)
    for step, batch in enumerate(batches(10)):
        train(net, optimizer, [batch])
        for theta in thetas(net):
            count = optimizer.state[theta].get("step")
            assert count is None or float(count) == step + 1, "the step count was reset with a slot"


def test_the_state_of_an_optimizer_that_is_gone_is_not_taken_for_another() -> None:
    """A new optimizer often has the id of a deleted one."""
    starting, theta, seen = StartingState(), nn.Parameter(torch.ones(4)), set()
    for i in range(20):
        initial = 0.5 + i
        optimizer = optim.Adagrad([theta], initial_accumulator_value=initial)
        theta.grad = torch.ones(4)
        optimizer.step()
        starting.reset(optimizer, 0, theta, torch.tensor([1, 3]))
        assert optimizer.state[theta]["sum"].tolist() == [initial + 1, initial, initial + 1, initial]
        seen.add(id(optimizer))
        del optimizer
    assert len(seen) < 20, "no id was reused: nothing was tested"


def test_finding_the_start_leaves_the_optimizer_alone() -> None:
    """A second optimizer takes a step to show its start: no hook fires, and the first one's state and groups do not change."""
    theta, fired = nn.Parameter(torch.ones(4)), []
    for optimizer in (
        Odd({"theta": theta}, rate=0.1, start=3.0),
        optim.Adam([theta]),
        optim.SGD([theta], lr=0.1, momentum=0.9),
    ):
        scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        theta.grad = torch.ones(4)
        optimizer.step()
        scheduler.step()
        hooks = [
            optimizer.register_step_pre_hook(lambda *args: fired.append(args)),
            optimizer.register_step_post_hook(lambda *args: fired.append(args)),
            register_optimizer_step_post_hook(lambda *args: fired.append(args)),
        ]
        before, weight = copy.deepcopy(optimizer.state_dict()), theta.detach().clone()
        scheduled = scheduler.state_dict() | {"lr_lambdas": None}
        StartingState().of(optimizer, 0, theta)
        for hook in hooks:
            hook.remove()
        assert not fired
        assert str(optimizer.state_dict()) == str(before) and torch.equal(theta, weight)
        assert scheduler.state_dict() | {"lr_lambdas": None} == scheduled


def test_a_step_size_starts_at_the_initial_learning_rate() -> None:
    """Rprop's step size starts at the initial learning rate at any rebirth, under any scheduler."""
    net = mlp()
    optimizer = optim.Rprop(net.parameters(), lr=0.02)
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    DeepR(l1=0.5, seed=SEED).attach(net, optimizer)
    for step, batch in enumerate(batches(20)):
        train(net, optimizer, [batch], scheduler)
        for theta, slots in zip(thetas(net), all_slots(net), strict=True):
            sizes = optimizer.state[theta]["step_size"][slots.born == step]
            assert torch.equal(sizes, torch.full_like(sizes, 0.02))
    assert any(int(slots.born.max()) > 10 for slots in all_slots(net))


# -- the plain learning rate --------------------------------------------------------------------------------------------------


def lambda_lr(optimizer: optim.Optimizer) -> Any:
    return optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step * (0.2 + step % 3))


def one_cycle(optimizer: optim.Optimizer) -> Any:
    peaks = [2 * float(group["lr"]) for group in optimizer.param_groups]
    return optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=STEPS + 1)


@pytest.mark.parametrize("schedule", [lambda_lr, one_cycle])
@pytest.mark.parametrize("name", ["sgd nesterov", "adam", "adamw fused", "rmsprop momentum centered"])
def test_l1_and_noise_take_the_groups_learning_rate(name: str, schedule: Callable[[optim.Optimizer], Any]) -> None:
    """Each layer has a group with its own learning rate, and one scheduler changes both."""
    table, temperature = CASES[name], 1e-4

    def make(named: Named) -> optim.Optimizer:
        listed = list(named)
        optimizer = table.make(listed)
        options = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        groups = [[p for n, p in listed if n.startswith(layer)] for layer in ("0.", "2.")]
        optimizer.param_groups.clear()
        for factor, group in zip((1.0, 0.25), groups, strict=True):
            optimizer.add_param_group({**options, "params": group, "lr": options["lr"] * factor})
        return optimizer

    net = mlp()
    optimizer = make(net.named_parameters())
    scheduler = schedule(optimizer)
    DeepR(l1=table.alpha, temperature=temperature, seed=SEED, check_invariants=True).attach(net, optimizer)
    rates = set()
    for step, batch in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        twin = Twin(net, optimizer, make)
        optimizer.step()
        by_name = dict(net.named_parameters())
        for index, (theta, slots) in enumerate(zip(thetas(net), all_slots(net), strict=True)):
            (would_be,) = (twin.params[n] for n, p in by_name.items() if p is theta)
            lr = optimizer.param_groups[index]["lr"]
            rates.add(lr)
            nu = oracle.normal(oracle.key(SEED, oracle.NOISE, step), [index * 2**40 + slot for slot in range(theta.numel())])
            expected = would_be.detach().numpy() - lr * table.alpha + math.sqrt(2 * lr * temperature) * nu
            expected[(slots.born == step).numpy()] = 0.0
            np.testing.assert_allclose(theta.detach().numpy(), expected, rtol=1e-5, atol=2e-7)
            assert (expected >= -1e-7).all()
        scheduler.step()
    assert len(rates) > STEPS


# -- invariants, resume, refusal ----------------------------------------------------------------------------------------------


@EVERY_CASE
def test_a_run_that_is_saved_and_resumed_equals_one_that_is_not(case: Case) -> None:
    """With a scheduler: Rprop's step size starts at the learning rate, and at the same one after a resume."""
    data = batches(30)

    def begin() -> tuple[nn.Module, optim.Optimizer, Any, Any]:
        net = mlp()
        optimizer = case.make(net.named_parameters())
        scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        callback = DeepR(l1=case.alpha, temperature=1e-6, seed=SEED, check_invariants=True)
        return net, optimizer, scheduler, callback.attach(net, optimizer)

    net, optimizer, scheduler, rewiring = begin()
    train(net, optimizer, data[:15], scheduler)
    saved = copy.deepcopy([thing.state_dict() for thing in (net, optimizer, scheduler, rewiring)])
    train(net, optimizer, data[15:], scheduler)

    again = begin()
    for thing, state in zip(again, saved, strict=True):
        thing.load_state_dict(state)
    train(again[0], again[1], data[15:], again[2])
    assert_equal_states(state_of(net, optimizer), state_of(again[0], again[1]))
    assert rewiring.state_dict() == again[3].state_dict()
    assert any(int(slots.born.max()) >= 15 for slots in all_slots(net)), "nothing was reborn after the resume"


def test_lbfgs_is_refused() -> None:
    net = mlp()
    with pytest.raises(ValueError, match=r"LBFGS.*another optimizer"):
        DeepR().attach(net, optim.LBFGS(net.parameters()))
    with pytest.raises(ValueError, match=r"LBFGS.*another optimizer"):
        trainer(DeepR(0.3)).fit(Regression(optim.LBFGS))
