"""Tensors that could not be chosen, and the report of what stayed dense and of what computes."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_deepr import DeepR, connections, connectivity_report, densify, load_state_dict, save_sparse, sparsify
from lightning_deepr.conversion.selection import candidates
from tests.helpers.small import unchanged


class Attention(nn.Module):
    """A user's module with a table of biases by position, as in Swin and BEiT, and words with "bias" in them."""

    def __init__(self) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.randn(25, 4))
        self.unbiased = nn.Parameter(torch.randn(6, 6))
        self.out_bias = nn.Parameter(torch.randn(3, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.unbiased + self.out_bias.sum(0) + self.relative_position_bias_table.sum() + self.bias


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (["unbiased"], {"attn.unbiased"}),
        (["attn"], {"attn.unbiased"}),  # a module's name takes its weights, not its biases
        (["*"], {"attn.unbiased", "head.weight"}),
        (["attn.*"], {"attn.unbiased"}),
        (["relative_position_bias_table"], {"attn.relative_position_bias_table"}),
        (["*bias_table"], {"attn.relative_position_bias_table"}),
        (["attn.out_bias", "head"], {"attn.out_bias", "head.weight"}),
        (["attn.*bias*"], {"attn.relative_position_bias_table", "attn.unbiased", "attn.out_bias"}),
        (r".*", {"attn.unbiased", "head.weight"}),
        (r".*_bias_table", {"attn.relative_position_bias_table"}),
        (lambda name, module: name == "attn", {"attn.unbiased"}),
        ("all", {"head.weight"}),
    ],
)
def test_biases_are_chosen_by_their_own_names_only(pattern: Any, expected: set[str]) -> None:
    net = nn.ModuleDict({"attn": Attention(), "head": nn.Linear(6, 2)})
    assert connections(sparsify(net, 0.5, target_modules=pattern)).keys() == expected
    x = torch.randn(3, 6)
    y = net["attn"](x)
    y.sum().backward()
    torch.testing.assert_close(densify(net)["attn"](x), y)  # type: ignore[index]


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(6, 6), torch.randn(6), torch.randn(6, 4)])
        self.by_name = nn.ParameterDict({"up": torch.randn(4, 5), "shift": torch.randn(5)})

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.weights[0] + self.weights[1]) @ self.weights[2]) @ self.by_name["up"] + self.by_name["shift"]


@pytest.mark.parametrize("compute", ["auto", "dense", "sparse"])
def test_parameters_in_lists_and_dicts(compute: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    net, x = Listed(), torch.randn(3, 6)
    assert set(connectivity_report(net).left_out) == {"weights.0", "weights.2", "by_name.up"}
    sparsify(net, {"weights": 0.5, "by_name.up": 0.5}, compute=compute)
    assert connections(net).keys() == {"weights.0", "weights.2", "by_name.up"}
    assert [len(w) if i == 1 else w.shape for i, w in enumerate(net.weights)] == [(6, 6), 6, (6, 4)]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    rewiring = DeepR(l1=1e-3).attach(net, optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    rewiring.remove()
    for what in (net.state_dict(), save_sparse(net, tmp_path / "net")):
        torch.testing.assert_close(load_state_dict(Listed(), what)(x), net(x))
    y = net(x)
    torch.testing.assert_close(densify(net)(x), y)


# -- what can't be converted --------------------------------------------------------------------------------------------------


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filters = nn.Parameter(torch.randn(4, 5, dtype=torch.complex64))


BARRED = {"lazy": (lambda: nn.LazyLinear(5), "weight", "lazy"), "complex": (Spectrum, "filters", "complex")}


@pytest.mark.parametrize("kind", BARRED)
def test_what_cannot_be_converted_is_said_by_name(kind: str) -> None:
    make, tensor, why = BARRED[kind]
    net = nn.ModuleDict({"odd": make(), "fc": nn.Linear(6, 5)})
    name = f"odd.{tensor}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sparsify(net, 0.5)
    assert connections(net).keys() == {"fc.weight"}
    assert [str(one.message) for one in caught if name in str(one.message)] or kind != "lazy"
    report = connectivity_report(net)
    assert why in report.left_out[name] and f"left dense: {name} ({why}" in str(report)
    for target in (["odd"], [name], {name: 0.5}, r"odd.*", lambda n, module: n == "odd", ["fc", tensor]):
        other = nn.ModuleDict({"odd": make(), "fc": nn.Linear(6, 5)})
        chosen: dict[str, Any] = {"target_modules": target}
        connectivity: Any = 0.5
        if isinstance(target, dict):
            chosen, connectivity = {}, target
        if kind == "complex":
            with (
                unchanged(other),
                pytest.raises(ValueError, match=rf"`{name}` can't be converted: it is {why}.*exclude_modules"),
            ):
                sparsify(other, connectivity, **chosen)
        else:
            with pytest.raises(ValueError, match=rf"`{name}` can't be converted: it is {why}.*exclude_modules"):
                sparsify(other, connectivity, **chosen)
    other = nn.ModuleDict({"odd": make(), "fc": nn.Linear(6, 5)})
    assert connections(sparsify(other, {"*": 0.5})).keys() == {"fc.weight"}, "a wildcard passes over it"
    with pytest.raises(ValueError, match=rf"nothing to convert.*{name}.*{why}"):
        sparsify(nn.ModuleDict({"odd": make()}), 0.5)


def test_a_lazy_layer_is_converted_after_its_first_pass() -> None:
    net: Any = nn.Sequential(nn.LazyLinear(5), nn.LazyConv1d(3, 2))
    net[0](torch.randn(2, 6)), net[1](torch.randn(2, 4, 7))
    assert connections(sparsify(net, 0.5)).keys() == {"0.weight", "1.weight"}


# -- shares -------------------------------------------------------------------------------------------------------------------


class Odds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.first = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.own = Attention()
        self.left = nn.Linear(8, 8, bias=False)
        self.frozen = nn.Linear(8, 7, bias=False).requires_grad_(False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(7, 5, bias=False))
        self.tied, self.tied_too = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
        self.tied_too.weight = self.tied.weight
        self.twice = self.first


def test_the_report_counts_all_parameters_by_reason() -> None:
    net = Odds()
    everything = sum(p.numel() for p in net.parameters())
    before = connectivity_report(net)
    assert before.parameters == everything == sum(before.dense.values())
    sparsify(net, 0.25, exclude_modules=["left", "tied", "tied_too"])
    report = connectivity_report(net)
    assert report.parameters == everything
    assert report.dense == {
        "bias or norm": 148,  # first 8, norm 16; in `own` the bias 6, the table 100 and out_bias 18
        "excluded or not named": 64,
        "only when named": 60,
        "frozen": 56,
        "another parametrization": 40,  # weight_norm's magnitudes and directions
        "unknown kind of layer": 36,
        "tied": 12,
    }
    assert sum(report.dense.values()) == everything - 48
    assert list(report.dense.values()) == sorted(report.dense.values(), reverse=True)
    printed = " ".join(str(report).split())  # long lines are wrapped
    assert f"dense: {everything - 48} of all {everything} parameters (" in printed and printed.endswith("tied 12")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["parameters"] == everything and data["dense"] == report.dense


# -- what computes ------------------------------------------------------------------------------------------------------------


class StandardizedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 2 * weight, bias)


class StandardizedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class PassedOn(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + 1


class Multiplied(nn.Module):
    """Not a known kind; its weight is [inputs, outputs], as in GPT-2's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Hidden(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x)[0]


LAYERS: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "linear": (lambda: nn.Linear(64, 64), (128, 64), "sparse"),
    "passed on": (lambda: PassedOn(64, 64), (128, 64), "sparse"),
    "standardized linear": (lambda: StandardizedLinear(64, 64), (128, 64), "dense"),
    "product": (Multiplied, (128, 64), "dense"),
    "conv": (lambda: nn.Conv2d(16, 16, 3), (32, 16, 12, 12), "sparse"),
    "standardized conv": (lambda: StandardizedConv(16, 16, 3), (32, 16, 12, 12), "dense"),
    "a conv's inner forward": (lambda: OwnConvForward(16, 16, 3), (32, 16, 12, 12), "dense"),
    "attention": (lambda: Hidden(64, 2), (5, 8, 64), "dense"),
}


@pytest.mark.parametrize("compute", ["auto", "sparse", "dense"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.filterwarnings("ignore:.*have a forward of their own")
def test_the_report_says_what_computes(kind: str, compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_deepr.compute import forwards
    from lightning_deepr.weights.k_slots import KSlots

    make, size, expected = LAYERS[kind]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(*size)
    names = [c.name for c in candidates(layer)]
    sparsify(layer, dict.fromkeys(names, 0.02), compute=compute)
    built = []
    weight_of, quick_weight = KSlots.weight_of, forwards.quick_weight

    def noted(*arguments: Any) -> Any:
        weight = quick_weight(*arguments)
        built.extend([weight] * (weight is not None))
        return weight

    monkeypatch.setattr(KSlots, "weight_of", lambda self, part: (built.append(self), weight_of(self, part))[1])
    monkeypatch.setattr(forwards, "quick_weight", noted)
    y = layer(x)
    y.sum().backward()
    says = {row["compute"] for row in connectivity_report(layer)}
    assert says == {"dense" if compute == "dense" else expected}
    assert ("dense" in says) == bool(built)
    torch.testing.assert_close(densify(layer)(x), y, rtol=1e-4, atol=1e-4)


def test_a_convolution_with_a_forward_of_its_own_is_told_at_the_conversion() -> None:
    for compute in ("auto", "sparse"):
        with pytest.warns(
            UserWarning, match=r"`0` \(StandardizedConv\)|`0\.weight` \(StandardizedConv\).*each forward pass builds"
        ):
            sparsify(nn.Sequential(StandardizedConv(3, 4, 3), nn.Conv2d(4, 4, 3)), 0.3, compute=compute)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsify(nn.Sequential(StandardizedConv(3, 4, 3), nn.Linear(4, 4)), 0.3, compute="dense")
        sparsify(nn.Sequential(nn.Conv2d(3, 4, 3), PassedOn(4, 4)), 0.3, compute="sparse")
