"""When it runs: Trainer, Fabric and a plain loop are one, bit for bit, and a step that is no step rewires nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision as FabricPrecision
from lightning.pytorch.plugins.precision import MixedPrecision as TrainerPrecision
from torch import Tensor, nn, optim
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils.data import DataLoader

from lightning_deepr import DeepR, LinearDecay, LrPower, sparsify
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.algorithm import (
    SEED,
    Regression,
    Twin,
    all_slots,
    assert_equal_states,
    batches,
    loss_of,
    mlp,
    oracle_of,
    plain_mlp,
    state_of,
    thetas,
    train,
    trainer,
)

STEPS = 30


def sgd(params: Any) -> optim.Optimizer:
    return optim.SGD(params, lr=0.1, momentum=0.5)


def adam(params: Any) -> optim.Optimizer:
    return optim.Adam(params, lr=0.02)


def adam_fused(params: Any) -> optim.Optimizer:
    return optim.Adam(params, lr=0.02, fused=True)


@dataclass
class Run:
    """A training that has ended."""

    net: nn.Module
    optimizer: optim.Optimizer
    callback: DeepR

    @property
    def state(self) -> list[Tensor]:
        return state_of(self.net, self.optimizer)

    @property
    def steps(self) -> list[int]:
        return [tensor["step"] for tensor in self.callback.state_dict()["tensors"].values()]


@dataclass
class Setting:
    make: Callable[[Any], optim.Optimizer] = sgd
    options: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    scheduled: bool = False

    def callback(self, **options: Any) -> DeepR:
        l1 = 0.05 if self.make is sgd else 0.2
        return DeepR(**{"seed": SEED, "l1": l1, "check_invariants": True, **self.options, **options})

    def scheduler(self, optimizer: optim.Optimizer) -> Any:
        return optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step)) if self.scheduled else None


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
}
EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())


def by_plain_loop(setting: Setting) -> Run:
    net = mlp()
    optimizer, callback = setting.make(net.parameters()), setting.callback()
    scheduler = setting.scheduler(optimizer)
    callback.attach(net, optimizer, total_steps=STEPS // setting.accumulate)
    for i, batch in enumerate(batches(STEPS), start=1):
        (loss_of(net, batch) / setting.accumulate).backward()
        if i % setting.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
    return Run(net, optimizer, callback)


def by_trainer(setting: Setting) -> Run:
    class Scheduled(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = setting.scheduler(optimizer)
            return optimizer if scheduler is None else ([optimizer], [{"scheduler": scheduler, "interval": "step"}])

    module = Scheduled(setting.make, STEPS)
    callback = setting.callback(connectivity=0.3, distribution="uniform")
    runner = trainer(callback, accumulate_grad_batches=setting.accumulate)
    runner.fit(module)
    return Run(module, runner.optimizers[0], callback)


def by_fabric(setting: Setting, attached: str = "no") -> Run:
    """``attached``: whether the callback is attached as well, before Fabric's setup or to what the setup returned."""
    callback = setting.callback()
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
    net = mlp()
    optimizer = setting.make(net.parameters())
    scheduler, total = setting.scheduler(optimizer), STEPS // setting.accumulate
    if attached == "before":
        callback.attach(net, optimizer, total_steps=total)
    wrapped, wrapped_optimizer = fabric.setup(net, optimizer)
    if attached == "after":
        callback.attach(wrapped, wrapped_optimizer, total_steps=total)
    for i, batch in enumerate(batches(STEPS), start=1):
        fabric.backward(loss_of(wrapped, batch) / setting.accumulate)
        if i % setting.accumulate == 0:
            wrapped_optimizer.step()
            wrapped_optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
    return Run(net, optimizer, callback)


def needs_total_steps(setting: Setting) -> bool:
    l1, until = setting.options.get("l1"), setting.options.get("rewire_until")
    return isinstance(l1, (LinearDecay, dict)) or isinstance(until, float)


# -- one and the same ---------------------------------------------------------------------------------------------------------


@EVERY_SETTING
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
def test_a_fabric_without_a_converted_network_is_refused() -> None:
    """Not converted, or set up by ``setup_module``, of which Fabric's callbacks hear nothing."""
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


def test_setup_module_and_attach_are_equal_to_setup() -> None:
    callback = Setting().callback()
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
    net = mlp()
    wrapped, optimizer = fabric.setup_module(net), sgd(net.parameters())
    wrapped_optimizer = fabric.setup_optimizers(optimizer)
    callback.attach(wrapped, wrapped_optimizer, total_steps=STEPS)  # type: ignore[arg-type]
    train(wrapped, wrapped_optimizer, batches(STEPS))  # type: ignore[arg-type]
    assert_equal_states(state_of(net, optimizer), by_plain_loop(Setting()).state)


def test_fabric_refuses_a_schedule_without_a_length() -> None:
    net = mlp()
    callback = DeepR(l1=LinearDecay(0.1))
    with pytest.raises(ValueError, match="total_steps"):
        Fabric(accelerator="cpu", devices=1, callbacks=[callback]).setup(net, sgd(net.parameters()))


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize(("every", "until"), [(1, None), (3, None), (1, 20), (4, 25)])
def test_the_order_of_a_step_is_the_oracles(make: Any, every: int, until: int | None) -> None:
    """Optimizer, L1 and noise with the plain learning rate, sign test; where nothing rewires, theta < 0 becomes 0."""
    temperature, alpha = 1e-5, 0.05 if make is sgd else 0.2
    net = mlp()
    slow = oracle_of(net)
    optimizer = make(net.parameters())
    lr = optimizer.param_groups[0]["lr"]
    callback = DeepR(l1=alpha, temperature=temperature, seed=SEED, rewire_every_n_steps=every, rewire_until=until)
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


# -- what is a step -----------------------------------------------------------------------------------------------------------


def test_a_training_step_that_returns_none_is_no_step() -> None:
    skipped = {0, 4, 11, 12, STEPS - 1}

    class Choosy(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx in skipped else super().training_step(batch, batch_idx)

    for make in (sgd, adam):
        setting = Setting(make)
        callback = setting.callback(connectivity=0.3, distribution="uniform")
        module, runner = Choosy(make, STEPS), trainer(callback)
        runner.fit(module)
        net = mlp()
        optimizer, plain = make(net.parameters()), setting.callback()
        plain.attach(net, optimizer)
        train(net, optimizer, [batch for i, batch in enumerate(batches(STEPS)) if i not in skipped])
        assert_equal_states(state_of(module, runner.optimizers[0]), state_of(net, optimizer))
        assert Run(module, runner.optimizers[0], callback).steps == [STEPS - len(skipped)] * 2


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_frozen_tensor_waits(set_to_none: bool) -> None:
    """It keeps its connections, its theta and its count of steps, even if a gradient of 0 is left in it."""
    net = mlp()
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    callback = DeepR(l1=0.3, seed=SEED)
    callback.attach(net, optimizer)

    def steps(data: list[Any]) -> list[int]:
        for batch in data:
            optimizer.zero_grad(set_to_none)
            loss_of(net, batch).backward()
            optimizer.step()
        return [entry["step"] for entry in callback.state_dict()["tensors"].values()]

    data = batches(20)
    assert steps(data[:5]) == [5, 5]
    before = [state_of(layer) for layer in (net[0], net[2])]  # type: ignore[index]
    thetas(net)[0].requires_grad_(False)
    assert steps(data[5:10]) == [5, 10]
    callback.statistics()
    slots = all_slots(net)[0]
    assert torch.equal(thetas(net)[0], before[0][1]) and torch.equal(slots.places, before[0][2])
    assert not torch.equal(thetas(net)[1], before[1][1])
    thetas(net)[0].requires_grad_(True)
    assert steps(data[10:]) == [15, 20]
    assert int(slots.born.max()) < 15 <= int(all_slots(net)[1].born.max())
    deaths = callback.statistics()
    assert all(deaths[f"deepr/{name}/newborn_deaths"] > 0 for name in ("0.weight", "2.weight")), "those of one were forgotten"


@pytest.mark.parametrize("make", [sgd, adam])
def test_a_closure_counts_once(make: Any) -> None:
    net, other = mlp(), mlp()
    setting = Setting(make)
    optimizers = [make(module.parameters()) for module in (net, other)]
    for module, optimizer in zip((net, other), optimizers, strict=True):
        setting.callback().attach(module, optimizer)
    train(net, optimizers[0], batches(10))
    for batch in batches(10):

        def closure(batch: Any = batch) -> Tensor:
            optimizers[1].zero_grad()
            loss = loss_of(other, batch)
            loss.backward()
            return loss

        for theta in thetas(other):
            theta.grad = torch.full_like(theta, torch.nan)  # stale: not the gradient of this step
        optimizers[1].step(closure)
    assert_equal_states(state_of(net, optimizers[0]), state_of(other, optimizers[1]))


class Scaled(Regression):
    """The loss of some batches overflows."""

    def __init__(self, make: Any, overflowing: set[int]) -> None:
        super().__init__(make, STEPS)
        self.overflowing = overflowing
        self.seen: list[list[Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(state_of(self, self.trainer.optimizers[0]))
        return loss_of(self.net, batch) * (torch.inf if batch_idx in self.overflowing else 1.0)


class TrainerScaler(TrainerPrecision):
    """With GradScaler, but in float32: only scaling by powers of 2 is left, which is exact."""

    def forward_context(self) -> Any:
        return nullcontext()


class FabricScaler(FabricPrecision):
    """The same for Fabric."""

    forward_context = TrainerScaler.forward_context

    def convert_input(self, data: Any) -> Any:
        return data


@pytest.mark.parametrize("how", ["plain", "fabric", "fabric, attached", "trainer"])
@pytest.mark.parametrize("make", [sgd, adam, adam_fused])
def test_a_step_that_gradscaler_skips_is_none(make: Any, how: str) -> None:
    """A fused optimizer calls its hooks even then, and Fabric its own in either case."""
    overflowing = {0, 3, 4, 17, STEPS - 1}
    setting = Setting(make, options={"temperature": 1e-5})
    scaler = torch.amp.GradScaler("cpu", growth_interval=5)
    callback = setting.callback(**({"connectivity": 0.3, "distribution": "uniform"} if how == "trainer" else {}))
    if how == "trainer":
        module = Scaled(make, overflowing)
        runner = trainer(callback, plugins=[TrainerScaler("16-mixed", "cpu", scaler)])
        runner.fit(module)
        net, optimizer = module, runner.optimizers[0]
        states = [*module.seen, state_of(net, optimizer)]
    else:
        net = mlp()
        optimizer = make(net.parameters())
        states = []
        if how != "fabric":
            callback.attach(net, optimizer)
        if how != "plain":
            fabric = Fabric(
                accelerator="cpu", devices=1, callbacks=[callback], plugins=[FabricScaler("16-mixed", "cpu", scaler)]
            )
            wrapped, wrapped_optimizer = fabric.setup(net, optimizer)
        for i, batch in enumerate(batches(STEPS)):
            states.append(state_of(net, optimizer))
            optimizer.zero_grad()
            factor = torch.inf if i in overflowing else 1.0
            if how == "plain":
                scaler.scale(loss_of(net, batch) * factor).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                fabric.backward(loss_of(wrapped, batch) * factor)
                wrapped_optimizer.step()
        states.append(state_of(net, optimizer))
    for i in overflowing - {0}:
        assert_equal_states(states[i], states[i + 1])

    plain = mlp()
    unscaled = make(plain.parameters())
    setting.callback().attach(plain, unscaled)
    train(plain, unscaled, [batch for i, batch in enumerate(batches(STEPS)) if i not in overflowing])
    assert_equal_states(state_of(net, optimizer), state_of(plain, unscaled))
    assert Run(net, optimizer, callback).steps == [STEPS - len(overflowing)] * 2


# -- several optimizers -------------------------------------------------------------------------------------------------------


class Adversaries(pl.LightningModule):
    """Two optimizers by hand: the second player moves in every step, the first in every third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(12, 10), nn.Linear(10, 6)

    def moves(self, batch: Any, step: int) -> list[tuple[int, Callable[[], Tensor]]]:
        x, y = batch
        moves = [(1, lambda: (self.discriminator(self.generator(x).detach().tanh()) - y).square().mean())]
        if step % 3 == 2:
            moves.append((0, lambda: self.discriminator(self.generator(x).tanh()).square().mean()))
        return moves

    def play(self, batch: Any, step: int, optimizers: Any, backward: Callable[[Tensor], None]) -> None:
        for player, loss in self.moves(batch, step):
            for optimizer in optimizers:
                optimizer.zero_grad()
            backward(loss())
            optimizers[player].step()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.play(batch, batch_idx, self.optimizers(), self.manual_backward)

    def configure_optimizers(self) -> Any:
        return [sgd(self.generator.parameters()), adam(self.discriminator.parameters())]

    def train_dataloader(self) -> Any:
        return DataLoader(batches(STEPS), batch_size=None)  # type: ignore[arg-type]


def test_each_tensor_counts_its_own_steps_under_manual_optimization() -> None:
    options = {"connectivity": 0.3, "distribution": "uniform", "l1": 0.2, "seed": SEED, "check_invariants": True}
    module, callback = Adversaries(), DeepR(**options)
    runner = trainer(callback)
    runner.fit(module)

    plain, attached = Adversaries(), DeepR(**options)
    sparsify(plain, 0.3, distribution="uniform", seed=SEED)
    optimizers = plain.configure_optimizers()
    for optimizer in optimizers:
        attached.attach(plain, optimizer)
    for step, batch in enumerate(batches(STEPS)):
        plain.play(batch, step, optimizers, Tensor.backward)

    given, fabrics = Adversaries(), DeepR(**options)
    sparsify(given, 0.3, distribution="uniform", seed=SEED)
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[fabrics])
    optimizers_given = given.configure_optimizers()
    _, *wrapped = fabric.setup(given, *optimizers_given)
    for step, batch in enumerate(batches(STEPS)):
        given.play(batch, step, wrapped, fabric.backward)

    for i in (0, 1):
        first = [module.generator, module.discriminator][i]
        second = [plain.generator, plain.discriminator][i]
        third = [given.generator, given.discriminator][i]
        assert_equal_states(state_of(first, runner.optimizers[i]), state_of(second, optimizers[i]))
        assert_equal_states(state_of(first, runner.optimizers[i]), state_of(third, optimizers_given[i]))
    for one in (callback, attached, fabrics):
        assert [entry["step"] for entry in one.state_dict()["tensors"].values()] == [STEPS // 3, STEPS]
    slots = all_slots(module)
    assert 0 <= int(slots[0].born.max()) < STEPS // 3 < int(slots[1].born.max())


def test_one_callback_serves_two_networks() -> None:
    """A generator and a discriminator that are converted and set up one by one; their tensors have the same names."""
    for given in (False, True):
        nets = [mlp(seed=1), mlp(seed=2)]
        optimizers = [sgd(net.parameters()) for net in nets]
        callback = DeepR(l1=0.3, seed=SEED)
        if given:
            fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
            pairs = [fabric.setup(net, optimizer) for net, optimizer in zip(nets, optimizers, strict=True)]
        else:
            pairs = list(zip(nets, optimizers, strict=True))
            for net, optimizer in pairs:
                callback.attach(net, optimizer)
        for net, optimizer in pairs:
            train(net, optimizer, batches(10))
        for net in nets:
            assert all(int(slots.born.max()) >= 0 for slots in all_slots(net))
            assert all(bool((theta >= 0).all()) for theta in thetas(net))
        assert len(callback.state_dict()["tensors"]) == 4


# -- values that are not finite -----------------------------------------------------------------------------------------------


class Poisoned(Regression):
    """Something goes wrong in step 5."""

    def __init__(self, make: Any, what: str, value: float) -> None:
        super().__init__(make, STEPS)
        self.what, self.value = what, value
        self.before: list[Tensor] = []

    def poison(self, step: int) -> None:
        if step == 5 and self.what == "theta":
            with torch.no_grad():
                thetas(self)[1][2] = self.value
        self.before = state_of(self)

    def loss(self, batch: Any, step: int) -> Tensor:
        self.poison(step)
        loss = loss_of(self.net, batch)
        if step == 5 and self.what == "gradient":
            thetas(self)[1].register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([4]), self.value))
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch, batch_idx)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("what", ["theta", "gradient"])
@pytest.mark.parametrize("how", ["trainer", "plain", "fabric"])
def test_a_value_that_is_not_finite_stops_before_the_step(how: str, what: str, value: float) -> None:
    module = Poisoned(sgd, what, value)
    callback = Setting().callback(connectivity=0.3, distribution="uniform")
    message = rf"`net\.2\.weight`, step 5: .*{what}.* not finite"
    if how == "trainer":
        with pytest.raises(RuntimeError, match=message):
            trainer(callback).fit(module)
    else:
        sparsify(module, 0.3, distribution="uniform", seed=SEED)
        optimizer: Any = sgd(module.parameters())
        backward: Callable[[Tensor], None] = Tensor.backward
        if how == "plain":
            callback.attach(module, optimizer)
        else:
            fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
            _, optimizer = fabric.setup(module, optimizer)
            backward = fabric.backward

        def loop() -> None:
            for step, batch in enumerate(batches(STEPS)):
                optimizer.zero_grad()
                backward(module.loss(batch, step))
                optimizer.step()

        with pytest.raises(RuntimeError, match=message):
            loop()
    for now, then in zip(state_of(module), module.before, strict=True):
        assert torch.equal(now.nan_to_num(), then.nan_to_num()), "the step was taken"
    assert Run(module, optimizer if how != "trainer" else None, callback).steps == [5, 5]  # type: ignore[arg-type]


# -- and when it does not run any more ----------------------------------------------------------------------------------------


def assert_not_at_work(net: nn.Module, optimizer: optim.Optimizer, callback: DeepR) -> None:
    """Steps of the optimizer are only its own."""
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
    rewiring.remove()  # again does no harm
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
    """The same handle's work in two parts; nobody is told that nothing rewires."""
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


def test_attach_twice_rewires_once() -> None:
    net = mlp()
    optimizer, callback = sgd(net.parameters()), Setting().callback()
    for _ in range(2):
        callback.attach(net, optimizer, total_steps=STEPS)
    train(net, optimizer, batches(STEPS))
    assert_equal_states(state_of(net, optimizer), by_plain_loop(Setting()).state)


def test_a_second_callback_on_the_same_tensors_is_refused() -> None:
    net = mlp()
    optimizer, first = sgd(net.parameters()), Setting().callback()
    first.attach(net, optimizer)
    with pytest.raises(ValueError, match=r"another one rewires.*remove"):
        Setting().callback().attach(net, optimizer)


def test_a_new_optimizer_where_the_old_one_lay_is_wired() -> None:
    """An id is used again when its object is gone."""
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
    """Fabric's callback sees the steps of all optimizers of the process."""
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
        if len(made) % 10 == 0:  # something else has taken the room: there is more
            other = sgd(foreign)
            other.step()
            seen.add(id(other))
            del other
        made.append(sgd(net.parameters()))
    assert id(made[-1]) in seen, "none lies where another lay: nothing was tested"
    train(net, fabric.setup_optimizers(made[-1]), batches(5))  # type: ignore[arg-type]
    assert Run(net, made[-1], callback).steps == [5, 5]


def test_a_callback_given_to_fabric_leaves_nothing_behind() -> None:
    """However many there were, torch's hooks on all optimizers do not grow, and none keeps a callback alive."""
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
