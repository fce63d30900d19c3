"""A tied tensor that is named by all of its names becomes one tensor of connections, which all of its layers hold."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import (
    SET,
    DeepR,
    FixedRandom,
    MagnitudePruning,
    RigL,
    SoftDeepR,
    connections,
    connectivity_report,
    densify,
    load_state_dict,
    save_sparse,
    sparsify,
)
from lightning_deepr.export import to_dense_state_dict
from tests.conversion.test_tied import Tied
from tests.helpers.small import unchanged

METHODS: dict[str, Any] = {
    "DeepR": lambda **options: DeepR(l1=0.05, **options),
    "SET": lambda **options: SET(rewire_every_n_steps=2, **options),
    "RigL": lambda **options: RigL(rewire_every_n_steps=2, **options),
}
NAMES = ["embed", "head", "first", "second", "third", "own"]
X = torch.randint(12, (4, 3), generator=torch.Generator().manual_seed(0))


def tied(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    return Tied()


def theta_of(net: nn.Module, name: str) -> Any:
    return net.get_submodule(name).parametrizations.weight.original  # type: ignore[union-attr, index]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Tensor:
    for _ in range(steps):
        optimizer.zero_grad()
        y = net(X)
        nn.functional.cross_entropy(y.flatten(0, 1), X.flatten()).backward()
        optimizer.step()
    return net(X).detach()


@pytest.mark.parametrize("targets", [NAMES, ".*", {"embed": 0.3, "head": 0.3, "first": 0.2, "second": 0.2, "third": 0.2}])
def test_all_names_make_one_tensor(targets: Any) -> None:
    net = tied()
    sparsify(
        net, **({"connectivity": targets} if isinstance(targets, dict) else {"connectivity": 0.3, "target_modules": targets})
    )
    expected = {"embed.weight", "first.weight"} | (set() if isinstance(targets, dict) else {"own.weight"})
    assert connections(net).keys() == expected
    assert theta_of(net, "head") is theta_of(net, "embed") and theta_of(net, "third") is theta_of(net, "first")
    assert torch.equal(net.head.weight, net.embed.weight) and torch.equal(net.first.weight, net.third.weight)
    assert connectivity_report(net).total == 96 + 64 * (len(expected) - 1)  # each tensor counts once
    assert len(list(net.parameters())) == 3 + 4  # the weights, and four biases


@pytest.mark.parametrize("make", [DeepR, SET, RigL, FixedRandom], ids=lambda kind: kind.__name__)
def test_the_gradient_is_that_of_the_tied_dense_network(make: Any) -> None:
    """Oracle: the dense network whose one weight has the connections' values."""
    net = tied()
    callback = make(0.4, target_modules=NAMES)
    callback.prepare(net)
    dense = tied(1)
    dense.load_state_dict(to_dense_state_dict(net))
    for one in (net, dense):
        one(X).square().sum().backward()
    torch.testing.assert_close(net(X), dense(X))
    for name in ("embed", "first"):
        _, places, _ = connections(net)[f"{name}.weight"]
        theta = theta_of(net, name)
        whole = dense.get_submodule(name).weight.grad.flatten()[places]  # type: ignore[union-attr]
        slots = net.get_submodule(name).parametrizations.weight[0]  # type: ignore[union-attr, index]
        torch.testing.assert_close(theta.grad, whole * slots.signs)


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_rewires_it_once_for_all_layers(make: Any, optimizer: Any) -> None:
    net = tied()
    callback = make(connectivity=0.3, target_modules=NAMES, check_invariants=True, seed=1)
    callback.prepare(net)
    before = connections(net)
    opt = optimizer(net.parameters(), lr=0.05)
    callback.attach(net, opt, total_steps=40)
    train(net, opt, 20)
    after = connections(net)
    assert all(before[name][1].numel() == after[name][1].numel() for name in before)
    assert any(not torch.equal(before[name][1].sort().values, after[name][1].sort().values) for name in before)
    assert torch.equal(net.head.weight, net.embed.weight)
    assert net.first.weight.count_nonzero() <= after["first.weight"][1].numel()


def test_resume_copy_and_densify(tmp_path: Path) -> None:
    net = tied()
    callback = DeepR(0.3, target_modules=NAMES, l1=0.05, seed=1)
    callback.prepare(net)
    opt = torch.optim.Adam(net.parameters(), lr=0.05)
    handle = callback.attach(net, opt, total_steps=40)
    train(net, opt, 10)
    state = copy.deepcopy((net.state_dict(), opt.state_dict(), handle.state_dict()))
    wanted = train(net, opt, 10)
    again = tied(3)
    load_state_dict(again, state[0])
    assert theta_of(again, "head") is theta_of(again, "embed")
    opt = torch.optim.Adam(again.parameters(), lr=0.05)
    opt.load_state_dict(state[1])
    other = DeepR(l1=0.05, seed=1)
    other.attach(again, opt, total_steps=40).load_state_dict(state[2])
    assert torch.equal(train(again, opt, 10), wanted)
    twin = copy.deepcopy(again)
    assert theta_of(twin, "head") is theta_of(twin, "embed")
    assert torch.equal(twin(X), wanted)
    save_sparse(again, tmp_path / "net.safetensors")
    loaded = tied(4)
    load_state_dict(loaded, tmp_path / "net.safetensors")
    torch.testing.assert_close(loaded(X), wanted, rtol=0, atol=0)
    dense = densify(loaded)
    assert dense.head.weight is dense.embed.weight and dense.first.weight is dense.third.weight
    torch.testing.assert_close(dense(X), wanted)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (lambda net: sparsify(net, 0.3, target_modules=NAMES, scope="global"), 'is a tied tensor.*scope="global"'),
        (lambda net: DeepR(0.3, target_modules=NAMES, scope="global").prepare(net), 'is a tied tensor.*scope="global"'),
        (lambda net: sparsify(net, 0.3, target_modules=NAMES, compute="sparse"), 'compute="sparse".*tied'),
        (lambda net: sparsify(net, {"embed": 0.3, "head": 0.2}), "are one tensor: expected one connectivity"),
        (
            lambda net: SoftDeepR(0.3, temperature=1e-3, l1=0.1, theta_min=-1e-3, target_modules=NAMES).prepare(net),
            "tied with.*expected a method on K slots",
        ),
        (lambda net: MagnitudePruning(0.3, target_modules=NAMES).prepare(net), "tied with.*expected a method on K slots"),
    ],
    ids=["global", "global callback", "sparse", "two values", "soft", "pruning"],
)
def test_what_a_tied_tensor_cannot_have(convert: Any, message: str) -> None:
    net = tied()
    with unchanged(net), pytest.raises(ValueError, match=message):
        convert(net)


def test_a_language_model_named_on_purpose() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4)
    net = transformers.GPT2LMHeadModel(config)
    sparsify(net, 0.2, target_modules=["wte", "lm_head"])
    assert connections(net).keys() == {"transformer.wte.weight"}
    x = torch.randint(100, (2, 8))
    net(x, labels=x).loss.backward()
    assert theta_of(net, "lm_head").grad is not None
