"""Arguments that do not fit the network are refused by name, and the network does not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_deepr import DeepR, connections, densify, sparsify
from tests.helpers.classifier import Net, batches
from tests.helpers.layers import Scaled
from tests.helpers.small import network, unchanged
from tests.helpers.trainer import trainer

UNFIT = [
    ({"connectivity": 257}, r"connectivity = 257 connections, but the 2 chosen tensors have only 256\. Give at most"),
    ({"connectivity": 1.0 / 1000}, r"gives 0 connections to 2 tensors\. Expected at least one"),
    ({"connectivity": {"0": 193}}, r"connectivity\['0'\] = 193 connections, but 0\.weight have only 192"),
    ({"connectivity": {"5": 0.1}}, r"connectivity: the pattern '5' matches no tensor.*nearest names are: .*`0`"),
    ({"connectivity": 0.1, "target_modules": ["2.wieght"]}, r"'2\.wieght' matches no tensor.*nearest names are: `2\.weight`"),
    ({"connectivity": 0.1, "target_modules": "weight"}, r"regular expression 'weight' matches no tensor \(a single string"),
    ({"connectivity": 0.1, "exclude_modules": ["conv"]}, r"exclude_modules: the pattern 'conv' matches no tensor"),
    ({"connectivity": 0.1, "exclude_modules": ["*"]}, r"Sequential has nothing to convert"),
    ({"connectivity": 0.1, "target_modules": lambda name, module: False}, "nothing to convert"),
    (
        {"connectivity": 0.1, "distribution": "deepr"},
        r'distribution="deepr" is the paper\'s for 3 layers .* found 2: 0\.weight',
    ),
    ({"connectivity": 0.1, "distribution": lambda shapes, c: [0.1]}, r"expected 2 densities in \(0, 1\], found \[0\.1\]"),
    ({"connectivity": 0.1, "distribution": lambda shapes, c: [0.1, 1.1]}, r"expected 2 densities in \(0, 1\], found"),
    ({"connectivity": 0.1, "distribution": lambda shapes, c: {"x": 0.1}}, r"expected a density for each of .* found \['x'\]"),
    ({"connectivity": 0.1, "distribution": lambda shapes, c: [0.1, float("nan")]}, r"expected 2 densities"),
    ({"connectivity": 0.1, "distribution": "random"}, r"distribution: expected one of"),
    ({"connectivity": 0.1, "init": "zeros"}, r"init: expected one of"),
    ({"connectivity": 0.1, "compute": "fast"}, r"compute: expected one of"),
]


@pytest.mark.parametrize(("arguments", "message"), UNFIT, ids=lambda value: str(value)[:50])
def test_what_does_not_fit_the_network(arguments: dict[str, Any], message: str) -> None:
    net = network()
    with unchanged(net), pytest.raises(ValueError, match=message):
        sparsify(net, **arguments)


def test_what_does_not_fit_under_the_trainer() -> None:
    net = Net()
    for callback, message in [
        (DeepR(257), "have only 256"),
        (DeepR(0.1, target_modules=["fc3"]), "'fc3' matches no tensor.*nearest names are: `fc2`, `fc1`"),
        (DeepR(0.1, distribution="deepr"), "found 2: fc1.weight, fc2.weight"),
        (DeepR(0.1, l1={"fc1": 1e-4, "fc": 1e-3}), "l1: the pattern 'fc' matches no tensor"),
        (DeepR(0.1, l1={"fc1": 1e-4}), "l1: no key matches `fc2.weight`"),
        (DeepR(), r"DeepR\(connectivity=None\) expects a converted module.*Give a connectivity"),
    ]:
        with unchanged(net), pytest.raises(ValueError, match=message):
            trainer(callback).fit(net, batches())
    trainer(DeepR(0.1)).fit(net, batches(2))  # and the same network can be trained


def test_a_tensor_is_converted_once() -> None:
    net = sparsify(network(), {"0": 0.1})
    with unchanged(net), pytest.raises(ValueError, match=r"`0\.weight` is converted already \(K = 19\).*densify"):
        sparsify(net, 0.1)
    sparsify(net, 0.1, exclude_modules=["0"])
    assert connections(net).keys() == {"0.weight", "2.weight"}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_are_refused_by_name() -> None:
    net = Tied()
    with (
        unchanged(net),
        pytest.raises(ValueError, match=r"`head\.weight` is shared \(tied\): `embed\.weight` and `head\.weight` are"),
    ):
        sparsify(net, 0.2, target_modules=["head", "body"])
    assert net.head.weight is net.embed.weight


def test_another_parametrization_is_refused_by_name() -> None:
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    with unchanged(net), pytest.raises(ValueError, match=r"`0\.weight` has another parametrization already \(_WeightNorm\)"):
        sparsify(net, 0.2, target_modules=["0", "1"])
    with unchanged(net), pytest.raises(ValueError, match=r"nothing to convert.*`0\.weight`: has another parametrization"):
        sparsify(net, 0.2, exclude_modules=["1"])


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_with_sparse_gradients(kind: Any) -> None:
    net = nn.Sequential(kind(12, 8, sparse=True))
    with unchanged(net), pytest.raises(ValueError, match=r"`0\.weight` has sparse=True.*expected sparse=False"):
        sparsify(net, {"0": 0.3})


def test_a_trained_layer_that_is_not_finite() -> None:
    net = network()
    with torch.no_grad():
        net[2].weight[0, 0] = float("nan")
    with unchanged(net[:1]), pytest.raises(ValueError, match=r"`2\.weight` holds values that are not finite"):
        sparsify(net, 0.2, init="largest")
    assert not connections(net)


def test_a_weight_too_large_to_be_dense() -> None:
    net = nn.Sequential(nn.Linear(4, 4), sparsify(nn.Linear(100_000, 100_000, device="meta"), 10))
    sparsify(net, {"0": 3})
    with unchanged(net), pytest.raises(RuntimeError, match=r"`1\.weight` of shape .* more than 16 GiB.*connections\(module\)"):
        densify(net)


def test_a_module_on_meta_that_cannot_be_materialized() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 4), Scaled())
    with pytest.raises(ValueError, match=r"`1` \(Scaled\) is on the meta device and has no reset_parameters"):
        sparsify(net, {"0": 3})
    assert not connections(net) and all(parameter.device.type == "meta" for parameter in net.parameters())


def test_a_converted_weight_cannot_be_assigned() -> None:
    net = sparsify(network(), 0.1)
    for value in (torch.zeros(16, 12), nn.Parameter(torch.zeros(16, 12))):
        with (
            unchanged(net),
            pytest.raises(NotImplementedError, match=r"\(shape \(16, 12\), \d+ connections\) can't be assigned.*densify"),
        ):
            net[0].weight = value
