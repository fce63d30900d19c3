"""A pattern that names a parent covers its children; a pattern that names layers means what it always did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import DeepR, SoftDeepR, connections, connectivity_report, densify, sparsify
from lightning_deepr.conversion.kinds import kind_of
from tests.helpers.small import unchanged


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.output = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({"words": nn.Embedding(9, 8), "places": nn.Embedding(7, 8)})
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Block() for _ in range(3))})
        self.multi = nn.MultiheadAttention(8, 2)
        self.frozen = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
        self.head = nn.Linear(8, 4)


ATTENTION = [f"encoder.layer.{i}.attention.{n}.weight" for i in range(3) for n in ("query", "key", "value", "output.0")]
MLP = [f"encoder.layer.{i}.mlp.{n}.weight" for i in range(3) for n in (0, 2)]
WITHIN_1 = [name for name in ATTENTION + MLP if ".1." in name]

CASES: dict[str, tuple[Any, list[str]]] = {
    "a parent": (["attention"], ATTENTION),
    "two parents": (["attention", "mlp"], ATTENTION + MLP),
    "a long name": (["layer.1"], WITHIN_1),
    "a parent with a wildcard": (["layer.1.att*ion"], [n for n in WITHIN_1 if "attention" in n]),
    "the whole": (["encoder"], ATTENTION + MLP),
    "a parent of embeddings": (["embeddings"], ["embeddings.words.weight", "embeddings.places.weight"]),
    "layers": (["query", "head"], [n for n in ATTENTION if "query" in n] + ["head.weight"]),
    "a layer that is a parent, too": (["multi"], ["multi.in_proj_weight"]),
    "a layer, and a parent of the same name elsewhere": (
        ["0"], [n for n in ATTENTION + MLP if n.endswith(".0.weight")] + ["frozen.0.weight"]
    ),
    "wildcards": (["encoder.*.query"], [n for n in ATTENTION if "query" in n]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_target_modules(case: str) -> None:
    patterns, expected = CASES[case]
    assert set(connections(sparsify(Encoder(), 0.3, target_modules=patterns))) == set(expected)
    assert set(connections(DeepR(0.3, target_modules=patterns).prepare(Encoder()))) == set(expected)


@pytest.mark.parametrize("case", CASES)
def test_exclude_modules(case: str) -> None:
    patterns, excluded = CASES[case]
    found = set(connections(sparsify(Encoder(), 0.3, exclude_modules=patterns)))
    assert found == set(connections(sparsify(Encoder(), 0.3))) - set(excluded)


def test_keys_of_dicts() -> None:
    net = sparsify(Encoder(), {"attention": 0.25, "layer.1": 0.5, "query": 32, "head": 1.0, "encoder": 0.125})
    counts = {name: places.numel() for name, (_, places, _) in connections(net).items()}
    expected = dict.fromkeys(ATTENTION, 16) | dict.fromkeys(MLP, 16) | {"head.weight": 32}
    expected |= {name: 64 for name in MLP if ".1." in name}  # the nearest parent
    expected |= {f"encoder.layer.{i}.attention.query.weight": n for i, n in enumerate((11, 11, 10))}  # what names it wins
    assert counts == expected
    callback = DeepR({"attention": 0.25, "mlp": 0.5}, l1={"attention": 0.5, "encoder": 0.25})
    callback.prepare(net := Encoder())
    callback.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert {row["name"]: row["l1"] for row in connectivity_report(net)} == {
        **dict.fromkeys(ATTENTION, 0.5),
        **dict.fromkeys(MLP, 0.25),
    }


def test_what_stays_out_of_a_parent() -> None:
    """Frozen and tied layers, embeddings beside layers, metrics: what "all" leaves out."""
    net = nn.ModuleDict({"part": nn.ModuleDict({"words": nn.Embedding(8, 8), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})})
    net["part"]["b"].requires_grad_(False)  # type: ignore[index]
    assert set(connections(sparsify(net, 0.3, target_modules=["part"]))) == {"part.a.weight"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"connectivity": 0.3, "target_modules": ["frozen"]}, "nothing to convert"),
        ({"connectivity": 0.3, "target_modules": ["atention"]}, r"'atention' matches no tensor"),
        ({"connectivity": 0.3, "target_modules": ["attentio"]}, "matches no tensor"),
        ({"connectivity": {"layer.1": 0.2, "ayer.1": 0.2}}, "'ayer.1' matches no tensor"),
        ({"connectivity": {"layer.?": 0.2, "layer.1": 0.3}}, "are equally long"),
        # "0" names layers of the name 0, and is a parent of what "layer" covers
        (
            {"connectivity": {"layer": 0.2, "0": 0.3}},
            r"the key '0' names .* and a parent of `encoder\.layer\.0\.attention\.query",
        ),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    net = Encoder()
    with unchanged(net), pytest.raises(ValueError, match=message):
        sparsify(net, **arguments)


# -- layers of other packages, and free parameters ----------------------------------------------------------------------------


class Experts(nn.Module):
    """Experts as parameters of three dimensions, and a matrix in an einsum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 8) / 3), nn.Parameter(torch.randn(4, 8, 16) / 4)
        self.mix = nn.Parameter(torch.randn(8, 5) / 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,ehi->beh", x, self.up).relu()
        return torch.einsum("beh,eoh,oc->bc", hidden, self.down, self.mix)


def conv1d() -> nn.Module:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    return nn.Sequential(Conv1D(6, 8), nn.ReLU(), Conv1D(3, 6))


OWN: dict[str, tuple[Any, list[str], int]] = {
    "experts": (Experts, ["up", "down", "mix"], 8),
    "Conv1D": (conv1d, ["0", "2"], 8),
}


@pytest.mark.parametrize("compute", ["auto", "dense", "sparse"])
@pytest.mark.parametrize("kind", OWN)
def test_other_layers_are_converted_when_named(kind: str, compute: str) -> None:
    make, names, width = OWN[kind]
    with pytest.raises(ValueError, match="nothing to convert"):
        sparsify(make(), 0.3)
    net = sparsify(make(), 0.3, target_modules=names, compute=compute)
    assert len(connections(net)) == len(names)
    x = torch.randn(10, width)
    y = net(x)
    y.square().sum().backward()
    dense = densify(sparsify(make(), 0.3, target_modules=names))
    dense(x).square().sum().backward()
    torch.testing.assert_close(dense(x), y)
    for name, (_, places, values) in connections(net).items():
        prefix, _, tensor_name = name.rpartition(".")
        theta = net.get_parameter(f"{prefix}.parametrizations.{tensor_name}.original".removeprefix("."))
        gradient = dense.get_parameter(name).grad.view(-1)[places] * values.sign()  # type: ignore[union-attr]
        torch.testing.assert_close(theta.grad * (values != 0), gradient, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    DeepR(l1=0.1, check_invariants=True).attach(net, optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        net(x).sub(1).square().mean().backward()
        optimizer.step()


def test_the_fan_in_of_conv1d() -> None:
    net = conv1d()
    assert kind_of(type(net[0])).fan_in(net[0], (8, 6)) == 8  # type: ignore[index]


def test_patterns_of_methods_with_a_theta_for_every_place() -> None:
    soft = SoftDeepR(0.3, temperature=1e-3, l1=0.1, theta_min=-1e-3, target_modules=["attention"])
    assert set(connections(soft.prepare(Encoder()))) == set(ATTENTION)
