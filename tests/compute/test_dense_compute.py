"""The transient weight: kernels and PyTorch build the same one, and every way of differentiating gives the same gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import sparsify
from lightning_deepr.compute import dense, forwards

SHAPE = torch.Size((128, 160))
COUNT = dense.LARGE + 517


def plain(theta: Tensor, signs: Tensor, places: Tensor, shape: torch.Size = SHAPE) -> Tensor:
    return torch.zeros(shape.numel(), dtype=theta.dtype).index_copy(0, places, theta * signs).view(shape)


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def tensors(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    theta = torch.rand(COUNT, dtype=request.param, generator=generator)
    theta[:9] = 0.0  # newborns are active
    signs = torch.randint(0, 2, (COUNT,), generator=generator).to(request.param) * 2 - 1
    return theta.requires_grad_(), signs, torch.randperm(SHAPE.numel(), generator=generator)[:COUNT]


def through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the calls that use the kernels, so that no test compares PyTorch with itself."""
    calls: list[int] = []
    original = dense.Scatter.forward

    def counted(*arguments: object) -> Tensor:
        calls.append(1)
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(dense.Scatter, "forward", staticmethod(counted))
    return calls


@pytest.mark.parametrize("of", [lambda y: y.contiguous(), lambda y: y.t().contiguous().t(), lambda y: y[:1].expand(128, 160)])
def test_weight_and_gradient_are_pytorchs(
    tensors: tuple[Tensor, Tensor, Tensor], of: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = through_the_kernels(monkeypatch)
    theta = tensors[0]
    gradient = of(torch.randn(SHAPE, dtype=theta.dtype))
    found = []
    for build in (dense.build_weight, plain):
        weight = build(*tensors, SHAPE)
        found.append((weight.detach(), *torch.autograd.grad(weight, theta, gradient)))
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.equal(torch.signbit(found[0][0]), torch.signbit(found[1][0]))  # also at 0


def test_second_derivatives(tensors: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = through_the_kernels(monkeypatch)
    theta = tensors[0]
    found = []
    for build in (dense.build_weight, plain):
        (first,) = torch.autograd.grad(build(*tensors, SHAPE).pow(3).sum(), theta, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), theta)[0])
    assert calls
    assert torch.allclose(*found)


def test_forward_mode_and_transforms(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    theta, signs, places = tensors
    theta, tangent = theta.detach(), torch.rand_like(theta)
    for way in (
        lambda f: torch.func.jvp(f, (theta,), (tangent,))[1],
        lambda f: torch.func.grad(lambda t: f(t).square().sum())(theta),
        lambda f: torch.func.vmap(f)(torch.stack([theta, tangent])),
    ):
        ours, theirs = way(lambda t: dense.build_weight(t, signs, places, SHAPE)), way(lambda t: plain(t, signs, places))
        assert torch.equal(ours, theirs)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(theta, tangent)
        made = torch.autograd.forward_ad.unpack_dual(dense.build_weight(dual, signs, places, SHAPE)).tangent
    assert torch.equal(made, plain(tangent, signs, places))


def test_rewiring_between_forward_and_backward_is_refused(tensors: tuple[Tensor, Tensor, Tensor]) -> None:
    weight = dense.build_weight(*tensors, SHAPE)
    tensors[2][0] = tensors[2][1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weight.sum().backward()


def test_a_layer_trains_alike_with_and_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = through_the_kernels(monkeypatch)
    gradients = []
    for large in (dense.LARGE, 1 << 40):
        monkeypatch.setattr(dense, "LARGE", large)
        if gradients:
            monkeypatch.setattr(forwards, "quick_weight", lambda *arguments: None)
        torch.manual_seed(0)
        layer = sparsify(nn.Conv2d(32, 64, 5), 0.4, compute="dense")
        layer(torch.randn(2, 32, 8, 8)).square().sum().backward()
        gradients.append(next(p.grad for name, p in layer.named_parameters() if name.endswith("original")))
    assert len(calls) == 1
    assert torch.equal(*gradients)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_weight_is_pytorchs(narrow: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded to the nearest, ties to even, at the edges of the range and for values that are not finite, too."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (COUNT,), generator=generator).to(torch.int32)
    bits[:4] = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000], dtype=torch.int32)  # two ties, the largest, inf
    theta = bits.view(torch.float32).abs().requires_grad_()
    signs = torch.randint(0, 2, (COUNT,), generator=generator).float() * 2 - 1
    places = torch.randperm(SHAPE.numel(), generator=generator)[:COUNT]
    gradient = torch.randn(SHAPE, generator=generator).to(narrow)
    found = []
    for kernels_on in (True, False):
        monkeypatch.setattr(dense.kernels, "available", lambda on=kernels_on: on)
        weight = dense.build_weight(theta, signs, places, SHAPE, narrow)
        assert weight.dtype is narrow
        found.append((weight.detach(), *torch.autograd.grad(weight, theta, gradient)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
