"""Precisions: theta keeps float32 where the weight has fewer bits, and every precision of a Trainer resumes exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from lightning_deepr import (
    SET,
    DeepR,
    FixedRandom,
    L1Shrinkage,
    MagnitudePruning,
    RigL,
    SoftDeepR,
    connections,
    densify,
    load_state_dict,
    save_sparse,
    sparsify,
)
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.crashes import Crash, Crashing
from tests.helpers.optimizers import sgd
from tests.helpers.regression import SEED, batches, loss_of, mlp, plain_mlp, train
from tests.helpers.state import all_slots, assert_equal_states, state_of, thetas
from tests.helpers.trainer import trainer


def adam(params: Any) -> optim.Optimizer:
    return optim.Adam(params, lr=0.02, eps=1e-4)  # 1e-8 is 0 in float16, and torch's own biases would be NaN


STEPS = 200
NARROW = [torch.bfloat16, torch.float16]
narrow = pytest.mark.parametrize("dtype", NARROW, ids=str)


def in_layer_dtype(batch: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return batch[0].to(dtype), batch[1].to(dtype)


def assert_kept_in_full(net: nn.Module, dtype: torch.dtype) -> None:
    """theta and its signs have float32, the weight has the layer's dtype, and everything else has it, too."""
    found = list(converted_tensors(net))
    assert found
    for one in found:
        assert one.theta.dtype == one.slots.signs.dtype == torch.float32
        assert one.slots.weight_dtype == one.slots.whole(one.theta.detach()).dtype == dtype
    mine = {id(one.theta) for one in found}
    assert all(p.dtype == dtype for p in net.parameters() if id(p) not in mine)


# -- the ways in which a network gets fewer bits ----------------------------------------------------------------------------

CASTS: dict[str, Callable[[nn.Module, torch.dtype], nn.Module]] = {
    "to": lambda net, dtype: net.to(dtype),
    "half or bfloat16": lambda net, dtype: net.half() if dtype is torch.float16 else net.bfloat16(),
    "type": lambda net, dtype: net.type(dtype),
    "to, with a device": lambda net, dtype: net.to("cpu", dtype),
    "twice": lambda net, dtype: net.to(torch.float16).to(dtype),
    "through double": lambda net, dtype: net.double().to(dtype),
    "then moved": lambda net, dtype: net.to(dtype).cpu().to("cpu"),
    "one layer after the other": lambda net, dtype: nn.Sequential(*(layer.to(dtype) for layer in net.children())),
}


@narrow
@pytest.mark.feature("Precision: net.bfloat16(), net.half(), before and after the conversion")
@pytest.mark.parametrize("how", CASTS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_theta_keeps_float32_however_a_network_is_cast(how: str, dtype: torch.dtype, when: str, scope: str) -> None:
    """An outside oracle: the L1 term of many steps without gradients. In bfloat16 it is rounded away in every step."""
    net = plain_mlp()
    if when == "before":
        net = CASTS[how](net, dtype)  # type: ignore[assignment]
    sparsify(net, 0.3, scope=scope, seed=SEED)
    if when == "after":
        net = CASTS[how](net, dtype)  # type: ignore[assignment]
    assert_kept_in_full(net, dtype)
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    DeepR(l1=1e-5, scope=scope, rewire_until=0).attach(net, optimizer)
    before = [theta.detach().clone() for theta in thetas(net)]
    for _ in range(STEPS):
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for theta, start in zip(thetas(net), before, strict=True):
        assert theta.grad.dtype == torch.float32
        torch.testing.assert_close(theta.detach(), (start - STEPS * 0.1 * 1e-5).clamp(min=0), rtol=0, atol=1e-5)


def test_casting_back_and_forth_loses_nothing() -> None:
    net = mlp()
    before = state_of(net)
    for cast in (net.half, net.bfloat16, net.float):
        cast()
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(net), strict=True) if a.numel() > 10)
    assert all(slots.narrow is None and slots.weight_dtype == torch.float32 for slots in all_slots(net))
    net.double()
    assert all(theta.dtype == torch.float64 for theta in thetas(net))
    theta = thetas(net)[0]
    net.bfloat16()
    assert thetas(net)[0] is theta and theta.dtype == torch.float32  # the optimizer's parameter stays the same object


def test_parametrizations_of_others_are_cast() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(()))

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.scale

    net = sparsify(nn.Linear(12, 10), 0.3)
    nn.utils.parametrize.register_parametrization(net, "weight", Scaled(), unsafe=True)
    net.bfloat16()
    assert net.parametrizations["weight"][1].scale.dtype == torch.bfloat16  # type: ignore[index, union-attr]
    assert_kept_in_full(net, torch.bfloat16)


# -- compute ----------------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(40, 30), lambda: torch.randn(5, 40)),
    "linear without bias": (lambda: nn.Linear(40, 30, bias=False), lambda: torch.randn(2, 3, 40)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), lambda: torch.randn(2, 4, 9, 9)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: torch.randn(2, 4, 9)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(50, 20)), lambda: torch.randint(50, (6,))),
    "lstm": (lambda: nn.LSTM(12, 16, 2, bidirectional=True), lambda: torch.randn(7, 3, 12)),
    "gru without bias": (lambda: nn.GRU(12, 16, bias=False), lambda: torch.randn(7, 3, 12)),
}


@narrow
@pytest.mark.parametrize("compute", ["dense", "sparse", "auto"])
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_are_those_of_the_dense_layer(layer: str, compute: str, dtype: torch.dtype) -> None:
    """densify gives the weight that the layer computes with, in its own dtype."""
    torch.manual_seed(0)
    make, feed = LAYERS[layer]
    targets = {"target_modules": ["0"]} if layer == "embedding" else {}
    net: Any = sparsify(make(), 0.3, compute=compute, **targets).to(dtype)
    x = feed()
    x = x.to(dtype) if x.is_floating_point() else x
    dense = densify(copy.deepcopy(net))
    assert all(p.dtype == dtype for p in dense.parameters())
    found, expected = net(x), dense(x)
    if isinstance(found, tuple):
        assert found[1][0].dtype == dtype
        found, expected = found[0], expected[0]
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    dy = torch.randn_like(expected)
    with pytest.warns(UserWarning, match="no callback rewires it"):
        found.backward(dy)
    expected.backward(dy)
    for one in converted_tensors(net):
        assert one.theta.grad is not None and one.theta.grad.dtype == torch.float32
        weight = dict(dense.named_parameters())[one.name]
        assert weight.grad is not None
        wanted = weight.grad.float().reshape(-1)[one.slots.places] * one.slots.signs
        assert float((one.theta.grad - wanted).norm() / wanted.norm().clamp(min=1e-6)) < 0.03


@pytest.mark.parametrize("compute", ["dense", "sparse"])
@pytest.mark.parametrize("bias", [True, False])
def test_an_input_of_another_dtype_is_refused_as_by_torch(compute: str, bias: bool) -> None:
    net = sparsify(nn.Linear(12, 10, bias=bias), 0.3, compute=compute).bfloat16()
    with pytest.raises(RuntimeError) as theirs:
        nn.Linear(12, 10, bias=bias).bfloat16()(torch.randn(2, 12))
    with pytest.raises(RuntimeError) as ours:
        net(torch.randn(2, 12))
    assert str(ours.value) == str(theirs.value)


# -- copies and files -------------------------------------------------------------------------------------------------------


@narrow
def test_copies_and_files_keep_both_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    net = mlp().to(dtype)
    train_with(net, DeepR(l1=0.1, seed=SEED), dtype, 8)
    x = torch.randn(4, 12).to(dtype)

    replica = copy.deepcopy(net)
    assert_kept_in_full(replica, dtype)
    assert_equal_states(state_of(replica), state_of(net))

    torch.save(net.state_dict(), tmp_path / "net.pt")
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    assert state["0.parametrizations.weight.0.weight_dtype"].dtype == dtype  # the record of the weight's dtype
    other = mlp(seed=9).to(dtype)
    other.load_state_dict(state)
    assert_equal_states(state_of(other), state_of(net))
    for restored in (other, load_state_dict(plain_mlp().to(dtype), state)):
        assert_kept_in_full(restored, dtype)
        assert torch.equal(restored(x), net(x))

    again = load_state_dict(plain_mlp().to(dtype), save_sparse(net, tmp_path / "net.safetensors"))
    assert_kept_in_full(again, dtype)
    assert torch.equal(again(x), net(x))
    for (_, places, values), found in zip(connections(again).values(), connections(net).values(), strict=True):
        order = found[1].argsort()
        assert values.dtype == found[2].dtype == dtype
        assert torch.equal(places, found[1][order]) and torch.equal(values, found[2][order])


def test_a_checkpoint_in_float32_loads_into_a_bfloat16_network() -> None:
    net, other = mlp(), mlp(seed=9).bfloat16()
    other.load_state_dict(net.state_dict())
    for a, b in zip(thetas(net), thetas(other), strict=True):
        assert torch.equal(a, b)


def test_an_average_follows_in_float32() -> None:
    net = mlp().bfloat16()
    average = AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = adam(net.parameters())
    DeepR(l1=0.3, seed=SEED).attach(net, optimizer)
    for batch in batches(6):
        optimizer.zero_grad()
        loss_of(net, in_layer_dtype(batch, torch.bfloat16)).backward()
        optimizer.step()
        average.update_parameters(net)
    for one, two in zip(all_slots(net), all_slots(average), strict=True):
        assert torch.equal(one.places, two.places) and two.weight_dtype == torch.bfloat16
    assert all(theta.dtype == torch.float32 for theta in thetas(average))


# -- every method -----------------------------------------------------------------------------------------------------------

METHODS: dict[str, Callable[[], Any]] = {
    "DeepR": lambda: DeepR(0.3, l1=0.1, temperature=1e-5),
    "DeepR, one K": lambda: DeepR(0.3, l1=0.1, scope="global"),
    "SoftDeepR": lambda: SoftDeepR(0.3, l1=0.05, temperature=1e-5),
    "SET": lambda: SET(0.3, rewire_every_n_steps=3),
    "RigL": lambda: RigL(0.3, rewire_every_n_steps=3),
    "FixedRandom": lambda: FixedRandom(0.3),
    "MagnitudePruning": lambda: MagnitudePruning(0.3, prune_from=0.1, prune_until=0.8, prunings=4),
    "L1Shrinkage": lambda: L1Shrinkage(0.3, l1=0.05),
}


def train_with(net: nn.Module, method: Any, dtype: torch.dtype, steps: int) -> None:
    optimizer = adam(net.parameters())
    method.check_invariants = True
    method.attach(net, optimizer, total_steps=steps)
    train(net, optimizer, [in_layer_dtype(batch, dtype) for batch in batches(steps)])


@narrow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains(method: str, dtype: torch.dtype) -> None:
    made = METHODS[method]()
    net = made.prepare(plain_mlp()).to(dtype)
    before = copy.deepcopy(net)
    train_with(net, made, dtype, 12)
    assert_kept_in_full(net, dtype)
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
    for a, b in zip(thetas(before), thetas(net), strict=True):
        assert not torch.equal(a, b)
    dense = densify(copy.deepcopy(net))
    assert {p.dtype for p in dense.parameters()} == {dtype}


# -- the Trainer and Fabric -------------------------------------------------------------------------------------------------

EPOCH = 12


class InPrecision(Crashing):
    """The input has the dtype of the first bias, whatever the precision does to data."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.trainer.global_step == self.crash_at:
            raise Crash
        x, y = self.data[self.trainer.global_step]
        dtype = self.net[0].bias.dtype
        return (self.net(x.to(dtype)) - y.to(dtype)).square().mean()

    def train_dataloader(self) -> Any:
        return DataLoader(range(self.steps), batch_size=None)  # type: ignore[arg-type]


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("DeepR, one K", "SoftDeepR", "RigL", "MagnitudePruning")]


@pytest.mark.feature("Precision: 32-true, 64-true, 16-true, bf16-true, bf16-mixed, resumed exactly")
@pytest.mark.parametrize("precision", ["32-true", "64-true", "16-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("method", ["DeepR", *SLOW])
def test_a_resumed_training_is_the_uninterrupted_one(method: str, precision: str, tmp_path: Path) -> None:
    """The Trainer restores a checkpoint before it casts the network: float64 must not pass through float32."""

    def fit(folder: str, crash_at: int | None = None, path: Any = None) -> list[Tensor]:
        made = METHODS[method]()
        made.check_invariants = True
        saver = ModelCheckpoint(tmp_path / folder, every_n_train_steps=5, save_top_k=-1)
        module = InPrecision(adam, EPOCH, crash_at)
        runner = trainer(made, saver, precision=precision, enable_checkpointing=True)
        if crash_at is not None:
            with pytest.raises(Crash):
                runner.fit(module)
        else:
            runner.fit(module, ckpt_path=path)
        dtypes = {"64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}
        assert module.net[0].bias.dtype == dtypes.get(precision, torch.float32)
        assert {p.dtype for p in thetas(module)} == {torch.float64 if precision == "64-true" else torch.float32}
        values = [p.detach().clone() for p in module.parameters()]
        for one in converted_tensors(module):
            values += [getattr(one.slots, name).clone() for name in one.slots.tensors]
        for p in module.parameters():
            values += [v.clone() for _, v in sorted(runner.optimizers[0].state[p].items()) if isinstance(v, Tensor)]
        return values

    whole = fit("whole")
    fit("crashed", crash_at=8)
    assert_equal_states(fit("crashed", path=next((tmp_path / "crashed").glob("*step=5.ckpt"))), whole)


@pytest.mark.feature("Precision: bf16-true, 16-true, 64-true under Fabric")
@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-true", torch.bfloat16), ("16-true", torch.float16), ("64-true", torch.float64)]
)
def test_fabric_equals_a_plain_loop(precision: Any, dtype: torch.dtype) -> None:
    callback = DeepR(l1=0.05, seed=SEED, check_invariants=True)
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision, callbacks=[callback])
    net = mlp()
    optimizer = sgd(net.parameters())
    wrapped, wrapped_optimizer = fabric.setup(net, optimizer)
    for x, y in batches(20):
        wrapped_optimizer.zero_grad()
        fabric.backward((wrapped(x) - y.to(dtype)).square().mean())
        wrapped_optimizer.step()

    plain = mlp().to(dtype)
    other = sgd(plain.parameters())
    DeepR(l1=0.05, seed=SEED).attach(plain, other)
    for batch in batches(20):
        other.zero_grad()
        x, y = in_layer_dtype(batch, dtype)
        out = plain(x)
        (out.to(torch.float32) if precision != "64-true" else out).sub(y).square().mean().backward()
        other.step()
    assert [p.dtype for p in net.parameters()] == [p.dtype for p in plain.parameters()]
    assert all(slots.born.max() > 10 for slots in all_slots(net))
    for a, b in zip(thetas(net), thetas(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.05)


def test_the_default_dtype_of_a_loop_changes_nothing() -> None:
    """Precision plugins run the training step, and some loops the whole step, under another default dtype."""
    states, data = [], batches(10)
    for dtype in (torch.float32, torch.bfloat16):
        net = mlp()
        optimizer = adam(net.parameters())
        DeepR(l1=0.3, temperature=1e-4, seed=SEED, check_invariants=True).attach(net, optimizer)
        torch.set_default_dtype(dtype)
        try:
            train(net, optimizer, data)
        finally:
            torch.set_default_dtype(torch.float32)
        states.append(state_of(net, optimizer))
    assert_equal_states(*states)
