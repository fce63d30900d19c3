"""``layer.weight`` of a sparse layer: its shape and dtype are known without building it, and it reads as the dense tensor."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_deepr import connections, sparsify
from lightning_deepr.compute.weight import SparseWeight
from tests.helpers.sparse_linear import dense_twin, huge_layer, sparse_layer, theta_gradient
from tests.helpers.state import assert_equal_states, state_of, theta_of
from tests.helpers.tensors_made import Recording

pytestmark = pytest.mark.filterwarnings("ignore:A backward pass reached", "ignore:.*an int and means one single connection")


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
def test_writing_into_the_weight_is_refused(compute: str) -> None:
    """Every read builds the weight again, under either compute. A layer is initialized before it is converted."""
    layer = sparse_layer(compute=compute)
    x = torch.randn(5, 14)
    before, state = layer(x), state_of(layer)
    for write in (nn.init.xavier_uniform_, lambda weight: weight.data.fill_(3.0)):
        with pytest.raises(RuntimeError, match=r"`weight` was written to after it was converted \("):
            write(layer.weight)
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
