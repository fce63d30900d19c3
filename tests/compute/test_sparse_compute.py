"""Sparse compute: the same numbers as a dense layer's, in training as in a single product, and never a dense tensor."""

from __future__ import annotations

import copy
import itertools
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_deepr import DeepR, connections, connectivity_report, densify, load_state_dict, sparsify
from lightning_deepr import kernels as kernels_module
from lightning_deepr.compute.order import Order, addresses
from lightning_deepr.compute.weight import SparseWeight
from lightning_deepr.weights.k_slots import KSlots
from tests.helpers.algorithm import SEED, all_slots, assert_equal_states, plain_mlp, state_of, thetas
from tests.helpers.networks import Net, Scaled, assert_connected, batches, slots_by_name, theta_of, trainer
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:A backward pass reached", "ignore:.*an int and means one single connection")
needs_kernels = pytest.mark.skipif(not kernels_module.available(), reason="no kernels here")
OPERATORS = torch.ops.lightning_deepr
connections_module = sys.modules[KSlots.__module__]  # (the package has a function of this name)


def sparse_layer(
    columns: int = 14,
    rows: int = 9,
    connectivity: float | int = 0.3,
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    compute: str = "sparse",
) -> nn.Linear:
    torch.manual_seed(0)
    return sparsify(nn.Linear(columns, rows, bias=bias, dtype=dtype), connectivity, compute=compute, seed=SEED)  # type: ignore[return-value]


def dense_twin(layer: nn.Module) -> nn.Linear:
    """An ordinary layer with the same weights, taken from what :func:`connections` says."""
    ((shape, places, values),) = connections(layer).values()
    plain = nn.Linear(shape[1], shape[0], bias=layer.bias is not None, dtype=values.dtype)
    with torch.no_grad():
        plain.weight.zero_().view(-1)[places] = values
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    return plain


def theta_gradient(layer: nn.Module, of_weight: Tensor) -> Tensor:
    """What theta's gradient has to be, given that of the dense weight."""
    slots = slots_by_name(layer)["weight"]
    return of_weight.reshape(-1)[slots.places] * slots.signs


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PyTorch, as where numba can't be imported (the environment variable has a test of its own)."""
    monkeypatch.setattr(kernels_module, "available", lambda: False)
    monkeypatch.setattr(connections_module, "_told", {"cpu, torch.float32", "cpu, torch.float64"})


# -- a product and its gradients ----------------------------------------------------------------------------------------------

BATCHES = (0, 1, 3, 8, 10, 16, 17, 64, 128, 129, 300)
SHAPES: dict[str, tuple[int, int, float | int]] = {  # columns, rows, connectivity
    "ordinary": (14, 9, 0.3),
    "blocks of 16": (64, 32, 0.1),
    "no blocks": (133, 67, 0.05),
    "empty rows and columns": (97, 83, 30),
    "K = 1": (20, 30, 1),
    "K = N": (17, 23, 1.0),
    "N = 1": (1, 1, 1.0),
    "one row": (37, 1, 0.5),
    "one column": (1, 53, 0.4),
    "more than 256 in a row": (700, 3, 0.9),
    "more than 256 in a column": (3, 700, 0.9),
}


def oracle_product(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, np.ndarray]:
    """y and all gradients in double precision NumPy, a connection at a time where it matters."""
    ((shape, places, values),) = connections(layer).values()
    rows, columns = np.divmod(places.numpy(), shape[1])
    signs = np.where(values.numpy() < 0, -1.0, 1.0)
    a, g, w = x.double().numpy(), dy.double().numpy(), values.double().numpy()
    y, dx, dtheta = np.zeros((len(a), shape[0])), np.zeros_like(a), np.zeros(len(w))
    for k, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        y[:, row] += w[k] * a[:, column]
        dx[:, column] += w[k] * g[:, row]
        dtheta[k] = signs[k] * (g[:, row] @ a[:, column])
    if layer.bias is not None:
        y += layer.bias.detach().double().numpy()
    return {"y": y, "x": dx, "theta": dtheta, "bias": g.sum(0)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_gradients_equal_the_oracle(shape: tuple[int, int, float | int], dtype: torch.dtype) -> None:
    columns, rows, connectivity = shape
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for batch, bias in itertools.product(BATCHES, (True, False)):
        layer = sparse_layer(columns, rows, connectivity, bias=bias, dtype=dtype)
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, columns, dtype=dtype, generator=generator).requires_grad_()
        dy = torch.randn(batch, rows, dtype=dtype, generator=generator)
        expected = oracle_product(layer, x.detach(), dy)
        y = layer(x)
        assert y.dtype == dtype and y.shape == (batch, rows) and y.is_contiguous()
        y.backward(dy)
        found = {"y": y.detach(), "x": x.grad, "theta": theta_of(layer, "weight").grad}
        if bias:
            found["bias"] = layer.bias.grad
        for name, value in found.items():
            assert value is not None and value.dtype == dtype
            np.testing.assert_allclose(
                value.numpy(), expected[name], rtol=tolerance, atol=tolerance * 10, err_msg=f"{name}, {batch}"
            )
        with torch.no_grad():
            assert torch.equal(layer(x), y), "without gradients something else comes out"


def test_the_table_has_empty_rows_and_columns_and_long_ones() -> None:
    def counts(name: str) -> tuple[np.ndarray, np.ndarray]:
        columns, rows, connectivity = SHAPES[name]
        places = connections(sparse_layer(columns, rows, connectivity))["weight"][1].numpy()
        return np.bincount(places // columns, minlength=rows), np.bincount(places % columns, minlength=columns)

    by_row, by_column = counts("empty rows and columns")
    assert (by_row == 0).sum() > 5 and (by_column == 0).sum() > 5
    assert counts("more than 256 in a row")[0].min() > 256
    assert counts("more than 256 in a column")[1].min() > 256


INPUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {  # a leaf, and a view of it with 14 columns
    "1-D": ((14,), lambda x: x),
    "3-D": ((2, 3, 14), lambda x: x),
    "4-D": ((2, 3, 2, 14), lambda x: x),
    "3-D without elements": ((2, 0, 14), lambda x: x),
    "transposed": ((14, 5), lambda x: x.t()),
    "3-D transposed": ((3, 2, 14), lambda x: x.transpose(0, 1)),
    "features first": ((2, 14, 3), lambda x: x.mT),
    "every other column": ((5, 28), lambda x: x[:, ::2]),
    "every other row": ((10, 14), lambda x: x[::2]),
    "at an offset": ((7, 14), lambda x: x[2:]),
    "expanded rows": ((1, 14), lambda x: x.expand(6, 14)),
    "expanded columns": ((6, 1), lambda x: x.expand(6, 14)),
    "a number expanded": ((), lambda x: x.expand(3, 14)),
    "unfolded": ((20,), lambda x: x.unfold(0, 14, 1)),
    "flipped": ((5, 14), lambda x: x.flip(0)),
}


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_of_any_shape_and_stride(name: str) -> None:
    size, view = INPUTS[name]
    layer = sparse_layer(dtype=torch.float64)
    plain = dense_twin(layer)
    leaf = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = leaf.clone().requires_grad_(), leaf.clone().requires_grad_()
    y, expected = layer(view(ours)), plain(view(theirs))
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected)
    for output in (y, expected):  # a gradient that is expanded, too
        (output.sum() + output.square().sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(theta_of(layer, "weight").grad, theta_gradient(layer, plain.weight.grad))
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


@pytest.mark.parametrize("path", ["kernels", "operators", "plain PyTorch"])
def test_only_the_gradients_that_are_needed(path: str, request: pytest.FixtureRequest) -> None:
    if path == "plain PyTorch":
        request.getfixturevalue("without_kernels")
    for batch, *needed in itertools.product((1, 20), (True, False), (True, False), (True, False)):
        layer = sparse_layer(dtype=torch.float64)
        plain = dense_twin(layer)
        x = torch.randn(batch, 14, dtype=torch.float64)
        ours, theirs = x.clone().requires_grad_(needed[0]), x.clone().requires_grad_(needed[0])
        theta = theta_of(layer, "weight").requires_grad_(needed[1])
        plain.weight.requires_grad_(needed[1])
        layer.bias.requires_grad_(needed[2])
        with Recording() if path == "operators" else nullcontext():
            y = layer(ours)
            assert y.requires_grad == any(needed)
            if any(needed):
                y.square().sum().backward()
                plain(theirs).square().sum().backward()
        for wanted, found, expected in zip(
            needed, (ours, theta, layer.bias), (theirs.grad, plain.weight.grad, plain.bias.grad), strict=True
        ):
            if not wanted or not any(needed):
                assert found.grad is None
            else:
                assert expected is not None
                expected = theta_gradient(layer, expected) if found is theta else expected
                torch.testing.assert_close(found.grad, expected)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_two_threads_give_what_one_gives(dtype: torch.dtype) -> None:
    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        net = sparsify(nn.Sequential(nn.Linear(200, 260), nn.ReLU(), nn.Linear(260, 200)).to(dtype), 0.2, compute="sparse")
        x = torch.randn(70, 200, dtype=dtype).requires_grad_()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        DeepR(l1=0.5).attach(net, optimizer)
        for _ in range(2):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
        assert sum(int((s.born == 1).sum()) for s in all_slots(net)) > 1000
        return [*state_of(net), x.grad, *(slots.ordered().buffer.clone() for slots in all_slots(net))]

    before = torch.get_num_threads()
    try:
        assert_equal_states(run(1), run(2))
    finally:
        torch.set_num_threads(before)


# -- a training: sparse and dense agree ---------------------------------------------------------------------------------------

MICRO, WIDTHS = 2, (20, 32, 16, 6)
Batch = list[tuple[Tensor, Tensor]]


class Trained:
    """A network under training with one kind of compute; the same seed and data for either."""

    def __init__(self, compute: str, connectivity: float = 0.2) -> None:
        self.net: nn.Module = sparsify(plain_mlp(WIDTHS).double(), connectivity, seed=SEED, compute=compute)
        self.begin()

    def begin(self) -> None:
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)
        self.rewiring = DeepR(l1=0.25, temperature=1e-5, seed=SEED, check_invariants=True).attach(self.net, self.optimizer)

    def step(self, micro_batches: Batch) -> None:
        self.optimizer.zero_grad()
        for x, y in micro_batches:
            kind = next(self.net.parameters()).dtype
            ((self.net(x.to(kind)) - y.to(kind)).square().mean() / len(micro_batches)).backward()
        self.optimizer.step()


def data(steps: int, first: int = 0) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(7 + first)
    teacher = torch.randn(WIDTHS[0], WIDTHS[-1], generator=torch.Generator().manual_seed(1)).double()
    for _ in range(steps):
        inputs = [torch.randn(9, WIDTHS[0], generator=generator).double() for _ in range(MICRO)]
        yield [(x, x @ teacher + torch.randn(9, WIDTHS[-1], generator=generator)) for x in inputs]


class Pair:
    """Both kinds of compute, compared after every step."""

    def __init__(self) -> None:
        self.both = [Trained("sparse"), Trained("dense")]
        self.reborn = self.slots = 0

    @property
    def nets(self) -> list[nn.Module]:
        return [one.net for one in self.both]

    def train(self, steps: int, first: int = 0) -> None:
        for batch in data(steps, first):
            before = [slots.places.clone() for slots in all_slots(self.nets[0])]
            for one in self.both:
                one.step(batch)
            self.compare()
            for old, slots in zip(before, all_slots(self.nets[0]), strict=True):
                self.reborn += int((old != slots.places).sum())
                self.slots += slots.count

    def compare(self) -> None:
        sparse, dense = self.nets
        assert [s.compute for s in all_slots(sparse)] == ["sparse"] * 3 and [s.compute for s in all_slots(dense)] == [
            "dense"
        ] * 3
        for a, b in zip(all_slots(sparse), all_slots(dense), strict=True):
            assert torch.equal(a.places, b.places) and torch.equal(a.signs, b.signs) and torch.equal(a.born, b.born)
        for p, q in zip(sparse.parameters(), dense.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-9)

    def compare_outputs(self) -> None:
        (batch,) = data(1, 99)
        kind = next(self.nets[0].parameters()).dtype
        tolerance = 1e-9 if kind == torch.float64 else 1e-4
        first, second = (net(batch[0][0].to(kind)) for net in self.nets)
        torch.testing.assert_close(first, second, rtol=0, atol=tolerance)


@pytest.mark.parametrize("path", ["kernels", "plain PyTorch"])
def test_sparse_and_dense_training_agree(path: str, request: pytest.FixtureRequest) -> None:
    if path == "plain PyTorch":
        request.getfixturevalue("without_kernels")
    pair = Pair()
    pair.train(200 if path == "kernels" else 50)
    assert pair.reborn / pair.slots >= 0.1, f"{pair.reborn / pair.slots:.1%} reborn per step: too few to test anything"


def test_kernels_and_plain_pytorch_train_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = Trained("sparse"), Trained("sparse")
    for batch in data(60):
        one.step(batch)
        with monkeypatch.context() as patch:
            patch.setattr(kernels_module, "available", lambda: False)
            patch.setattr(connections_module, "_told", {"cpu, torch.float64"})
            other.step(batch)
        for a, b in zip(all_slots(one.net), all_slots(other.net), strict=True):
            assert torch.equal(a.places, b.places) and torch.equal(a.signs, b.signs) and torch.equal(a.born, b.born)
        for p, q in zip(one.net.parameters(), other.net.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def test_they_agree_after_load_state_dict() -> None:
    pair = Pair()
    pair.train(10)
    kept = [copy.deepcopy(net.state_dict()) for net in pair.nets]
    pair.train(10, 1)
    assert not torch.equal(all_slots(pair.nets[0])[0].places, kept[0]["0.parametrizations.weight.0.places"])
    pair.nets[0].load_state_dict(kept[1])  # crosswise: a state_dict knows no kind of compute
    pair.nets[1].load_state_dict(kept[0])
    pair.compare()
    pair.compare_outputs()
    pair.train(20, 2)


def test_they_agree_after_deepcopy() -> None:
    pair = Pair()
    pair.train(10)
    before = [state_of(net) for net in pair.nets]
    originals = [(one.net, one.optimizer, one.rewiring) for one in pair.both]
    for one in pair.both:
        one.net = copy.deepcopy(one.net)
        one.begin()
    pair.train(20, 1)
    for (net, _, _), state in zip(originals, before, strict=True):
        assert_equal_states(state_of(net), state)  # what a copy does is the copy's own
    for one, (net, optimizer, rewiring) in zip(pair.both, originals, strict=True):
        one.net, one.optimizer, one.rewiring = net, optimizer, rewiring
    pair.train(10, 2)


def test_they_agree_after_another_dtype_and_back() -> None:
    pair = Pair()
    pair.train(10)
    for net in pair.nets:
        net.to(torch.float32)
    pair.compare_outputs()
    for net in pair.nets:
        net.to(torch.float64)
    for one in pair.both:  # (momentum of the former dtype would not do)
        one.optimizer.state.clear()
    pair.compare()
    pair.train(20, 1)


def test_they_agree_after_an_average_is_swapped_in_and_out() -> None:
    """Values move through ``.data.copy_``, which no version counter sees."""
    pair = Pair()
    averages = [AveragedModel(net, avg_fn=get_ema_avg_fn(0.9)) for net in pair.nets]

    def swap() -> None:
        for net, average in zip(pair.nets, averages, strict=True):
            for p, q in zip(average.module.parameters(), net.parameters(), strict=True):
                kept = p.data.clone()
                p.data.copy_(q.data)
                q.data.copy_(kept)

    for part in range(3):
        for step in range(5):
            pair.train(1, 10 * part + step)
            for net, average in zip(pair.nets, averages, strict=True):
                average.update_parameters(net)
        (batch,) = data(1, 98)
        first, second = (average(batch[0][0]) for average in averages)
        torch.testing.assert_close(first, second, rtol=0, atol=1e-9)
        before = pair.nets[0](batch[0][0])
        swap()
        torch.testing.assert_close(pair.nets[0](batch[0][0]), first, rtol=0, atol=1e-12)
        assert (before - first).abs().max() > 1e-6
        pair.compare_outputs()
        swap()
        torch.testing.assert_close(pair.nets[0](batch[0][0]), before, rtol=0, atol=1e-12)


def test_they_agree_under_lightnings_weight_averaging() -> None:
    def fit(compute: str) -> tuple[list[Tensor], dict[str, Tensor]]:
        net = Net().double()
        callback = DeepR(connectivity=0.4, l1=0.05, compute=compute, seed=SEED)
        loader = DataLoader([(x.double(), y) for x, y in batches()], batch_size=None)  # type: ignore[arg-type]
        trainer(callback, EMAWeightAveraging(decay=0.8), max_epochs=3).fit(net, loader, loader)
        assert {slots.compute for slots in all_slots(net)} == {compute}
        return [slots.places for slots in all_slots(net)], dict(net.named_parameters())

    (sparse_places, sparse), (dense_places, dense) = fit("sparse"), fit("dense")
    assert_equal_states(sparse_places, dense_places)
    for name, value in sparse.items():
        torch.testing.assert_close(value, dense[name], rtol=0, atol=1e-9)


def test_they_agree_through_a_frozen_phase() -> None:
    pair = Pair()
    pair.train(10)
    frozen = [(theta_of(net, "2.weight"), all_slots(net)[1]) for net in pair.nets]
    before = frozen[0][0].detach().clone(), frozen[0][1].places.clone()
    for theta, _ in frozen:
        theta.requires_grad_(False)
    pair.train(10, 1)
    assert torch.equal(frozen[0][0], before[0]) and torch.equal(frozen[0][1].places, before[1])
    for theta, _ in frozen:
        theta.requires_grad_(True)
    pair.train(20, 2)
    assert not torch.equal(frozen[0][1].places, before[1])


def test_they_agree_after_remove_and_densify() -> None:
    pair = Pair()
    pair.train(10)
    places = [slots.places.clone() for slots in all_slots(pair.nets[0])]
    for one in pair.both:
        one.rewiring.remove()
    pair.train(10, 1)  # no callback: connections stay, values go on
    assert_equal_states(places, [slots.places for slots in all_slots(pair.nets[0])])
    pair.compare_outputs()
    for one in pair.both:
        one.begin()
    pair.train(10, 2)
    (batch,) = data(1, 97)
    expected = pair.nets[0](batch[0][0])
    for net in pair.nets:
        densify(net)
    for net in pair.nets:
        torch.testing.assert_close(net(batch[0][0]), expected, rtol=0, atol=1e-9)
    assert [type(m) for m in pair.nets[0]] == [type(m) for m in plain_mlp(WIDTHS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_resumed_training_is_the_same_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    def begin() -> Trained:
        one = Trained("sparse")
        one.rewiring.remove()
        one.net.to(dtype)
        one.begin()
        return one

    through = begin()
    for batch in data(15):
        through.step(batch)
    torch.save(
        {"net": through.net.state_dict(), "optimizer": through.optimizer.state_dict(), "deepr": through.rewiring.state_dict()},
        tmp_path / "state.pt",
    )
    resumed = Trained("sparse", connectivity=0.2)
    resumed.rewiring.remove()
    resumed.net.to(dtype)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.net.load_state_dict(saved["net"])
    resumed.begin()
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.rewiring.load_state_dict(saved["deepr"])
    for batch in data(30, 1):
        through.step(batch)
        resumed.step(batch)
        assert_equal_states(state_of(resumed.net, resumed.optimizer), state_of(through.net, through.optimizer))


@needs_kernels
@pytest.mark.parametrize("connectivity", [0.01, 0.2, 0.5, 0.8, 1.0])
def test_the_order_that_follows_is_the_order_built_anew(connectivity: float) -> None:
    """By row, then by column, whatever happened: that is what makes a resumed training equal."""
    torch.manual_seed(0)
    net = sparsify(nn.Linear(90, 70, bias=False), connectivity, compute="sparse", seed=SEED)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(l1=0.3, temperature=0.01, seed=SEED).attach(net, optimizer)
    (slots,) = all_slots(net)
    order = slots.order
    reborn = 0
    for step in range(60):
        optimizer.zero_grad()
        net(torch.randn(8, 90)).square().mean().backward()
        optimizer.step()
        reborn += int((slots.born == step).sum())
        assert slots.order is order and not order.is_stale(slots.places)
        assert torch.equal(order.buffer, Order(slots.places, slots.signs, slots.shape).buffer), f"step {step}"
    assert reborn > 3 * slots.count

    # and what is in it, told apart from how it is built
    base = order.buffer.data_ptr()
    parts = [(a - base) // 4 for a in addresses(order.buffer, 70, 90, slots.count)]
    read = [
        order.buffer[p : p + n].numpy()
        for p, n in zip(parts, (71, slots.count, slots.count, 91, slots.count, slots.count), strict=True)
    ]
    for (start, across, slot), key in ((read[:3], lambda p: p), (read[3:], lambda p: p % 90 * 70 + p // 90)):
        width = 90 if len(start) == 71 else 70
        number = slot & 0x7FFFFFFF
        sorted_slots = np.argsort([key(p) for p in slots.places.tolist()])
        assert number.tolist() == sorted_slots.tolist()
        line = np.repeat(np.arange(len(start) - 1), np.diff(start))
        assert (line * width + across == np.array([key(p) for p in slots.places.tolist()])[sorted_slots]).all()
        assert ((slot < 0) == (slots.signs.numpy()[sorted_slots] < 0)).all()


# -- what does not fit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(5, 13),
        torch.zeros(13),
        torch.zeros(2, 3, 15),
        torch.zeros(0, 13),
        torch.tensor(1.0),
        torch.zeros(5, 14, dtype=torch.float64),
        torch.zeros(2, 5, 14, dtype=torch.bfloat16),
        torch.zeros(14, dtype=torch.float16),
        torch.zeros(5, 14, dtype=torch.long),
        torch.zeros(5, 14, dtype=torch.complex64),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.dtype} {x.device}",
)
def test_an_input_that_does_not_fit_is_refused_as_by_nn_linear(x: Tensor, bias: bool) -> None:
    layer = sparse_layer(bias=bias)
    with pytest.raises(RuntimeError) as theirs:
        nn.Linear(14, 9, bias=bias)(x)
    with pytest.raises(RuntimeError) as ours:
        layer(x)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    "bias",
    [torch.ones(1), torch.ones(1).expand(9), torch.arange(18.0)[::2], torch.tensor(2.0), torch.arange(45.0).view(5, 9)],
    ids=["one number", "expanded", "strided", "0-D", "one for each element of the batch"],
)
def test_any_bias_that_f_linear_takes(bias: Tensor) -> None:
    """Kernels know addresses, not strides and sizes: a bias must never be read past its end."""
    layer = sparse_layer()
    x = torch.randn(5, 14)
    torch.testing.assert_close(F.linear(x, layer.weight, bias), F.linear(x, dense_twin(layer).weight, bias))


@pytest.mark.parametrize("bias", [torch.arange(18.0)[::2], torch.zeros(9).double()], ids=["strided", "another dtype"])
def test_a_bias_parameter_put_in_from_outside(bias: Tensor) -> None:
    layer, x = sparse_layer(), torch.randn(5, 14)
    plain = dense_twin(layer)
    for one in (layer, plain):
        one.bias = nn.Parameter(bias)
    if bias.dtype == torch.float32:
        torch.testing.assert_close(layer(x), plain(x))
    else:
        with pytest.raises(RuntimeError) as theirs:
            plain(x)
        with pytest.raises(RuntimeError) as ours:
            layer(x)
        assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("x", [torch.zeros(5, 14), torch.zeros(14)], ids=["2-D", "1-D"])
@pytest.mark.parametrize("bias", [torch.zeros(5), torch.zeros(9, dtype=torch.float64)], ids=["length", "dtype"])
def test_a_bias_that_does_not_fit_is_refused(x: Tensor, bias: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"must match|dtype"):
        F.linear(x, sparse_layer().weight, bias)


def test_a_theta_put_in_from_outside() -> None:
    layer, x = sparse_layer(), torch.randn(5, 14)
    name = "parametrizations.weight.original"
    theta = theta_of(layer, "weight").detach()
    strided = torch.stack([theta, theta * 7], dim=1)[:, 0]
    bias = layer.bias.detach()
    expected = layer(x)
    assert not strided.is_contiguous()
    torch.testing.assert_close(torch.func.functional_call(layer, {name: strided}, (x,)), expected)
    torch.testing.assert_close(torch.func.functional_call(layer, {name: theta * 2}, (x,)), 2 * expected - bias)
    with pytest.raises(RuntimeError, match=r"theta of K = 38 connections, found 3"):
        torch.func.functional_call(layer, {name: theta[:3]}, (x,))


@pytest.mark.parametrize("path", ["kernels", "operators", "plain PyTorch"])
def test_a_second_derivative_is_refused(path: str, request: pytest.FixtureRequest) -> None:
    """Also where the first one has no graph of its own (dy of a sum): a gradient penalty must not vanish silently."""
    if path == "plain PyTorch":
        request.getfixturevalue("without_kernels")
    layer = sparse_layer()

    def penalty(x: Tensor, power: int) -> None:
        (gradient,) = torch.autograd.grad(layer(x).pow(power).sum(), x, create_graph=True)
        gradient.square().sum().backward()

    x = torch.randn(3, 14).requires_grad_()
    for power in (1, 2):
        with Recording() if path == "operators" else nullcontext(), pytest.raises(RuntimeError, match="no double backward"):
            penalty(x, power)
    layer(x).sum().backward()  # a first one still is no problem


@pytest.mark.parametrize("compute", ["sparse", "dense"])
@pytest.mark.parametrize("path", ["kernels", "plain PyTorch"])
def test_a_graph_from_before_a_rewiring_is_refused(compute: str, path: str, request: pytest.FixtureRequest) -> None:
    if path == "plain PyTorch":
        request.getfixturevalue("without_kernels")
    layer = sparse_layer(compute=compute)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    DeepR(l1=5.0).attach(layer, optimizer)
    x = torch.randn(5, 14)
    kept = layer(x)
    layer(x).sum().backward()
    places = all_slots(layer)[0].places.clone()
    optimizer.step()
    assert not torch.equal(all_slots(layer)[0].places, places)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.sum().backward()


# -- layer.weight -------------------------------------------------------------------------------------------------------------


class Recording(TorchDispatchMode):
    """Which operators run, and the largest output of any (views of nothing larger included)."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and type(value) is not SparseWeight and value.device.type != "meta":
                self.largest = max(self.largest, value.numel())
        return result


def huge_layer(width: int = 1_000_000, count: int = 1000, **options: Any) -> nn.Linear:
    with torch.device("meta"):
        net = nn.Linear(width, width, **options)
    return sparsify(net, count, compute="sparse", seed=SEED)  # type: ignore[return-value]


def test_what_can_be_told_of_a_huge_weight_is_free() -> None:
    layer = huge_layer()
    with Recording() as seen:
        weight = layer.weight
        assert (
            weight.shape == (10**6, 10**6) == tuple(weight.size())
            and weight.numel() == 10**12
            and weight.dim() == weight.ndim == 2
        )
        assert weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.is_floating_point()
        assert weight.requires_grad and not weight.is_cuda and len(weight) == 10**6 and weight.size(0) == 10**6
        assert repr(weight) == "SparseWeight(shape=(1000000, 1000000), K=1000, dtype=torch.float32)" == str(weight)
        assert "1000000" in repr(layer)
    assert seen.largest <= 1000
    for read in (
        lambda: weight + 1,
        lambda: weight.sum(),
        lambda: weight.tolist(),
        lambda: weight.detach(),
        lambda: weight.data,
    ):
        with pytest.raises(RuntimeError, match="connections"):
            read()


def test_values_are_exact_and_dormant_ones_are_zero() -> None:
    layer = sparse_layer(30, 20, 0.2)
    weight = layer.weight
    assert isinstance(weight, SparseWeight) and isinstance(weight, Tensor)
    expected = torch.zeros(600)
    _, places, values = connections(layer)["weight"]
    expected[places] = values
    expected = expected.view(20, 30)
    assert torch.equal(weight, expected)
    assert weight.tolist() == expected.tolist() and np.array_equal(weight.detach().numpy(), expected.numpy())
    assert torch.equal(weight[3, 4:9], expected[3, 4:9]) and int((weight != 0).sum()) == int((values != 0).sum())
    assert torch.equal(weight.t(), expected.t()) and torch.equal(weight.clone(), expected)
    assert torch.equal(torch.stack([weight, weight]).sum(0), 2 * expected)
    assert torch.equal(weight.double(), expected.double())


EXPRESSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "norm": lambda w, x: w.norm(),
    "square": lambda w, x: (w * w).sum(),
    "from the right": lambda w, x: (2 - 3 * w).square().sum(),
    "matmul": lambda w, x: (x @ w.t()).square().sum(),
    "einsum": lambda w, x: torch.einsum("bi,oi->bo", x, w).square().sum(),
    "index": lambda w, x: w[2].square().sum() + w[:, 3].sum(),
    "F.linear": lambda w, x: F.linear(x, w).square().sum(),
    "F.linear of its transpose": lambda w, x: F.linear(x[:, :9], w.t()).square().sum(),
    "as the input": lambda w, x: F.linear(w, x).square().sum(),
    "by itself": lambda w, x: F.linear(w, w).square().sum(),
    "normalized": lambda w, x: F.linear(x, F.normalize(w)).square().sum(),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_arithmetic_with_the_weight_reaches_theta(name: str) -> None:
    layer = sparse_layer(dtype=torch.float64)
    plain = dense_twin(layer)
    x = torch.randn(5, 14, dtype=torch.float64)
    value, expected = EXPRESSIONS[name](layer.weight, x), EXPRESSIONS[name](plain.weight, x)
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(theta_of(layer, "weight").grad, theta_gradient(layer, plain.weight.grad))


@pytest.mark.parametrize("compute", ["sparse", "dense"])
def test_writing_into_the_weight_changes_nothing(compute: str) -> None:
    """What is read is built anew each time, under either compute; a layer is initialized before it is converted."""
    layer = sparse_layer(compute=compute)
    x = torch.randn(5, 14)
    before, state = layer(x), state_of(layer)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.weight)
    nn.init.orthogonal_(layer.weight)
    layer.weight.data.fill_(3.0)
    layer.weight.data[:] = 1
    with torch.no_grad():
        layer.weight.copy_(torch.ones(9, 14))
        layer.weight.mul_(2)
        layer.weight[0] = 1
    assert_equal_states(state_of(layer), state)
    assert torch.equal(layer(x), before)
    for value in (nn.Parameter(torch.ones(9, 14)), torch.ones(9, 14)):
        with pytest.raises(NotImplementedError, match=r"can't be assigned.*lightning_deepr\.densify\(module\)"):
            layer.weight = value  # type: ignore[assignment]
    assert torch.equal(layer(x), before)


class Gated(nn.Module):
    """A layer of a user's own that uses one weight twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * torch.nn.functional.linear(input=x, weight=self.weight).sigmoid()


def test_a_module_that_goes_through_f_linear_profits() -> None:
    torch.manual_seed(0)
    own = sparsify(Gated(600), 0.005, target_modules=["weight"], compute="sparse")
    twin = Gated(600)
    with torch.no_grad():
        twin.weight.copy_(own.weight)
    x = torch.randn(4, 600)
    with Recording() as seen:
        y = own(x)
        y.square().sum().backward()
    assert seen.largest <= 4 * 600, "a tensor of N elements was made"
    assert (
        seen.names.count("lightning_deepr.linear.default") == 2 == seen.names.count("lightning_deepr.linear_backward.default")
    )
    expected = twin(x)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(theta_of(own, "weight").grad, theta_gradient(own, twin.weight.grad), rtol=1e-4, atol=1e-5)


class Subclass(nn.Linear):
    """``nn.Linear`` with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


@pytest.mark.parametrize("make", [lambda: Subclass(300, 400), lambda: nn.Linear(300, 400)], ids=["subclass", "nn.Linear"])
def test_a_subclass_of_linear_profits(make: Callable[[], nn.Module]) -> None:
    layer = sparsify(make(), 0.01, compute="sparse")
    with Recording() as seen:
        layer(torch.randn(2, 300)).sum().backward()
    assert seen.names.count("lightning_deepr.linear.default") == 1 and seen.largest <= 1200


# -- proportional to K --------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("way", ["short", "operators"])
def test_no_dense_tensor_is_ever_made(way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if way == "short":  # what eager mode runs; a dispatch mode at work would otherwise send all to the operators
        monkeypatch.setattr("lightning_deepr.compute.sparse.is_plain", lambda x: True)
    torch.manual_seed(0)
    columns, rows, count, batch = 3000, 4000, 3000, 8
    with Recording() as seen:
        with torch.device("meta"):
            net = nn.Linear(columns, rows)
        net = sparsify(net, count, compute="sparse")
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        DeepR(l1=0.3, check_invariants=True).attach(net, optimizer)
        for _ in range(3):
            x = torch.randn(batch, columns).requires_grad_()
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
        net.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["net"])
        copy.deepcopy(net)(x)
        connections(net)
        str(connectivity_report(net))
    kernel_calls = seen.names.count("lightning_deepr.linear.default")
    assert kernel_calls == (0 if way == "short" else 4)
    assert batch * rows <= seen.largest <= rows * columns / 100
    # 3000 connections of 16 bytes and of two moments, 4000 biases of three numbers; a dense weight has 48 MB
    assert (tmp_path / "checkpoint.pt").stat().st_size < 250_000


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}
CONVERTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(60, 50, bias=False), (4, 60)),
    "conv": (lambda: nn.Conv2d(8, 16, 3, bias=False), (2, 8, 6, 6)),
    "lstm": (lambda: nn.LSTM(20, 24, bias=False), (5, 2, 20)),
}


def elements(state: Any) -> int:
    return sum(value.numel() for value in tree_leaves(state) if isinstance(value, Tensor))


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", CONVERTED)
def test_state_gradients_and_checkpoint_are_k_sized(name: str, optimizer_name: str) -> None:
    make, size = CONVERTED[name]
    torch.manual_seed(0)
    net = sparsify(make(), 0.05)
    optimizer = OPTIMIZERS[optimizer_name](net.parameters())
    DeepR().attach(net, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        output = net(torch.randn(size))
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()
        optimizer.step()
    report = connectivity_report(net)
    assert report.active == round(0.05 * report.total)
    parameters = list(net.parameters())
    assert elements(parameters) == elements([p.grad for p in parameters]) == report.active
    per_tensor = 10  # counters, seeds, shapes: numbers whose count does not depend on N or K
    extra = per_tensor * len(parameters)
    kept = max(sum(isinstance(v, Tensor) and v.shape == p.shape for v in optimizer.state[p].values()) for p in parameters)
    assert kept <= 4
    assert elements(optimizer.state_dict()) <= kept * report.active + extra
    assert elements(net.state_dict()) <= 4 * report.active + extra  # theta, places, births, at most as many exceptions


def test_a_layer_of_1e12_places_trains_and_stays_exact() -> None:
    layer = huge_layer(bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    DeepR(l1=1000.0, seed=SEED, check_invariants=True).attach(layer, optimizer)
    (slots,) = all_slots(layer)
    x = torch.randn(2, 1_000_000)
    first = slots.places.clone()
    for _ in range(4):
        optimizer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        row, column = slots.places // 10**6, slots.places % 10**6
        values = connections(layer)["weight"][2]
        expected = torch.zeros(2, 10**6).index_add_(1, row, x[:, column] * values)
        torch.testing.assert_close(y.detach(), expected)
        torch.testing.assert_close(theta_of(layer, "weight").grad, (2 * expected[:, row] * x[:, column]).sum(0) * slots.signs)
        optimizer.step()
        assert_connected(layer, {"weight": 1000})
    assert (first != slots.places).float().mean() > 0.5
    assert int(slots.places.max()) > 9 * 10**11 and slots.places.unique().numel() == 1000


def test_a_layer_of_more_than_2_to_the_31_places_trains_like_its_own_connections() -> None:
    layer = huge_layer(50_000, 700)
    assert layer.weight.numel() > 2**31
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    DeepR(l1=100.0, seed=SEED, check_invariants=True).attach(layer, optimizer)
    (slots,) = all_slots(layer)
    beyond = 0
    for _ in range(10):
        x = torch.randn(3, 50_000)
        optimizer.zero_grad()
        layer(x).sum().backward()
        torch.testing.assert_close(theta_of(layer, "weight").grad, x.sum(0)[slots.places % 50_000] * slots.signs)
        optimizer.step()
        assert_connected(layer, {"weight": 700})
        beyond += int((slots.places[slots.born >= 0] >= 2**31).sum())
    assert beyond > 100


# -- precision ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype, given: torch.dtype) -> None:
    layer = sparse_layer(60, 40, 0.2)
    plain = dense_twin(layer)
    x = torch.randn(20, 60).to(given)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        y, expected = layer(ours), plain(theirs)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.03, atol=0.05)
    for output in (y, expected):
        output.float().square().sum().backward()
    exact = dense_twin(layer)
    exact(x.float()).square().sum().backward()
    theta = theta_of(layer, "weight")
    assert theta.grad.dtype == torch.float32 and bool(torch.isfinite(theta.grad).all())
    assert ours.grad.dtype == given and bool(torch.isfinite(ours.grad).all())
    wanted = theta_gradient(layer, exact.weight.grad)
    assert float((theta.grad - wanted).norm() / wanted.norm()) < 0.01
    assert float((layer.bias.grad - exact.bias.grad).norm() / exact.bias.grad.norm()) < 0.01


def test_autocast_leaves_double_precision_alone() -> None:
    layer = sparse_layer(dtype=torch.float64)
    x = torch.randn(5, 14, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == nn.Linear(14, 9, dtype=torch.float64)(x).dtype == torch.float64
        with pytest.raises(RuntimeError) as theirs:
            nn.Linear(14, 9)(x)
        with pytest.raises(RuntimeError) as ours:
            sparse_layer()(x)
    assert str(ours.value) == str(theirs.value)
    assert torch.equal(y, layer(x))


def test_a_dtype_without_a_kernel_runs_in_plain_pytorch_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module, "_told", set())
    layer = sparse_layer(60, 40, 0.2).to(torch.bfloat16)
    plain = dense_twin(layer)
    x = torch.randn(20, 60, dtype=torch.bfloat16).requires_grad_()
    with pytest.warns(UserWarning, match=r"no kernel for cpu, torch.bfloat16: it runs in plain PyTorch"):
        y = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(layer(x), y)
        sparse_layer(5, 4)(torch.randn(1, 5))  # float32 has one
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain(x).float(), rtol=0.05, atol=0.1)
    y.sum().backward()
    plain(x.detach()).sum().backward()
    wanted = theta_gradient(layer, plain.weight.grad).float()
    assert float((theta_of(layer, "weight").grad.float() - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.usefixtures("without_kernels")
def test_plain_pytorch_equals_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_deepr.compute import gather

    monkeypatch.setattr(gather, "LARGEST", 500)  # several chunks of connections
    for columns, rows, connectivity in SHAPES.values():
        for batch in (0, 1, 17):
            layer = sparse_layer(columns, rows, connectivity, dtype=torch.float64)
            assert slots_by_name(layer)["weight"].order is None
            x = torch.randn(batch, columns, dtype=torch.float64).requires_grad_()
            dy = torch.randn(batch, rows, dtype=torch.float64)
            expected = oracle_product(layer, x.detach(), dy)
            y = layer(x)
            y.backward(dy)
            found = {"y": y.detach(), "x": x.grad, "theta": theta_of(layer, "weight").grad, "bias": layer.bias.grad}
            for name, value in found.items():
                np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-12, atol=1e-11, err_msg=name)


ALONE = """
import sys, warnings, torch
from torch import nn
from lightning_deepr import DeepR, kernels, sparsify
torch.manual_seed(0)
assert not kernels.available()
net = sparsify(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)), 0.3, compute="sparse", seed=2)
optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
DeepR(l1=0.3, seed=2).attach(net, optimizer)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for step in range(20):
        optimizer.zero_grad()
        net(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()
assert sum("no kernel for cpu, torch.float32" in str(w.message) for w in caught) == 1, caught
assert "numba" not in sys.modules
torch.save(net.state_dict(), sys.argv[1])
"""


def test_the_environment_variable_turns_kernels_off_and_the_same_comes_out(tmp_path: Path) -> None:
    where = tmp_path / "net.pt"
    environment = {**os.environ, "LIGHTNING_DEEPR_KERNELS": "0"}
    subprocess.run([sys.executable, "-c", ALONE, str(where)], env=environment, check=True, cwd=ROOT)
    here: dict[str, Any] = {"__name__": "here"}
    lines = [line for line in ALONE.splitlines() if not line.startswith(("assert", "torch.save"))]
    exec("\n".join(lines), here)
    alone, ours = torch.load(where, weights_only=True), here["net"].state_dict()
    assert alone.keys() == ours.keys()
    for name, value in alone.items():
        if name.endswith(("original", "bias")):
            torch.testing.assert_close(value, ours[name], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(value, ours[name]), name
    assert int((ours["0.parametrizations.weight.0.born"] >= 0).sum()) > 20


# -- operators and compilers --------------------------------------------------------------------------------------------------


@contextmanager
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()


NEEDS_A_COMPILER = (pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"))


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning", "ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=NEEDS_A_COMPILER)])
def test_a_compiled_network_follows_rewiring_loading_and_copies(backend: str) -> None:
    with fresh_compiler():
        one = Trained("sparse")
        compiled = torch.compile(one.net, fullgraph=True, backend=backend)
        kept = copy.deepcopy(one.net.state_dict())
        x = torch.randn(9, WIDTHS[0]).double()

        def check(net: Callable[[Tensor], Tensor], eager: nn.Module) -> None:
            found, expected = net(x), eager(x)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            gradients = torch.autograd.grad(found.square().sum(), list(eager.parameters()))
            wanted = torch.autograd.grad(expected.square().sum(), list(eager.parameters()))
            torch.testing.assert_close(gradients, wanted, rtol=1e-10, atol=1e-12)

        check(compiled, one.net)
        places = [slots.places.clone() for slots in all_slots(one.net)]
        for (batch,) in zip(data(5), strict=False):
            one.optimizer.zero_grad()
            (compiled(batch[0][0]) - batch[0][1]).square().mean().backward()
            one.optimizer.step()
            check(compiled, one.net)
        assert all(not torch.equal(a, s.places) for a, s in zip(places, all_slots(one.net), strict=True))
        one.net.load_state_dict(kept)
        check(compiled, one.net)
        for slots, before in zip(all_slots(one.net), places, strict=True):
            assert torch.equal(slots.places, before)
        twin = copy.deepcopy(one.net)
        with torch.no_grad():
            theta_of(one.net, "0.weight").mul_(2)
        check(torch.compile(twin, fullgraph=True, backend=backend), twin)
        check(compiled, one.net)
        assert not torch.equal(twin(x), one.net(x))


def operator_inputs(bias: bool = True, needed: bool = True) -> tuple[Any, ...]:
    layer = sparse_layer(dtype=torch.float64, bias=bias)
    slots = slots_by_name(layer)["weight"]
    x = torch.randn(5, 14, dtype=torch.float64).requires_grad_(needed)
    theta = theta_of(layer, "weight").detach().requires_grad_(needed)
    own = layer.bias.detach().requires_grad_(needed) if bias else None
    return x, theta, own, slots.ordered().buffer, 9, 14


@needs_kernels
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_opcheck_of_both_operators() -> None:
    for bias, needed in itertools.product((True, False), (True, False)):
        inputs = operator_inputs(bias, needed)
        torch.library.opcheck(OPERATORS.linear.default, inputs)
    x, theta, _, order, rows, columns = operator_inputs(needed=False)
    for needed in itertools.product((True, False), repeat=3):
        torch.library.opcheck(
            OPERATORS.linear_backward.default,
            (torch.randn(5, 9, dtype=torch.float64), x, theta, order, rows, columns, *needed),
        )


@needs_kernels
@pytest.mark.filterwarnings("ignore:Input #")
def test_gradcheck_of_the_operator() -> None:
    x, theta, bias, order, rows, columns = operator_inputs()
    assert torch.autograd.gradcheck(lambda x, t, b: OPERATORS.linear(x, t, b, order, rows, columns), (x, theta, bias))
    layer = sparse_layer(dtype=torch.float64)
    name = "parametrizations.weight.original"
    assert torch.autograd.gradcheck(
        lambda x, t, b: torch.func.functional_call(layer, {name: t, "bias": b}, (x,)), (x, theta, bias)
    )


def test_shapes_propagate_without_values() -> None:
    layer = sparse_layer()
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = layer(torch.empty(3, 7, 14))
        assert y.shape == (3, 7, 9)
        assert OPERATORS.linear(
            torch.empty(5, 14), torch.empty(38), None, torch.empty(500, dtype=torch.int32), 9, 14
        ).shape == (5, 9)
    meta = {"device": "meta"}
    order = torch.empty(500, dtype=torch.int32, **meta)
    y = OPERATORS.linear(torch.empty(5, 14, **meta), torch.empty(38, **meta), torch.empty(9, **meta), order, 9, 14)
    assert y.shape == (5, 9) and y.device.type == "meta"
    dx, dtheta, dbias = OPERATORS.linear_backward(
        y, torch.empty(5, 14, **meta), torch.empty(38, **meta), order, 9, 14, True, True, False
    )
    assert (dx.shape, dtheta.shape, dbias.shape) == ((5, 14), (38,), (0,))
    layer = sparse_layer().to("meta")
    y = layer(torch.empty(2, 3, 14, **meta))
    assert y.shape == (2, 3, 9) and y.device.type == "meta"
    y.sum().backward()
    assert theta_of(layer, "weight").grad.shape == (38,)


@needs_kernels
def test_operators_have_names_in_a_profile() -> None:
    layer = sparse_layer()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(torch.randn(5, 14)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"lightning_deepr::linear", "lightning_deepr::linear_backward"} <= names


def test_functional_call_differentiates_to_what_it_was_given() -> None:
    layer = sparse_layer(dtype=torch.float64)
    x = torch.randn(5, 14, dtype=torch.float64)
    given = {name: (2 * p.detach()).requires_grad_() for name, p in layer.named_parameters()}
    torch.func.functional_call(layer, given, (x,)).square().sum().backward()
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(given[name].grad, p.grad)


@pytest.mark.filterwarnings("ignore:There is a performance drop because")
def test_transforms_of_torch_func() -> None:
    layer = sparse_layer(dtype=torch.float64)
    x = torch.randn(4, 14, dtype=torch.float64)
    given = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    leaf = x.clone().requires_grad_()
    loss(dict(layer.named_parameters()), leaf).backward()
    gradients, of_x = torch.func.grad(loss, argnums=(0, 1))(given, x)
    torch.testing.assert_close(of_x, leaf.grad)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(given, x)
    for name, p in layer.named_parameters():
        assert each[name].shape == (4, *p.shape)
        torch.testing.assert_close(each[name].sum(0), p.grad)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    _, pull = torch.func.vjp(layer, x)
    torch.testing.assert_close(pull(2 * layer(x).detach())[0], leaf.grad)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.func.grad(lambda x: torch.func.grad(loss, argnums=1)(given, x).sum())(x)


# -- what is picked -----------------------------------------------------------------------------------------------------------


@needs_kernels
def test_auto_picks_per_tensor_and_the_report_says_what() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10), nn.Unflatten(1, (1, 10)), nn.Conv1d(1, 4, 3))
    sparsify(net, {"0": 0.01, "2": 0.9, "4": 0.5}, compute="auto")
    assert {row["name"]: row["compute"] for row in connectivity_report(net)} == {
        "0.weight": "sparse",
        "2.weight": "dense",
        "4.weight": "dense",
    }
    assert "sparse" in str(connectivity_report(net)).splitlines()[2]
    both = {kind: copy.deepcopy(net) for kind in ("sparse", "dense")}
    for kind, twin in both.items():
        for slots in all_slots(twin)[:2]:
            slots.choose_compute(kind, True)
    for batch in (1, 30, 200, 1):  # each batch size has a choice of its own; the numbers are the same
        x = torch.randn(batch, 1000)
        for twin in both.values():
            torch.testing.assert_close(net(x), twin(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compute", ["sparse", "dense"])
def test_what_is_asked_for_is_what_is_done(compute: str) -> None:
    net = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 10), nn.Unflatten(1, (1, 10)), nn.Conv1d(1, 4, 3))
    sparsify(net, {"0": 0.01, "1": 0.9, "3": 0.5}, compute=compute)
    with Recording() as seen:
        net(torch.randn(2, 1000))
    assert seen.names.count("lightning_deepr.linear.default") == (
        2 if compute == "sparse" and kernels_module.available() else 0
    )
    # a convolution has no sparse kernel that wins: it stays dense and says so
    assert [row["compute"] for row in connectivity_report(net)] == [compute, compute, "dense"]


def test_a_layer_too_large_to_be_dense_is_sparse_whatever_is_picked() -> None:
    with torch.device("meta"):
        layer = nn.Linear(40_000, 20_000)
    sparsify(layer, 50, compute="auto")
    assert connectivity_report(layer)[0]["compute"] == "sparse"
    for batch in (1, 2):
        layer(torch.randn(batch, 40_000)).sum().backward()


def test_first_used_in_inference_mode_then_trained() -> None:
    """A sanity check runs in inference mode, and may be the first that needs the order of the connections."""
    layer = sparse_layer(500, 400, 0.02, compute="auto")
    slots = slots_by_name(layer)["weight"]
    slots.order, slots.policy = None, "sparse"
    with torch.inference_mode():
        layer(torch.randn(5, 500))
        copy.deepcopy(layer)(torch.randn(5, 500))
    x = torch.randn(5, 500)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    DeepR(l1=1.0, check_invariants=True).attach(layer, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer(x), dense_twin(layer)(x), rtol=1e-4, atol=1e-5)


def test_own_layer_of_the_table_trains_sparse() -> None:
    net = sparsify(Scaled(), 0.4, target_modules=["weight"], compute="sparse", seed=SEED)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    DeepR(l1=0.5, seed=SEED, check_invariants=True).attach(net, optimizer)
    assert isinstance(slots_by_name(net)["weight"], KSlots)
    for _ in range(10):
        x = torch.randn(8, 14)
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    twin = Scaled()
    with torch.no_grad():
        twin.weight.copy_(net.weight)
        twin.bias.copy_(net.bias)
    torch.testing.assert_close(net(x), twin(x))
    loaded = load_state_dict(Scaled(), net.state_dict())
    torch.testing.assert_close(loaded(x), net(x))
    assert thetas(loaded)[0].shape == thetas(net)[0].shape
