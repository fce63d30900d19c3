"""Linear layers with a connection at every place (K = N): products with theta and its signs, without a weight in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from lightning_deepr import sparsify
from lightning_deepr.kernels import available
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.plain import PlainDeepR as DeepR

pytestmark = pytest.mark.skipif(not available(), reason="no kernels here")


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


SHAPES = [
    (6, 6, 16),
    (7, 53, 99),
    (64, 96, 64),
    (65, 300, 784),
    (130, 49, 129),
    (3, 20, 40),
    (9, 5, 300),
    (64, 300, 7),
    (700, 520, 530),
]


@pytest.mark.parametrize(("batch", "rows", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_products(batch: int, rows: int, columns: int, dtype: torch.dtype, has_bias: bool, threads: int) -> None:
    from lightning_deepr.compute import full

    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(batch, n, generator=generator, dtype=dtype) for n in (columns, rows))
    theta = torch.rand(rows * columns, generator=generator, dtype=dtype)
    signs = torch.where(torch.rand(rows * columns, generator=generator) < 0.5, -1.0, 1.0).to(dtype)
    bias = torch.randn(rows, generator=generator, dtype=dtype) if has_bias else None
    weight, bits = (theta * signs).view(rows, columns).double(), full.sign_bits(signs, rows, columns)
    tolerance = {"rtol": 1e-4, "atol": 2e-4} if dtype is torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    y = full.forward(x, theta, bias, bits, rows, columns)
    torch.testing.assert_close(y.double(), linear(x.double(), weight, None if bias is None else bias.double()), **tolerance)
    dx = full.backward_input(dy, theta, bits, rows, columns)
    torch.testing.assert_close(dx.double(), dy.double().mm(weight), **tolerance)
    dtheta, finite = full.backward_theta(dy, x, theta, bits, rows, columns)
    torch.testing.assert_close(dtheta.double(), dy.double().t().mm(x.double()).view(-1) * signs, **tolerance)
    assert finite
    for bad in (float("nan"), float("inf")):
        spoiled = x.clone()
        spoiled[-1, -1] = bad
        dtheta, finite = full.backward_theta(dy, spoiled, theta, bits, rows, columns)
        assert not finite and not dtheta.view(rows, columns)[:, -1].isfinite().any()
        assert dtheta.view(rows, columns)[:, :-1].isfinite().all()


def test_the_result_does_not_depend_on_the_number_of_threads() -> None:
    from lightning_deepr.compute import full

    x, dy, theta = torch.randn(64, 300), torch.randn(64, 200), torch.rand(200 * 300)
    bits = full.sign_bits(torch.where(torch.rand(200 * 300) < 0.5, -1.0, 1.0), 200, 300)
    before, found = torch.get_num_threads(), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        y = full.forward(x, theta, None, bits, 200, 300)
        dx, (dtheta, _) = full.backward_input(dy, theta, bits, 200, 300), full.backward_theta(dy, x, theta, bits, 200, 300)
        found.append([y.clone(), dx.clone(), dtheta.clone()])
    torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_200_steps_equal_those_of_a_dense_network_whose_weights_keep_their_signs() -> None:
    """The dense network: plain SGD with momentum; a weight that has crossed 0 is set to 0."""
    torch.manual_seed(0)
    source = nn.Sequential(nn.Linear(96, 120), nn.Tanh(), nn.Linear(120, 100), nn.Tanh(), nn.Linear(100, 10)).double()
    net = sparsify(copy.deepcopy(source), 1.0, compute="dense")
    dense, layers = copy.deepcopy(source), [layer for layer in net if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, other in zip(layers, (one for one in dense if isinstance(one, nn.Linear)), strict=True):
            other.weight.copy_(layer.weight)
            other.bias.copy_(layer.bias)
    signs = [one.slots.signs.view(one.slots.shape) for one in converted_tensors(net)]
    weights = [one.weight for one in dense if isinstance(one, nn.Linear)]
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.2, momentum=0.9) for one in (net, dense)]
    DeepR(l1=0.0).attach(net, optimizers[0])
    crossed = 0
    for step in range(200):
        x, target = torch.randn(32, 96, dtype=torch.float64), torch.randint(0, 10, (32,))
        for one, optimizer in zip((net, dense), optimizers, strict=True):
            optimizer.zero_grad()
            cross_entropy(one(x), target).backward()
            optimizer.step()
        if step == 0:
            assert "_FullLinear" in str(net[:1](x).grad_fn)
        with torch.no_grad():
            for weight, sign in zip(weights, signs, strict=True):
                wrong = weight * sign < 0
                crossed += int(wrong.sum())
                weight[wrong] = 0.0
    assert crossed > 1000
    for one, weight in zip(converted_tensors(net), weights, strict=True):
        found = (one.theta * one.slots.signs).view(one.slots.shape)
        torch.testing.assert_close(found, weight, rtol=1e-8, atol=1e-10)


def test_signs_that_were_loaded_are_used_and_a_copy_has_its_own() -> None:
    torch.manual_seed(0)
    nets = [sparsify(nn.Linear(120, 100), 1.0, compute="dense", seed=seed) for seed in (1, 2)]
    x = torch.randn(8, 120)

    def check(layer: nn.Module) -> Tensor:
        y = layer(x)
        torch.testing.assert_close(y, linear(x, layer.weight.clone(), layer.bias), rtol=1e-4, atol=1e-5)
        return y.detach()

    first, second = (check(net) for net in nets)
    assert not torch.allclose(first, second)
    twin = copy.deepcopy(nets[1])
    nets[1].load_state_dict(nets[0].state_dict())
    assert torch.equal(check(nets[1]), first) and torch.equal(check(twin), second)
    nets[1].double()
    x = x.double()
    torch.testing.assert_close(check(nets[1]).float(), first, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["written", "written by data"])
def test_theta_that_a_kernel_has_found_finite_is_looked_at_again_once_it_is_written(how: str) -> None:
    """torch counts no write by ``.data`` to a large theta: it is found after the next step, and no second one is taken."""
    layer = sparsify(nn.Linear(640, 512), 1.0, compute="dense")
    (one,) = converted_tensors(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    DeepR(l1=0.0).attach(layer, optimizer)
    for _ in range(2):
        layer(torch.randn(8, 640)).sum().backward()
        optimizer.step()
    assert one.slots.finite_theta is not None
    if how == "written":
        with torch.no_grad():
            one.theta[5] = float("nan")
    else:
        one.theta.data[5] = float("nan")
        optimizer.step()
    with pytest.raises(RuntimeError, match="theta is not finite at 1 of"):
        optimizer.step()
