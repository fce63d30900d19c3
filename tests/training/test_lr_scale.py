"""``lr_scale`` in a training: resuming, no cost at 1, several optimizers, bad input."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn, optim

from lightning_deepr import SET, DeepR, FixedRandom, MagnitudePruning, SoftDeepR, connectivity_report
from lightning_deepr.algorithm import lr_scale
from tests.data import make as old
from tests.files.test_old_checkpoints import HERE
from tests.helpers import dense_theta
from tests.helpers.dense_theta import assert_same
from tests.helpers.optimizers import adam, sgd
from tests.helpers.regression import SEED, Regression, batches, loss_of, mlp, train
from tests.helpers.soft import soft
from tests.helpers.state import all_slots, assert_equal_states, state_of, thetas
from tests.helpers.trainer import trainer

DATA = batches(30)


def deepr(scale: Any = "auto", **options: Any) -> DeepR:
    return DeepR(**{"l1": 0.2, "seed": SEED, "lr_scale": scale, "check_invariants": True, **options})


def begin(callback: DeepR, make: Any = adam) -> tuple[nn.Module, optim.Optimizer, Any]:
    net = mlp()
    optimizer = make(net.parameters())
    return net, optimizer, callback.attach(net, optimizer)


def saved(*things: Any) -> list[Any]:
    return copy.deepcopy([thing.state_dict() for thing in things])


def load(things: Any, states: list[Any]) -> None:
    for thing, state in zip(things, states, strict=True):
        thing.load_state_dict(state)


def scales(net: nn.Module) -> list[float]:
    return [row["lr_scale"] for row in connectivity_report(net)]


# -- at 1 ---------------------------------------------------------------------------------------------------------------------


def test_one_costs_nothing() -> None:
    """At 1 there is no hook and no copy of theta, and the result has the same bits for a number and for a dict."""
    unscaled_callback, callback = deepr(1.0), deepr(2.0)
    net, optimizer, _ = begin(unscaled_callback)
    other, other_optimizer, _ = begin(callback)
    (run,), (other_run,) = unscaled_callback._runs, callback._runs
    assert len(other_run.hooks[0]._before) == len(run.hooks[0]._before) + 1
    assert run.scaled is not None and not run.scaled.thetas and other_run.scaled is not None and other_run.scaled.thetas
    train(net, optimizer, DATA)
    assert scales(net) == [1.0, 1.0]
    unscaled = mlp()
    unscaled_optimizer = adam(unscaled.parameters())
    DeepR(l1=0.2, seed=SEED, lr_scale={"0": 1.0, "2": 1.0}).attach(unscaled, unscaled_optimizer)
    train(unscaled, unscaled_optimizer, DATA)
    assert_equal_states(state_of(net, optimizer), state_of(unscaled, unscaled_optimizer))
    train(other, other_optimizer, DATA)
    assert not torch.equal(all_slots(net)[0].places, all_slots(other)[0].places)


# -- saved and resumed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("at", [1, 7, 20])
def test_a_plain_loop_resumes_exactly(make: Any, at: int) -> None:
    net, optimizer, rewiring = begin(deepr(), make)
    train(net, optimizer, DATA[:at])
    states = saved(net, optimizer, rewiring)
    train(net, optimizer, DATA[at:])
    again = begin(deepr(), make)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(again, states)
    train(again[0], again[1], DATA[at:])
    assert_equal_states(state_of(net, optimizer), state_of(again[0], again[1]))
    assert rewiring.state_dict() == again[2].state_dict()


@pytest.mark.parametrize("at", [25, 75])
def test_with_a_steered_alpha_a_plain_loop_resumes_exactly_in_the_middle_of_an_interval(at: int) -> None:
    """The defaults of both rules: alpha changes after every 50 steps, and Adam's steps are multiplied by N / K."""
    data = batches(130)

    def start() -> tuple[nn.Module, optim.Optimizer, Any]:
        net = mlp()
        optimizer = adam(net.parameters())
        return net, optimizer, deepr(l1="auto").attach(net, optimizer, total_steps=len(data))

    def finish(net: nn.Module, optimizer: optim.Optimizer, rewiring: Any) -> list[list[float]]:
        alphas = []
        for batch in data[at:]:
            train(net, optimizer, [batch])
            tensors = rewiring.state_dict()["tensors"].values()
            alphas.append([entry["steering"]["alpha"] for entry in tensors])
        return alphas

    first, again = start(), start()
    train(first[0], first[1], data[:at])
    states = saved(*first)
    steerings = [entry["steering"] for entry in states[2]["tensors"].values()]
    assert all(one["exposed"] > 0 for one in steerings) and steerings[0]["reborn"] > 0, "the interval is not open"
    alphas = finish(*first)
    assert alphas[0] != alphas[-1] and scales(first[0]) == pytest.approx([10 / 3] * 2, rel=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(again, states)
    assert finish(*again) == alphas
    assert scales(again[0]) == scales(first[0])
    assert_equal_states(state_of(first[0], first[1]), state_of(again[0], again[1]))
    assert first[2].state_dict() == again[2].state_dict()


def test_auto_goes_on_with_what_the_checkpoint_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version may have another exponent. A training that continues keeps its scale."""
    net, optimizer, rewiring = begin(deepr())
    train(net, optimizer, DATA[:10])
    states, taken = saved(net, optimizer, rewiring), scales(net)
    train(net, optimizer, DATA[10:])
    monkeypatch.setattr(DeepR, "lr_exponents", lr_scale.Exponents(0.5, 0.25))
    again = begin(deepr())
    assert scales(again[0]) != taken
    load(again, states)
    assert scales(again[0]) == taken
    train(again[0], again[1], DATA[10:])
    assert scales(again[0]) == taken
    assert_equal_states(state_of(net, optimizer), state_of(again[0], again[1]))


def test_a_new_training_asks_anew() -> None:
    """The second training has an optimizer of another kind."""
    callback = deepr()
    net, optimizer, rewiring = begin(callback)
    train(net, optimizer, DATA[:3])
    first = scales(net)
    rewiring.remove()
    callback.attach(net, sgd(net.parameters()))
    assert scales(net) == pytest.approx([scale**0.5 for scale in first], rel=1e-5)


def test_a_state_from_before_an_optimizer_was_there() -> None:
    callback, others = [DeepR(0.3, lr_scale="auto", distribution="uniform", seed=SEED) for _ in range(2)]
    callback._take(Regression(adam))
    state = callback.state_dict()
    assert [entry["lr_scale"] for entry in state["tensors"].values()] == [None, None]
    others.load_state_dict(state)
    module = Regression(adam)
    trainer(others).fit(module)
    assert scales(module) == pytest.approx([10 / 3] * 2, rel=1e-2)


def test_another_number_than_in_the_checkpoint_is_told() -> None:
    net, optimizer, rewiring = begin(deepr(2.0))
    train(net, optimizer, DATA[:5])
    states = saved(net, optimizer, rewiring)
    again = begin(deepr({"0": 3.0, "2": 2.0}))
    with pytest.warns(UserWarning, match=r"lr_scale differs from the checkpoint's: `0\.weight` \(2 before, 3 now\)\."):
        load(again, states)
    train(again[0], again[1], DATA[5:6])
    assert scales(again[0]) == [3.0, 2.0]


def without(state: dict[str, Any]) -> dict[str, Any]:
    """The state as versions without lr_scale wrote it."""
    state = copy.deepcopy(state)
    for entry in state["tensors"].values():
        del entry["lr_scale"]
    return state


def test_a_checkpoint_of_before_goes_on_with_one() -> None:
    net, optimizer, rewiring = begin(deepr(1.0))
    train(net, optimizer, DATA[:10])
    states = saved(net, optimizer, rewiring)
    train(net, optimizer, DATA[10:])
    again = begin(deepr())
    with pytest.warns(UserWarning, match=r"version without lr_scale: `0\.weight`, `2\.weight` go on with lr_scale=1"):
        load(again, [*states[:2], without(states[2])])
    assert scales(again[0]) == [1.0, 1.0]
    train(again[0], again[1], DATA[10:])
    assert_equal_states(state_of(net, optimizer), state_of(again[0], again[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(begin(deepr(1.0)), [*states[:2], without(states[2])])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_an_old_file_resumes_as_ever_under_auto() -> None:
    expected = torch.load(HERE / "expected.pt", weights_only=True)["deepr"]
    callback = old.CALLBACKS["deepr"]()
    callback.lr_scale = "auto"
    with pytest.warns(UserWarning, match="version without lr_scale"):
        found = old.state_of(old.fit(callback, ckpt_path=HERE / "deepr.ckpt"))
    assert torch.equal(found["places"], expected["places"])
    torch.testing.assert_close(found["parameters"], expected["parameters"], rtol=1e-9, atol=1e-11)


def test_a_copy_of_the_callback_is_at_work_by_itself() -> None:
    callback = deepr(2.0)
    net, optimizer, _ = begin(callback)
    train(net, optimizer, DATA[:5])
    other, state = copy.deepcopy((net, callback.state_dict()))
    twin = copy.deepcopy(callback)
    twin_optimizer = adam(other.parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin.attach(other, twin_optimizer).load_state_dict(state)
    before = state_of(net, optimizer)
    train(other, twin_optimizer, DATA[5:15])
    assert_equal_states(state_of(net, optimizer), before)
    train(net, optimizer, DATA[5:15])
    assert_equal_states(state_of(net, optimizer), state_of(other, twin_optimizer))


# -- soft-DEEP R --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_soft_by_trainer_fabric_and_plain_loop(accumulate: int) -> None:
    ends = []
    for way in (dense_theta.by_plain_loop, dense_theta.by_trainer, dense_theta.by_fabric):
        net, optimizer = way(soft(lr_scale="auto"), adam, accumulate)
        ends.append(dense_theta.full_state(net, optimizer))
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


def test_soft_resumes_exactly() -> None:
    for at in (1, 10):
        assert_same(*dense_theta.resumed(lambda: soft(lr_scale="auto"), adam, at))


# -- several optimizers, tensors that wait ------------------------------------------------------------------------------------


def test_two_optimizers_and_a_tensor_without_a_gradient() -> None:
    """The scale follows the kind of each optimizer. A tensor that takes no step keeps its bits."""
    ends = []
    for scale in ("auto", {"0": 10 / 3, "2": (10 / 3) ** 0.5}):
        net = mlp()
        a, b = thetas(net)
        rest = [p for p in net.parameters() if p is not a and p is not b]
        optimizers = [adam([a]), sgd([b, *rest])]
        callback = deepr(scale)
        for optimizer in optimizers:
            callback.attach(net, optimizer)
        if scale == "auto":
            assert scales(net) == pytest.approx([10 / 3, (10 / 3) ** 0.5], rel=1e-5)
        a.data[0] = -0.0  # a file may contain this value
        for step, batch in enumerate(DATA[:12]):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss_of(net, batch).backward()
            if step % 3 == 0:
                before = a.detach().clone()
                a.grad = None
            for optimizer in optimizers:
                optimizer.step()
            if step % 3 == 0:
                assert torch.equal(a.detach().view(torch.int32), before.view(torch.int32))
        ends.append(state_of(net))
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_a_step_that_was_not_announced_is_refused() -> None:
    callback = deepr(2.0)
    net, optimizer, _ = begin(callback)
    loss_of(net, DATA[0]).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="lr_scale: a step was reported that was not announced"):
        callback.on_after_optimizer_step(optimizer=optimizer)


def test_an_optimizer_whose_step_is_hooked_twice_is_scaled_once() -> None:
    """torch calls the hooks for the step of the subclass, and again for the step of its base class."""
    sgd([nn.Parameter(torch.zeros(1))])  # torch hooks a class when the first of it is made

    class Mine(optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)

    nets = []
    for kind in (Mine, optim.SGD):
        net, optimizer, _ = begin(deepr(2.0), lambda params, kind=kind: kind(params, lr=0.1))
        train(net, optimizer, DATA)
        nets.append(net)
    assert_equal_states(state_of(nets[0]), state_of(nets[1]))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.feature("Optimizers: gradient clipping, LearningRateMonitor, schedulers")
def test_monitors_and_clipping_see_what_they_saw(scale: float) -> None:
    """They see the group's learning rate, and gradients that are not multiplied."""

    class Seeing(Regression):
        def __init__(self) -> None:
            super().__init__(sgd, 8)
            self.seen: list[tuple[float, float]] = []

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
            self.seen.append((optimizer.param_groups[0]["lr"], float(norm)))

    module = Seeing()
    callback = DeepR(0.3, distribution="uniform", l1=0.0, seed=SEED, lr_scale=scale)
    trainer(callback, gradient_clip_val=0.05).fit(module)
    assert [lr for lr, _ in module.seen] == [0.1] * 8
    assert all(norm > 0.05 for _, norm in module.seen[:1])
    theta = thetas(module)[0]
    assert theta.grad is not None and float(theta.grad.norm()) <= 0.05 + 1e-6


# -- bad input ----------------------------------------------------------------------------------------------------------------

BAD = [
    (0, ValueError, "lr_scale: expected a finite number above 0 .* found 0"),
    (0.0, ValueError, "found 0.0"),
    (-1.0, ValueError, "found -1.0"),
    (float("nan"), ValueError, "found nan"),
    (float("inf"), ValueError, "found inf"),
    (True, TypeError, 'lr_scale: expected a number, a dict of numbers or "auto", found True'),
    (None, TypeError, "found None"),
    ("Auto", TypeError, "found 'Auto'"),
    ([2.0], TypeError, r"found \[2\.0\]"),
    ({"0": 0.0, "2": 1.0}, ValueError, r"lr_scale\['0'\]: expected a finite number above 0 .* found 0\.0"),
    ({"0": "fast", "2": 1.0}, TypeError, r"lr_scale\['0'\]: expected a number or \"auto\", found 'fast'"),
    ({"0": {"1": 2.0}}, TypeError, r"lr_scale\['0'\]: expected a number or \"auto\""),
]


@pytest.mark.parametrize(("value", "error", "message"), BAD, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize(
    "make",
    [DeepR, SET, FixedRandom, lambda *a, **k: SoftDeepR(*a, temperature=1e-6, **k)],
    ids=["DeepR", "SET", "FixedRandom", "SoftDeepR"],
)
def test_values_that_make_no_sense(make: Any, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(0.1, lr_scale=value)


def test_patterns_that_do_not_fit() -> None:
    for given, message in (
        ({"0": 2.0, "2": 2.0, "fc7": 2.0}, r"lr_scale: the pattern 'fc7' matches no tensor"),
        ({"0": 2.0}, r"lr_scale: no key matches `(net\.)?2\.weight`.*1\.0 for none"),
    ):
        net = mlp()
        with pytest.raises(ValueError, match=message):
            DeepR(lr_scale=given).attach(net, sgd(net.parameters()))
        module = Regression(sgd)
        with pytest.raises(ValueError, match=message):
            trainer(DeepR(0.3, lr_scale={f"net.{k}" if k != "fc7" else k: v for k, v in given.items()})).fit(module)


def test_methods_that_begin_dense_have_none() -> None:
    with pytest.raises(TypeError, match="lr_scale"):
        MagnitudePruning(0.1, lr_scale=2.0)  # type: ignore[call-arg]


def test_a_second_fit_and_an_averaged_network(tmp_path: Any) -> None:
    callbacks: list[pl.Callback] = [DeepR(0.3, l1=0.1, seed=SEED, lr_scale="auto")]
    callbacks.append(pl.callbacks.EMAWeightAveraging(decay=0.8))
    module = Regression(adam, 6)
    trainer(*callbacks).fit(module)
    first = scales(module)
    trainer(*callbacks).fit(module)
    assert scales(module) == first and min(first) > 1
