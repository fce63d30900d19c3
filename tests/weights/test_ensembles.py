"""Ensembles by ``torch.func``: every network computes with its own places, or the call is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.func import stack_module_state as torchs_stack

from lightning_deepr import MagnitudePruning, SoftDeepR, sparsify
from lightning_deepr.weights.stack import stack_module_state
from tests.helpers.layers import Scaled

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Any]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)), (5, 12), "all"),
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(96, 4)), (5, 3, 6, 6), "all"),
    "own layer": (lambda: nn.Sequential(Scaled(), nn.Linear(9, 3)), (5, 14), ["*"]),
    "one layer": (lambda: nn.Linear(12, 7), (5, 12), "all"),
}
networks = pytest.mark.parametrize("kind", NETWORKS)
computes = pytest.mark.parametrize("compute", ["auto", "dense", "sparse"])


def ensemble(kind: str, compute: str = "auto", **options: Any) -> tuple[list[nn.Module], Tensor]:
    torch.manual_seed(0)
    make, size, target = NETWORKS[kind]
    found = [sparsify(make(), 0.4, seed=seed, target_modules=target, compute=compute, **options).eval() for seed in range(3)]
    return found, torch.randn(*size)


def call(network: nn.Module) -> Callable[..., Tensor]:
    return lambda parameters, buffers, x: functional_call(network, (parameters, buffers), (x,))


@networks
@computes
@pytest.mark.feature("Compilers: torch.func.vmap over an ensemble")
def test_every_network_computes_with_its_own_places(kind: str, compute: str) -> None:
    found, x = ensemble(kind, compute)
    wanted = torch.stack([network(x) for network in found])
    state = stack_module_state(found)
    torch.testing.assert_close(vmap(call(found[0]), (0, 0, None))(*state, x), wanted)
    torch.testing.assert_close(vmap(call(found[2]), (0, 0, 0))(*state, x.expand(3, *x.shape)), wanted)
    torch.testing.assert_close(torch.stack([network(x) for network in found]), wanted)  # nothing was left in the networks


@networks
@computes
def test_gradients_of_an_ensemble(kind: str, compute: str) -> None:
    found, x = ensemble(kind, compute)
    parameters, buffers = stack_module_state(found)

    def loss(parameters: Any, buffers: Any) -> Tensor:
        return call(found[0])(parameters, buffers, x).square().mean()

    gradients = vmap(grad(loss))(parameters, buffers)
    vmap(call(found[1]), (0, 0, None))(parameters, buffers, x).square().mean(
        (*range(1, found[0](x).dim() + 1),)
    ).sum().backward()
    for number, network in enumerate(found):
        network(x).square().mean().backward()
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(gradients[name][number], parameter.grad)
            torch.testing.assert_close(parameters[name].grad[number], parameter.grad)


@networks
@computes
def test_theta_alone_is_refused(kind: str, compute: str) -> None:
    found, x = ensemble(kind, compute)
    if kind == "one layer":
        parameters = {
            name: torch.stack([dict(n.named_parameters())[name].detach() for n in found])
            for name, _ in found[0].named_parameters()
        }
        buffers: dict[str, Tensor] = {}
    else:
        parameters, buffers = torchs_stack(found)
    message = r"maps over theta of a converted weight .*not over its places and signs.*weights\.stack\.stack_module_state"
    with pytest.raises(RuntimeError, match=message):
        vmap(call(found[0]), (0, 0, None))(parameters, buffers, x)
    with pytest.raises(RuntimeError, match=message):
        vmap(grad(lambda p, b: call(found[0])(p, b, x).sum()))(parameters, buffers)
    places = {name: value for name, value in stack_module_state(found)[1].items() if not name.endswith("signs")}
    with pytest.raises(RuntimeError, match="not over its signs"):
        vmap(call(found[0]), (0, 0, None))(parameters, places, x)


@computes
def test_variants_of_one_network(compute: str) -> None:
    found, x = ensemble("linear", compute)
    parameters, buffers = stack_module_state([found[1]] * 4)
    factors = torch.tensor([0.0, 1.0, 2.0, -1.0])
    varied = {name: value.detach() * factors.view(4, *[1] * (value.dim() - 1)) for name, value in parameters.items()}
    y = vmap(call(found[0]), (0, 0, None))(varied, buffers, x)
    for number, factor in enumerate(factors.tolist()):
        own = {name: value.detach() * factor for name, value in found[1].named_parameters()}
        torch.testing.assert_close(y[number], functional_call(found[1], own, (x,)))


@computes
def test_what_maps_over_the_input_alone_goes_on(compute: str) -> None:
    found, x = ensemble("linear", compute)
    network = found[0]
    torch.testing.assert_close(vmap(network)(x), network(x))
    own = dict(network.named_parameters())
    each = vmap(grad(lambda p, one: functional_call(network, p, (one,)).sum()), (None, 0))(own, x)
    network(x).sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad)


@pytest.mark.parametrize(
    "method", [lambda: SoftDeepR(0.4, temperature=1e-6), lambda: MagnitudePruning(0.4)], ids=["soft", "pruning"]
)
def test_a_theta_for_every_connection(method: Callable[[], Any]) -> None:
    found = []
    for seed in range(3):
        callback = method()
        callback.seed = seed
        network = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4))
        callback.prepare(network)
        found.append(network)
    x = torch.randn(5, 12)
    wanted = torch.stack([network(x) for network in found])
    torch.testing.assert_close(vmap(call(found[0]), (0, 0, None))(*stack_module_state(found), x), wanted)
    with pytest.raises(RuntimeError, match="maps over theta of a converted weight"):
        vmap(call(found[0]), (0, 0, None))(*torchs_stack(found), x)


def test_networks_that_cannot_be_stacked() -> None:
    found, x = ensemble("linear")
    with pytest.raises(ValueError, match="expected at least one network"):
        stack_module_state([])
    with pytest.raises(ValueError, match=r"found Linear and Conv2d at `0`"):
        stack_module_state([found[0], ensemble("conv")[0][0]])
    with pytest.raises(
        ValueError, match=r"`0\.parametrizations\.weight\.original`: expected one shape.*same number of connections"
    ):
        stack_module_state([found[0], sparsify(NETWORKS["linear"][0](), 0.2).eval()])
    with pytest.raises(ValueError, match="training mode or all in eval mode"):
        stack_module_state([found[0], found[1].train()])
    together, _ = ensemble("linear", scope="global")
    with pytest.raises(ValueError, match='scope="global"'):
        stack_module_state(together)
    with pytest.raises(RuntimeError, match='scope="global"'):
        vmap(call(together[0]), (0, 0, None))(*torchs_stack(together), x)


@computes
def test_a_compiled_ensemble(compute: str) -> None:
    torch.compiler.reset()
    found, x = ensemble("linear", compute)
    run = torch.compile(vmap(call(found[0]), (0, 0, None)), backend="eager")
    torch.testing.assert_close(run(*stack_module_state(found), x), torch.stack([network(x) for network in found]))
    with pytest.raises(Exception, match="maps over theta of a converted weight"):
        torch.compile(vmap(call(found[0]), (0, 0, None)), backend="eager", fullgraph=True)(*torchs_stack(found), x)
    network = found[0]
    torch.testing.assert_close(torch.compile(vmap(network), backend="eager")(x), network(x))
    torch.testing.assert_close(torch.compile(network, backend="eager", fullgraph=True)(x), network(x))
