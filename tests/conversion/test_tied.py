"""Tied tensors: "all" leaves them out and says so once; one that is named by some of its names is refused, with all at once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from lightning_deepr import DeepR, SoftDeepR, connections, connectivity_report, sparsify
from tests.helpers.small import unchanged


class Tied(nn.Module):
    """Two pairs of tied layers, one of three names, and one layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight
        self.first, self.second, self.third, self.own = (nn.Linear(8, 8) for _ in range(4))
        self.second.weight = self.third.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.own(self.third(self.second(self.first(self.embed(x))))))


WARNING = (
    r"Left dense, since they are tied: `embed\.weight` and `head\.weight` are one tensor; `first\.weight` and `second\.weight` "
    r"and `third\.weight` are one tensor"
)


def by_sparsify(net: nn.Module, **options: Any) -> None:
    sparsify(net, 0.3, **options)


def by_callback(net: nn.Module, **options: Any) -> None:
    DeepR(0.3, **options).prepare(net)


def by_soft(net: nn.Module, **options: Any) -> None:
    SoftDeepR(0.3, temperature=1e-3, l1=0.1, theta_min=-1e-3, **options).prepare(net)


@pytest.mark.parametrize("targets", ["all", "all-linear"])
@pytest.mark.parametrize("convert", [by_sparsify, by_callback, by_soft])
def test_the_default_leaves_tied_tensors_out(convert: Any, targets: str) -> None:
    net = Tied()
    with pytest.warns(UserWarning, match=WARNING) as told:
        convert(net, target_modules=targets)
    assert sum("tied" in str(one.message) for one in told) == 1
    assert connections(net).keys() == {"own.weight"}
    assert net.head.weight is net.embed.weight and net.first.weight is net.second.weight is net.third.weight
    left = connectivity_report(net).left_out
    assert left["first.weight"] == "tied with `second.weight`, `third.weight`"
    assert left["head.weight"] == "tied with `embed.weight`"
    net(torch.zeros(2, 3, dtype=torch.int64)).sum().backward()


@pytest.mark.parametrize(
    "targets", [["head", "first", "own"], ["head", "second"], "head|first|second", {"first": 0.1, "embed": 0.1}]
)
def test_a_named_one_is_refused_with_all_names(targets: Any) -> None:
    net = Tied()
    arguments = {"connectivity": targets} if isinstance(targets, dict) else {"connectivity": 0.3, "target_modules": targets}
    with unchanged(net), pytest.raises(ValueError, match=r"shared \(tied\)") as found:
        sparsify(net, **arguments)
    names = ["embed.weight", "first.weight", "head.weight", "second.weight", "third.weight"]
    assert all(f"`{name}`" in str(found.value) for name in names) and str(names) in str(found.value)
    sparsify(net, 0.3, exclude_modules=names)
    assert connections(net).keys() == {"own.weight"}


def test_nothing_is_said_where_nothing_is_left_out() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsify(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)), 0.3)
        sparsify(Tied(), 0.3, target_modules=["own"])
        shared = nn.Linear(8, 8)
        sparsify(nn.Sequential(shared, nn.ReLU(), shared), 0.3)  # one module at two places is no pair of tied tensors


def test_nothing_but_tied_tensors() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    net[1].weight = net[0].weight
    with unchanged(net), pytest.raises(ValueError, match=r"shared \(tied\): `0\.weight` and `1\.weight` are one tensor"):
        sparsify(net, 0.3)
    other = nn.Sequential(*net, nn.Embedding(3, 3))
    with (
        unchanged(other),
        pytest.raises(ValueError, match=r"nothing to convert.*`0\.weight`: tied with `1\.weight`.*`2\.weight`"),
    ):
        sparsify(other, 0.3)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
def test_language_models(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    small = {
        "BertForMaskedLM": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
        "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "T5ForConditionalGeneration": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    }
    net = kind(kind.config_class(vocab_size=100, **small[name]))
    targets = ["c_attn", "c_fc", "c_proj"] if name == "GPT2LMHeadModel" else "all"  # GPT-2's layers are of its own kind
    before = dict(net.named_parameters(remove_duplicate=False))
    tied = [n for n, p in before.items() if sum(p is q for q in before.values()) > 1 and p.ndim > 1]
    assert len(tied) > 1
    sparsify(net, 0.2, target_modules=targets)
    assert len(connections(net)) >= 8 and not connections(net).keys() & set(tied)
    after = dict(net.named_parameters(remove_duplicate=False))
    assert all(after[n] is before[n] for n in tied)
