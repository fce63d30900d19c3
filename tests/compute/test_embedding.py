"""Embeddings and bags of embeddings compute as the dense layer does, from the connections or from the weight."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import DeepR, RigL, connectivity_report, densify, sparsify
from lightning_deepr.weights.find import converted_tensors

COMPUTES = ["auto", "dense", "sparse"]


class Bag(nn.Module):
    """A bag in a module, so that it can be named."""

    def __init__(self, rows: int = 40, columns: int = 6, kind: Any = nn.EmbeddingBag, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bag = kind(rows, columns, **options)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = self.bag(*args, **kwargs)
        return found


def check(make: Any, args: tuple[Any, ...], compute: str, weights: Tensor | None = None) -> None:
    """Compare outputs, and the gradients of theta and of per_sample_weights, with the dense layer of the same weights."""
    net = sparsify(make(), 0.3, target_modules=["bag"], compute=compute)
    dense = densify(sparsify(make(), 0.3, target_modules=["bag"]))
    (one,) = converted_tensors(net)
    results = []
    for layer in (net, dense):
        own = None if weights is None else weights.clone().requires_grad_()
        y = layer(*args) if own is None else layer(*args, per_sample_weights=own)
        factors = torch.arange(1, y.numel() + 1, dtype=y.dtype).view(y.shape)  # each output has its own gradient
        (y * factors / max(y.numel(), 1)).sum().backward()
        results.append((y.detach(), None if own is None else own.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    gradient: Any = dense.bag.weight.grad  # type: ignore[union-attr]
    slots: Any = one.slots
    expected = gradient.reshape(-1)[slots.places] * slots.signs
    torch.testing.assert_close(one.theta.grad, expected, rtol=1e-5, atol=1e-6)


INPUTS: dict[str, tuple[Any, ...]] = {
    "matrix": (torch.tensor([[3, 5, 3, 0], [7, 39, 1, 5], [0, 0, 0, 0]]),),
    "offsets": (torch.tensor([3, 5, 3, 0, 7, 39, 1, 5, 0]), torch.tensor([0, 2, 2, 7])),  # an empty bag
    "one bag": (torch.tensor([3, 5, 3, 0]), torch.tensor([0])),
    "int32": (torch.tensor([3, 5, 0, 7], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)),
    "mixed": (torch.tensor([3, 5, 0, 7], dtype=torch.int32), torch.tensor([0, 1])),
    "nothing": (torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0])),
}


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("padding", [None, 0, -35])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags(mode: str, padding: int | None, given: str, compute: str) -> None:
    if given == "mixed":
        args = INPUTS[given]
        net = sparsify(Bag(mode=mode, padding_idx=padding), 0.3, target_modules=["bag"], compute=compute)
        assert torch.equal(net(*args), net(args[0].long(), args[1]))
        return
    check(lambda: Bag(mode=mode, padding_idx=padding), INPUTS[given], compute)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("given", ["matrix", "offsets", "one bag"])
def test_per_sample_weights(given: str, padding: int | None, compute: str) -> None:
    weights = torch.randn(INPUTS[given][0].shape)
    check(lambda: Bag(mode="sum", padding_idx=padding), INPUTS[given], compute, weights)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize(("mode", "scale"), [*itertools.product(["sum", "mean"], [False, True]), ("max", False)])
def test_include_last_offset_and_scale_grad_by_freq(mode: str, scale: bool, compute: str) -> None:
    args = (torch.tensor([3, 5, 3, 0, 7, 39, 1]), torch.tensor([0, 2, 2, 7]))
    check(lambda: Bag(mode=mode, include_last_offset=True, scale_grad_by_freq=scale), args, compute)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("options", [{}, {"padding_idx": 3}, {"padding_idx": -1}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("indices", [torch.tensor([[3, 5, 3], [39, 0, 1]]), torch.tensor(4), torch.zeros(2, 0).long()])
def test_embeddings(indices: Tensor, options: dict[str, Any], compute: str) -> None:
    check(lambda: Bag(kind=nn.Embedding, **options), (indices,), compute)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("compute", COMPUTES)
def test_rewired_scopes_types_and_compilers(kind: Any, compute: str) -> None:
    net = sparsify(Bag(kind=kind), 0.3, target_modules=["bag"], compute=compute)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    DeepR(l1=0.5, check_invariants=True).attach(net, optimizer)
    indices = torch.randint(0, 40, (8, 5))
    before = next(converted_tensors(net)).slots.places.clone()  # type: ignore[attr-defined]
    for _ in range(6):
        optimizer.zero_grad()
        net(indices).sub(1).square().mean().backward()
        optimizer.step()
    assert not torch.equal(next(converted_tensors(net)).slots.places, before)  # type: ignore[attr-defined]
    expected = net(indices)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(indices), expected)
    parameters = dict(net.named_parameters())
    torch.testing.assert_close(torch.func.functional_call(net, parameters, (indices,)), expected)
    loss = torch.func.grad(lambda p: torch.func.functional_call(net, p, (indices,)).square().sum())(parameters)
    (theta,) = parameters
    expected.square().sum().backward()
    net.zero_grad()
    net(indices).square().sum().backward()
    torch.testing.assert_close(loss[theta], parameters[theta].grad)
    torch.testing.assert_close(net.double()(indices), expected.double())
    torch.testing.assert_close(densify(net)(indices), expected.double())


def test_a_shared_theta_and_the_dense_gradient_of_rigl() -> None:
    net = nn.ModuleDict({"bag": nn.EmbeddingBag(40, 6), "out": nn.Linear(6, 3)})
    sparsify(net, 0.3, target_modules=["bag", "out"], scope="global", compute="sparse")
    indices = torch.randint(0, 40, (8, 5))
    y = net["out"](net["bag"](indices))
    y.sum().backward()
    densify(net)
    torch.testing.assert_close(net["out"](net["bag"](indices)), y)
    other = sparsify(Bag(), 0.3, target_modules=["bag"], compute="sparse")
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    RigL(rewire_every_n_steps=2, check_invariants=True).attach(other, optimizer, total_steps=100)
    for _ in range(6):
        optimizer.zero_grad()
        other(indices).sub(1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_the_weight_is_never_built(kind: Any) -> None:
    """10 million rows of 1,000 columns, dense 40 GB."""
    with torch.device("meta"):
        net = Bag(10_000_000, 1_000, kind)
    sparsify(net, 20_000, target_modules=["bag"], device="cpu")
    assert connectivity_report(net)[0]["compute"] == "sparse"
    y = net(torch.randint(0, 10_000_000, (4, 8)))
    y.sum().backward()
    assert next(net.parameters()).grad.shape == (20_000,)  # type: ignore[union-attr]


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_what_is_refused(kind: Any, compute: str) -> None:
    net = sparsify(Bag(kind=kind), 0.3, target_modules=["bag"], compute=compute)
    for bad in (torch.tensor([[3, 40]]), torch.tensor([[-1, 3]])):
        with pytest.raises((IndexError, RuntimeError)):
            net(bad)
    with pytest.raises(ValueError, match=r"`bag\.weight` has max_norm=1\.0, which writes to the weight"):
        sparsify(Bag(kind=kind, max_norm=1.0), 0.3, target_modules=["bag"])
    with pytest.raises(ValueError, match=r"`bag\.weight` has sparse=True"):
        sparsify(Bag(kind=kind, sparse=True), 0.3, target_modules=["bag"])
