"""Memory and work are proportional to K: no tensor of N elements is made, in layers of up to 10^12 places."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_deepr import DeepR, connections, connectivity_report, sparsify
from tests.helpers.regression import SEED
from tests.helpers.sparse_linear import huge_layer, needs_kernels
from tests.helpers.state import all_slots, assert_connected, theta_of
from tests.helpers.tensors_made import Recording

pytestmark = pytest.mark.filterwarnings("ignore:A backward pass reached", "ignore:.*an int and means one single connection")


@needs_kernels
@pytest.mark.parametrize("way", ["short", "operators"])
def test_no_dense_tensor_is_ever_made(way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if way == "short":  # the way of eager mode; the dispatch mode of this test would otherwise send every call to the operators
        monkeypatch.setattr("lightning_deepr.compute.sparse.is_plain", lambda x: True)
    torch.manual_seed(0)
    columns, rows, count, batch = 3000, 4000, 3000, 8
    with Recording() as seen:
        with torch.device("meta"):
            net = nn.Linear(columns, rows)
        net = sparsify(net, count, compute="sparse")
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        DeepR(l1=0.3, check_invariants=True).attach(net, optimizer)
        for _ in range(3):
            x = torch.randn(batch, columns).requires_grad_()
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
        torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
        net.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["net"])
        copy.deepcopy(net)(x)
        connections(net)
        str(connectivity_report(net))
    kernel_calls = seen.names.count("lightning_deepr.linear.default")
    assert kernel_calls == (0 if way == "short" else 4)
    assert batch * rows <= seen.largest <= rows * columns / 100
    # 3000 connections of 16 bytes with two moments each, 4000 biases of three numbers; a dense weight would take 48 MB
    assert (tmp_path / "checkpoint.pt").stat().st_size < 250_000


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}
CONVERTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(60, 50, bias=False), (4, 60)),
    "conv": (lambda: nn.Conv2d(8, 16, 3, bias=False), (2, 8, 6, 6)),
    "lstm": (lambda: nn.LSTM(20, 24, bias=False), (5, 2, 20)),
}


def elements(state: Any) -> int:
    return sum(value.numel() for value in tree_leaves(state) if isinstance(value, Tensor))


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", CONVERTED)
def test_state_gradients_and_checkpoint_are_k_sized(name: str, optimizer_name: str) -> None:
    make, size = CONVERTED[name]
    torch.manual_seed(0)
    net = sparsify(make(), 0.05)
    optimizer = OPTIMIZERS[optimizer_name](net.parameters())
    DeepR().attach(net, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        output = net(torch.randn(size))
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()
        optimizer.step()
    report = connectivity_report(net)
    assert report.active == round(0.05 * report.total)
    parameters = list(net.parameters())
    assert elements(parameters) == elements([p.grad for p in parameters]) == report.active
    per_tensor = 10  # counters, seeds, shapes: their number does not depend on N or K
    extra = per_tensor * len(parameters)
    kept = max(sum(isinstance(v, Tensor) and v.shape == p.shape for v in optimizer.state[p].values()) for p in parameters)
    assert kept <= 4
    assert elements(optimizer.state_dict()) <= kept * report.active + extra
    assert elements(net.state_dict()) <= 4 * report.active + extra  # theta, places, births, at most as many exceptions


def test_a_layer_of_1e12_places_trains_and_stays_exact() -> None:
    layer = huge_layer(bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    DeepR(l1=1000.0, seed=SEED, check_invariants=True).attach(layer, optimizer)
    (slots,) = all_slots(layer)
    x = torch.randn(2, 1_000_000)
    first = slots.places.clone()
    for _ in range(4):
        optimizer.zero_grad()
        y = layer(x)
        y.square().sum().backward()
        row, column = slots.places // 10**6, slots.places % 10**6
        values = connections(layer)["weight"][2]
        expected = torch.zeros(2, 10**6).index_add_(1, row, x[:, column] * values)
        torch.testing.assert_close(y.detach(), expected)
        torch.testing.assert_close(theta_of(layer, "weight").grad, (2 * expected[:, row] * x[:, column]).sum(0) * slots.signs)
        optimizer.step()
        assert_connected(layer, {"weight": 1000})
    assert (first != slots.places).float().mean() > 0.5
    assert int(slots.places.max()) > 9 * 10**11 and slots.places.unique().numel() == 1000


def test_a_layer_of_more_than_2_to_the_31_places_trains_like_its_own_connections() -> None:
    layer = huge_layer(50_000, 700)
    assert layer.weight.numel() > 2**31
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    DeepR(l1=100.0, seed=SEED, check_invariants=True).attach(layer, optimizer)
    (slots,) = all_slots(layer)
    beyond = 0
    for _ in range(10):
        x = torch.randn(3, 50_000)
        optimizer.zero_grad()
        layer(x).sum().backward()
        torch.testing.assert_close(theta_of(layer, "weight").grad, x.sum(0)[slots.places % 50_000] * slots.signs)
        optimizer.step()
        assert_connected(layer, {"weight": 700})
        beyond += int((slots.places[slots.born >= 0] >= 2**31).sum())
    assert beyond > 100
