"""FSDP with theta replicated beside the sharded rest, ZeRO 1 and tensor parallelism: as one process, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lightning_deepr import DeepR, load_state_dict, sparsify
from lightning_deepr.weights.find import converted_tensors
from lightning_deepr.weights.replicated import replicate
from tests.helpers.processes import Processes

pytestmark = pytest.mark.filterwarnings("ignore:.*FSDP", "ignore:.*deprecated")


def dense(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(12, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
        ).double()


def network(seed: int = 0) -> nn.Sequential:
    """A network with two converted layers and dense ones between, in float64: sums in another order are no matter."""
    return sparsify(dense(seed), 0.2, target_modules=["0", "5"], seed=seed)  # type: ignore[return-value]


def make(kind: str, parameters: Any) -> Any:
    if kind == "Adam":
        return torch.optim.Adam(parameters, lr=0.005)
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def train(model: nn.Module, optimizer: Any, steps: int, rank: int, size: int, accumulate: int = 1) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(accumulate):
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(10 * step + micro)).double()
            mine = x[8 // size * rank : 8 // size * (rank + 1)]
            nn.functional.cross_entropy(model(mine), mine[:, :4].argmax(1)).backward()
        optimizer.step()


def one_process(kind: str, steps: int, accumulate: int = 1) -> tuple[nn.Module, list[Any]]:
    net = network()
    optimizer = make(kind, net.parameters())
    DeepR(check_ranks_every_n_steps=0).attach(net, optimizer, total_steps=steps)
    train(net, optimizer, steps, 0, 1, accumulate)
    return net, found(net)


def found(net: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(one.theta.detach().clone(), one.slots.places.clone(), one.slots.born.clone()) for one in converted_tensors(net)]  # type: ignore[union-attr]


def wrapped(how: str, net: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if how == "FSDP2":
        thetas = replicate(net)
        fully_shard(net[3], mesh=mesh)  # type: ignore[index]
        fully_shard(net, mesh=mesh, ignored_params=thetas)
        return net
    if how == "FSDP2, by attach":
        fully_shard(net, mesh=mesh, ignored_params={one.theta for one in converted_tensors(net)})
        return net
    if how == "FSDP1":
        return FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True, ignored_states=replicate(net))
    return DistributedDataParallel(net)


def sharded(rank: int, how: str, kind: str, steps: int, accumulate: int) -> Any:
    net = network(seed=rank if how == "FSDP2" else 0)  # replicate gives all ranks the connections and theta of rank 0
    if how == "FSDP2":
        for name, value in network().named_parameters():
            if "parametrizations" not in name:
                net.get_parameter(name).data.copy_(value)
    model = wrapped(how, net)
    if how == "ZeRO 1":
        options = {"lr": 0.005} if kind == "Adam" else {"lr": 0.1, "momentum": 0.9}
        optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), getattr(torch.optim, kind), **options)
    else:
        optimizer = make(kind, model.parameters())
    callback = DeepR(check_invariants=True, check_ranks_every_n_steps=25)
    callback.attach(model, optimizer, total_steps=steps)
    train(model, optimizer, steps, rank, 2, accumulate)
    state = {}
    if how.startswith("FSDP2"):
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return found(net), [tensor.scale for tensor in callback.tracked], state


DEFAULT = [("FSDP2", "Adam", 3), ("FSDP2, by attach", "SGD", 1), ("FSDP1", "Adam", 1), ("ZeRO 1", "Adam", 1)]
ALL = [
    (how, kind, accumulate)
    for how in ("FSDP2", "FSDP2, by attach", "FSDP1", "ZeRO 1", "DDP")
    for kind in ("Adam", "SGD")
    for accumulate in (1, 3)
]


@pytest.mark.parametrize(
    ("how", "kind", "accumulate"), [pytest.param(*one, marks=[] if one in DEFAULT else pytest.mark.slow) for one in ALL]
)
@pytest.mark.feature("Sharding: FSDP1, FSDP2 and ZeroRedundancyOptimizer beside replicated connections, as one process")
def test_sharded_training_is_that_of_one_process(how: str, kind: str, accumulate: int, processes: Processes) -> None:
    steps = 500 if (how, kind, accumulate) == ("FSDP2", "Adam", 1) else 30
    net, expected = one_process(kind, steps, accumulate)
    results = processes.run(sharded, how, kind, steps, accumulate)
    for tensors, _, _ in results:
        for (theta, places, born), (theta_0, places_0, born_0) in zip(tensors, expected, strict=True):
            assert torch.equal(places, places_0) and torch.equal(born, born_0)
            torch.testing.assert_close(theta, theta_0, rtol=0, atol=1e-6)
            assert int(born.max()) > 5, "nothing was rewired"
    assert results[0][1] == results[1][1] and max(results[0][1]) > 1  # every rank multiplies the steps alike
    if results[0][2]:  # the gathered state_dict is that of a network on one process
        loaded = load_state_dict(dense(7), results[0][2])
        x = torch.randn(5, 12, dtype=torch.float64)
        torch.testing.assert_close(loaded(x), net(x), rtol=0, atol=1e-6)


# -- refusals ----------


def refused(rank: int, how: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    net = network()
    if how == "fully_shard without ignored_params":
        fully_shard(net, mesh=mesh)
    elif how == "replicate afterwards":
        fully_shard(net, mesh=mesh)
        replicate(net)
    elif how == "conversion of a sharded layer":
        plain = nn.Sequential(nn.Linear(12, 8))
        fully_shard(plain, mesh=mesh)
        sparsify(plain, 0.5)
    elif how == "tensor parallel plan":
        parallelize_module(net, mesh, {"0": ColwiseParallel()})
    elif how == "another mesh":
        parallelize_module(net, mesh, {"3": ColwiseParallel()})
        replicate(net, dist.new_group([rank], use_local_synchronization=True))
    elif how == "ZeRO with overlap":
        ddp = DistributedDataParallel(net)
        optimizer = ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.SGD, overlap_with_ddp=True, lr=0.1)
        DeepR().attach(ddp, optimizer)
    DeepR().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))


@pytest.mark.parametrize(("how", "words"), [
    ("fully_shard without ignored_params", "`0.weight`: theta: expected a plain tensor of shape (56,) on cpu, found a DTensor"),
    ("replicate afterwards", "`0.weight`: theta: expected a plain parameter, found a DTensor"),
    ("conversion of a sharded layer", "`0.weight`: sharded over ranks (a DTensor)"),
    ("tensor parallel plan", "`0.weight`: theta: expected K values in one vector"),
    ("another mesh", "is sharded over 2 ranks, but theta would be averaged over 1"),
    ("ZeRO with overlap", "overlap_with_ddp=True"),
])  # fmt: skip
def test_what_cannot_be_right_is_refused_before_the_first_step(how: str, words: str, processes: Processes) -> None:
    for error in processes.errors(refused, how):
        assert words in error, error
