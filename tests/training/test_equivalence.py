"""Trainer, Fabric and a plain loop agree bit for bit, and follow the oracle's order of a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lightning.fabric import Fabric

from lightning_deepr import DeepR, LinearDecay, LrPower, TurnoverTarget
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.loops import STEPS, Setting, by_fabric, by_plain_loop, by_trainer
from tests.helpers.optimizers import adam, adam_fused, sgd
from tests.helpers.regression import SEED, Twin, batches, loss_of, mlp, plain_mlp, train
from tests.helpers.state import all_slots, assert_equal_states, oracle_of, state_of, thetas

SETTINGS = {
    "sgd": Setting(),
    "adam": Setting(adam),
    "adam fused": Setting(adam_fused),
    "accumulated gradients": Setting(adam, accumulate=2),
    "noise": Setting(options={"temperature": LrPower(1e-2, 2)}),
    "l1 falls to 0": Setting(options={"l1": LinearDecay(0.2, 0.0)}),
    "l1 falls to 0, accumulated": Setting(options={"l1": LinearDecay(0.2, 0.0)}, accumulate=2),
    "every 3 steps": Setting(options={"rewire_every_n_steps": 3}),
    "every 3 steps until step 14": Setting(adam, options={"rewire_every_n_steps": 3, "rewire_until": 14}),
    "until half": Setting(options={"rewire_until": 0.5, "l1": {"0": 0.05, "2": LinearDecay(0.2, 0.01)}}),
    "scheduler": Setting(adam, scheduled=True),
    "default l1": Setting(adam, options={"l1": None}),
    "l1 by turnover": Setting(options={"l1": TurnoverTarget(0.2, interval=4)}),
    "l1 by turnover, accumulated, every 3 steps": Setting(
        adam, options={"l1": TurnoverTarget(0.4, interval=4), "rewire_every_n_steps": 3}, accumulate=2
    ),
    "l1 by a constant turnover": Setting(adam, options={"l1": {"0": TurnoverTarget(0.2, "constant", interval=3), "2": 0.2}}),
    "lr_scale": Setting(adam, options={"lr_scale": "auto"}),
    "lr_scale, accumulated": Setting(options={"lr_scale": {"0": 2.5, "2": "auto"}}, accumulate=2, scheduled=True),
    "lr_scale, fused, every 3 steps": Setting(adam_fused, options={"lr_scale": 0.7, "rewire_every_n_steps": 3}),
    "lr_scale, l1 by turnover": Setting(adam, options={"lr_scale": "auto", "l1": TurnoverTarget(0.2, interval=4)}),
}
EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())


def needs_total_steps(setting: Setting) -> bool:
    l1, until = setting.options.get("l1"), setting.options.get("rewire_until")
    falls = isinstance(l1, TurnoverTarget) or (isinstance(l1, dict) and isinstance(l1["2"], LinearDecay))
    return falls or isinstance(l1, LinearDecay) or isinstance(until, float)


@EVERY_SETTING
@pytest.mark.feature("Loops: Trainer, Fabric and plain loop, equal to the bit")
def test_trainer_fabric_and_plain_loop_are_equal(setting: Setting) -> None:
    plain = by_plain_loop(setting)
    assert sum(int((slots.born >= 0).sum()) for slots in all_slots(plain.net)) >= 5, "too little was rewired"
    runs = [by_trainer(setting), by_fabric(setting, attached="before")]
    if not needs_total_steps(setting):
        runs += [by_fabric(setting), by_fabric(setting, attached="after")]
    for run in runs:
        assert_equal_states(run.state, plain.state)
        assert run.steps == plain.steps == [STEPS // setting.accumulate] * 2
    names = [converted.name for converted in converted_tensors(runs[0].net)]
    assert names == ["net.0.weight", "net.2.weight"] and list(runs[1].callback.state_dict()["tensors"]) == [
        "0.weight",
        "2.weight",
    ]


@pytest.mark.filterwarnings("ignore:A backward pass reached")
@pytest.mark.feature("Loops: Fabric without a converted network", refused=True)
def test_a_fabric_without_a_converted_network_is_refused() -> None:
    """The network is not converted, or ``setup_module`` set it up, which Fabric does not report to its callbacks."""
    for how in ("dense", "setup_module"):
        callback = Setting().callback()
        fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
        net = plain_mlp() if how == "dense" else mlp()
        optimizer = sgd(net.parameters())
        if how == "dense":
            wrapped, wrapped_optimizer = fabric.setup(net, optimizer)
        else:
            wrapped, wrapped_optimizer = fabric.setup_module(net), fabric.setup_optimizers(optimizer)
        with pytest.raises(RuntimeError, match=r"given to Fabric.*fabric\.setup\(net, optimizer\).*attach"):
            train(wrapped, wrapped_optimizer, batches(1))


@pytest.mark.feature("Loops: Fabric's setup_module and setup_optimizers")
def test_setup_module_and_attach_are_equal_to_setup() -> None:
    callback = Setting().callback()
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
    net = mlp()
    wrapped, optimizer = fabric.setup_module(net), sgd(net.parameters())
    wrapped_optimizer = fabric.setup_optimizers(optimizer)
    callback.attach(wrapped, wrapped_optimizer, total_steps=STEPS)  # type: ignore[arg-type]
    train(wrapped, wrapped_optimizer, batches(STEPS))  # type: ignore[arg-type]
    assert_equal_states(state_of(net, optimizer), by_plain_loop(Setting()).state)


@pytest.mark.feature("Length: Fabric or a plain loop of unknown length, with a schedule over the training", refused=True)
def test_fabric_refuses_a_schedule_without_a_length() -> None:
    net = mlp()
    callback = DeepR(l1=LinearDecay(0.1))
    with pytest.raises(ValueError, match="total_steps"):
        Fabric(accelerator="cpu", devices=1, callbacks=[callback]).setup(net, sgd(net.parameters()))


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize(("every", "until"), [(1, None), (3, None), (1, 20), (4, 25)])
def test_the_order_of_a_step_is_the_oracles(make: Any, every: int, until: int | None) -> None:
    """The order is optimizer, L1 and noise with the plain learning rate, sign test. Without rewiring theta < 0 becomes 0."""
    temperature, alpha = 1e-5, 0.05 if make is sgd else 0.2
    net = mlp()
    slow = oracle_of(net)
    optimizer = make(net.parameters())
    lr = optimizer.param_groups[0]["lr"]
    callback = DeepR(
        l1=alpha,
        temperature=temperature,
        seed=SEED,
        lr_scale=1.0,
        newborn="start",
        rewire_every_n_steps=every,
        rewire_until=until,
    )
    callback.attach(net, optimizer)
    kept = reborn = 0
    for step, batch in enumerate(batches(50)):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        twin = Twin(net, optimizer, lambda named: make([p for _, p in named]))
        by_name = dict(net.named_parameters())
        for tensor, theta in zip(slow.tensors, thetas(net), strict=True):
            tensor.theta = next(twin.params[name] for name, p in by_name.items() if p is theta).detach().clone().numpy()
        slow.shrink_and_diffuse(step, lr, alpha, temperature)
        if (step + 1) % every == 0 and (until is None or step < until):
            reborn += sum(map(len, slow.rewire(step)))
        else:
            kept += sum(int((tensor.theta < 0).sum()) for tensor in slow.tensors)
            slow.keep_active()
        before = state_of(net)
        optimizer.step()
        for tensor, theta, slots in zip(slow.tensors, thetas(net), all_slots(net), strict=True):
            assert slots.places.tolist() == tensor.places and slots.born.tolist() == tensor.born
            np.testing.assert_allclose(theta.detach().numpy(), tensor.theta, rtol=1e-6, atol=3e-7)
            assert bool((theta >= 0).all())
        assert [value.shape for value in state_of(net)] == [value.shape for value in before], "K has changed"
    assert reborn > 10 and (kept > 10) == (every > 1 or until is not None)
