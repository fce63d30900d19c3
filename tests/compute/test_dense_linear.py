"""Dense compute of a linear layer in one node: F.linear with the built weight, bit for bit, in memory that is used again.

With a connection at every place the weight is never built (:mod:`tests.compute.test_full`): then it is equal up to rounding.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from lightning_deepr import sparsify
from lightning_deepr.kernels import available
from lightning_deepr.kernels.cpu import buffers
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.plain import PlainDeepR as DeepR

pytestmark = pytest.mark.skipif(not available(), reason="no kernels here")
ROWS, COLUMNS = 150, 240


def layer_of(density: float, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return sparsify(nn.Linear(COLUMNS, ROWS, bias=bias).to(dtype), density, compute="dense")


def gradients(layer: nn.Linear, x: Tensor, y: Tensor, dy: Tensor) -> list[Tensor]:
    wanted = [x, *layer.parameters()]
    return list(torch.autograd.grad(y, wanted, dy))


INPUTS: dict[str, Callable[[], Tensor]] = {
    "2-d": lambda: torch.randn(17, COLUMNS),
    "3-d": lambda: torch.randn(3, 5, COLUMNS),
    "transposed": lambda: torch.randn(COLUMNS, 17).t(),
    "expanded": lambda: torch.randn(1, COLUMNS).expand(9, COLUMNS),
    "one row": lambda: torch.randn(1, COLUMNS),
    "a vector": lambda: torch.randn(COLUMNS),
    "empty": lambda: torch.randn(0, COLUMNS),
    "every second column": lambda: torch.randn(17, 2 * COLUMNS)[:, ::2],
    "with NaN and infinity": lambda: torch.randn(17, COLUMNS).index_fill(0, torch.tensor([3]), float("nan")),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("density", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_equals_the_built_weight_bit_for_bit(kind: str, density: float, bias: bool) -> None:
    def same(a: Tensor, b: Tensor) -> bool:
        numbers = a.nan_to_num(), b.nan_to_num()
        equal = torch.equal(*numbers) if density < 1 else torch.allclose(*numbers, rtol=1e-5, atol=1e-4)
        return equal and torch.equal(a.isnan(), b.isnan())

    layer = layer_of(density, bias=bias)
    x = INPUTS[kind]().requires_grad_()
    y, expected = layer(x), linear(x, layer.weight.clone(), layer.bias)
    for dy in (torch.randn_like(y), torch.ones(()).expand_as(y)):
        mine = gradients(layer, x, y, dy.contiguous() if dy.dim() else dy)
        for a, b in zip([y, *mine], [expected, *gradients(layer, x, expected, dy)], strict=True):
            assert same(a, b)
        y, expected = layer(x), linear(x, layer.weight.clone(), layer.bias)
    with torch.no_grad():
        assert same(layer(x), expected)


@pytest.mark.parametrize("autocast", [False, True], ids=["own dtype", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_sixteen_bits_equal_a_dense_layer_bit_for_bit(density: float, dtype: torch.dtype, autocast: bool, bias: bool) -> None:
    layer = layer_of(density, torch.float32 if autocast else dtype, bias)
    (one,) = converted_tensors(layer)
    dense = nn.Linear(COLUMNS, ROWS, bias=bias).to(torch.float32 if autocast else dtype)
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
        if bias:
            dense.bias.copy_(layer.bias)
    inputs = [torch.randn(3, 5, COLUMNS, dtype=torch.float32 if autocast else dtype, requires_grad=True) for _ in range(2)]
    kept = []
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=autocast):
            found, expected = [layer(x) for x in inputs], [dense(x) for x in inputs]
            again = checkpoint(layer, inputs[0], use_reentrant=False)
        assert "_DenseLinear" in str(found[0].grad_fn) and found[0].dtype is dtype
        for x, a, b in zip([*inputs, inputs[0]], [*found, again], [*expected, expected[0]], strict=True):
            assert torch.equal(a, b)
            dy = torch.randn_like(a)
            mine = gradients(layer, x, a, dy)
            others = list(torch.autograd.grad(b, [x, *dense.parameters()], dy, retain_graph=True))
            theta = mine.pop(next(i for i, gradient in enumerate(mine) if gradient.shape == one.theta.shape))
            weight = others.pop(1)
            assert weight.shape == (ROWS, COLUMNS) and theta.dtype is torch.float32
            assert torch.equal(theta, weight.reshape(-1)[one.slots.places].float() * one.slots.signs)
            assert all(map(torch.equal, sorted(mine, key=Tensor.numel), sorted(others, key=Tensor.numel)))
        del found, again, a
        kept.append(len(buffers._kept[dtype, ROWS * COLUMNS]))
    if not autocast:
        assert kept[0] == kept[1], "a step allocates nothing once the first has passed"
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        assert torch.equal(layer(inputs[0]), expected[0])


@pytest.mark.parametrize("density", [0.4, 1.0])
def test_second_derivatives(density: float) -> None:
    layer = layer_of(density, torch.float64)
    x = torch.randn(3, COLUMNS, dtype=torch.float64, requires_grad=True)

    def twice(function: Callable[[Tensor], Tensor]) -> list[Tensor]:
        (first,) = torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.pow(2).sum(), [x, *layer.parameters()]))

    for a, b in zip(twice(layer), twice(lambda x: linear(x, layer.weight.clone(), layer.bias)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_memory_is_used_again_only_when_nobody_has_it() -> None:
    layer, dy = layer_of(0.6), torch.randn(17, ROWS)
    inputs = [torch.randn(17, COLUMNS, requires_grad=True) for _ in range(4)]
    expected = [gradients(layer, x, linear(x, layer.weight.clone(), layer.bias), dy) for x in inputs]
    kept = []
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):  # several forwards before a backward, in any order
        found = [layer(x) for x in inputs]
        for i in order:
            assert all(map(torch.equal, gradients(layer, inputs[i], found[i], dy), expected[i]))
        del found
        kept.append(len(buffers._kept[torch.float32, ROWS * COLUMNS]))
    assert kept[0] == kept[1] == kept[2], "a step allocates nothing once the first has passed"
    held = layer.weight.clone()
    seen = layer.weight  # a user's reference
    layer(inputs[0])
    assert torch.equal(seen, held)
    y = checkpoint(layer, inputs[0], use_reentrant=False)
    assert all(map(torch.equal, gradients(layer, inputs[0], y, dy), expected[0]))


def test_gradients_that_are_kept_are_not_overwritten() -> None:
    layer = layer_of(1.0)
    x, dy = torch.randn(17, COLUMNS, requires_grad=True), torch.randn(17, ROWS)
    (first,) = (g for g in gradients(layer, x, layer(x), dy) if g.numel() == ROWS * COLUMNS)
    before = first.clone()
    for _ in range(3):
        gradients(layer, x, layer(x), -dy)
    assert torch.equal(first, before)


def test_threads_and_copies() -> None:
    layer, dy = layer_of(0.7), torch.randn(17, ROWS)
    layers = [layer, copy.deepcopy(layer)]
    wrong = []

    def work(seed: int) -> None:
        x = torch.randn(17, COLUMNS, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        for i in range(20):
            own = layers[i % 2]
            expected = gradients(own, x, linear(x, own.weight.clone(), own.bias), dy)
            if not all(map(torch.equal, gradients(own, x, own(x), dy), expected)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_has_memory_of_its_own() -> None:
    layer = layer_of(0.7)
    with torch.no_grad():
        y = layer(torch.ones(2, COLUMNS))
        weight = layer.weight
        held = weight.clone()
        child = os.fork()
        if child == 0:
            status = 1  # whatever happens, the child must not go on with the tests
            try:
                torch.set_num_threads(1)
                del weight
                next(converted_tensors(layer)).theta.add_(1.0)
                layer.weight.sum()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(weight, held) and torch.equal(layer(torch.ones(2, COLUMNS)), y)


def test_a_backward_pass_after_a_rewiring_is_refused() -> None:
    layer = layer_of(0.6)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    DeepR(l1=1.0).attach(layer, optimizer)
    y = layer(torch.randn(4, COLUMNS))
    layer(torch.randn(4, COLUMNS)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_where_all_places_have_a_connection_nothing_moves() -> None:
    """The slots are in the order of their places. Slots in another order, as older files have them, train the same network."""
    layer = layer_of(1.0, torch.float64)
    other = copy.deepcopy(layer)
    slots, twin = next(converted_tensors(layer)), next(converted_tensors(other))
    assert slots.slots.places.tolist() == list(range(ROWS * COLUMNS)) and slots.slots.in_place_order
    order = torch.randperm(ROWS * COLUMNS)
    with torch.no_grad():
        twin.slots.places.copy_(slots.slots.places[order])
        twin.slots.signs.copy_(slots.slots.signs[order])
        twin.theta.copy_(slots.theta[order])
    assert not twin.slots.in_place_order
    twin.slots.stays = False
    for one in (slots, twin):
        one.slots.rests = False  # as where an older version has begun
    nets = (layer, other)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        DeepR(l1=0.05, check_invariants=True).attach(net, optimizer)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        x, target = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (COLUMNS, ROWS))
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            (net(x) - target).square().sum().backward()
            optimizer.step()
    assert slots.slots.born.max() > 0, "nothing was reborn"
    assert slots.slots.in_place_order and slots.slots.places.tolist() == list(range(ROWS * COLUMNS))
    torch.testing.assert_close(layer.weight.clone(), other.weight.clone(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("density", [0.6, 1.0])
@pytest.mark.parametrize(
    "how", ["written", "clipped", "accumulated", "input", "another path", "replaced", "freed, then replaced"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_stops_the_step_however_it_came(density: float, how: str, dtype: torch.dtype) -> None:
    """The kernel of the backward pass looks for values that are not finite; what comes after it is looked at again."""
    layer = layer_of(density, dtype)
    (one,) = converted_tensors(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    DeepR(l1=0.0).attach(layer, optimizer)
    for number in range(2):
        optimizer.zero_grad()
        x = torch.randn(17, COLUMNS, dtype=dtype)
        if number == 0:
            layer(x).sum().backward()
            optimizer.step()
            continue
        bad = torch.full((17, COLUMNS), float("nan"), dtype=dtype)
        layer(bad if how == "input" else x).sum().backward()
        if how == "written":
            one.theta.grad[7] = float("inf")
        elif how == "clipped":
            torch._foreach_mul_([one.theta.grad], float("nan"))
        elif how == "accumulated":
            layer(bad).sum().backward()
        elif how == "another path":
            optimizer.zero_grad()
            linear(bad, layer.weight, layer.bias).sum().backward()
        elif how.endswith("replaced"):
            if how.startswith("freed"):  # the new one may get the address of the old one
                optimizer.zero_grad()
            one.theta.grad = torch.full_like(one.theta, float("nan"))
        before = one.theta.detach().clone()
        with pytest.raises(RuntimeError, match=r"the gradient of theta is not finite"):
            optimizer.step()
        assert torch.equal(one.theta, before)
