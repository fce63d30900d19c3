"""The records of the kinds of layers: torch's own, and one of the user's."""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_deepr import DeepR, connections, connectivity_report, densify, kernels, sparsify
from lightning_deepr.conversion import kinds
from lightning_deepr.conversion.convert import convert
from lightning_deepr.conversion.kinds import KINDS, OTHER, Kind, kind_of, register_kind
from lightning_deepr.conversion.selection import candidates
from lightning_deepr.conversion.start import soft_start
from tests.helpers.layers import LAYERS, Layer, flat
from tests.helpers.optional import Optional
from tests.helpers.paths import ROOT
from tests.helpers.state import assert_connected, theta_of

stats = Optional("scipy.stats")

DOCUMENT = ROOT / "docs" / "extending.md"


@pytest.fixture(autouse=True)
def _no_kind_stays_registered() -> Iterator[None]:
    before = dict(kinds._registered)
    yield
    kinds._registered.clear()
    kinds._registered.update(before)


# -- torch's layers -----------------------------------------------------------------------------------------------------------


def tensors_of(net: nn.Module) -> Iterator[tuple[Kind, nn.Module, str, Tensor]]:
    """List the tensors of a network in layers of a known kind: (kind, module, the tensor's name, its values)."""
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
    assert set(layer.tensors) == {c.name for c in candidates(layer.build())}, "tensors that only a name takes are found, too"


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
    """Torch has made the layer's class already when the second matrix is converted."""
    net = sparsify(TwoMatrices(), 0.3, target_modules=["first", "second"], compute="sparse")
    assert [row["compute"] for row in connectivity_report(net)] == ["sparse", "sparse"]
    twin, x = densify(copy.deepcopy(net)), torch.randn(6, 14)
    torch.testing.assert_close(net(x), twin(x))


def test_a_convolution_of_soft_deepr_is_compiled_in_one_graph() -> None:
    net = nn.Conv2d(3, 4, 3)
    convert(net, candidates(net), {"weight": 20}, init="module", seed=0, compute="dense", begin=soft_start)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), net(x))


# -- a layer of the user's own ------------------------------------------------------------------------------------------------


@pytest.fixture(name="documented")
def _documented() -> dict[str, Any]:
    """Run the code of the document unchanged, and return the names that it defines."""
    names: dict[str, Any] = {}
    text = DOCUMENT.read_text(encoding="utf-8").partition("\n# A new kind of layer\n")[2]
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        exec(compile(block, f"{DOCUMENT.name}, block {number}", "exec"), names)
    return names


def test_the_documents_layer_is_converted_by_all(documented: dict[str, Any]) -> None:
    grouped = documented["GroupedLinear"]
    net = nn.Sequential(grouped(12, 6, groups=3), nn.Linear(6, 4))
    assert not any(candidate.left_out for candidate in candidates(net))
    del kinds._registered[grouped]
    assert "is not a known kind of layer" in candidates(net)[0].left_out, "without its record it is not"


@pytest.mark.parametrize("init", ["module", "deepr"])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_documents_layer_starts_by_its_record(documented: dict[str, Any], init: str, device: str) -> None:
    with torch.device(device):
        layer = documented["GroupedLinear"](800, 400, groups=4)
    sparsify(layer, 0.05, init=init, device="cpu")
    theta = theta_of(layer, "weight").detach()
    if init == "deepr":
        assert stats.kstest(theta.numpy() * math.sqrt(200), "halfnorm").pvalue > 1e-3
    else:
        assert stats.kstest(theta.numpy() * math.sqrt(200) * math.sqrt(0.05), "uniform").pvalue > 1e-3
    assert 0.97 / math.sqrt(200) <= float(layer.bias.detach().abs().max()) <= 1 / math.sqrt(200)


@pytest.mark.parametrize("compute", ["dense", "sparse", "auto"])
def test_the_documents_layer_is_trained_and_densified(documented: dict[str, Any], compute: str) -> None:
    torch.manual_seed(0)
    grouped = documented["GroupedLinear"]
    net = sparsify(nn.Sequential(grouped(40, 20, groups=4)), 0.3, compute=compute)
    x, target = torch.randn(64, 40), torch.randn(64, 20)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    rewiring = DeepR(l1=1e-3).attach(net, optimizer)
    before = connections(net)["0.weight"][1]
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert_connected(net, {"0.weight": 60})
    rewiring.remove()
    assert losses[-1] < 0.8 * losses[0]
    assert set(connections(net)["0.weight"][1].tolist()) != set(before.tolist()), "nothing was rewired"
    y = net(x)
    densify(net)
    assert type(net[0]) is grouped and "parametrizations" not in net[0]._modules
    torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-5)


def test_the_documents_sparse_forward_is_used_and_given_back(documented: dict[str, Any]) -> None:
    grouped, sparse_forward = documented["GroupedLinear"], documented["grouped_forward"]
    torch.manual_seed(0)
    layer = sparsify(grouped(40, 20, groups=4), 0.3, compute="sparse")
    twin = copy.deepcopy(layer)
    dense = copy.deepcopy(layer)
    dense.parametrizations.weight[0].choose_compute("dense", True)
    x = torch.randn(6, 40, requires_grad=True)
    gradients = []
    for one in (layer, twin, dense):
        assert type(one).forward is sparse_forward
        loss = (one(x) * torch.linspace(-1, 2, 20)).sum()
        gradients.append(torch.autograd.grad(loss, [x, *one.parameters()]))
    for given in gradients[1:]:
        torch.testing.assert_close(given, gradients[0])
    reads = []
    layer.parametrizations.weight.register_forward_hook(lambda *_: reads.append(1))
    layer(x)
    assert not reads, "the weight was not read"
    densify(twin)
    assert type(twin).forward is grouped.forward and type(layer).forward is sparse_forward


@pytest.mark.skipif(not kernels.available(), reason="the rules are asked only where there are kernels")
def test_the_documents_rules_choose_under_auto(documented: dict[str, Any]) -> None:
    grouped = documented["GroupedLinear"]
    for connectivity, compute in ((0.3, "dense"), (0.001, "sparse")):
        layer = sparsify(grouped(400, 200, groups=4), connectivity)
        assert [row["compute"] for row in connectivity_report(layer)] == [compute], "before the first input"
        layer(torch.randn(3, 400))
        assert [row["compute"] for row in connectivity_report(layer)] == [compute]


class Kernel(nn.Linear):
    """A linear layer with a second matrix under another name."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.kernel_bias = nn.Parameter(torch.randn(outputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(super().forward(x), self.kernel_bias)


def left_out(net: nn.Module) -> dict[str, str]:
    return {candidate.name: candidate.left_out for candidate in candidates(net)}


def test_a_record_says_what_all_takes() -> None:
    net = Kernel(7, 5)
    assert left_out(net) == {"weight": ""}, "before it has a record it is a linear layer"
    plain = kind_of(nn.Linear)
    register_kind(dataclasses.replace(plain, classes=(Kernel,), weights="weight|kernel_bias"))
    assert left_out(net) == {"weight": "", "kernel_bias": ""}
    assert connections(sparsify(Kernel(7, 5), 0.5, target_modules="all-linear")).keys() == {"weight", "kernel_bias"}
    register_kind(dataclasses.replace(plain, classes=(Kernel,), only_when_named=True))
    assert left_out(net) == {"weight": "Kernel: converted only when named"}
    register_kind(dataclasses.replace(plain, classes=(Kernel,), linear=False))
    assert left_out(net) == {"weight": ""}
    with pytest.raises(ValueError, match="has nothing to convert"):
        sparsify(Kernel(7, 5), 0.5, target_modules="all-linear")


def test_a_subclass_is_of_the_kind_of_its_nearest_class() -> None:
    class Further(Kernel):
        pass

    record = Kind((Kernel,), weight_bound=lambda layer, shape: 1.0)
    register_kind(record)
    assert kind_of(Further) is record and kind_of(nn.Linear) is KINDS[0] and kind_of(nn.ReLU) is OTHER
    assert kind_of(type(sparsify(Further(7, 5), 0.5))) is record, "also for a converted layer"


def test_a_record_may_refuse_a_module_and_draw_from_a_normal_distribution() -> None:
    def refuses(layer: Any) -> str:
        return "has five outputs: expected another number." if layer.out_features == 5 else ""

    register_kind(Kind((Kernel,), refuses=refuses, weight_bound=lambda layer, shape: 3.0, normal=True))
    with pytest.raises(ValueError, match=r"`weight` has five outputs: expected another number\."):
        sparsify(Kernel(7, 5), 0.5)
    with torch.device("meta"):
        layer = Kernel(70, 50)
    theta = theta_of(sparsify(layer, 1.0), "weight").detach()
    assert stats.kstest(theta.numpy() / 3, "halfnorm").pvalue > 1e-3


def test_a_kind_without_a_bound_needs_another_start_on_meta() -> None:
    register_kind(Kind((Kernel,)))
    with torch.device("meta"):
        layer = Kernel(7, 5)
    with pytest.raises(ValueError, match=r'how Kernel starts its weight is not known: expected init="deepr"'):
        sparsify(layer, 0.5)
    assert bool(flat(sparsify(layer, 0.5, init="deepr")(torch.randn(3, 7))).isfinite().all())


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        (nn.Linear, TypeError, r"expected a Kind\(\.\.\.\), found <class 'torch.nn"),
        (Kind(()), ValueError, "expected at least one class, found none"),
        (Kind((int,)), TypeError, "expected classes to be a tuple of classes of nn.Module, found"),  # type: ignore[arg-type]
        (Kind(Kernel), TypeError, "expected classes to be a tuple of classes of nn.Module, found"),  # type: ignore[arg-type]
        (Kind((nn.Linear,)), ValueError, "Linear has a record already. Expected a class of your own: derive it from Linear"),
        (Kind((Kernel,), weights="(weight"), ValueError, r"weights='\(weight' is no regular expression"),
    ],
    ids=["no_record", "no_class", "no_module", "no_tuple", "torchs", "no_expression"],
)
def test_what_is_no_record_is_refused(record: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        register_kind(record)
    assert not any(one is record for one in kinds._registered.values())
