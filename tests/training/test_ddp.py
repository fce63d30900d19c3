"""Two processes with different data rewire in the same way, without communication about it (gloo, CPU)."""

from __future__ import annotations

import os
import subprocess
import sys
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
from tests.helpers.state import assert_connected, slots_by_name, theta_of
from tests.helpers.trainer import trainer

STEPS = 20
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}


def assert_equal_on_all_ranks(folder: Path, steps: int, start: nn.Module) -> None:
    """Both ranks wrote the same network, it was rewired, and the ranks' losses differ."""
    one, other = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["state"].keys() == other["state"].keys()
    for name, value in one["state"].items():
        assert torch.equal(value, other["state"][name]), f"{name} differs"
    assert len(one["losses"]) == len(other["losses"]) == steps and one["losses"] != other["losses"]
    for name, slots in slots_by_name(start).items():
        places = one["state"][name.replace("weight", "parametrizations.weight.0.places")]
        assert places.shape == slots.places.shape and not torch.equal(places, slots.places), f"{name} was not rewired"


def plain_loop(rank: int, folder: Path, l1: Any) -> None:
    os.environ.update(LOOPBACK)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    # every rank starts with equal connections and its own values; DDP replaces the values by rank 0's
    torch.manual_seed(rank)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    sparsify(net, 0.3)
    assert not list(net.buffers()), "DDP would broadcast a buffer in each forward"
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.Adam(ddp.parameters(), lr=0.02)
    DeepR(l1=l1, temperature=1e-5, check_invariants=True).attach(net, optimizer, total_steps=STEPS)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("rewiring has communicated")

    collectives = {name: getattr(dist, name) for name in ("broadcast", "all_reduce", "all_gather", "broadcast_object_list")}
    for name in collectives:
        setattr(dist, name, refuse)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 * step + rank)
        x = torch.randn(8, 12, generator=generator)
        torch.rand(rank)  # the ranks' generators drift apart
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(ddp(x), x[:, :4].argmax(1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, function in collectives.items():
        setattr(dist, name, function)
    assert_connected(net)
    torch.save({"state": net.state_dict(), "losses": losses}, folder / f"{rank}.pt")

    # the start of a fit finds unequal connections
    def broadcast(value: Any, src: int) -> Any:
        values = [value]
        dist.broadcast_object_list(values, src=src)
        return values[0]

    loop = SimpleNamespace(world_size=2, global_rank=rank, strategy=SimpleNamespace(broadcast=broadcast))
    equal, unequal = sparsify(nn.Linear(12, 16), 0.3), sparsify(nn.Linear(12, 16), 0.3, init="largest")
    refuse_unequal_ranks(loop, list(converted_tensors(equal)))  # type: ignore[arg-type]
    if rank == 0:
        refuse_unequal_ranks(loop, list(converted_tensors(unequal)))  # type: ignore[arg-type]
    else:
        with pytest.raises(RuntimeError, match=r"`weight` has other connections on rank 1 than on rank 0.*same seed"):
            refuse_unequal_ranks(loop, list(converted_tensors(unequal)))  # type: ignore[arg-type]
    dist.destroy_process_group()


@pytest.mark.parametrize("l1", [0.2, TurnoverTarget(0.2, interval=3)], ids=str)
def test_a_plain_loop_on_two_ranks(l1: Any, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(plain_loop, args=(tmp_path, l1), nprocs=2)
    start = sparsify(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), 0.3)
    assert_equal_on_all_ranks(tmp_path, STEPS, start)


SCRIPT = """
import sys
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
def test_the_trainer_on_two_ranks(tmp_path: Path) -> None:
    script = tmp_path / "fit.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, **LOOPBACK, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr
    start = sparsify(Net(norm=True), 0.3)
    for name in ("0.pt", "1.pt"):  # in Lightning, too, each rank has its own statistics of batch norm
        saved = torch.load(tmp_path / name, weights_only=True)
        saved["state"] = {key: value for key, value in saved["state"].items() if "running" not in key}
        torch.save(saved, tmp_path / name)
    assert_equal_on_all_ranks(tmp_path, 20, start)
    state = torch.load(tmp_path / "0.pt", weights_only=True)["state"]
    assert theta_of(start, "fc1.weight").shape == state["fc1.parametrizations.weight.original"].shape


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_strategies_that_return_the_weights_are_refused(strategy: str) -> None:
    loop = trainer(strategy=strategy, devices=2)
    with pytest.raises(ValueError, match=r'starts its processes with spawn or fork.*Expected strategy="ddp"'):
        refuse_spawn(loop, converted_now=2)
    refuse_spawn(loop, converted_now=0)  # a network that is also converted in the first process
    refuse_spawn(trainer(strategy="ddp", devices=2), converted_now=2)
    refuse_spawn(trainer(), converted_now=2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
def test_a_fit_in_forked_processes_is_refused() -> None:
    net = Net()
    with pytest.raises(Exception, match=r'Expected strategy="ddp"'):
        trainer(DeepR(0.3), strategy="ddp_fork", devices=2).fit(net, batches())
    assert net.state_dict().keys() == Net().state_dict().keys()
