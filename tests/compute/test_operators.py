"""Sparse compute as PyTorch operators: opcheck, gradcheck, compilers, profiles and the transforms of torch.func."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.sparse_linear import WIDTHS, Trained, data, needs_kernels, sparse_layer
from tests.helpers.state import all_slots, slots_by_name, theta_of

pytestmark = pytest.mark.filterwarnings("ignore:A backward pass reached", "ignore:.*an int and means one single connection")


OPERATORS = torch.ops.lightning_deepr


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
@pytest.mark.feature("Compilers: torch.compile of the module")
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


@pytest.mark.feature("Compilers: torch.func.functional_call")
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
