"""Updates of SET and RigL on K slots against oracles from the papers' text, and the dense gradient that RigL needs."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim
from torch.utils.checkpoint import checkpoint

from lightning_deepr import SparseTraining, kernels, sparsify
from lightning_deepr.training.tracked import Stepped
from lightning_deepr.weights.find import converted_tensors
from tests.helpers import layers, oracle
from tests.helpers.comparisons import ALWAYS, EVERY_OTHER, dense_twin
from tests.helpers.optimizers import adam, sgd
from tests.helpers.plain import PlainRigL as RigL
from tests.helpers.plain import PlainSET as SET
from tests.helpers.regression import SEED, batches, loss_of, mlp, plain_mlp, train
from tests.helpers.state import all_slots, oracle_of, thetas
from tests.helpers.statistics import chi_square_p
from tests.helpers.tensors_made import Recording

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def stepped_by_hand(net: nn.Module, optimizer: optim.Optimizer) -> list[list[Tensor]]:
    """Record theta, places and optimizer state of each tensor after the optimizer's step. Call it before ``attach``."""
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


def assert_strongest(score: Tensor, chosen: Tensor, others: Tensor) -> None:
    """Check that no rejected place has a higher score than a chosen one, up to rounding."""
    if len(chosen) and len(others):
        assert score[chosen].min() >= score[others].max() - 1e-9 * score.max()


def check_update(slots: Any, theta: Tensor, before: Sequence[Tensor], dropped: int, gradient: Tensor | None) -> None:
    """Check one update of a tensor against the papers: the dropped, the grown and their starting values.

        Args:
    slots, theta: the tensor after the update.
    before: theta and places after the optimizer's step, before the update.
    dropped: the number of dropped connections.
    gradient: the flat gradient of the dense weight, for RigL; None for SET.
    """
    old_theta, old_places, *_ = before
    old, new = (dict(zip(p.tolist(), t.tolist(), strict=True)) for p, t in ((old_places, old_theta), (slots.places, theta)))
    assert len(new) == len(old) == len(old_theta), "K was not held, or two slots are at one place"
    ranked = sorted(old, key=lambda place: abs(old[place]))
    kept = ranked[dropped:]
    assert all(new[place] == old[place] for place in kept), "a connection that is not dropped has changed"
    grown = sorted(set(new) - set(kept))
    assert len(grown) == dropped
    for place in grown:
        again = (
            gradient is not None and place in old
        )  # RigL: a connection that would be dropped and grown again keeps its value
        assert new[place] == (old[place] if again else 0.0)
    assert torch.equal(slots.signs, slots.signs_at(slots.places))
    if gradient is not None:
        free = torch.ones(slots.total, dtype=torch.bool)
        free[list(new)] = False
        assert_strongest(gradient.abs(), torch.tensor(grown), free.nonzero().view(-1))


# -- one update ---------------------------------------------------------------------------------------------------------------


LSTM = layers.Layer("plain_lstm", lambda: nn.LSTM(11, 8), layers.sequences(), layers.recurrent(1, 1))


@pytest.mark.parametrize(("method", "compute"), [(SET, "auto"), (RigL, "dense"), (RigL, "sparse")])
@pytest.mark.parametrize("layer", [*layers.LAYERS, LSTM], ids=str)
def test_one_update_of_every_layer(layer: layers.Layer, method: type[SparseTraining], compute: str) -> None:
    net = sparsify(layer.build().double(), 0.3, target_modules=layer.target, compute=compute)
    twin = layer.build().double()
    optimizer = adam(net.parameters())
    between = stepped_by_hand(net, optimizer)
    callback = method(**EVERY_OTHER, check_invariants=True)
    callback.attach(net, optimizer, total_steps=1000)
    inputs = layer.feed(torch.float64)
    for step in range(4):
        dense_twin(twin, net).zero_grad()
        layers.loss_of(twin(*inputs)).backward()
        optimizer.zero_grad()
        layers.loss_of(net(*inputs)).backward()
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
    stays = slots.places[slots.born < 0]  # newborns are the weakest: these 20 are never dropped
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


# -- RigL's dense gradient ----------------------------------------------------------------------------------------------------


class Counting(RigL):
    """Record the number of connections that each update drops."""

    def grow(self, items: Sequence[Stepped], weakest: Sequence[Tensor]) -> None:
        self.dropped = [*getattr(self, "dropped", []), (items[0].tensor.step, [len(slots) for slots in weakest])]
        super().grow(items, weakest)


def test_the_fraction_falls_as_a_cosine() -> None:
    net = mlp(0.5)
    optimizer = sgd(net.parameters())
    callback = Counting(drop_fraction=0.3, rewire_every_n_steps=4, rewire_until=0.75)
    callback.attach(net, optimizer, total_steps=20)
    train(net, optimizer, batches(20))
    # done = 3, 7, 11 of 15 (K = 60 and 30); the next update would be at 15, the end
    cosines = [0.15 * (1 + math.cos(math.pi * done / 15)) for done in (3, 7, 11)]
    assert callback.dropped == [(d, [round(c * 60), round(c * 30)]) for d, c in zip((3, 7, 11), cosines, strict=True)]
    assert [c for _, (c, _) in callback.dropped] == [16, 10, 3]


def two_passes(net: nn.Module, optimizer: optim.Optimizer, data: Any) -> None:
    loss_of(net, data[0]).backward()
    loss_of(net, data[1]).backward()


def zeroed(net: nn.Module, optimizer: optim.Optimizer, data: Any) -> None:
    """An earlier pass's gradient is cleared to zeros instead of None."""
    (100 * loss_of(net, data[2])).backward()
    optimizer.zero_grad(set_to_none=False)
    two_passes(net, optimizer, data)


def skipped(net: nn.Module, optimizer: optim.Optimizer, data: Any) -> None:
    """Act as GradScaler does with infinities: skip the step and take the next batch."""
    (math.inf * loss_of(net, data[2])).backward()
    optimizer.zero_grad()
    two_passes(net, optimizer, data)


def reentrant(net: nn.Module, optimizer: optim.Optimizer, data: Any) -> None:
    """Checkpoint activations: each use of the layers has a backward pass within the backward pass."""
    total = sum((checkpoint(net, x.double().requires_grad_(), use_reentrant=True) - y).square().mean() for x, y in data[:2])
    total.backward()


def penalized(net: nn.Module, optimizer: optim.Optimizer, data: Any) -> None:
    """Compute a gradient with respect to the input in between."""
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
        with Recording() as seen:
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
        assert seen.sizes & sizes == (sizes if step % 3 == 2 else set()), step
        if step not in (2, 3, 8):
            continue
        tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.device.type == "cpu"]
        # (a compiled test of this process may have left tensors of symbolic sizes)
        held = [t for t in tensors if type(t.numel()) is int and t.numel() in sizes]
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
