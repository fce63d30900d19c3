"""Steps: a step that the optimizer skips rewires nothing; several optimizers; values that are not finite."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision as FabricPrecision
from lightning.pytorch.plugins.precision import MixedPrecision as TrainerPrecision
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

from lightning_deepr import DeepR, sparsify
from tests.helpers.loops import STEPS, Run, Setting
from tests.helpers.optimizers import adam, adam_fused, sgd
from tests.helpers.regression import SEED, Regression, batches, loss_of, mlp, train
from tests.helpers.state import all_slots, assert_equal_states, state_of, thetas
from tests.helpers.trainer import trainer

# -- skipped and real steps -- ------------------------------------------------------------------------------------------------


@pytest.mark.feature("Optimizers: training_step returns None")
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
@pytest.mark.feature("Optimizers: a parameter frozen for a while (plain loop)")
def test_a_frozen_tensor_waits(set_to_none: bool) -> None:
    """A frozen tensor keeps its connections, theta and step count, even if a gradient of 0 is left in it."""
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
    assert all(deaths[f"deepr/{name}/newborn_deaths"] > 0 for name in ("0.weight", "2.weight")), (
        "the deaths of one tensor were forgotten"
    )


@pytest.mark.parametrize("lr_scale", [1.0, 2.5])
@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.feature("Optimizers: step with a closure")
def test_a_closure_counts_once(make: Any, lr_scale: float) -> None:
    net, other = mlp(), mlp()
    setting = Setting(make, options={"lr_scale": lr_scale})
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


@pytest.mark.parametrize("lr_scale", [1.0, 2.5])
@pytest.mark.feature("Compilers: torch.compile of optimizer.step")
def test_a_compiled_step_rewires_as_any_other(lr_scale: float) -> None:
    setting, states = Setting(options={"lr_scale": lr_scale}), []
    for compiled in (False, True):
        net = mlp()
        optimizer = sgd(net.parameters())
        setting.callback().attach(net, optimizer)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for batch in batches(20):
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            step()
        states.append(state_of(net, optimizer))
    torch.compiler.reset()
    assert_equal_states(*states)


class Scaled(Regression):
    """A module with batches whose loss overflows."""

    def __init__(self, make: Any, overflowing: set[int]) -> None:
        super().__init__(make, STEPS)
        self.overflowing = overflowing
        self.seen: list[list[Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(state_of(self, self.trainer.optimizers[0]))
        return loss_of(self.net, batch) * (torch.inf if batch_idx in self.overflowing else 1.0)


class TrainerScaler(TrainerPrecision):
    """A precision with GradScaler in float32: scaling by powers of 2 is exact."""

    def forward_context(self) -> Any:
        return nullcontext()


class FabricScaler(FabricPrecision):
    """The same precision for Fabric."""

    forward_context = TrainerScaler.forward_context

    def convert_input(self, data: Any) -> Any:
        return data


@pytest.mark.parametrize("how", ["plain", "fabric", "fabric, attached", "trainer"])
@pytest.mark.parametrize("lr_scale", [1.0, 2.5])
@pytest.mark.parametrize("make", [sgd, adam, adam_fused])
@pytest.mark.feature("Precision: GradScaler skips a step")
def test_a_step_that_gradscaler_skips_is_none(make: Any, how: str, lr_scale: float) -> None:
    """A fused optimizer calls its hooks even for a skipped step, and Fabric always calls its own."""
    overflowing = {0, 3, 4, 17, STEPS - 1}
    setting = Setting(make, options={"temperature": 1e-5, "lr_scale": lr_scale})
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
    """A module with two optimizers under manual optimization: one steps every time, the other every third time."""

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


@pytest.mark.feature("Optimizers: manual optimization with several optimizers")
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
    """A generator and a discriminator are converted and set up one by one; their tensors have the same names."""
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
    """A module in which something goes wrong in step 5."""

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
        assert torch.equal(now.nan_to_num(), then.nan_to_num()), "the refused step was taken"
    assert Run(module, optimizer if how != "trainer" else None, callback).steps == [5, 5]  # type: ignore[arg-type]
