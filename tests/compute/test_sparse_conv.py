"""Sparse convolutions give the results of torch's convolution with the same weight in dense form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_deepr import kernels, sparsify
from lightning_deepr.compute import conv
from lightning_deepr.weights.find import slots_of
from lightning_deepr.weights.k_slots import KSlots

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels here")

SHAPE = (6, 4, 3, 3)
IMAGE = (7, 9)


def slots_for(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[KSlots, Tensor]:
    """Make K random connections; the slots are not in the order of their places."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(torch.Size(shape).numel(), generator=generator)[:count]
    theta = torch.rand(count, generator=generator, dtype=dtype) + 0.1
    return KSlots(torch.Size(shape), places, index=0, sign_seed=1, dtype=dtype), theta.requires_grad_()


def inputs(
    batch: int, shape: tuple[int, ...], image: tuple[int, int], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((batch, shape[1], *image), generator=generator, dtype=dtype)
    return x.requires_grad_(), torch.randn(shape[0], generator=generator, dtype=dtype).requires_grad_()


def agree(slots: KSlots, theta: Tensor, x: Tensor, bias: Tensor | None, how: dict[str, Any], tolerance: float) -> None:
    """Compare value and all gradients, relative to the largest, with those computed in float64."""
    given = [x, theta] if bias is None else [x, theta, bias]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    # the signs are in theta's dtype; +-1 is exact in each
    weight = torch.zeros(slots.total, dtype=torch.float64).index_copy(0, slots.places, exact[1] * slots.signs).view(slots.shape)
    expected = F.conv2d(exact[0], weight, exact[2] if bias is not None else None, **how)
    found = conv.conv2d(x, theta, bias, slots, **how)
    assert found.shape == expected.shape
    assert found.dtype == x.dtype
    dy = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pairs = zip(
        (found, *torch.autograd.grad(found, given, dy.to(x.dtype))),
        (expected, *torch.autograd.grad(expected, exact, dy)),
        strict=True,
    )
    for name, (one, other) in zip(("y", "dx", "dtheta", "dbias"), pairs, strict=False):
        assert one.shape == other.shape, name
        worst = (one.double() - other).abs().max().item() if one.numel() else 0.0
        assert worst <= tolerance * (1 + (other.abs().max().item() if other.numel() else 0.0)), (name, worst)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Give small layers a second thread, which they would not use otherwise."""
    from lightning_deepr.kernels.cpu import native

    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    monkeypatch.setattr(native, "threads_for", lambda work, grain=0: request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("shape", "image", "how"),
    [
        (SHAPE, IMAGE, {"padding": 1}),
        (SHAPE, IMAGE, {}),
        (SHAPE, IMAGE, {"stride": 2, "padding": 1}),
        (SHAPE, IMAGE, {"stride": (3, 2), "padding": (0, 2), "dilation": (2, 1)}),
        (SHAPE, IMAGE, {"padding": 5}),  # pixels of y that depend on no pixel of x
        (SHAPE, IMAGE, {"padding": "same", "dilation": 2}),
        ((5, 3, 2, 4), IMAGE, {"padding": "same"}),  # uneven padding
        ((5, 3, 4, 1), IMAGE, {"padding": "valid", "stride": (1, 4)}),
        ((5, 3, 1, 1), IMAGE, {"stride": 3}),  # pixels of x that no pixel of y depends on
        ((3, 2, 5, 5), (25, 14), {"padding": 2}),  # more pixels than are computed at a time
        ((20, 17, 3, 3), (3, 1), {"padding": 1}),
        ((2, 3, 7, 9), IMAGE, {}),  # one pixel is left
    ],
)
def test_sizes(shape: tuple[int, ...], image: tuple[int, int], how: dict[str, Any], threads: int) -> None:
    total = torch.Size(shape).numel()
    slots, theta = slots_for(shape, max(total // 4, 1))
    x, bias = inputs(3, shape, image)
    agree(slots, theta, x, bias, how, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3, 8, 16, 17, 128])
def test_batches(batch: int, dtype: torch.dtype, threads: int) -> None:
    slots, theta = slots_for(SHAPE, 60, dtype)
    x, bias = inputs(batch, SHAPE, IMAGE, dtype)
    agree(slots, theta, x, bias, {"padding": 1}, 1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("count", [0, 1, 216])
def test_none_one_and_all_connections(count: int, threads: int) -> None:
    slots, theta = slots_for(SHAPE, count)
    x, bias = inputs(3, SHAPE, IMAGE)
    agree(slots, theta, x, bias, {"padding": 1}, 1e-12)


def test_more_connections_of_a_channel_than_are_prepared_at_a_time() -> None:
    shape = (40, 40, 3, 3)
    slots, theta = slots_for(shape, 14000)
    x, bias = inputs(2, shape, IMAGE)
    agree(slots, theta, x, bias, {"padding": 1}, 1e-12)
    agree(slots, theta, x, bias, {"padding": 1, "stride": 2}, 1e-12)


def test_channels_without_connections() -> None:
    """Output channels 1, 2 and 5 and input channels 0 and 3 have none."""
    keep = torch.zeros(SHAPE, dtype=torch.bool)
    keep[torch.tensor([0, 3, 4])[:, None], torch.tensor([1, 2])[None]] = True
    places = keep.view(-1).nonzero().view(-1)
    slots = KSlots(torch.Size(SHAPE), places, index=0, sign_seed=1, dtype=torch.float64)
    theta = torch.rand(places.numel(), dtype=torch.float64).requires_grad_()
    x, bias = inputs(3, SHAPE, IMAGE)
    agree(slots, theta, x, bias, {"padding": 1}, 1e-12)
    dx = torch.autograd.grad(conv.conv2d(x, theta, bias, slots, padding=1).sum(), x)[0]
    assert not dx[:, [0, 3]].any()
    assert dx[:, [1, 2]].any()


@pytest.mark.parametrize("how", [{"padding": 1}, {"stride": 2}])
def test_planes_that_are_computed_in_bands(how: dict[str, Any], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "CACHE", 1 << 12)
    conv._geometry.cache_clear()
    try:
        slots, theta = slots_for((3, 2, 3, 3), 20)
        x, bias = inputs(17, (3, 2, 3, 3), (33, 9))
        agree(slots, theta, x, bias, how, 1e-12)
        image, stride = (2, 33, 9), conv._pair(how.get("stride", 1))
        around = conv._around(how.get("padding", 0), (3, 3), (1, 1))
        geometry = conv._geometry(image, (3, 2, 3, 3), stride, around, (1, 1), 8, 8)
        assert geometry.bands > 1  # or this has tested nothing
        assert geometry.forward_words["BANDS"] > 1
    finally:
        conv._geometry.cache_clear()


@pytest.mark.parametrize(
    "which", [(True, False, False), (False, True, False), (False, False, True), (False, True, True), (True, True, False)]
)
def test_only_the_gradients_that_are_asked_for(which: tuple[bool, bool, bool]) -> None:
    slots, theta = slots_for(SHAPE, 60)
    x, bias = inputs(3, SHAPE, IMAGE)
    expected = torch.autograd.grad(F.conv2d(x, slots.dense(theta), bias, padding=1).square().sum(), [x, theta, bias])
    given = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip((x, theta, bias), which, strict=True)]
    conv.conv2d(*given, slots, padding=1).square().sum().backward()
    for tensor, gradient, wanted in zip(given, expected, which, strict=True):
        if wanted:
            torch.testing.assert_close(tensor.grad, gradient, rtol=1e-12, atol=1e-12)
        else:
            assert tensor.grad is None


def test_inputs_of_any_memory_layout() -> None:
    slots, theta = slots_for(SHAPE, 60)
    x, bias = inputs(9, SHAPE, IMAGE)
    expected = F.conv2d(x, slots.dense(theta), bias, padding=1)
    layouts = {
        "channels_last": x.detach().to(memory_format=torch.channels_last),
        "transposed": x.detach().transpose(2, 3).contiguous().transpose(2, 3),
        "strided": torch.stack((x.detach(), x.detach()), dim=-1)[..., 0],
        "expanded": x.detach()[:1].expand(9, -1, -1, -1),
    }
    for name, given in layouts.items():
        found = conv.conv2d(given.requires_grad_(), theta, bias, slots, padding=1)
        wanted = expected if name != "expanded" else expected[:1].expand(9, -1, -1, -1)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12, msg=name)
    # a gradient without a layout of its own
    dx, dtheta = torch.autograd.grad(conv.conv2d(x, theta, bias, slots, padding=1).sum(), [x, theta])
    other_dx, other_dtheta = torch.autograd.grad(expected.sum(), [x, theta])
    torch.testing.assert_close(dx, other_dx, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dtheta, other_dtheta, rtol=1e-12, atol=1e-12)


def test_an_empty_batch() -> None:
    slots, theta = slots_for(SHAPE, 60)
    x, bias = inputs(0, SHAPE, IMAGE)
    agree(slots, theta, x, bias, {"padding": 1, "stride": 2}, 0.0)


def test_one_thread_and_two_find_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_deepr.kernels.cpu import native

    slots, theta = slots_for((20, 17, 3, 3), 500, torch.float32)
    x, bias = inputs(40, (20, 17, 3, 3), IMAGE, torch.float32)
    found = []
    for count in (1, 2, 3):
        monkeypatch.setattr(native, "threads_for", lambda work, grain=0, count=count: count)
        y = conv.conv2d(x, theta, bias, slots, padding=1)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, theta, bias])])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_without_gradients() -> None:
    slots, theta = slots_for(SHAPE, 60)
    x, _ = inputs(3, SHAPE, IMAGE)
    with torch.no_grad():
        y = conv.conv2d(x, theta, None, slots, padding=1)
    assert not y.requires_grad
    torch.testing.assert_close(y, F.conv2d(x, slots.dense(theta), None, padding=1).detach(), rtol=1e-12, atol=1e-12)


def test_autocast() -> None:
    slots, theta = slots_for(SHAPE, 60, torch.float32)
    x, bias = inputs(3, SHAPE, IMAGE, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv.conv2d(x.to(torch.bfloat16), theta, bias, slots, padding=1)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.conv2d(x, slots.dense(theta), bias, padding=1), rtol=0.05, atol=0.1)


def test_a_second_derivative_is_refused() -> None:
    slots, theta = slots_for(SHAPE, 60)
    x, bias = inputs(3, SHAPE, IMAGE)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(conv.conv2d(x, theta, bias, slots).square().sum(), theta, create_graph=True)


def test_a_rewiring_between_the_passes_is_noticed() -> None:
    slots, theta = slots_for(SHAPE, 60)
    x, bias = inputs(3, SHAPE, IMAGE)
    y = conv.conv2d(x, theta, bias, slots)
    with torch.no_grad():
        slots.places[0] = next(place for place in range(slots.total) if place not in slots.places)
    slots.places_changed()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_new_places_are_followed() -> None:
    slots, theta = slots_for(SHAPE, 60)
    x, bias = inputs(3, SHAPE, IMAGE)
    conv.conv2d(x, theta, bias, slots)
    with torch.no_grad():
        slots.places.copy_(torch.randperm(slots.total)[:60])
        slots.signs.copy_(slots.signs_at(slots.places))
    agree(slots, theta, x, bias, {"padding": 1}, 1e-12)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_operators_keep_their_promises(batch: int, stride: int) -> None:
    slots, theta = slots_for(SHAPE, 60)
    x, bias = inputs(batch, SHAPE, IMAGE)
    weight, how = list(SHAPE), ([stride, stride], [1, 1, 1, 1], [1, 1])
    order = slots.ordered().buffer
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(conv.conv2d_op, (x, theta, bias, order, weight, *how), test_utils=checks)
    torch.library.opcheck(conv.conv2d_op, (x, theta, None, order, weight, *how), test_utils=checks)
    dy = torch.randn_like(conv.conv2d(x, theta, bias, slots, stride, 1)).detach()
    needs = [(True, True, True), (False, True, False), (True, False, True)]
    for need in needs:
        arguments = (dy, x.detach(), theta.detach(), order, weight, *how, *need)
        torch.library.opcheck(conv.conv2d_backward_op, arguments, test_utils=checks)


def test_the_operator_has_the_same_gradients() -> None:
    slots, theta = slots_for(SHAPE, 60)
    x, bias = inputs(17, SHAPE, IMAGE)
    short = conv.conv2d(x, theta, bias, slots, 2, 1)
    with torch.profiler.profile() as profile:
        watched = conv.conv2d(x, theta, bias, slots, 2, 1)
    assert "lightning_deepr::conv2d" in {event.name for event in profile.events()}
    assert torch.equal(short, watched)
    for one, other in zip(
        torch.autograd.grad(short.square().sum(), [x, theta, bias]),
        torch.autograd.grad(watched.square().sum(), [x, theta, bias]),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 3, 7, 9), "to have 4 channels, but got 3"),
        (torch.zeros(2, 4, 2, 9), "Kernel size can't be greater"),
        (torch.zeros(2, 4, 7, 9, dtype=torch.float64), "should be the same|expected scalar type"),
        (torch.zeros(4, 7), r"Expected input\[B, 4, H, W\]"),
    ],
)
def test_inputs_that_do_not_fit(x: Tensor, message: str) -> None:
    slots, theta = slots_for(SHAPE, 60, torch.float32)
    with pytest.raises(RuntimeError, match=message):
        conv.conv2d(x, theta, None, slots)


@pytest.mark.parametrize("bias", [torch.zeros(5), torch.zeros(6, 1), torch.zeros(6, dtype=torch.float64)])
def test_a_bias_that_does_not_fit(bias: Tensor) -> None:
    slots, theta = slots_for(SHAPE, 60, torch.float32)
    with pytest.raises(RuntimeError, match=r"bias|[Ee]xpected"):
        conv.conv2d(torch.zeros(2, 4, 7, 9), theta, bias, slots)


def test_a_dtype_without_a_kernel() -> None:
    slots, theta = slots_for(SHAPE, 60, torch.bfloat16)
    x = torch.randn(2, 4, 7, 9).to(torch.bfloat16)
    assert torch.equal(conv.conv2d(x, theta, None, slots), F.conv2d(x, slots.dense(theta)))


def test_a_compiled_graph_holds_the_operator() -> None:
    slots, theta = slots_for(SHAPE, 60)
    x, bias = inputs(3, SHAPE, IMAGE)
    slots.ordered()  # as a converted layer does

    def loss(x: Tensor, theta: Tensor, bias: Tensor) -> Tensor:
        return conv.conv2d(x, theta, bias, slots, padding=1).relu().square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        torch.autograd.grad(compiled(x, theta, bias), [x, theta, bias]),
        torch.autograd.grad(loss(x, theta, bias), [x, theta, bias]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "x", "expected"),
    [
        (nn.Conv2d(4, 6, 3), torch.zeros(2, 4, 5, 5), True),
        (nn.Conv2d(4, 6, 3, padding="same", stride=1, dilation=2), torch.zeros(0, 4, 5, 5), True),
        (nn.Conv2d(4, 6, 3), torch.zeros(4, 5, 5), False),  # no batch dimension
        (nn.Conv2d(4, 6, 3, groups=2), torch.zeros(2, 4, 5, 5), False),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), torch.zeros(2, 4, 5, 5), False),
        (nn.Conv2d(4, 6, 3), torch.zeros(2, 4, 5, 2), False),  # smaller than the kernel
        (nn.Conv2d(4, 6, 3), torch.zeros(2, 3, 5, 5), False),
        (nn.Conv2d(4, 6, 3), torch.zeros(2, 4, 5, 5, dtype=torch.float64), False),
        (nn.Conv2d(4, 6, 3, dtype=torch.bfloat16), torch.zeros(2, 4, 5, 5, dtype=torch.bfloat16), True),
        (nn.Conv1d(4, 6, 3), torch.zeros(2, 4, 5), False),
    ],
)
def test_what_is_left_to_dense_compute(layer: nn.Module, x: Tensor, expected: bool) -> None:
    converted = sparsify(layer, 0.2, compute="dense")
    assert conv.suits(converted, x) is expected
    slots = slots_of(converted, "weight")
    if expected:
        assert isinstance(layer, nn.Conv2d)
        assert slots is not None
        theta = converted.parametrizations["weight"].original  # type: ignore[index, union-attr]
        found = conv.conv2d(x, theta, layer.bias, slots, layer.stride, layer.padding, layer.dilation)
        torch.testing.assert_close(found, layer(x), rtol=1e-5, atol=1e-6)
