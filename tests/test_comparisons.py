"""Fixed random connectivity, SET and RigL on K slots: against oracles from the papers' text, and wherever DEEP R itself is tested."""

from __future__ import annotations

import copy
import gc
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

import lightning_deepr
from lightning_deepr import SET, DeepR, FixedRandom, LinearDecay, LrPower, RigL, SparseTraining, densify, kernels, sparsify
from lightning_deepr.connections import converted_tensors
from lightning_deepr.stepping import Stepped
from tests import networks, oracle
from tests.helpers_algorithm import (
    SEED,
    Regression,
    all_slots,
    assert_equal_states,
    batches,
    chi_square_p,
    loss_of,
    mlp,
    oracle_of,
    plain_mlp,
    state_of,
    thetas,
    train,
    trainer,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
ALWAYS = {"drop_fraction": 0.4, "rewire_every_n_steps": 1, "rewire_until": None}
EVERY_OTHER = {**ALWAYS, "rewire_every_n_steps": 2}


def sgd(params: Any) -> optim.Optimizer:
    return optim.SGD(params, lr=0.1, momentum=0.5)


def adam(params: Any) -> optim.Optimizer:
    return optim.Adam(params, lr=0.02)


def stepped_by_hand(net: nn.Module, optimizer: optim.Optimizer) -> list[list[Tensor]]:
    """Per tensor theta, places and the optimizer's state between its step and what follows it. Call it before ``attach``."""
    seen: list[list[Tensor]] = []

    def note(*_: Any) -> None:
        seen.clear()
        for converted in converted_tensors(net):
            states = optimizer.state.get(converted.theta, {})
            moments = [
                value for _, value in sorted(states.items()) if value is not None and value.shape == converted.theta.shape
            ]
            seen.append([v.detach().clone() for v in (converted.theta, converted.slots.places, *moments)])

    optimizer.register_step_post_hook(note)
    return seen


def dense_twin(plain: nn.Module, sparse: nn.Module) -> nn.Module:
    """The same network with ordinary dense weights."""
    for name, value in sparse.named_parameters():
        if ".original" not in name and not name.startswith("parametrizations"):
            plain.get_parameter(name).data.copy_(value.data)
    return networks.set_dense(plain, sparse)


def assert_strongest(score: Tensor, chosen: Tensor, others: Tensor) -> None:
    """No place that was left has a higher score than one that was chosen, but for rounding."""
    if len(chosen) and len(others):
        assert score[chosen].min() >= score[others].max() - 1e-9 * score.max()


def check_update(slots: Any, theta: Tensor, before: Sequence[Tensor], dropped: int, gradient: Tensor | None) -> None:
    """One update of a tensor against the papers: which go, which come, and what each of them starts with.

    Args:
        slots, theta: after it.
        before: theta and places after the optimizer's step.
        dropped: how many connections.
        gradient: of the dense weight, flat: RigL. None: SET.
    """
    old_theta, old_places, *_ = before
    old, new = (dict(zip(p.tolist(), t.tolist(), strict=True)) for p, t in ((old_places, old_theta), (slots.places, theta)))
    assert len(new) == len(old) == len(old_theta), "K was not held, or two slots are at one place"
    ranked = sorted(old, key=lambda place: abs(old[place]))
    kept = ranked[dropped:]
    assert all(new[place] == old[place] for place in kept), "what is not dropped stays as it is, sign included"
    grown = sorted(set(new) - set(kept))
    assert len(grown) == dropped
    for place in grown:
        again = gradient is not None and place in old  # RigL: dropped and grown at once keeps its value
        assert new[place] == (old[place] if again else 0.0)
    assert torch.equal(slots.signs, slots.signs_at(slots.places))
    if gradient is not None:
        free = torch.ones(slots.total, dtype=torch.bool)
        free[list(new)] = False
        assert_strongest(gradient.abs(), torch.tensor(grown), free.nonzero().view(-1))


# -- one update ---------------------------------------------------------------------------------------------------------------


LSTM = networks.Layer("plain_lstm", lambda: nn.LSTM(11, 8), networks.sequences(), networks.recurrent(1, 1))


@pytest.mark.parametrize(("method", "compute"), [(SET, "auto"), (RigL, "dense"), (RigL, "sparse")])
@pytest.mark.parametrize("layer", [*networks.LAYERS, LSTM], ids=str)
def test_one_update_of_every_layer(layer: networks.Layer, method: type[SparseTraining], compute: str) -> None:
    net = sparsify(layer.build().double(), 0.3, target_modules=layer.target, compute=compute)
    twin = layer.build().double()
    optimizer = adam(net.parameters())
    between = stepped_by_hand(net, optimizer)
    callback = method(**EVERY_OTHER, check_invariants=True)
    callback.attach(net, optimizer, total_steps=1000)
    inputs = layer.feed(torch.float64)
    for step in range(4):
        dense_twin(twin, net).zero_grad()
        networks.loss_of(twin(*inputs)).backward()
        optimizer.zero_grad()
        networks.loss_of(net(*inputs)).backward()
        optimizer.step()
        if step != 1:
            continue
        for converted, before in zip(converted_tensors(net), between, strict=True):
            slots, theta = converted.slots, converted.theta.detach()
            fraction = 0.4 / 2 * (1 + math.cos(math.pi / 1000)) if method is RigL else 0.4
            gradient = twin.get_parameter(converted.name).grad.reshape(-1) if method is RigL else None
            check_update(slots, theta, before, round(fraction * slots.count), gradient)
            reborn = slots.born == 1
            assert reborn.any()
            for value, moment in zip(before[2:], _moments(optimizer, converted.theta), strict=True):
                assert not moment[reborn].any() and torch.equal(moment[~reborn], value[~reborn])


def _moments(optimizer: optim.Optimizer, theta: Tensor) -> list[Tensor]:
    return [value for _, value in sorted(optimizer.state[theta].items()) if value is not None and value.shape == theta.shape]


@pytest.mark.parametrize("connectivity", [0.3, 0.7, 1.0])
def test_set_draws_what_the_oracle_draws(connectivity: float) -> None:
    net = mlp(connectivity)
    slow = oracle_of(net)
    optimizer = sgd(net.parameters())
    between = stepped_by_hand(net, optimizer)
    SET(**ALWAYS, seed=SEED).attach(net, optimizer)
    for step, batch in enumerate(batches(5)):
        train(net, optimizer, [batch])
        for tensor, (values, *_) in zip(slow.tensors, between, strict=True):
            theta = values.numpy()
            count = min(round(0.4 * len(theta)), tensor.total - 1)
            tensor.theta = np.ones_like(theta)
            tensor.theta[np.argsort(np.abs(theta), kind="stable")[:count]] = -1.0
            oracle.Network([tensor], SEED).rewire(step)
            tensor.theta = np.where(np.array(tensor.born) == step, np.float32(0), theta)
        for tensor, slots, fast in zip(slow.tensors, all_slots(net), thetas(net), strict=True):
            assert slots.places.tolist() == tensor.places
            assert np.array_equal(fast.detach().numpy(), tensor.theta)


def test_set_grows_uniformly() -> None:
    net = sparsify(nn.Linear(20, 20, bias=False), 40, seed=SEED)
    theta, slots = thetas(net)[0], all_slots(net)[0]
    optimizer = optim.SGD([theta], lr=0.1)
    SET(drop_fraction=0.5, rewire_every_n_steps=1, rewire_until=None).attach(net, optimizer)
    births = torch.zeros(slots.total)
    for step in range(300):
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
        births[slots.places[slots.born == step]] += 1
    stays = slots.places[slots.born < 0]  # newborns are the weakest: these 20 never go
    assert len(stays) == 20 and births[stays].sum() == 0
    free = torch.ones(slots.total, dtype=torch.bool)
    free[stays] = False
    assert births.sum() == 300 * 20
    assert chi_square_p(births[free]) > 1e-3


@pytest.mark.parametrize("method", [SET, RigL])
def test_free_signs_survive(method: type[SparseTraining]) -> None:
    net = mlp()
    optimizer = sgd(net.parameters())
    method(**{**EVERY_OTHER, "drop_fraction": 0.2}, check_invariants=True).attach(net, optimizer, total_steps=100)
    train(net, optimizer, batches(40))
    theta = thetas(net)[0]
    assert int((theta < 0).sum()) > 2
    place, value = all_slots(net)[0].places[theta < -0.01], theta.detach()[theta < -0.01].clone()
    train(net, optimizer, batches(1))  # no update in this step
    now = dict(zip(all_slots(net)[0].places.tolist(), theta.tolist(), strict=True))
    assert len(place) > 2
    assert any(now[p] < 0 and now[p] != v for p, v in zip(place.tolist(), value.tolist(), strict=True))


# -- RigL's dense gradient ------------------------------------------------------------------------------------------------------


class Counting(RigL):
    """Notes how many connections each update drops."""

    def grow(self, items: Sequence[Stepped], weakest: Sequence[Tensor]) -> list[Tensor]:
        self.dropped = [*getattr(self, "dropped", []), (items[0].tensor.step, [len(slots) for slots in weakest])]
        return super().grow(items, weakest)


def test_the_fraction_falls_as_a_cosine() -> None:
    net = mlp(0.5)
    optimizer = sgd(net.parameters())
    callback = Counting(drop_fraction=0.3, rewire_every_n_steps=4, rewire_until=0.75)
    callback.attach(net, optimizer, total_steps=20)
    train(net, optimizer, batches(20))
    # done = 3, 7, 11 of 15 (K = 60 and 30); the next would be 15, where it ends
    cosines = [0.15 * (1 + math.cos(math.pi * done / 15)) for done in (3, 7, 11)]
    assert callback.dropped == [(d, [round(c * 60), round(c * 30)]) for d, c in zip((3, 7, 11), cosines, strict=True)]
    assert [c for _, (c, _) in callback.dropped] == [16, 10, 3]


def two_passes(net: nn.Module, optimizer: optim.Optimizer, data: Any) -> None:
    loss_of(net, data[0]).backward()
    loss_of(net, data[1]).backward()


def zeroed(net: nn.Module, optimizer: optim.Optimizer, data: Any) -> None:
    """What an earlier pass left is cleared by zeros instead of None."""
    (100 * loss_of(net, data[2])).backward()
    optimizer.zero_grad(set_to_none=False)
    two_passes(net, optimizer, data)


def skipped(net: nn.Module, optimizer: optim.Optimizer, data: Any) -> None:
    """What GradScaler does with infinities: no step, and the next batch."""
    (math.inf * loss_of(net, data[2])).backward()
    optimizer.zero_grad()
    two_passes(net, optimizer, data)


def reentrant(net: nn.Module, optimizer: optim.Optimizer, data: Any) -> None:
    """Checkpointed activations: a backward pass within the backward pass, for each use of the layers."""
    total = sum((checkpoint(net, x.double().requires_grad_(), use_reentrant=True) - y).square().mean() for x, y in data[:2])
    total.backward()


def penalized(net: nn.Module, optimizer: optim.Optimizer, data: Any) -> None:
    """A gradient with respect to the input on the way."""
    x, y = (part.double() for part in data[0])
    x.requires_grad_()
    loss = (net(x) - y).square().mean()
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    (loss + slope.square().sum()).backward()
    loss_of(net, data[1]).backward()


def used_twice(net: nn.Module, optimizer: optim.Optimizer, data: Any) -> None:
    (loss_of(net, data[0]) + loss_of(net, data[1])).backward()


@pytest.mark.parametrize("compute", ["dense", "sparse"])
@pytest.mark.parametrize("passes", [two_passes, zeroed, skipped, reentrant, penalized, used_twice])
def test_the_gradient_is_that_of_the_whole_step(passes: Callable[..., None], compute: str) -> None:
    net, twin = mlp(compute=compute).double(), plain_mlp().double()
    optimizer = adam(net.parameters())
    between = stepped_by_hand(net, optimizer)
    RigL(**EVERY_OTHER, check_invariants=True).attach(net, optimizer, total_steps=1000)
    data = batches(5)
    train(net, optimizer, data[:1])
    dense_twin(twin, net)
    for used, held in ((net, optimizer), (twin, adam(twin.parameters()))):
        held.zero_grad()
        passes(used, held, data[1:])
    optimizer.step()
    for converted, before in zip(converted_tensors(net), between, strict=True):
        count = round(0.2 * (1 + math.cos(math.pi / 1000)) * converted.slots.count)
        gradient = twin.get_parameter(converted.name).grad.reshape(-1)
        check_update(converted.slots, converted.theta.detach(), before, count, gradient)


@pytest.mark.parametrize("method", [SET, RigL])
def test_sparse_and_dense_compute_rewire_alike(method: type[SparseTraining]) -> None:
    found = []
    for compute in ("dense", "sparse"):
        net = mlp(compute=compute).double()
        optimizer = sgd(net.parameters())
        method(**EVERY_OTHER).attach(net, optimizer, total_steps=100)
        train(net, optimizer, batches(12))
        found.append((thetas(net), all_slots(net)))
    for a, b, slots_a, slots_b in zip(found[0][0], found[1][0], found[0][1], found[1][1], strict=True):
        assert torch.equal(slots_a.places, slots_b.places)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class Largest(TorchDispatchMode):
    """Notes which of these sizes an operator's result has."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.seen = sizes, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen |= {part.numel() for part in networks.tensors_in(result)} & self.sizes
        return result


@pytest.mark.skipif(not kernels.available(), reason="no compiled kernels here")
def test_nothing_dense_between_updates_and_nothing_dense_stays() -> None:
    torch.manual_seed(0)
    net = sparsify(nn.Sequential(nn.Linear(37, 29), nn.ReLU(), nn.Linear(29, 31)), 0.1, compute="sparse")
    sizes = {slots.total for slots in all_slots(net)}
    optimizer = adam(net.parameters())
    callback = RigL(drop_fraction=0.3, rewire_every_n_steps=3, rewire_until=None)
    callback.attach(net, optimizer, total_steps=100)
    for step in range(9):
        x = torch.randn(5, 37)
        with Largest(sizes) as mode:
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
        assert mode.seen == (sizes if step % 3 == 2 else set()), step
        if step not in (2, 3, 8):
            continue
        held = [t for t in gc.get_objects() if isinstance(t, Tensor) and t.numel() in sizes and t.device.type == "cpu"]
        assert not held, step


def test_a_layer_without_a_gradient_in_this_step() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(12, 6), nn.Linear(12, 6)
            self.both = True

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) if self.both else self.a(x)

    net = sparsify(Skipping(), 0.3)
    optimizer = sgd(net.parameters())
    RigL(**ALWAYS).attach(net, optimizer, total_steps=100)
    for step, batch in enumerate(batches(6)):
        net.both = step % 2 == 0
        optimizer.zero_grad(set_to_none=False)
        loss_of(net, batch).backward()
        optimizer.step()
    born_a, born_b = (set(slots.born.tolist()) for slots in all_slots(net))
    assert 5 in born_a
    assert not born_b & {1, 3, 5} and 4 in born_b


def test_two_networks_and_one_callback() -> None:
    nets = [mlp(seed=SEED), mlp(seed=SEED + 1)]
    optimizers = [sgd(net.parameters()) for net in nets]
    callback = RigL(**ALWAYS)
    for net, optimizer in zip(nets, optimizers, strict=True):
        callback.attach(net, optimizer, total_steps=100)
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, batches(2))
        assert all(slots.last_birth() == 1 for slots in all_slots(net))


def test_torch_compile_is_refused_at_the_update() -> None:
    net = mlp()
    optimizer = sgd(net.parameters())
    RigL(**EVERY_OTHER).attach(net, optimizer, total_steps=100)
    compiled = torch.compile(net, backend="eager")
    train(compiled, optimizer, batches(1))
    with pytest.raises(RuntimeError, match=r"RigL: `0\.weight` .* step 1.*torch\.compile"):
        train(compiled, optimizer, batches(1))


def test_a_compiled_network_follows_set() -> None:
    net = mlp(compute="sparse")
    optimizer = sgd(net.parameters())
    SET(**EVERY_OTHER).attach(net, optimizer)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for batch in batches(4):
        train(compiled, optimizer, [batch])
        torch.testing.assert_close(compiled(batch[0]), dense_twin(plain_mlp(), net)(batch[0]))


# -- fixed random connectivity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("signs", ["fixed", "free"])
def test_fixed_random_is_masked_training(signs: str, make: Callable[[Any], optim.Optimizer]) -> None:
    net = mlp().double()
    twin = dense_twin(plain_mlp().double(), net)
    optimizer, twin_optimizer = make(net.parameters()), make(twin.parameters())
    before = [slots.places.clone() for slots in all_slots(net)]
    FixedRandom(signs=signs, check_invariants=True).attach(net, optimizer)
    masks = [torch.zeros(s.total, dtype=torch.float64).index_fill_(0, s.places, 1).view(s.shape) for s in all_slots(net)]
    constant = [
        torch.zeros(s.total, dtype=torch.float64).index_copy_(0, s.places, s.signs.double()).view(s.shape)
        for s in all_slots(net)
    ]
    weights = [twin.get_parameter(converted.name) for converted in converted_tensors(net)]
    clamped = 0
    for batch in batches(25):
        train(net, optimizer, [batch])
        twin_optimizer.zero_grad()
        loss_of(twin, batch).backward()
        for weight, mask in zip(weights, masks, strict=True):
            weight.grad *= mask
        twin_optimizer.step()
        if signs == "fixed":
            for weight, sign in zip(weights, constant, strict=True):
                clamped += int((weight.data * sign < 0).sum())
                weight.data[weight.data * sign < 0] = 0.0
        for converted, weight in zip(converted_tensors(net), weights, strict=True):
            torch.testing.assert_close(getattr(converted.module, "weight") + 0, weight.data, rtol=1e-9, atol=1e-12)  # noqa: B009
    assert all(torch.equal(slots.places, places) for slots, places in zip(all_slots(net), before, strict=True))
    if signs == "fixed":
        assert clamped > 5 and min(float(theta.min()) for theta in thetas(net)) == 0.0
    else:
        assert min(float(theta.min()) for theta in thetas(net)) < 0


# -- Trainer, Fabric, plain loop; resume ----------------------------------------------------------------------------------------

KINDS: dict[str, Callable[..., SparseTraining]] = {
    "fixed": lambda *args, **options: FixedRandom(*args, **options),
    "free": lambda *args, **options: FixedRandom(*args, signs="free", **options),
    "set": lambda *args, **options: SET(*args, **{**EVERY_OTHER, "rewire_every_n_steps": 3, "rewire_until": 0.6}, **options),
    "rigl": lambda *args, **options: RigL(*args, **{**EVERY_OTHER, "rewire_every_n_steps": 3, "rewire_until": 0.6}, **options),
}
SETTING: dict[str, Any] = {"distribution": "uniform", "seed": SEED, "check_invariants": True}


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("kind", KINDS)
def test_trainer_fabric_and_plain_loop_are_equal(kind: str, make: Callable[[Any], optim.Optimizer]) -> None:
    steps, found = 20, []
    module = Regression(make, steps)
    runner = trainer(KINDS[kind](0.3, **SETTING))
    runner.fit(module)
    found.append(state_of(module, runner.optimizers[0]))

    callback = KINDS[kind](0.3, **SETTING)
    net = callback.prepare(plain_mlp())
    optimizer = make(net.parameters())
    callback.attach(net, optimizer, total_steps=steps)
    train(net, optimizer, batches(steps))
    found.append(state_of(net, optimizer))

    callback = KINDS[kind](0.3, **SETTING)
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
    net = callback.prepare(plain_mlp())
    optimizer = make(net.parameters())
    callback.attach(net, optimizer, total_steps=steps)
    wrapped, wrapped_optimizer = fabric.setup(net, optimizer)
    for batch in batches(steps):
        wrapped_optimizer.zero_grad()
        fabric.backward(loss_of(wrapped, batch))
        wrapped_optimizer.step()
    found.append(state_of(net, optimizer))
    for other in found[1:]:
        assert_equal_states(found[0], other)
    births = {birth for slots in all_slots(net) for birth in slots.born.tolist()}
    assert max(births) == {"set": 11, "rigl": 8}.get(kind, -1)  # (RigL's cosine has come to less than one connection)


class ByStep(Regression):
    """The batch is chosen by the step: a plain data loader does not remember where it was."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.net, batches(30)[self.trainer.global_step])

    def train_dataloader(self) -> Any:
        return DataLoader(batches(10), batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_runs_go_on_exactly(kind: str, tmp_path: Path) -> None:
    def fit(folder: str, ckpt_path: Any = None) -> list[Tensor]:
        module = ByStep(adam)
        saver = ModelCheckpoint(
            tmp_path / folder, every_n_train_steps=1, save_top_k=-1, filename="{step:02d}", auto_insert_metric_name=False
        )
        callbacks = [KINDS[kind](0.3, **SETTING), *([saver] if ckpt_path is None else [])]
        runner = trainer(*callbacks, max_epochs=3, enable_checkpointing=ckpt_path is None)
        runner.fit(module, ckpt_path=ckpt_path)
        return state_of(module, runner.optimizers[0])

    whole = fit("whole")
    # 8: the very next step is an update; 13: in the middle; 24: frozen since step 18
    for step in (8, 13, 24):
        assert_equal_states(whole, fit(f"from_{step}", tmp_path / "whole" / f"{step:02d}.ckpt"))
    last = torch.load(tmp_path / "whole" / "24.ckpt", weights_only=False)["state_dict"]
    end = torch.load(tmp_path / "whole" / "30.ckpt", weights_only=False)["state_dict"]
    for name, value in last.items():
        if name.endswith((".places", ".born")):
            assert torch.equal(value, end[name])  # frozen
            assert int(end[name.replace(".places", ".born")].max()) == {"set": 17, "rigl": 14}.get(kind, -1)


@pytest.mark.parametrize("at", [8, 12, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_loop_resumes_exactly(kind: str, at: int) -> None:
    data = batches(30)

    def start() -> tuple[nn.Module, optim.Optimizer, Any]:
        callback = KINDS[kind](0.3, **SETTING)
        net = callback.prepare(plain_mlp())
        optimizer = adam(net.parameters())
        return net, optimizer, callback.attach(net, optimizer, total_steps=30)

    net, optimizer, rewiring = start()
    train(net, optimizer, data[:at])
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), rewiring.state_dict()))
    train(net, optimizer, data[at:])
    again, second, handle = start()
    train(again, second, data[:1])  # a loop at work: what was planned for its next steps is not what the loaded ones need
    for part, state in zip((again, second, handle), saved, strict=True):
        part.load_state_dict(state)
    train(again, second, data[at:])
    assert_equal_states(state_of(net, optimizer), state_of(again, second))


def test_a_state_is_loaded_under_fabric() -> None:
    def start() -> tuple[Any, Any, RigL]:
        callback = RigL(**{**EVERY_OTHER, "rewire_every_n_steps": 3}, seed=SEED)
        fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
        net = mlp()
        return *fabric.setup(net, sgd(net.parameters())), callback

    net, optimizer, callback = start()
    train(net, optimizer, batches(2))
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), callback.state_dict()))
    train(net, optimizer, batches(3))
    again, second, other = start()
    for part, state in zip((again, second, other), saved, strict=True):
        part.load_state_dict(state)
    train(again, second, batches(3))
    assert_equal_states(state_of(net), state_of(again))


def test_the_checkpoint_of_another_method(tmp_path: Path) -> None:
    first = trainer(DeepR(0.3, l1=0.1, **SETTING))
    first.fit(Regression(sgd, 10))
    first.save_checkpoint(tmp_path / "deepr.ckpt")
    callback, module = SET(0.3, **EVERY_OTHER, **SETTING), Regression(sgd, 10)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        trainer(callback, max_epochs=2).fit(module, ckpt_path=tmp_path / "deepr.ckpt")
    recorded = torch.load(tmp_path / "deepr.ckpt", weights_only=False)["state_dict"]
    last = max(int(value.max()) for name, value in recorded.items() if name.endswith(".born"))
    assert last >= 8
    assert all(tensor.step == last + 11 for tensor in callback._tensors)  # it repeats no draw
    assert min(slots.last_birth() for slots in all_slots(module)) > last


@pytest.mark.parametrize("method", [DeepR, FixedRandom])
def test_constant_signs_after_free_ones(method: type[SparseTraining]) -> None:
    net = mlp()
    optimizer = sgd(net.parameters())
    rewiring = SET(**EVERY_OTHER, seed=SEED).attach(net, optimizer)
    train(net, optimizer, batches(20))
    rewiring.remove()
    below = int((thetas(net)[0] < 0).sum())
    assert below > 2
    with pytest.warns(UserWarning, match=rf"{method.__name__}: theta < 0 in `0\.weight` \({below} of 36\).*init=\"largest\""):
        method().attach(net, optimizer)
    # the advice keeps them
    values = {name: (p, v) for name, (_, p, v) in lightning_deepr.connections(net).items()}
    again = sparsify(densify(net), {"0": 36, "2": 18}, init="largest")
    for name, (_, places, weights) in lightning_deepr.connections(again).items():
        old = {p: v for p, v in zip(*(part.tolist() for part in values[name]), strict=True) if v}
        new = {p: v for p, v in zip(places.tolist(), weights.tolist(), strict=True) if v}
        assert old == new
    assert all(bool((theta >= 0).all()) for theta in thetas(again))


@pytest.mark.parametrize("method", [SET, RigL])
def test_an_average_follows(method: type[SparseTraining]) -> None:
    net = mlp()
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = sgd(net.parameters())
    method(**EVERY_OTHER).attach(net, optimizer, total_steps=100)
    for step, batch in enumerate(batches(6)):
        train(net, optimizer, [batch])
        for slots, mine, theta in zip(all_slots(net), all_slots(average.module), thetas(average.module), strict=True):
            assert torch.equal(slots.places, mine.places) and torch.equal(slots.signs, mine.signs)
            if step % 2:
                assert not theta[slots.born == step].any() and (slots.born == step).any()
        average.update_parameters(net)


def test_sparsify_of_a_callback_is_sparsify() -> None:
    options: dict[str, Any] = {
        "distribution": "uniform",
        "seed": SEED,
        "init": "deepr",
        "target_modules": ["0"],
        "compute": "dense",
    }
    assert_equal_states(state_of(SET(0.3, **options).prepare(plain_mlp())), state_of(sparsify(plain_mlp(), 0.3, **options)))
    with pytest.raises(ValueError, match="expects a converted module"):
        SET().prepare(plain_mlp())


def test_statistics_tell_newborns_from_mature_connections() -> None:
    net = sparsify(nn.Linear(20, 20, bias=False), 40, seed=SEED)
    (theta,) = thetas(net)
    optimizer = optim.SGD([theta], lr=0.1)
    callback = SET(drop_fraction=0.25, rewire_every_n_steps=2, rewire_until=None)
    callback.attach(net, optimizer)
    for _ in range(4):  # the second update drops those that the first has grown: they are still 0
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
    assert callback.statistics() == {
        "deepr/weight/turnover": 20 / 4 / 40, "deepr/weight/newborn_deaths": 10 / 4, "deepr/weight/mature_deaths": 10 / 4
    }  # fmt: skip


class Doubling(SET):
    """Broken: two slots at one place."""

    def grow(self, items: Sequence[Stepped], weakest: Sequence[Tensor]) -> list[Tensor]:
        reborn = super().grow(items, weakest)
        items[0].tensor.slots.places[0] = items[0].tensor.slots.places[1]
        items[0].tensor.slots.signs[0] = items[0].tensor.slots.signs[1]
        return reborn


def test_check_invariants_finds_what_is_broken() -> None:
    net = mlp()
    optimizer = sgd(net.parameters())
    Doubling(**ALWAYS, check_invariants=True).attach(net, optimizer)
    with pytest.raises(RuntimeError, match=r"`0\.weight`, step 0: two slots are at one place"):
        train(net, optimizer, batches(1))


# -- schedules per tensor -------------------------------------------------------------------------------------------------------


def free_step(net: nn.Module, lr: float = 0.1, steps: int = 1, **options: Any) -> list[Tensor]:
    """What a DeepR without gradient does to each theta in the last of some steps."""
    optimizer = optim.SGD(thetas(net), lr=lr)
    DeepR(**options, seed=SEED).attach(net, optimizer, total_steps=10)
    for _ in range(steps):
        before = [theta.detach().clone() for theta in thetas(net)]
        for theta in thetas(net):
            theta.grad = torch.zeros_like(theta)
        optimizer.step()
    return [after.detach() - old for after, old in zip(thetas(net), before, strict=True)]


def test_schedules_per_tensor() -> None:
    net = mlp().double()
    for theta in thetas(net):
        theta.data += 1.0  # nothing goes dormant
    first, second = free_step(net, steps=4, l1={"0": LinearDecay(0.2, 0.1), "2": 0.3})
    torch.testing.assert_close(first, torch.full_like(first, -0.1 * 0.17))  # progress .3 in the fourth step
    torch.testing.assert_close(second, torch.full_like(second, -0.1 * 0.3))

    net = sparsify(nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60), nn.Linear(60, 60)), 0.5, seed=SEED).double()
    for theta in thetas(net):
        theta.data += 5.0
    moved = free_step(net, l1=0.0, temperature={"0": LrPower(2.0, 1), "1": 0.0, "[2]": lambda lr: 8 * lr})
    assert not moved[1].any()
    for found, temperature in ((moved[0], 0.2), (moved[2], 0.8)):
        expected = math.sqrt(2 * 0.1 * temperature)
        assert abs(float(found.std()) / expected - 1) < 4 / math.sqrt(2 * found.numel())


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (lambda _: math.nan, ValueError, "found nan"),
        (lambda _: -1e-3, ValueError, "found -0.001"),
        (lambda _: math.inf, ValueError, "found inf"),
        (lambda _: torch.tensor(math.nan), ValueError, "found nan"),
        (lambda _: torch.tensor(-0.5), ValueError, "found -0.5"),
        (lambda _: None, TypeError, "expected a number, found None"),
        (lambda _: torch.ones(3), TypeError, "expected a number"),
        (lambda _: "1", TypeError, "expected a number"),
    ],
)
@pytest.mark.parametrize("argument", ["l1", "temperature"])
@pytest.mark.parametrize("in_a_dict", [False, True])
def test_a_schedule_that_returns_nonsense(
    value: Any, error: type[Exception], words: str, argument: str, in_a_dict: bool
) -> None:
    given = {"0": 0.0, "2": value} if in_a_dict else value
    name = argument if argument == "temperature" and not in_a_dict else f"{argument} of `{'2' if in_a_dict else '0'}.weight`"
    with pytest.raises(error, match=f"{name}: .*{words}"):
        free_step(mlp(), **{argument: given})


@pytest.mark.parametrize("argument", ["l1", "temperature"])
def test_dicts_that_fit_no_tensor(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"{argument}: no key matches `2\.weight`"):
        free_step(mlp(), **{argument: {"0": 0.0}})
    with pytest.raises(ValueError, match=argument):
        free_step(mlp(), **{argument: {"0": 0.0, "2": 0.0, "fc9": 0.0}})
    with pytest.raises(ValueError, match=rf"{argument}\['0'\]"):
        free_step(mlp(), **{argument: {"0": -1.0, "2": 0.0}})


# -- bad input ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: FixedRandom(signs="none"), ValueError, 'signs: expected "fixed" or "free"'),
        (lambda: SET(drop_fraction=1.0), ValueError, "drop_fraction"),
        (lambda: RigL(drop_fraction=-0.1), ValueError, "drop_fraction"),
        (lambda: RigL(drop_fraction=math.nan), ValueError, "drop_fraction"),
        (lambda: SET(drop_fraction=True), TypeError, "drop_fraction"),  # type: ignore[arg-type]
        (lambda: SET(rewire_every_n_steps=0), ValueError, "rewire_every_n_steps"),
        (lambda: RigL(rewire_until=1.5), ValueError, "rewire_until"),
        (lambda: FixedRandom(0.1, distribution="erdos"), ValueError, "distribution"),
        (lambda: lightning_deepr.Nope, AttributeError, "no attribute 'Nope'; its callbacks are DeepR, FixedRandom"),
    ],
)
def test_unknown_methods_and_values(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("method", [SET, RigL])
def test_a_fraction_of_a_training_of_unknown_length(method: type[SparseTraining]) -> None:
    net = mlp()
    with pytest.raises(ValueError, match=r"rewire_until is a fraction.*total_steps"):
        method().attach(net, sgd(net.parameters()))


def test_the_command_line_takes_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_deepr import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-deepr"])

    def made(*arguments: str) -> pl.Callback:
        return cli.train(["--config", "mnist_quickstart", *arguments], run=False).trainer.callbacks[0]

    Path("set.yaml").write_text(
        "sparsity:\n  class_path: lightning_deepr.SET\n  init_args: {connectivity: 0.02, drop_fraction: 0.2}\n"
    )
    found: Any = made("--config", "set.yaml", "--sparsity.connectivity", ".05", "--seed_everything", "7")
    assert type(found) is SET
    assert (found.connectivity, found.drop_fraction, found.seed) == (0.05, 0.2, 7)
    found = made("--sparsity", "RigL", "--sparsity.drop_fraction", ".4")  # what the recipe has for DeepR alone is dropped
    assert type(found) is RigL
    assert (found.connectivity, found.drop_fraction, found.distribution) == (2662, 0.4, "deepr")
    Path("dicts.yaml").write_text(
        """
sparsity:
  class_path: lightning_deepr.DeepR
  init_args:
    l1:
      fc1: {class_path: lightning_deepr.LinearDecay, init_args: {start: 2.0e-4, end: 1.0e-5}}
      "fc[23]": 1.0e-4
    temperature:
      fc1: {class_path: lightning_deepr.LrPower, init_args: {coefficient: 1.0e-12, power: 2}}
      "fc[23]": 0.0
"""
    )
    found = made("--config", "dicts.yaml", "--sparsity.connectivity", ".05")
    assert type(found) is DeepR
    assert (found.l1["fc1"].start, found.l1["fc1"].end, found.l1["fc[23]"]) == (2e-4, 1e-5, 1e-4)
    assert (found.temperature["fc1"].coefficient, found.temperature["fc[23]"]) == (1e-12, 0.0)
    for arguments in (["--sparsity", "Nope"], ["--sparsity.class_path=Nope"]):
        with pytest.raises(SystemExit, match=r"no method 'Nope'\. Methods: DeepR, FixedRandom"):
            made(*arguments)


def test_an_unknown_class_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_deepr import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-deepr"])
    Path("nope.yaml").write_text("sparsity:\n  class_path: lightning_deepr.Nope\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        cli.train(["--config", "mnist_quickstart", "--config", "nope.yaml"], run=False)
    assert "no attribute 'Nope'; its callbacks are DeepR, FixedRandom" in capsys.readouterr().err
