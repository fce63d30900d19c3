"""The choice of compute for a tensor: "auto" picks one, and an explicit choice is followed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_deepr import DeepR, connectivity_report, load_state_dict, sparsify
from lightning_deepr import kernels as kernels_module
from lightning_deepr.compute import choice
from lightning_deepr.weights.k_slots import KSlots
from tests.helpers.layers import Scaled
from tests.helpers.regression import SEED
from tests.helpers.sparse_linear import dense_twin, needs_kernels, sparse_layer
from tests.helpers.state import all_slots, slots_by_name, thetas
from tests.helpers.tensors_made import Recording

pytestmark = pytest.mark.filterwarnings("ignore:A backward pass reached", "ignore:.*an int and means one single connection")


@needs_kernels
def test_auto_picks_per_tensor_and_the_report_says_what() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10), nn.Unflatten(1, (1, 10)), nn.Conv1d(1, 4, 3))
    sparsify(net, {"0": 0.01, "2": 0.9, "4": 0.5}, compute="auto")
    assert {row["name"]: row["compute"] for row in connectivity_report(net)} == {
        "0.weight": "sparse",
        "2.weight": "dense",
        "4.weight": "dense",
    }
    assert "sparse" in str(connectivity_report(net)).splitlines()[2]
    both = {kind: copy.deepcopy(net) for kind in ("sparse", "dense")}
    for kind, twin in both.items():
        for slots in all_slots(twin)[:2]:
            slots.choose_compute(kind, True)
    for batch in (1, 30, 200, 1):  # each batch size has its own choice; the numbers are the same
        x = torch.randn(batch, 1000)
        for twin in both.values():
            torch.testing.assert_close(net(x), twin(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compute", ["sparse", "dense"])
def test_what_is_asked_for_is_what_is_done(compute: str) -> None:
    net = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 10), nn.Unflatten(1, (1, 10)), nn.Conv1d(1, 4, 3))
    sparsify(net, {"0": 0.01, "1": 0.9, "3": 0.5}, compute=compute)
    with Recording() as seen:
        net(torch.randn(2, 1000))
    assert seen.names.count("lightning_deepr.linear.default") == (
        2 if compute == "sparse" and kernels_module.available() else 0
    )
    # no sparse kernel is faster for this convolution: it stays dense, and the report says so
    assert [row["compute"] for row in connectivity_report(net)] == [compute, compute, "dense"]


def test_a_layer_too_large_to_be_dense_is_sparse_whatever_is_picked() -> None:
    with torch.device("meta"):
        layer = nn.Linear(40_000, 20_000)
    sparsify(layer, 50, compute="auto")
    assert connectivity_report(layer)[0]["compute"] == "sparse"
    for batch in (1, 2):
        layer(torch.randn(batch, 40_000)).sum().backward()


def test_first_used_in_inference_mode_then_trained() -> None:
    """A sanity check runs in inference mode, and may be the first pass that needs the order of the connections."""
    layer = sparse_layer(500, 400, 0.02, compute="auto")
    slots = slots_by_name(layer)["weight"]
    slots.order, slots.policy = None, "sparse"
    with torch.inference_mode():
        layer(torch.randn(5, 500))
        copy.deepcopy(layer)(torch.randn(5, 500))
    x = torch.randn(5, 500)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    DeepR(l1=1.0, check_invariants=True).attach(layer, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer(x), dense_twin(layer)(x), rtol=1e-4, atol=1e-5)


def test_own_layer_of_the_table_trains_sparse() -> None:
    net = sparsify(Scaled(), 0.4, target_modules=["weight"], compute="sparse", seed=SEED)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    DeepR(l1=0.5, seed=SEED, check_invariants=True).attach(net, optimizer)
    assert isinstance(slots_by_name(net)["weight"], KSlots)
    for _ in range(10):
        x = torch.randn(8, 14)
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    twin = Scaled()
    with torch.no_grad():
        twin.weight.copy_(net.weight)
        twin.bias.copy_(net.bias)
    torch.testing.assert_close(net(x), twin(x))
    loaded = load_state_dict(Scaled(), net.state_dict())
    torch.testing.assert_close(loaded(x), net(x))
    assert thetas(loaded)[0].shape == thetas(net)[0].shape


@needs_kernels
@pytest.mark.parametrize(
    ("layer", "pixels", "expected"),
    [
        (lambda: nn.Conv2d(96, 64, 3, padding=36, dilation=36), 4, "dense"),
        (lambda: nn.Conv2d(96, 64, 3, padding="same", dilation=18), 5, "dense"),
        (lambda: nn.Conv2d(96, 64, 1, padding=20), 4, "dense"),
        (lambda: nn.Conv2d(96, 64, 3, padding=1), 16, "sparse"),
        (lambda: nn.Conv2d(96, 64, 3, padding=2, dilation=2), 16, "sparse"),
        (lambda: nn.Conv2d(96, 64, 5, padding=2, stride=2), 16, "sparse"),
    ],
    ids=["dilated by 36", "same, dilated by 18", "much padding", "3 x 3", "dilated by 2", "strided"],
)
def test_auto_runs_a_convolution_dense_whose_padding_is_larger_than_its_image(layer: Any, pixels: int, expected: str) -> None:
    torch.manual_seed(0)
    net = sparsify(layer(), 0.05, compute="auto")
    x = torch.randn(2, 96, pixels, pixels)
    y = net(x)
    assert all_slots(net)[0].compute == expected
    all_slots(net)[0].choose_compute("sparse", True)  # the numbers are the same
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_auto_chooses_anew_where_the_precision_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A size of input that was computed in float32 may come again under autocast, where dense products cost something else."""
    seen = []

    def rule(rows: int, columns: int, count: int, batch: int, dtype: torch.dtype, device: str) -> bool:
        seen.append(dtype)
        return dtype is torch.float32

    monkeypatch.setattr(choice, "prefers_sparse", rule)
    net = sparsify(nn.Linear(300, 200), 0.3, compute="auto")
    (slots,) = all_slots(net)
    x = torch.randn(8, 300)
    for _ in range(2):
        seen.clear()
        for casts in (False, False, True, True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=casts):
                y = net(x)
            assert slots.compute == ("dense" if casts else "sparse")
            assert y.dtype is (torch.bfloat16 if casts else torch.float32)
        slots.ask_again()
    assert seen == [torch.float32, torch.bfloat16, torch.float32]
    net, x = net.bfloat16(), x.bfloat16()
    net(x)
    assert slots.compute == "dense" and seen[3:] == [torch.bfloat16]
