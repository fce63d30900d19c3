"""The records of the kinds of layers: torch's own, and one of the user's."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_deepr import connectivity_report, densify, sparsify
from lightning_deepr.conversion.convert import convert
from lightning_deepr.conversion.kinds import KINDS, OTHER, Kind, kind_of
from lightning_deepr.conversion.selection import candidates
from lightning_deepr.conversion.start import soft_start

from .networks import LAYERS, Layer

# -- torch's layers -----------------------------------------------------------------------------------------------------------


def tensors_of(net: nn.Module) -> Iterator[tuple[Kind, nn.Module, str, Tensor]]:
    """What a network holds in layers of a known kind: (kind, module, the tensor's name, its values)."""
    for module in net.modules():
        kind = kind_of(type(module))
        for name, parameter in module.named_parameters(recurse=False):
            if kind is not OTHER:
                yield kind, module, name, parameter.detach()


def test_the_table_of_layers_has_every_kind_and_every_tensor_of_it() -> None:
    found = [(kind, name) for layer in LAYERS for kind, _, name, _ in tensors_of(layer.build())]
    assert {id(kind) for kind, _ in found} == {id(kind) for kind in KINDS}
    for kind in KINDS:
        assert any(one is kind and kind.takes(name) for one, name in found), f"no layer has a weight of {kind.classes}"
    classes = {one for kind in KINDS for one in kind.classes}
    covered = {one for layer in LAYERS for module in layer.build().modules() for one in type(module).__mro__}
    assert classes <= covered


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_all_takes_of_a_kind_what_the_record_says(layer: Layer) -> None:
    taken = {c.name for c in candidates(layer.build()) if not c.left_out}
    assert taken == (set() if layer.named else set(layer.tensors))
    assert set(layer.tensors) == {c.name for c in candidates(layer.build())}, "what only a name takes is found, too"


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.name != "own_layer"], ids=str)
def test_bounds_are_those_of_torchs_own_reset(layer: Layer) -> None:
    draws = 200
    found: dict[int, list[Tensor]] = {}
    for seed in range(draws):
        for number, (_, _, _, values) in enumerate(tensors_of(layer.build(seed))):
            found.setdefault(number, []).append(values)
    for number, (kind, module, name, values) in enumerate(tensors_of(layer.build())):
        drawn = torch.stack(found[number])
        if kind.takes(name):
            assert kind.weight_bound is not None
            bound = kind.weight_bound(module, tuple(values.shape))
        else:
            assert "bias" in name
            weight = next(values for own, values in module.named_parameters(recurse=False) if kind.takes(own))
            bound = kind.bias_bound(module, tuple(weight.shape))
        spread = bound if kind.normal else bound / math.sqrt(3)
        assert float(drawn.square().mean().sqrt()) == pytest.approx(spread, rel=0.05), name
        if not kind.normal:
            assert 0.98 * bound <= float(drawn.abs().max()) <= bound * (1 + 1e-6), name


def test_biases_of_a_layer_on_meta_start_as_torchs_do() -> None:
    with torch.device("meta"):
        bilinear, attention = nn.Bilinear(50, 40, 2000), nn.MultiheadAttention(40, 4)
    sparsify(bilinear, 500)
    assert 0.98 / 50**0.5 <= float(bilinear.bias.detach().abs().max()) <= 1 / 50**0.5
    sparsify(attention, 500)
    assert not attention.in_proj_bias.any() and not attention.out_proj.bias.any()


def test_a_weight_that_stays_dense_in_a_converted_layer_on_meta_has_its_own_start() -> None:
    with torch.device("meta"):
        attention = nn.MultiheadAttention(40, 4, kdim=30, vdim=20)
    sparsify(attention, {"q_proj_weight": 0.3})
    for weight in (attention.k_proj_weight, attention.v_proj_weight):
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.98 * bound <= float(weight.detach().abs().max()) <= bound


class TwoMatrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(9, 14))
        self.second = nn.Parameter(torch.randn(5, 9))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.first), self.second)


def test_every_matrix_of_an_own_layer_may_be_computed_sparsely() -> None:
    """The second one is converted when the layer's class is one of torch's making already."""
    net = sparsify(TwoMatrices(), 0.3, target_modules=["first", "second"], compute="sparse")
    assert [row["compute"] for row in connectivity_report(net)] == ["sparse", "sparse"]
    twin, x = densify(copy.deepcopy(net)), torch.randn(6, 14)
    torch.testing.assert_close(net(x), twin(x))


def test_a_convolution_of_soft_deepr_is_compiled_in_one_graph() -> None:
    net = nn.Conv2d(3, 4, 3)
    convert(net, candidates(net), {"weight": 20}, init="module", seed=0, compute="dense", begin=soft_start)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), net(x))
