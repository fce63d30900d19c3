"""A sparse linear layer gives the results of the dense one, and refuses the same arguments, in every precision."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_deepr import DeepR, connections, sparsify
from lightning_deepr.weights import k_slots
from tests.helpers.paths import ROOT
from tests.helpers.sparse_linear import dense_twin, needs_kernels, sparse_layer, theta_gradient
from tests.helpers.state import all_slots, assert_equal_states, slots_by_name, state_of, theta_of
from tests.helpers.tensors_made import Recording

pytestmark = pytest.mark.filterwarnings("ignore:A backward pass reached", "ignore:.*an int and means one single connection")


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
    """Compute y and all gradients in double precision NumPy, one connection at a time."""
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
    """Kernels take addresses, without strides and sizes: they must never read a bias past its end."""
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
    with pytest.raises(RuntimeError, match=r"theta: expected K = 38 values, found shape \(3,\)"):
        torch.func.functional_call(layer, {name: theta[:3]}, (x,))


@pytest.mark.parametrize("path", ["kernels", "operators", "plain PyTorch"])
def test_a_second_derivative_is_refused(path: str, request: pytest.FixtureRequest) -> None:
    """Also if the first one has no graph of its own (dy of a sum): a gradient penalty must not vanish silently."""
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
    layer(x).sum().backward()  # a first derivative still works


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


def test_fewer_bits_run_in_the_kernels() -> None:
    """theta has float32, the weight and the output have bfloat16."""
    layer = sparse_layer(60, 40, 0.2).to(torch.bfloat16)
    plain = dense_twin(layer)
    x = torch.randn(20, 60, dtype=torch.bfloat16).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = layer(x)
    assert y.dtype == torch.bfloat16 and theta_of(layer, "weight").dtype == torch.float32
    torch.testing.assert_close(y.float(), plain(x).float(), rtol=0.05, atol=0.1)
    y.sum().backward()
    plain(x.detach()).sum().backward()
    wanted = theta_gradient(layer, plain.weight.grad).float()
    assert float((theta_of(layer, "weight").grad.float() - wanted).norm() / wanted.norm()) < 0.02


@pytest.mark.usefixtures("without_kernels")
def test_without_a_kernel_it_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(k_slots, "_told", set())
    layer, x = sparse_layer(60, 40, 0.2), torch.randn(20, 60)
    with pytest.warns(UserWarning, match=r"no kernel for cpu, torch.float32: it runs in plain PyTorch"):
        y = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(layer(x), y)


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


@pytest.mark.slow
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
