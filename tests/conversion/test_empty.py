"""Weights without a single place (a layer of 0 outputs or inputs) stay dense, and are refused when they are named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_deepr import DeepR, connectivity_report, densify, load_state_dict, save_sparse, sparsify
from tests.helpers.small import unchanged


class Table(nn.Module):
    """A module of no known kind with an empty matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(0, 4))


EMPTY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no outputs": (lambda: nn.Linear(7, 0), "weight"),
    "no inputs": (lambda: nn.Linear(0, 4), "weight"),
    "no channels": (lambda: nn.Conv2d(3, 0, 3), "weight"),
    "no words": (lambda: nn.Embedding(0, 4), "weight"),
    "bilinear": (lambda: nn.Bilinear(3, 4, 0), "weight"),
    "unknown kind": (Table, "table"),
    "on meta": (lambda: nn.Linear(7, 0, device="meta"), "weight"),
}


def build(kind: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.ModuleDict({"body": nn.Linear(20, 10), "empty": EMPTY[kind][0]()})


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("distribution", ["erdos_renyi", "erk", "uniform"])
@pytest.mark.parametrize("connectivity", [0.5, 90, {"*": 0.5}])
def test_all_leaves_an_empty_weight_dense(kind: str, distribution: str, connectivity: Any) -> None:
    net = sparsify(build(kind), connectivity, distribution=distribution)
    report = connectivity_report(net)
    names = {row["name"] for row in report}
    assert "body.weight" in names
    assert f"empty.{EMPTY[kind][1]}" not in names
    assert "empty" in report.left_out[f"empty.{EMPTY[kind][1]}"]
    assert all(row["total"] > 0 for row in report)


@pytest.mark.parametrize("kind", [kind for kind in EMPTY if kind != "on meta"])  # whose values can't be compared
def test_an_empty_weight_is_refused_by_name(kind: str) -> None:
    name = f"empty.{EMPTY[kind][1]}"
    arguments: list[tuple[Any, dict[str, Any]]] = [
        (0.5, {"target_modules": [name]}),
        (0.5, {"target_modules": ["body", name]}),
        ({name: 0.5}, {}),
        ({name: 1, "body": 0.5}, {}),
    ]
    for connectivity, options in arguments:
        net = build(kind)
        with unchanged(net), pytest.raises(ValueError, match=rf"`{name}` can't be converted: it is empty"):
            sparsify(net, connectivity, **options)


def test_a_network_of_empty_weights_has_nothing_to_convert() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = nn.Sequential(nn.Linear(5, 0), nn.Linear(0, 5))
    with pytest.raises(ValueError, match=r"nothing to convert.*`0.weight`: empty"):
        sparsify(net, 0.5)


def test_it_trains_and_comes_back_from_files(tmp_path: Any) -> None:
    """A bottleneck of width 0 beside a layer with connections, as transformers' MobileBert has for some sizes."""

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 0), nn.Linear(0, 3))

    net = sparsify(make(), 0.5)
    optimizer = torch.optim.AdamW(net.parameters())
    DeepR(check_invariants=True).attach(net, optimizer, total_steps=10)
    for _ in range(3):
        optimizer.zero_grad()
        (net(torch.ones(2, 6)).sum() + net[0](torch.ones(2, 6)).square().sum()).backward()
        optimizer.step()
    expected = net[0].weight.clone()
    for source in (net.state_dict(), save_sparse(net, tmp_path / "net.safetensors")):
        assert torch.equal(load_state_dict(make(), source)[0].weight.clone(), expected)
    plain = make()
    plain.load_state_dict(densify(net).state_dict())
    assert torch.equal(plain[0].weight, expected)
