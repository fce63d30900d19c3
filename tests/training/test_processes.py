"""Networks in shared memory: a forked process computes with the connections as they are, and one process rewires."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from lightning_deepr import DeepR, connectivity_report, sparsify
from tests.helpers.regression import batches, loss_of, mlp

READERS = """
import json, os, sys
import torch
import torch.multiprocessing as mp
from torch import nn
from lightning_deepr import DeepR, densify, sparsify
from tests.helpers.layers import LAYERS

torch.set_num_threads(1)
kind, compute, action = sys.argv[1:]
layer = next(one for one in LAYERS if one.name == kind)
net = sparsify(layer.build(), 0.3, compute=compute, target_modules=layer.target)
inputs = layer.feed()
net.share_memory()

def outputs():
    with torch.no_grad():
        found = net(*inputs)
    return (found[0] if isinstance(found, tuple) else found).flatten().tolist()

optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
rewiring = DeepR(l1=0.1, seed=1).attach(net, optimizer)

def step():
    optimizer.zero_grad()
    found = net(*inputs)
    (found[0] if isinstance(found, tuple) else found).sub(1).square().mean().backward()
    optimizer.step()

def reader(ask, answer):
    answer.put(outputs())
    while ask.get():
        answer.put(outputs())

def stepper(ask, answer):
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    try:
        optimizer.step()
        answer.put("a second process has rewired")
    except RuntimeError as error:
        answer.put(str(error))

context = mp.get_context("fork")
ask, answer = context.Queue(), context.Queue()
process = context.Process(target={"read": reader, "step": stepper}[action], args=(ask, answer))
process.start()  # before any backward pass: a thread of autograd does not survive a fork
found = [answer.get(timeout=60)]
if action == "read":
    found = []
    for _ in range(3):
        for _ in range(4):
            step()
        ask.put(True)
        found.append((answer.get(timeout=60), outputs()))
    ask.put(False)
process.join()
print(json.dumps(found))
"""


def run(*arguments: str) -> list:
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(READERS), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize(
    ("kind", "compute"),
    [
        ("linear", "auto"),
        *[pytest.param(kind, "sparse", marks=pytest.mark.slow) for kind in ("linear", "conv2d", "lstm", "embedding")],
    ],
)
def test_a_forked_reader_sees_each_rewiring(kind: str, compute: str) -> None:
    for theirs, ours in run(kind, compute, "read"):
        assert theirs == pytest.approx(ours, rel=1e-6, abs=1e-7)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_second_process_does_not_rewire() -> None:
    (message,) = run("linear", "auto", "step")
    assert "`weight` lies in shared memory" in message and "one process that rewires" in message


def test_dense_compute_is_told_once() -> None:
    net = mlp(compute="sparse")
    with pytest.warns(UserWarning, match="lies in shared memory: the network computes densely") as found:
        net.share_memory()
    assert len(found) == 1
    assert {row["compute"] for row in connectivity_report(net).to_dict()["rows"]} == {"dense"}


def test_what_is_shared_in_part_is_refused() -> None:
    net = mlp(scope="global", compute="dense").share_memory()
    with pytest.raises(ValueError, match=r"`0\.weight`.*scope=\"global\""):
        DeepR(scope="global").attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    net = mlp()
    for p in net.parameters():
        p.share_memory_()
    with pytest.raises(ValueError, match=r"`0\.weight`.*net\.share_memory\(\)"):
        DeepR().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))


def test_one_process_trains_as_ever() -> None:
    found = []
    for shared in (False, True):
        net = mlp(compute="dense")
        if shared:
            net.share_memory()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        DeepR(l1=0.05, seed=1, check_invariants=True).attach(net, optimizer)
        for batch in batches(6):
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            optimizer.step()
        found.append([p.detach().clone() for p in net.parameters()])
    assert all(map(torch.equal, *found))


def test_a_layer_alone() -> None:
    layer = sparsify(nn.Linear(30, 20), 0.2, compute="dense").share_memory()
    DeepR().attach(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
