"""Values that were averaged or kept in plain tensors, and written back after the connections have moved, are told once."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel

from lightning_deepr import SET, DeepR, FixedRandom, connections, sparsify
from tests.helpers.layers import LAYERS
from tests.helpers.regression import SEED, batches, loss_of, mlp

TOLD = "written by something else than a step"
Kept = dict[str, Tensor]
METHODS: dict[str, Callable[[], Any]] = {
    "deepr": lambda: DeepR(l1=0.05, seed=SEED),
    "deepr of a network": lambda: DeepR(l1=0.05, scope="global", seed=SEED),
    "set": lambda: SET(rewire_every_n_steps=2, rewire_until=None, seed=SEED),
    "fixed random": lambda: FixedRandom(seed=SEED),
}


def fit(net: nn.Module, method: str = "deepr", steps: int = 8, shadow: Kept | None = None) -> Any:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rewiring = METHODS[method]().attach(net, optimizer)
    for batch in batches(steps):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        optimizer.step()
        for name, p in net.named_parameters() if shadow is not None else ():
            shadow[name].lerp_(p.detach(), 0.1)
    return rewiring


def kept(net: nn.Module) -> Kept:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@torch.no_grad()
def by_copy(net: nn.Module, values: Kept) -> None:
    for name, p in net.named_parameters():
        p.copy_(values[name])


def by_data_copy(net: nn.Module, values: Kept) -> None:  # raises no version
    for name, p in net.named_parameters():
        p.data.copy_(values[name].data)


def by_data(net: nn.Module, values: Kept) -> None:
    for name, p in net.named_parameters():
        p.data = values[name]


def by_vector(net: nn.Module, values: Kept) -> None:
    vector_to_parameters(torch.cat([one.view(-1) for one in values.values()]), net.parameters())


WRITES = {one.__name__: one for one in (by_copy, by_data_copy, by_data, by_vector)}
USES: dict[str, Callable[[nn.Module], Any]] = {
    "validation": lambda net: net.eval()(batches(1)[0][0]),
    "state_dict": lambda net: net.state_dict(),
    "connections": connections,
}


def told(action: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        action()
    return [str(one.message) for one in found if TOLD in str(one.message)]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("compute", ["dense", "sparse"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("method", ["deepr", "deepr of a network", "set"])
def test_an_average_in_plain_tensors_is_told_once(method: str, write: str, compute: str, use: str) -> None:
    net = mlp(compute=compute, scope="global" if method == "deepr of a network" else "layer")
    shadow = kept(net)
    fit(net, method, shadow=shadow)
    assert told(lambda: USES[use](net)) == []
    WRITES[write](net, shadow)
    found = told(lambda: [USES[use](net) for _ in range(4)])
    assert len(found) == 1
    assert "`0.weight`" in found[0] and "lightning_deepr.follow" in found[0]


@pytest.mark.parametrize("layer", [one for one in LAYERS if one.name in ("conv2d", "attention", "embedding", "lstm")], ids=str)
def test_layers_of_every_kind(layer: Any) -> None:
    net = sparsify(layer.build(), 0.3, target_modules=layer.target, seed=SEED)
    optimizer, inputs = torch.optim.SGD(net.parameters(), lr=0.1), layer.feed()

    def loss() -> Tensor:
        output = net(*inputs)
        return (output[0] if isinstance(output, tuple) else output).sub(1).square().mean()

    rewiring = DeepR(l1=0.3, seed=SEED).attach(net, optimizer)
    best: Kept = kept(net)
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    net.eval()
    assert told(loss) == []
    by_data_copy(net, best)
    assert len(told(loss)) == 1
    rewiring.remove()


def test_between_the_rewirings_a_version_shows_it() -> None:
    net = mlp()
    best = kept(net)
    fit(net, "set", steps=7)  # the last step gave birth to nothing
    net.eval()
    by_copy(net, best)
    found = told(lambda: net(batches(1)[0][0]))
    assert len(found) == 1 and "since the last step" in found[0]


def swap(net: nn.Module) -> None:
    average = AveragedModel(net)
    average.update_parameters(net)
    fit(net)
    average.update_parameters(net)
    for p, q in zip(net.parameters(), average.module.parameters(), strict=True):
        p.data.copy_(q.data)


@torch.no_grad()
def clamp(net: nn.Module) -> None:
    for p in net.parameters():
        p.clamp_(-0.1, 0.1)


RIGHT: dict[str, Callable[[nn.Module], Any]] = {
    "nothing": lambda net: None,
    "clamp": lambda net: [p.data.clamp_(-0.1, 0.1) for p in net.parameters()],
    "a clamp that torch counts": clamp,
    "a factor": lambda net: [p.data.mul_(0.9) for p in net.parameters()],
    "half and back": lambda net: net.half().float(),
    "its own state": lambda net: net.load_state_dict(copy.deepcopy(net.state_dict())),
    "a round trip": lambda net: vector_to_parameters(parameters_to_vector(net.parameters()).detach().clone(), net.parameters()),
    "an average that follows": swap,
}


@pytest.mark.parametrize("what", RIGHT)
def test_nothing_is_said_otherwise(what: str) -> None:
    net = mlp()
    fit(net).remove()
    RIGHT[what](net)
    net.eval()
    assert told(lambda: [net(batches(1)[0][0]), net.state_dict(), connections(net)]) == []


def test_connections_that_never_move_may_be_averaged() -> None:
    net = mlp()
    shadow = kept(net)
    fit(net, "fixed random", shadow=shadow)
    by_copy(net, shadow)
    net.eval()
    assert told(lambda: net(batches(1)[0][0])) == []


def test_a_validation_that_began_before_the_write() -> None:
    net = mlp()
    best = kept(net)
    fit(net)
    net.eval()
    x = batches(1)[0][0]
    assert told(lambda: [net(x) for _ in range(5)]) == []
    by_data_copy(net, best)
    assert len(told(lambda: [net(x) for _ in range(5)])) == 1


@pytest.mark.parametrize("strict", [True, False])
def test_theta_without_its_places_is_refused(strict: bool) -> None:
    net, other = mlp(), mlp(seed=SEED + 1)
    for target in (net, other):
        with pytest.raises(RuntimeError, match=r"`0\.weight`: expected theta and its places, found theta alone"):
            target.load_state_dict(dict(net.named_parameters()), strict=strict)
    other.load_state_dict({name: value for name, value in net.state_dict().items() if name.startswith("0.")}, strict=False)
    biases = {name: p for name, p in net.named_parameters() if name.endswith("bias")}
    assert biases
    other.load_state_dict(biases, strict=False)


def test_theta_of_every_connection_is_complete() -> None:
    """With K = N no slot moves: theta alone says everything."""
    net, other = mlp(1.0), mlp(1.0)
    values = {name: p.detach() + 1 for name, p in net.named_parameters()}
    other.load_state_dict(values, strict=False)
    assert all(torch.equal(p, values[name]) for name, p in other.named_parameters())
