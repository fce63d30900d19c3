"""Rows of one layer on several ranks: outputs, gradients and rewiring are those of one process with the same blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from lightning_deepr import DeepR, RigL, connections, sparsify
from lightning_deepr.conversion.row_blocks import RowBlockLinear, RowBlocks
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.processes import Processes


def network(on_meta: bool, init: str = "module") -> nn.Sequential:
    """Two layers in blocks, with plans of their own, and an ordinary converted one, in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        last = sparsify(nn.Linear(23, 4).double(), 0.5)
        with torch.device("meta" if on_meta else "cpu"):
            net = nn.Sequential(nn.Linear(12, 30).double(), nn.Tanh(), nn.Linear(30, 23).double(), nn.Tanh())
    net.append(last)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = RowBlocks(0.3, blocks=5, seed=3, init=init, compute="auto")
    return parallelize_module(net, mesh, {"0": plan, "2": plan})  # type: ignore[return-value]


def train(net: nn.Module, optimizer: Any, steps: Any) -> list[float]:
    losses = []
    for step in steps:
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).double()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), x[:, :4].argmax(1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def everything(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def trained(rank: int, method: str, on_meta: bool, init: str) -> Any:
    net = network(on_meta, init)
    start = everything(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    callback: Any = (
        DeepR(check_invariants=True, check_ranks_every_n_steps=5) if method == "DeepR" else RigL(rewire_every_n_steps=3)
    )
    callback.attach(net, optimizer, total_steps=25)
    losses = train(net, optimizer, range(25))
    count = sum(theta.numel() for theta in optimizer.state)
    return start, everything(net), losses, count


def merged(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    for state in states:
        for name, value in state.items():
            if name in whole:
                torch.testing.assert_close(value, whole[name], rtol=0, atol=1e-9)
            whole[name] = value
    return whole


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        exact = not value.is_floating_point()
        torch.testing.assert_close(value, other[name], rtol=0, atol=0 if exact else 1e-9, msg=name)


@pytest.mark.parametrize(("method", "on_meta", "init"), [
    ("DeepR", True, "module"),
    pytest.param("DeepR", False, "largest", marks=pytest.mark.slow),
    pytest.param("RigL", True, "deepr", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.feature("Sharding: rows of a layer over ranks (RowBlocks)")
def test_ranks_train_the_blocks_of_one_process(method: str, on_meta: bool, init: str, processes: Processes) -> None:
    (whole,) = processes.run(trained, method, on_meta, init, ranks=1)
    counts = []
    for ranks in (2,) if (method, on_meta) == ("DeepR", True) else (2, 3):
        results = processes.run(trained, method, on_meta, init, ranks=ranks)
        assert_close(merged([one[0] for one in results]), whole[0])
        assert_close(merged([one[1] for one in results]), whole[1])
        for one in results:
            torch.testing.assert_close(torch.tensor(one[2]), torch.tensor(whole[2]), rtol=0, atol=1e-9)
        counts.append(max(one[3] for one in results))
    assert [whole[3], *counts] == sorted(
        {whole[3], *counts}, reverse=True
    )  # a rank keeps its own part of the optimizer's state
    places = {name: value for name, value in whole[1].items() if name.endswith("places")}
    assert any(not torch.equal(value, whole[0][name]) for name, value in places.items() if "blocks" in name)
    first = [value.numel() for name, value in places.items() if name.startswith("0.blocks")]
    assert len(first) == 5 and sum(first) == round(0.3 * 12 * 30) and max(first) - min(first) <= 1


def a_part(rank: int, steps: tuple[int, int], folder: str | None, save: str | None) -> Any:
    net = network(True)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    rewiring = DeepR(check_invariants=True).attach(net, optimizer, total_steps=30)
    if folder is not None:
        state = {
            "net": net.state_dict(),
            "optimizer": get_optimizer_state_dict(net, optimizer),
            "rewiring": rewiring.state_dict(),
        }
        dcp.load(state, checkpoint_id=folder)
        net.load_state_dict(state["net"])
        set_optimizer_state_dict(net, optimizer, state["optimizer"])
        rewiring.load_state_dict(state["rewiring"])
    train(net, optimizer, range(*steps))
    if save is not None:
        dcp.save(
            {
                "net": net.state_dict(),
                "optimizer": get_optimizer_state_dict(net, optimizer),
                "rewiring": rewiring.state_dict(),
            },
            checkpoint_id=save,
        )
    return everything(net), rewiring.state_dict()["tensors"]


@pytest.mark.slow
@pytest.mark.feature("Sharding: a checkpoint of RowBlocks on another number of ranks")
def test_a_checkpoint_loads_on_another_number_of_ranks(processes: Processes, tmp_path: Path) -> None:
    (whole,) = processes.run(a_part, (0, 30), None, None, ranks=1)
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    processes.run(a_part, (0, 10), None, first, ranks=3)
    processes.run(a_part, (10, 20), first, second, ranks=1)
    last = processes.run(a_part, (20, 30), second, None, ranks=2)
    assert_close(merged([one[0] for one in last]), whole[0])
    for one in last:
        for name, entry in one[1].items():
            assert entry["step"] == whole[1][name]["step"] == 30
    steps = {name for one in last for name in one[1]}
    assert steps == set(whole[1])


def test_one_process_needs_no_group() -> None:
    dense = nn.Linear(20, 12)
    weight, bias = dense.weight.detach().clone(), dense.bias.detach().clone()
    layer = RowBlocks(1.0, blocks=3, init="largest").convert(dense)
    assert isinstance(layer, RowBlockLinear) and not list(layer._parameters)
    x = torch.randn(4, 20)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias))
    assert [shape for shape, _, _ in connections(layer).values()] == [(4, 20)] * 3
    indices = [one.slots.index for one in converted_tensors(layer)]
    assert len(set(indices)) == 3
    places = [one.slots.places for one in converted_tensors(RowBlocks(30, blocks=3).convert(nn.Linear(20, 12, device="meta")))]  # type: ignore[union-attr]
    assert not torch.equal(places[0], places[1]) and sum(one.numel() for one in places) == 30


@pytest.mark.parametrize(("act", "words"), [
    (lambda: RowBlocks(0.5, blocks=13).convert(nn.Linear(20, 12)), "to 12 .the number of rows. blocks, found 13"),
    (lambda: RowBlocks(2, blocks=3).convert(nn.Linear(20, 12)), "one per block.*found 2"),
    (lambda: RowBlocks(0.5).convert(sparsify(nn.Linear(20, 12), 0.5)), "expected an nn.Linear that is not converted"),
    (lambda: RowBlocks(0.5, blocks=0), "blocks: expected an int from 1"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(act: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        act()


def test_layers_that_would_draw_alike_are_refused() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in net:
        RowBlocks(0.5, blocks=2).convert(layer)
    with pytest.raises(ValueError, match=r"two layers that draw alike.*layer="):
        DeepR().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
