"""The transient weight of an ordinary call of a small layer: that of ``layer.weight``, bit for bit, with its gradients."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_deepr import sparsify
from lightning_deepr.compute import forwards
from lightning_deepr.compute.dense import are_readable
from lightning_deepr.kernels import available
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.plain import PlainDeepR as DeepR

pytestmark = pytest.mark.skipif(not available(), reason="no kernels here")

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(20, 30), (7, 20)),
    "linear without bias, three dimensions": (lambda: nn.Linear(20, 30, bias=False), (2, 3, 20)),
    "linear, a vector": (lambda: nn.Linear(20, 30), (20,)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4, stride=2), (3, 8, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), (2, 12, 5, 5)),
    "dilated": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=3), (2, 4, 8, 8)),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6, 6)),
    "one image": (lambda: nn.Conv2d(4, 6, 3), (4, 6, 6)),
}


def pair(make: Callable[[], nn.Module], dtype: torch.dtype, density: float = 0.3) -> tuple[nn.Module, nn.Module]:
    """Make a converted layer, and a dense one with the same weight."""
    torch.manual_seed(0)
    dense = make().to(dtype)
    layer = sparsify(copy.deepcopy(dense), density, compute="dense")
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
    return layer, dense


def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """List the calls, and whether they gave a weight."""
    seen: list[bool] = []
    plain = forwards.quick_weight

    def noted(*arguments: object) -> Tensor | None:
        found = plain(*arguments)  # type: ignore[arg-type]
        seen.append(found is not None)
        return found

    monkeypatch.setattr(forwards, "quick_weight", noted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_equals_the_dense_layer_bit_for_bit(
    kind: str, dtype: torch.dtype, density: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = LAYERS[kind]
    layer, dense = pair(make, dtype, density)
    (one,) = converted_tensors(layer)
    seen = counted(monkeypatch)
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]
    found, expected = [layer(x) for x in inputs], [dense(x) for x in inputs]
    found.append(checkpoint(layer, inputs[0], use_reentrant=False))
    twin = copy.deepcopy(layer)
    for number in (2, 0, 3, 1):  # several forwards before a backward, in any order
        x, a, b = inputs[number % 3], found[number], expected[number % 3]
        assert torch.equal(a, b) and torch.equal(twin(x), b)
        dy = torch.randn_like(a)
        mine = torch.autograd.grad(a, [x, one.theta], dy)
        others = torch.autograd.grad(b, [x, dense.weight], dy, retain_graph=True)
        assert torch.equal(mine[0], others[0]) and mine[1].dtype is one.theta.dtype
        gradient = others[1].contiguous().view(-1)[one.slots.places].to(one.theta.dtype) * one.slots.signs
        assert torch.equal(mine[1], gradient)
    with torch.no_grad():
        assert torch.equal(layer(inputs[0]), expected[0])
    assert seen and all(seen)


@pytest.mark.parametrize("kind", ["linear", "depthwise"])
def test_under_autocast(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, dense = pair(make, torch.float32)
    x = torch.randn(shape)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), dense(x)) and layer(x).dtype is torch.bfloat16


@pytest.mark.parametrize("kind", ["linear", "grouped"])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_trains_as_through_the_parametrization(kind: str, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connectivity is equal bit for bit, also under deterministic algorithms; another path computes in between."""
    make, shape = LAYERS[kind]
    first, _ = pair(make, torch.float64, density)
    second = copy.deepcopy(first)
    plain = forwards.quick_weight
    optimizers = [torch.optim.Adam(layer.parameters(), lr=0.02) for layer in (first, second)]
    for layer, optimizer in zip((first, second), optimizers, strict=True):
        DeepR(l1=0.05, check_invariants=True).attach(layer, optimizer)
    generator = torch.Generator().manual_seed(1)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(60):
            x = torch.randn(shape, dtype=torch.float64, generator=generator)
            for layer, optimizer in zip((first, second), optimizers, strict=True):
                monkeypatch.setattr(forwards, "quick_weight", plain if layer is first else lambda *arguments: None)
                optimizer.zero_grad()
                layer(x).square().sum().backward()
                optimizer.step()
    finally:
        torch.use_deterministic_algorithms(False)
    (one,), (other,) = converted_tensors(first), converted_tensors(second)
    assert torch.equal(one.slots.places, other.slots.places) and torch.equal(one.theta, other.theta)
    assert density == 1.0 or int(one.slots.born.max()) > 0, "nothing was reborn"


@pytest.mark.parametrize("kind", ["linear", "grouped"])
def test_a_backward_pass_after_a_rewiring_is_refused(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, _ = pair(make, torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    DeepR(l1=1.0).attach(layer, optimizer)
    y = layer(torch.randn(shape))
    layer(torch.randn(shape)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["linear", "depthwise"])
def test_second_derivatives(kind: str) -> None:
    make, shape = LAYERS[kind]
    layer, dense = pair(make, torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = []
    for net in (layer, dense):
        (first,) = torch.autograd.grad(net(x).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "depthwise", "large"])
@pytest.mark.parametrize("name", ["signs", "places"])
@pytest.mark.parametrize("how", ["meta", "other dtype", "shorter", "freed"])
def test_tensors_that_were_exchanged_are_not_read(kind: str, name: str, how: str) -> None:
    """A kernel takes addresses; whoever exchanges a tensor gets an error, or PyTorch's own operators."""
    make, shape = LAYERS[kind] if kind != "large" else (lambda: nn.Linear(200, 150), (3, 200))
    layer, _ = pair(make, torch.float32, 0.5)
    (one,) = converted_tensors(layer)
    value = getattr(one.slots, name)
    if how == "meta":
        setattr(one.slots, name, value.to("meta"))
    elif how == "other dtype":
        setattr(one.slots, name, value.to(torch.int16))
    elif how == "shorter":
        setattr(one.slots, name, value[:-1])
    else:  # PyTorch's operators would read it: only the quick way is asked
        freed = value.clone()
        freed.untyped_storage().resize_(0)
        setattr(one.slots, name, freed)
        assert not are_readable(one.theta, one.slots.signs, one.slots.places)
        return
    with contextlib.suppress(RuntimeError, IndexError, NotImplementedError):
        layer(torch.randn(shape)).sum().backward()
