"""``lr_scale`` multiplies every step of theta by a number, with any optimizer, and "auto" finds the number."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_deepr import SET, DeepR, FixedRandom, RigL, SoftDeepR, TurnoverTarget, connectivity_report, kernels, sparsify
from lightning_deepr.algorithm import lr_scale
from lightning_deepr.weights.find import converted_tensors
from tests.algorithm.test_optimizers import CASES, EVERY_CASE, Case
from tests.helpers import global_scope, oracle_soft
from tests.helpers.optimizers import adam, sgd
from tests.helpers.regression import SEED, Named, Regression, Twin, batches, loss_of, mlp, plain_mlp, train
from tests.helpers.soft import ALPHA, TEMPERATURE
from tests.helpers.soft import soft as soft_callback
from tests.helpers.state import all_slots, assert_equal_states, state_of, thetas
from tests.helpers.trainer import trainer

SCALE = 2.5


def longer(before: np.ndarray, after: np.ndarray, scale: float = SCALE) -> np.ndarray:
    """Return before + scale * (after - before). Every operation is rounded to theta's dtype."""
    found = np.empty_like(before)
    for k in range(len(before)):
        found[k] = before[k] + before.dtype.type(scale) * (after[k] - before[k])
    return found


class Watched:
    """A training step, beside the step that the optimizer alone would take."""

    def __init__(self, net: nn.Module, optimizer: optim.Optimizer, make: Callable[[Named], optim.Optimizer]) -> None:
        self.net, self.optimizer, self.make = net, optimizer, make

    def step(self, batch: Any) -> list[tuple[np.ndarray, np.ndarray]]:
        """Take a step. Return each tensor's theta before it, and theta after the optimizer's step alone."""
        self.optimizer.zero_grad()
        loss_of(self.net, batch).backward()
        twin = Twin(self.net, self.optimizer, self.make)
        names = {id(p): name for name, p in self.net.named_parameters()}
        before = [theta.detach().clone().numpy() for theta in thetas(self.net)]
        alone = [twin.params[names[id(theta)]].detach().numpy() for theta in thetas(self.net)]
        self.optimizer.step()
        held = {id(theta) for theta in thetas(self.net)}
        for name, p in self.net.named_parameters():
            if id(p) not in held:
                assert torch.equal(p, twin.params[name]), "the other parameters take the plain step"
        for theta in thetas(self.net):
            if type(self.optimizer) is not optim.Rprop:
                assert self.optimizer.state[theta].keys() == twin.optimizer.state[twin.params[names[id(theta)]]].keys()
        return list(zip(before, alone, strict=True))


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "torch"])
@EVERY_CASE
def test_every_step_is_the_optimizers_times_the_scale(case: Case, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """L1 keeps the plain learning rate, rewiring comes after it, and reborn slots start at 0."""
    if not compiled:
        monkeypatch.setattr(kernels, "available", lambda: False)
    elif not kernels.available():
        pytest.skip("no kernels here")
    net = mlp()
    optimizer = case.make(net.named_parameters())
    DeepR(l1=case.alpha, seed=SEED, check_invariants=True, lr_scale=SCALE).attach(net, optimizer)
    watched, reborn_total = Watched(net, optimizer, case.make), 0
    for step, batch in enumerate(batches(25)):
        moves = watched.step(batch)
        for (before, after), theta, slots in zip(moves, thetas(net), all_slots(net), strict=True):
            lr = optimizer.param_groups[0]["lr"]
            expected = torch.from_numpy(longer(before, after)) - lr * case.alpha
            reborn = slots.born == step
            assert torch.equal(reborn, expected < 0)
            expected[reborn] = 0.0
            assert torch.equal(theta, expected)
            reborn_total += int(reborn.sum())
    assert reborn_total > 10


@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "torch"])
def test_the_order_of_a_step_with_a_steered_alpha(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer's step, the scaled step, L1 with the alpha of before the step, the sign test and the rebirths."""
    if not compiled:
        monkeypatch.setattr(kernels, "available", lambda: False)
    elif not kernels.available():
        pytest.skip("no kernels here")
    net = mlp()
    optimizer = adam(net.parameters())
    callback = DeepR(l1=TurnoverTarget(0.2, interval=4), seed=SEED, check_invariants=True, lr_scale=SCALE)
    callback.attach(net, optimizer, total_steps=25)
    watched, alphas = Watched(net, optimizer, lambda named: adam([p for _, p in named])), [[0.03 * SCALE, 0.03 * SCALE]]
    for step, batch in enumerate(batches(25)):
        moves = watched.step(batch)
        lr = optimizer.param_groups[0]["lr"]
        for (before, after), theta, slots, alpha in zip(moves, thetas(net), all_slots(net), alphas[-1], strict=True):
            expected = torch.from_numpy(longer(before, after)) - lr * alpha
            assert torch.equal(slots.born == step, expected < 0)
            assert torch.equal(theta, expected.clamp(min=0.0))
        statistics = callback.statistics()
        alphas.append([statistics[f"deepr/{name}/l1"] for name in ("0.weight", "2.weight")])
    assert len({first for first, _ in alphas}) > 4


EQUIVALENT = [
    "sgd weight decay", "sgd dampening", "sgd nesterov", "sgd fused", "adam amsgrad", "adam foreach", "adamw", "adamw fused",
    "rmsprop momentum centered", "adagrad initial", "nadam", "radam", "adamax", "adadelta", "adam tensor lr",
]  # fmt: skip


@pytest.mark.parametrize("name", EQUIVALENT)
def test_it_is_a_group_with_so_many_times_the_learning_rate(name: str) -> None:
    """The result is that of a parameter group for theta alone. AdamW's decoupled decay grows with the learning rate."""
    made, data = [], batches(12)
    for scaled in (True, False):
        net = mlp()
        optimizer = CASES[name].make(net.named_parameters())
        held = {id(theta) for theta in thetas(net)}
        options = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
        if name.startswith("adamw"):
            options["weight_decay"] = 0.5
        optimizer.param_groups.clear()
        for own in (True, False):
            params = [p for p in net.parameters() if (id(p) in held) == own]
            optimizer.add_param_group({**options, "params": params, "lr": options["lr"] * (SCALE if own and not scaled else 1)})
        FixedRandom(signs="free", lr_scale=SCALE if scaled else 1.0, check_invariants=True).attach(net, optimizer)
        rates = [group["lr"] for group in optimizer.param_groups]
        train(net, optimizer, data)
        assert rates == [group["lr"] for group in optimizer.param_groups]
        made.append(state_of(net, optimizer))
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


METHODS = {
    "DeepR": lambda: DeepR(l1=0.0, lr_scale=SCALE, seed=SEED),
    "SET": lambda: SET(lr_scale=SCALE, rewire_every_n_steps=3, seed=SEED),
    "RigL": lambda: RigL(lr_scale=SCALE, rewire_every_n_steps=3, seed=SEED),
    "FixedRandom, free": lambda: FixedRandom(signs="free", lr_scale=SCALE),
    "FixedRandom": lambda: FixedRandom(lr_scale=SCALE),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_k_slots(name: str) -> None:
    net = mlp()
    optimizer = adam(net.parameters())
    METHODS[name]().attach(net, optimizer, total_steps=40)
    watched = Watched(net, optimizer, lambda named: adam([p for _, p in named]))
    for step, batch in enumerate(batches(20)):
        for (before, after), theta, slots in zip(watched.step(batch), thetas(net), all_slots(net), strict=True):
            expected = longer(before, after)
            if name == "FixedRandom":
                expected = np.maximum(expected, 0)
            kept = (slots.born != step).numpy()
            np.testing.assert_array_equal(theta.detach().numpy()[kept], expected[kept])
            assert bool((theta[~torch.from_numpy(kept)] == 0).all())
    if "Fixed" not in name:
        assert all(int(slots.born.max()) > 10 for slots in all_slots(net))


@pytest.mark.parametrize("given", [SCALE, {"0": 0.5, "2": 3.0, "4": 1.0}], ids=str)
def test_one_theta_for_several_layers(given: Any) -> None:
    """Each layer's part of theta has its own scale. The test finds moved connections by layer and place."""
    net = global_scope.network()
    optimizer = adam(net.parameters())
    DeepR(scope="global", l1=0.0, lr_scale=given, seed=SEED, check_invariants=True).attach(net, optimizer)
    scales = list(given.values()) if isinstance(given, dict) else [given] * 3
    theta, moved = global_scope.shared(net), 0
    for step, batch in enumerate(batches(25)):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        twin = Twin(net, optimizer, lambda named: adam([p for _, p in named]))
        (name,) = (n for n, p in net.named_parameters() if p is theta)
        was = global_scope.by_connection(net, twin.params[name].detach())
        optimizer.step()
        born = [int(b) for slots in all_slots(net) for b in slots.born]
        now = global_scope.by_connection(net)
        for ((layer, place), (value,)), birth in zip(now.items(), born, strict=True):
            if birth == step:
                assert value == 0.0
                moved += 1
                continue
            before, after = (np.array([v], np.float32) for v in was[layer, place])
            assert np.float32(value) == longer(before, after, scales[layer])[0]
    assert moved > 10


def test_soft_deepr() -> None:
    """The step of an active theta is multiplied. Noise alone moves a dormant theta."""
    net = soft_callback(lr_scale=SCALE).prepare(plain_mlp())
    callback = soft_callback(lr_scale=SCALE)
    optimizer = sgd(net.parameters())
    callback.attach(net, optimizer)
    data = batches(12)
    train(net, optimizer, data[:1])
    for number, batch in enumerate(data[1:], start=1):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        twin = Twin(net, optimizer, lambda named: sgd([p for _, p in named]))
        found = list(converted_tensors(net))
        names = {id(p): name for name, p in net.named_parameters()}
        before = [one.theta.detach().view(-1).clone().numpy() for one in found]
        optimizer.step()
        for index, (one, was) in enumerate(zip(found, before, strict=True)):
            after = longer(was, twin.params[names[id(one.theta)]].detach().view(-1).numpy())
            bound = oracle_soft.theta_min(TEMPERATURE, ALPHA, one.slots.wanted, one.slots.total)
            lr = optimizer.param_groups[0]["lr"]
            options = {"lr": lr, "alpha": ALPHA, "temperature": TEMPERATURE, "bound": bound}
            expected = oracle_soft.step(was, after, index=index, seed=SEED, number=number, **options)
            np.testing.assert_allclose(one.theta.detach().view(-1).numpy(), expected, rtol=2e-6, atol=1e-8)


# -- "auto" -------------------------------------------------------------------------------------------------------------------


def plain_kind(name: str) -> bool:
    return name.startswith(("sgd", "asgd"))


@pytest.mark.parametrize("name", [name for name in CASES if "custom" not in name])
@pytest.mark.parametrize("state", ["fresh", "warming up", "trained"])
@pytest.mark.filterwarnings("ignore:A backward pass reached")
def test_the_kind_of_an_optimizer(name: str, state: str) -> None:
    """The probe finds out whether it normalizes, also while the learning rate is 0. It does not change the optimizer."""
    net, fired = mlp(), []
    optimizer = CASES[name].make(net.named_parameters())
    if state != "fresh":
        train(net, optimizer, batches(3))
    if state == "warming up":
        for group in optimizer.param_groups:
            group["lr"] = torch.zeros(()) if isinstance(group["lr"], torch.Tensor) else 0.0
    hooks = [
        register_optimizer_step_post_hook(lambda *_: fired.append(1)),
        optimizer.register_step_pre_hook(lambda *_: fired.append(1)),
    ]
    before, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in net.parameters()]
    found = lr_scale.normalizes(optimizer, optimizer.param_groups[0], torch.device("cpu"))
    for hook in hooks:
        hook.remove()
    assert found is (not plain_kind(name))
    assert not fired and str(optimizer.state_dict()) == str(before)
    assert_equal_states(weights, [p.detach() for p in net.parameters()])


@pytest.mark.parametrize("make", [sgd, adam])
def test_auto_goes_by_the_optimizer_and_the_connectivity(make: Any) -> None:
    net = sparsify(plain_mlp((40, 30, 20, 10)), {"0": 12, "2": 60, "4": 1.0}, seed=SEED)
    optimizer = make(net.parameters())
    callback = DeepR(lr_scale="auto")
    rewiring = callback.attach(net, optimizer)
    ratios = [40 * 30 / 12, 30 * 20 / 60, 1.0]
    expected = [ratio if make is adam else ratio**0.5 for ratio in ratios]
    found = [row["lr_scale"] for row in connectivity_report(net)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[2] == 1.0
    assert [entry["lr_scale"] for entry in rewiring.state_dict()["tensors"].values()] == found
    assert repr(callback) == "DeepR()"  # "auto" is the default
    printed = str(connectivity_report(net)).splitlines()
    assert printed[2].split()[-2] == ("100" if make is adam else "10")


def test_groups_of_one_optimizer_may_be_of_two_kinds() -> None:
    class Both(optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad.sign() if group["signs"] else p.grad, alpha=group["lr"])

    net = mlp(0.1)
    a, b = thetas(net)
    optimizer = Both([{"params": [a], "signs": True}, {"params": [b], "signs": False}], {"lr": 0.01})
    DeepR(lr_scale="auto").attach(net, optimizer)
    assert [row["lr_scale"] for row in connectivity_report(net)] == [10.0, pytest.approx(10**0.5, rel=1e-5)]


def test_auto_is_one_number_for_a_network_with_one_k() -> None:
    net = global_scope.network(connectivity=0.05)
    DeepR(scope="global", lr_scale="auto").attach(net, adam(net.parameters()))
    total, count = sum(s.total for s in all_slots(net)), sum(s.count for s in all_slots(net))
    assert [row["lr_scale"] for row in connectivity_report(net)] == pytest.approx([total / count] * 3, rel=1e-5)


def test_auto_has_a_cap() -> None:
    assert lr_scale.automatic(1e12, True) == lr_scale.automatic(1e12, False) == lr_scale.LARGEST_SCALE
    assert lr_scale.automatic(1.0, True) == lr_scale.automatic(1.0, False) == 1.0
    net = sparsify(nn.Linear(300, 200), 20)
    DeepR(lr_scale="auto").attach(net, adam(net.parameters()))
    assert connectivity_report(net)[0]["lr_scale"] == lr_scale.LARGEST_SCALE


def test_soft_deepr_goes_by_the_wanted_connectivity() -> None:
    callback = SoftDeepR(0.05, temperature=1e-6, l1=1e-3, lr_scale="auto", distribution="uniform")
    net = callback.prepare(nn.Linear(100, 10))
    optimizer = sgd(net.parameters())
    callback.attach(net, optimizer)
    assert connectivity_report(net)[0]["lr_scale"] == pytest.approx(20**0.25, rel=1e-5)


def test_an_optimizer_whose_kind_can_not_be_found_out() -> None:
    """There is one warning, and the scale is 1."""

    class Closed(optim.Optimizer):
        def __init__(self, params: Any, secret: object) -> None:
            self.mine = list(params)
            super().__init__(self.mine, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            if len(self.param_groups[0]["params"]) != 4:
                raise RuntimeError("not mine")
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=0.1)

    nets = [mlp(), mlp()]
    for net, given in zip(nets, ("auto", 1.0), strict=True):
        optimizer = Closed(net.parameters(), object())
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            callback = DeepR(l1=0.05, seed=SEED, lr_scale=given)
            callback.attach(net, optimizer)
            train(net, optimizer, batches(10))
        said = [str(one.message) for one in seen if "lr_scale" in str(one.message)]
        assert len(said) == (given == "auto")
        assert not said or ("Closed" in said[0] and "Give a number" in said[0])
        assert {row["lr_scale"] for row in connectivity_report(net)} == {1.0}
    assert_equal_states(state_of(nets[0]), state_of(nets[1]))


def test_the_kind_is_found_by_the_trainer_too() -> None:
    module, callback = Regression(adam, 5), DeepR(0.1, distribution="uniform", lr_scale="auto")
    trainer(callback).fit(module)
    assert {row["lr_scale"] for row in connectivity_report(module)} == {10.0}
