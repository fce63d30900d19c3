"""The hooks on an optimizer are registered once and removed when the training ends, also after an exception."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn, optim
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_deepr import DeepR, densify
from tests.helpers.loops import STEPS, Run, Setting, by_fabric, by_plain_loop, by_trainer
from tests.helpers.optimizers import sgd
from tests.helpers.regression import Regression, batches, loss_of, mlp, train
from tests.helpers.state import all_slots, assert_equal_states, state_of, thetas
from tests.helpers.trainer import trainer


def assert_not_at_work(net: nn.Module, optimizer: optim.Optimizer, callback: DeepR) -> None:
    """Check that the callback does nothing after the optimizer's steps."""
    places = [slots.places.clone() for slots in all_slots(net)]
    counts = Run(net, optimizer, callback).steps
    with torch.no_grad():
        for theta in thetas(net):
            theta[0] = -1.0
    for theta in thetas(net):
        theta.grad = torch.zeros_like(theta)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert all(torch.equal(slots.places, before) for slots, before in zip(all_slots(net), places, strict=True))
    assert all(float(theta.detach()[0]) == -1.0 for theta in thetas(net)), "theta < 0 was touched"
    assert Run(net, optimizer, callback).steps == counts
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks


def test_hooks_are_gone_after_a_fit() -> None:
    run = by_trainer(Setting())
    assert_not_at_work(run.net, run.optimizer, run.callback)


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt])
@pytest.mark.feature("Loops: an exception or Ctrl-C within fit")
def test_hooks_are_gone_after_an_exception(exception: type[BaseException]) -> None:
    class Failing(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            if batch_idx == 5:
                raise exception("on purpose")
            return super().training_step(batch, batch_idx)

    module, callback = Failing(sgd), Setting().callback(connectivity=0.3)
    runner = trainer(callback)
    with pytest.raises((exception, SystemExit)):
        runner.fit(module)
    assert Run(module, runner.optimizers[0], callback).steps == [5, 5]
    assert_not_at_work(module, runner.optimizers[0], callback)


def test_hooks_are_gone_after_remove() -> None:
    net = mlp()
    optimizer, callback = sgd(net.parameters()), Setting().callback()
    rewiring = callback.attach(net, optimizer)
    train(net, optimizer, batches(5))
    rewiring.remove()
    rewiring.remove()  # a second call does no harm
    assert_not_at_work(net, optimizer, callback)


def test_remove_stops_one_optimizer_of_two() -> None:
    net = mlp()
    optimizers = [sgd(net[0].parameters()), sgd(net[2].parameters())]  # type: ignore[index]
    callback = Setting().callback()
    handles = [callback.attach(net, optimizer) for optimizer in optimizers]
    handles[0].remove()
    for batch in batches(5):
        loss_of(net, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert [entry["step"] for entry in callback.state_dict()["tensors"].values()] == [0, 5]


@pytest.mark.filterwarnings("error:A backward pass reached")
def test_attach_after_remove_goes_on() -> None:
    """Two attaches, one after the other, equal a single one, without the warning that no callback rewires."""
    runs = []
    for parts in ((20,), (8, 12)):
        net = mlp()
        optimizer, callback, data = sgd(net.parameters()), Setting().callback(), batches(20)
        for count in parts:
            rewiring = callback.attach(net, optimizer)
            train(net, optimizer, data[:count])
            del data[:count]
            rewiring.remove()
        runs.append(Run(net, optimizer, callback))
    assert_equal_states(runs[0].state, runs[1].state)
    assert runs[0].steps == runs[1].steps == [20, 20]


@pytest.mark.feature("Loops: attached twice, or attached and given to Fabric")
def test_attach_twice_rewires_once() -> None:
    net = mlp()
    optimizer, callback = sgd(net.parameters()), Setting().callback()
    for _ in range(2):
        callback.attach(net, optimizer, total_steps=STEPS)
    train(net, optimizer, batches(STEPS))
    assert_equal_states(state_of(net, optimizer), by_plain_loop(Setting()).state)


@pytest.mark.feature("Callbacks: two callbacks on one tensor, in a plain loop", refused=True)
def test_a_second_callback_on_the_same_tensors_is_refused() -> None:
    net = mlp()
    optimizer, first = sgd(net.parameters()), Setting().callback()
    first.attach(net, optimizer)
    with pytest.raises(ValueError, match=r"another one rewires.*remove"):
        Setting().callback().attach(net, optimizer)


def test_a_new_optimizer_where_the_old_one_lay_is_wired() -> None:
    """Python reuses the id of a deleted object."""
    net, seen = mlp(), set()
    callback = Setting().callback()
    for i in range(10):
        optimizer = sgd(net.parameters())
        seen.add(id(optimizer))
        callback.attach(net, optimizer)
        train(net, optimizer, batches(1))
        assert Run(net, optimizer, callback).steps == [i + 1] * 2
        del optimizer


def test_an_optimizer_where_a_foreign_one_lay_is_found() -> None:
    """A callback of Fabric sees the steps of all optimizers of the process."""
    callback = Setting().callback()
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
    net = fabric.setup(mlp())
    foreign = [nn.Parameter(torch.ones(2)) for _ in net.parameters()]
    seen = set()
    for _ in range(20):
        other = sgd(foreign)
        other.step()
        seen.add(id(other))
        del other
    made = [sgd(net.parameters())]
    while id(made[-1]) not in seen and len(made) < 500:
        if len(made) % 10 == 0:  # another object took the freed memory: try again
            other = sgd(foreign)
            other.step()
            seen.add(id(other))
            del other
        made.append(sgd(net.parameters()))
    assert id(made[-1]) in seen, "no id was reused: nothing was tested"
    train(net, fabric.setup_optimizers(made[-1]), batches(5))  # type: ignore[arg-type]
    assert Run(net, made[-1], callback).steps == [5, 5]


def test_a_callback_given_to_fabric_leaves_nothing_behind() -> None:
    """torch's global hooks do not grow with the number of callbacks, and do not keep a callback alive."""
    counts = []
    for _ in range(3):
        run = by_fabric(Setting())
        gone = weakref.ref(run.callback)
        run.callback = None  # type: ignore[assignment]
        gc.collect()
        assert gone() is None
        counts.append(len(_global_optimizer_pre_hooks) + len(_global_optimizer_post_hooks))
        before = [slots.places.clone() for slots in all_slots(run.net)]
        with torch.no_grad():
            for theta in thetas(run.net):
                theta.fill_(-1.0)
        run.optimizer.step()
        assert all(torch.equal(slots.places, places) for slots, places in zip(all_slots(run.net), before, strict=True))
    assert len(set(counts)) == 1


def test_after_fabric_a_dense_network_leaves_other_trainings_alone() -> None:
    """The callback lives on, and hears of every optimizer of the process: its tensors may be ordinary ones by now."""
    run = by_fabric(Setting())
    densify(run.net)
    other = nn.Linear(3, 2)
    optimizer = sgd(other.parameters())
    other(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert run.callback.tracked, "the callback has not forgotten them: it was asked"
