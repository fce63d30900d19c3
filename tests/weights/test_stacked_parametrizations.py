"""A parametrization of others upon a converted weight is kept, or refused by name before a wrong weight leaves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations

from lightning_deepr import SoftDeepR, connectivity_report, densify, load_state_dict, save_sparse, sparsify
from lightning_deepr.export import to_c_header, to_csr, to_dense_state_dict, to_scipy
from tests.helpers.optional import needs


class Doubled(nn.Module):
    """A parametrization without a state, whose inverse would change the weight."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


class Standardized(nn.Module):
    """A parametrization with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.5))

    def forward(self, weight: Tensor) -> Tensor:
        return self.gain * (weight - weight.mean(-1, keepdim=True)) / weight.std()


UPON: dict[str, Callable[[nn.Module], object]] = {
    "spectral_norm": lambda layer: parametrizations.spectral_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley", use_trivialization=False),
    "doubled": lambda layer: None,  # see stacked(): torch would pass the weight through right_inverse, which ours refuses
    "standardized": lambda layer: register_parametrization(layer, "weight", Standardized()),
    "two": lambda layer: None,
}
upon = pytest.mark.parametrize("kind", UPON)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def stacked(kind: str, compute: str = "auto") -> nn.Sequential:
    torch.manual_seed(0)
    net: nn.Sequential = sparsify(plain(), 0.4, compute=compute)  # type: ignore[assignment]
    if kind in ("doubled", "two"):
        holder = net[0].parametrizations.weight  # type: ignore[union-attr]
        for number, one in enumerate([Standardized(), Doubled()] if kind == "two" else [Doubled()]):
            holder.add_module(str(number + 1), one)  # type: ignore[union-attr, operator]
    else:
        UPON[kind](net[0])
    return net.eval()


X = torch.randn(5, 8)


@upon
@pytest.mark.parametrize("compute", ["auto", "dense", "sparse"])
def test_densify_keeps_it(kind: str, compute: str) -> None:
    net = stacked(kind, compute)
    expected, dense = net(X), densify(copy.deepcopy(net))
    torch.testing.assert_close(dense(X), expected)
    assert is_parametrized(dense[0]) and not is_parametrized(dense[2])  # type: ignore[index]
    assert dense[0].parametrizations.weight.original.shape == (8, 8)  # type: ignore[index]
    torch.testing.assert_close(remove_parametrizations(dense[0], "weight")(X), net[0](X))  # type: ignore[index]
    assert type(dense[0]) is nn.Linear  # type: ignore[index]
    dense[2](net[1](net[0](X))).sum().backward()  # type: ignore[index]


@upon
def test_a_dense_state_dict_keeps_it(kind: str) -> None:
    net = stacked(kind)
    state, expected = to_dense_state_dict(net), densify(copy.deepcopy(net)).state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    assert state._metadata == expected._metadata  # type: ignore[attr-defined]
    target = densify(stacked(kind))
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    target.load_state_dict(state)
    torch.testing.assert_close(target(X), net(X))


@needs("scipy")
@upon
def test_what_cannot_keep_it_refuses_by_name(kind: str, tmp_path: Path) -> None:
    net = stacked(kind)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for what in (
        lambda: save_sparse(net, tmp_path / "net"),
        lambda: to_csr(net),
        lambda: to_scipy(net),
        lambda: to_c_header(net, tmp_path / "net.h"),
    ):
        with pytest.raises(ValueError, match=r"`0(\.weight)?` .*another parametrization"):
            what()
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@upon
def test_a_state_dict_of_it_does_not_load_without_it(kind: str) -> None:
    net = stacked(kind)
    with pytest.raises((ValueError, RuntimeError), match=r"`0\.weight`.*another parametrization|Unexpected key"):
        load_state_dict(plain(), net.state_dict())
    loaded = stacked(kind)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(load_state_dict(loaded, net.state_dict())(X), net(X))


@upon
@pytest.mark.parametrize("compute", ["auto", "dense", "sparse"])
def test_the_report_says_that_the_weight_is_built(kind: str, compute: str) -> None:
    rows = {row["name"]: row["compute"] for row in connectivity_report(stacked(kind, compute))}
    assert rows["0.weight"] == "dense" and rows["2.weight"] == ("dense" if compute == "dense" else "sparse")


def test_a_theta_for_every_connection_keeps_it_too() -> None:
    torch.manual_seed(0)
    net = plain()
    SoftDeepR(0.4, temperature=1e-6).prepare(net)
    register_parametrization(net[0], "weight", Standardized())
    expected = net.eval()(X)
    state = to_dense_state_dict(net)
    torch.testing.assert_close(densify(net)(X), expected)
    assert state.keys() == net.state_dict().keys()
