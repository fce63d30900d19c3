"""Two processes with different data rewire in the same way, without communication about it (gloo, CPU)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_deepr import DeepR, TurnoverTarget, sparsify
from lightning_deepr.training.guards import refuse_spawn, refuse_unequal_ranks
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.classifier import Net, batches
from tests.helpers.paths import ROOT
from tests.helpers.processes import LOOPBACK, Processes
from tests.helpers.state import assert_connected, slots_by_name, theta_of
from tests.helpers.trainer import trainer

STEPS = 20


def assert_equal_on_all_ranks(ranks: list[Any], steps: int, start: nn.Module) -> None:
    """All ranks have the same network, it was rewired, and the ranks' losses differ."""
    one = ranks[0]
    for other in ranks[1:]:
        assert one["state"].keys() == other["state"].keys()
        for name, value in one["state"].items():
            assert torch.equal(value, other["state"][name]), f"{name} differs"
        assert len(one["losses"]) == len(other["losses"]) == steps and one["losses"] != other["losses"]
    for name, slots in slots_by_name(start).items():
        places = one["state"][name.replace("weight", "parametrizations.weight.0.places")]
        assert places.shape == slots.places.shape and not torch.equal(places, slots.places), f"{name} was not rewired"


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


@contextmanager
def silence() -> Iterator[None]:
    """Let every collective of Python fail. (DDP's own, of the gradients, are called from C++.)"""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("rewiring has communicated")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("broadcast", "all_reduce", "all_gather", "broadcast_object_list"):
            patch.setattr(dist, name, refuse)
        yield


def plain_loop(rank: int, l1: Any, options: dict[str, Any]) -> dict[str, Any]:
    # every rank starts with equal connections and its own values; DDP replaces the values by rank 0's
    torch.manual_seed(rank)
    net = sparsify(mlp(), 0.3)
    assert not list(net.buffers()), "DDP would broadcast a buffer in each forward"
    ddp = DistributedDataParallel(net, **options)
    optimizer = torch.optim.Adam(ddp.parameters(), lr=0.02)
    rewiring = DeepR(l1=l1, temperature=1e-5, check_invariants=True).attach(net, optimizer, total_steps=STEPS)
    losses = []
    with silence():
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(100 * step + rank)
            x = torch.randn(8, 12, generator=generator)
            torch.rand(rank)  # the ranks' generators drift apart
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(ddp(x), x[:, :4].argmax(1))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert_connected(net)
    rewiring.remove()
    return {"state": net.state_dict(), "losses": losses}


@pytest.mark.parametrize(
    ("l1", "ranks", "options"),
    [
        (0.2, 2, {}),
        (TurnoverTarget(0.2, interval=3), 2, {}),
        (0.2, 2, {"static_graph": True}),
        pytest.param(TurnoverTarget(0.2, interval=3), 4, {"gradient_as_bucket_view": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.feature("Ranks: plain loop, DistributedDataParallel, 2 and 4 processes, static graph, gradients as bucket views")
def test_a_plain_loop_on_several_ranks(l1: Any, ranks: int, options: dict[str, Any], processes: Processes) -> None:
    assert_equal_on_all_ranks(processes.run(plain_loop, l1, options, ranks=ranks), STEPS, sparsify(mlp(), 0.3))


def start_of_a_fit(rank: int) -> None:
    def broadcast(value: Any, src: int) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=src)
        return values[0]

    loop = SimpleNamespace(world_size=2, global_rank=rank, strategy=SimpleNamespace(broadcast=broadcast))
    torch.manual_seed(rank)
    equal, unequal = sparsify(nn.Linear(12, 16), 0.3), sparsify(nn.Linear(12, 16), 0.3, init="largest")
    refuse_unequal_ranks(loop, list(converted_tensors(equal)))  # type: ignore[arg-type]
    if rank == 0:
        refuse_unequal_ranks(loop, list(converted_tensors(unequal)))  # type: ignore[arg-type]
    else:
        with pytest.raises(RuntimeError, match=r"`weight` has other connections on rank 1 than on rank 0.*same seed"):
            refuse_unequal_ranks(loop, list(converted_tensors(unequal)))  # type: ignore[arg-type]


def test_the_start_of_a_fit_finds_unequal_connections(processes: Processes) -> None:
    processes.run(start_of_a_fit)


def until_a_rank_dies(rank: int) -> tuple[str, list[int], dict[str, Any], dict[str, Any]]:
    net = sparsify(mlp(), 0.3)
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.Adam(ddp.parameters(), lr=0.02)
    callback = DeepR(l1=0.05, check_invariants=True)
    rewiring = callback.attach(net, optimizer, total_steps=STEPS)
    for step in range(STEPS):
        if rank == 1 and step == 7:
            os._exit(9)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        try:
            nn.functional.cross_entropy(ddp(x), x[:, :4].argmax(1)).backward()
        except RuntimeError as error:
            assert_connected(net)
            steps = [tensor.step for tensor in callback.tracked]
            rewiring.remove()
            return str(error), steps, before, net.state_dict()
        optimizer.step()
    raise AssertionError("the death of a rank was not noticed")


@pytest.mark.feature("Ranks: a rank that dies (the others stop before the step, unchanged)")
def test_a_rank_that_dies(processes: Processes) -> None:
    ((error, steps, before, after),), _ = processes.errors_and_results(until_a_rank_dies, ranks=2, dies=1)
    assert error and steps == [7, 7]
    assert all(torch.equal(value, before[name]) for name, value in after.items())


SCRIPT = """
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_deepr import DeepR
from tests.helpers.classifier import Net, batches
from tests.helpers.state import assert_connected
from tests.helpers.trainer import trainer

torch.set_num_threads(1)
net = Net(norm=True)
callback = DeepR(0.3, l1=0.02, temperature=1e-6, check_invariants=True)
loop = trainer(callback, EMAWeightAveraging(decay=0.5), strategy="ddp", devices=2, max_epochs=2)
loop.fit(net, batches(20), batches(4))
assert_connected(net)
torch.save({"state": net.state_dict(), "losses": net.losses}, Path(sys.argv[1]) / f"{loop.global_rank}.pt")
torch.distributed.destroy_process_group()  # else its threads may outlive the interpreter, which aborts on a busy machine
"""


@pytest.mark.slow
@pytest.mark.feature("Ranks: Trainer, strategy ddp, 2 processes")
def test_the_trainer_on_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, **LOOPBACK, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    start = sparsify(Net(norm=True), 0.3)
    ranks = [torch.load(tmp_path / name, weights_only=True) for name in ("0.pt", "1.pt")]
    for saved in ranks:  # in Lightning, too, each rank has its own statistics of batch norm
        saved["state"] = {key: value for key, value in saved["state"].items() if "running" not in key}
    assert_equal_on_all_ranks(ranks, 20, start)
    assert theta_of(start, "fc1.weight").shape == ranks[0]["state"]["fc1.parametrizations.weight.original"].shape


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
@pytest.mark.feature("Ranks: ddp_spawn, ddp_fork, ddp_notebook of a dense network", refused=True)
def test_strategies_that_return_the_weights_are_refused(strategy: str) -> None:
    loop = trainer(strategy=strategy, devices=2)
    with pytest.raises(ValueError, match=r'starts its processes with spawn or fork.*Expected strategy="ddp"'):
        refuse_spawn(loop, converted_now=2)
    refuse_spawn(loop, converted_now=0)  # a network that is also converted in the first process
    refuse_spawn(trainer(strategy="ddp", devices=2), converted_now=2)
    refuse_spawn(trainer(), converted_now=2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
@pytest.mark.feature("Ranks: ddp_spawn, ddp_fork, ddp_notebook of a dense network", refused=True)
def test_a_fit_in_forked_processes_is_refused() -> None:
    net = Net()
    with pytest.raises(Exception, match=r'Expected strategy="ddp"'):
        trainer(DeepR(0.3), strategy="ddp_fork", devices=2).fit(net, batches())
    assert net.state_dict().keys() == Net().state_dict().keys()
