"""A layer that calls ``torch.addmm(bias, x, weight)`` (GPT-2's ``Conv1D``), against the dense weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import adapt, connections, sparsify
from lightning_deepr.compute import choice, tokens
from tests.helpers.sparse_linear import needs_kernels
from tests.helpers.tensors_made import Recording

pytestmark = [needs_kernels, pytest.mark.filterwarnings("ignore:A backward pass reached")]


class Conv1D(nn.Module):
    """As that of transformers: weight [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, dtype=dtype))
        self.bias = nn.Parameter(torch.randn(outputs, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], -1)


def layer_of(upon: bool, inputs: int, outputs: int, count: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    layer = Conv1D(inputs, outputs, dtype)
    make: Any = adapt if upon else sparsify
    make(layer, {"weight": count}, target_modules=["weight"], seed=1, **options)
    if upon:
        layer.bias.requires_grad_(True)
        with torch.no_grad():
            layer.parametrizations.weight.original.uniform_()
    return layer


def weight_of(layer: Any) -> Tensor:
    """Build the weight from what :func:`connections` reports, and the base."""
    shape, places, values = connections(layer)["weight"]
    slots = layer.parametrizations.weight[0]
    weight = slots.base.detach().clone() if slots.adapts else torch.zeros(shape, dtype=values.dtype)
    flat = weight.view(-1)
    flat[places] += values
    return weight


SIZES = [(40, 70, 300, 7), (1, 9, 4, 3), (9, 1, 4, 1), (64, 48, 3000, 5), (30, 20, 60, tokens.FROM + 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("upon", [False, True])
@pytest.mark.parametrize(("inputs", "outputs", "count", "batch"), SIZES)
def test_output_and_gradients(upon: bool, inputs: int, outputs: int, count: int, batch: int, dtype: torch.dtype) -> None:
    layer = layer_of(upon, inputs, outputs, count, dtype, compute="sparse")
    slots, theta = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    x = torch.randn(batch, inputs, dtype=dtype, requires_grad=True)
    weight = weight_of(layer).requires_grad_()
    wanted = torch.addmm(layer.bias, x, weight)
    seed = torch.randn_like(wanted)
    dx, dweight, dbias = torch.autograd.grad(wanted, (x, weight, layer.bias), seed)
    y = layer(x)
    assert slots.used == "sparse"
    found = torch.autograd.grad(y, (x, theta, layer.bias), seed)
    torch.testing.assert_close(y, wanted)
    for mine, other in zip(found, (dx, dweight.view(-1)[slots.places] * slots.signs, dbias), strict=True):
        torch.testing.assert_close(mine, other)
    with torch.no_grad():
        torch.testing.assert_close(layer(x.view(1, batch, inputs)), wanted.detach().view(1, batch, -1))


@pytest.mark.parametrize("upon", [False, True])
def test_no_tensor_of_the_weights_size_is_made(upon: bool) -> None:
    inputs, outputs, batch = 64, 96, 3
    layer = layer_of(upon, inputs, outputs, 60, compute="sparse")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        layer(torch.randn(batch, inputs, requires_grad=True)).sum().backward()
    slots = layer.parametrizations.weight[0]
    bases = [slots.base.data_ptr()] if upon else []
    assert kept and all(one.numel() < inputs * outputs or one.data_ptr() in bases for one in kept)


@pytest.mark.parametrize("twice", [False, True])
def test_many_connections_upon_a_base_take_the_sum(twice: bool) -> None:
    inputs, outputs, batch, count = 32, 48, 200, 100
    assert choice.prefers_sum(inputs, outputs, count, batch)
    layer, x = layer_of(True, inputs, outputs, count), torch.randn(batch, inputs, requires_grad=True)
    slots, theta = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    y = layer(x)
    assert y.grad_fn.next_functions[0][0].name() == "_LinearBackward"  # (below the view)
    weight = weight_of(layer).requires_grad_()
    wanted = torch.addmm(layer.bias, x, weight)
    torch.testing.assert_close(y, wanted)
    dx, dweight = torch.autograd.grad(wanted.square().sum(), (x, weight), create_graph=twice)
    dweight = dweight.view(-1)[slots.places] * slots.signs
    found = torch.autograd.grad(y.square().sum(), (x, theta), create_graph=twice)
    torch.testing.assert_close(found[0], dx)
    torch.testing.assert_close(found[1], dweight)
    if twice:
        torch.testing.assert_close(
            torch.autograd.grad(found[1].square().sum(), x)[0], torch.autograd.grad(dweight.square().sum(), x)[0]
        )


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_comes_out_as_from_the_dense_layer(value: float) -> None:
    """0 times infinity is not a number, also where there is no connection; the kernels for many rows look for it."""
    batch = tokens.FROM + 5
    layer = layer_of(False, 30, 20, 60, compute="sparse")
    x = torch.randn(batch, 30)
    x[3, 4] = value
    wanted = torch.addmm(layer.bias, x, weight_of(layer))
    torch.testing.assert_close(layer(x), wanted, equal_nan=True)


def test_what_is_no_ordinary_call_builds_the_weight() -> None:
    layer = layer_of(False, 12, 8, 20, compute="sparse")
    x, weight = torch.randn(4, 12), weight_of(layer)
    torch.testing.assert_close(torch.addmm(layer.bias, x, layer.weight, alpha=2), torch.addmm(layer.bias, x, weight, alpha=2))
    torch.testing.assert_close(torch.addmm(torch.ones(4, 8), x, layer.weight), torch.addmm(torch.ones(4, 8), x, weight))
    torch.testing.assert_close(torch.addmm(torch.ones(1), x, layer.weight), torch.addmm(torch.ones(1), x, weight))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.addmm(layer.bias, torch.randn(4, 11), layer.weight)
    with Recording() as seen:  # something looks at the operators: they are torch's
        torch.addmm(layer.bias, x, layer.weight)
    assert any("addmm" in name for name in seen.names)
    grad = torch.func.grad(lambda value: torch.addmm(layer.bias, value, layer.weight).square().sum())(x)
    torch.testing.assert_close(grad, 2 * torch.addmm(layer.bias, x, weight) @ weight.t())


def test_reads_under_torch_func_are_ordinary_and_writes_refused() -> None:
    layer = layer_of(False, 12, 8, 20, compute="sparse")
    x, weight = torch.randn(4, 12), weight_of(layer)
    grad = torch.func.grad(lambda value: (value @ layer.weight).square().sum())(x)
    torch.testing.assert_close(grad, 2 * x @ weight @ weight.t())
    torch.testing.assert_close(torch.func.vmap(lambda value: layer.weight.t() @ value)(x), x @ weight)
    with pytest.raises(RuntimeError, match="was written to after it was converted"):
        torch.func.grad(lambda value: (value @ layer.weight.view(12, 8).mul_(2)).sum())(x)


def test_a_rewiring_between_the_passes_is_refused() -> None:
    layer = layer_of(False, 12, 8, 20, compute="sparse")
    y = layer(torch.randn(4, 12, requires_grad=True))
    slots = layer.parametrizations.weight[0]
    slots.ordered().build(slots.places, slots.signs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
