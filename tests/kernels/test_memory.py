"""Kernels allocate nothing: an exception in compiled code would be lost, and the caller would go on with half a result."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_deepr import kernels
from lightning_deepr.kernels import cpu

needs_kernels = pytest.mark.skipif(not kernels.available(), reason="no kernels here")
SOURCES = sorted(Path(inspect.getfile(cpu)).parent.glob("*.py"))
ALLOCATING = {"empty", "zeros", "ones", "full", "arange", "empty_like", "zeros_like", "array", "copy", "concatenate", "sort",
              "argsort", "cumsum", "unique", "repeat", "where", "nonzero", "searchsorted"}  # fmt: skip


def compiled_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    """Find what numba compiles: functions under ``njit``, and functions that are made into a ``Kernel``."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        names = {one.id for decorator in node.decorator_list for one in ast.walk(decorator) if isinstance(one, ast.Name)}
        if "njit" in names:
            found.append(node)
        made = {
            call.args[0].id
            for call in ast.walk(node)
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "Kernel"
            if call.args and isinstance(call.args[0], ast.Name)
        }
        found += [inner for inner in node.body if isinstance(inner, ast.FunctionDef) and inner.name in made]
    return found


def allocations(tree: ast.Module) -> list[str]:
    found = []
    for function in compiled_functions(tree):
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ALLOCATING:
                found.append(f"{function.name}, line {node.lineno}: {ast.unparse(node)}")
            if isinstance(node, (ast.Raise, ast.Assert, ast.ListComp, ast.List)):
                found.append(f"{function.name}, line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_kernel_allocates_or_raises(source: Path) -> None:
    assert allocations(ast.parse(source.read_text(encoding="utf-8"))) == []


def test_the_search_finds_them() -> None:
    text = """
        @njit
        def one(n):
            return np.empty(n)

        def maker():
            def two(a):
                x = carray(a, 3).copy()

            return Kernel(two)

        def host():
            return np.zeros(3)
    """
    assert len(allocations(ast.parse(textwrap.dedent(text)))) == 2
    assert len(SOURCES) > 10


SETTING = """
import resource, sys
import torch
from lightning_deepr import DeepR, kernels, sparsify
from lightning_deepr.weights.find import converted_tensors

torch.set_num_threads(2)

def limit(spare):
    used = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))

def unlimited():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
START = """
kernels.random_places(10_000, 100, 0, 0)  # compiled
n = 2_000_000
limit(8 * n + (16 << 20))
try:
    kernels.random_places(10 * n, n, 0, 0)
except RuntimeError as error:
    print("refused:", error)
unlimited()
places = kernels.random_places(10 * n, n, 0, 0)
assert places.unique().numel() == n
"""
STEP = """
def made(scope, compute, share):
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(1500, 1500, bias=False) for _ in range(2)))
    net = sparsify(net, share, compute=compute, seed=1, scope=scope)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(l1=0.01, seed=1, scope=scope, lr_scale=1).attach(net, optimizer)
    return net, optimizer

def descend(net):
    torch.manual_seed(1)
    for theta in {id(c.theta): c.theta for c in converted_tensors(net)}.values():
        theta.grad = torch.randn_like(theta)

def state(net):
    found = [c.theta.detach().clone() for c in converted_tensors(net)]
    return found + [value.clone() for c in converted_tensors(net) for value in (c.slots.places, c.slots.born, c.slots.signs)]

scope, compute, share = sys.argv[1], sys.argv[2], float(sys.argv[3])
warm, warmer = made(scope, compute, share)
descend(warm)
warmer.step()  # compiled
del warm, warmer
(net, optimizer), (twin, other) = made(scope, compute, share), made(scope, compute, share)
descend(net)
descend(twin)
thetas = {id(c.theta): c.theta for c in converted_tensors(net)}.values()
for theta in thetas:
    theta.data.add_(theta.grad, alpha=-0.1)  # the optimizer's step, so that only ours remains
    theta.grad.zero_()
before = state(net)
limit(8 << 20)
try:
    optimizer.step()
    print("enough")
except (RuntimeError, MemoryError) as error:
    unlimited()
    print("refused:", str(error)[:60])
    assert all(map(torch.equal, before, state(net))), "the step was done in part"
unlimited()
"""
AGAIN = """
optimizer.step()
other.step()
assert all(map(torch.equal, state(net), state(twin))), "the step that was repeated is another one"
"""


def run(source: str, *arguments: str) -> str:
    # a fixed threshold, and large blocks: else the C library may have kept enough of what was freed before
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", source, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS and /proc")


@needs_kernels
@on_linux
def test_a_start_without_memory_is_refused() -> None:
    assert "no memory for the kernels" in run(SETTING + START)


@needs_kernels
@on_linux
@pytest.mark.parametrize(
    ("scope", "compute", "share"),
    [
        pytest.param("layer", "sparse", "0.3", marks=pytest.mark.slow),
        pytest.param("layer", "dense", "0.7", marks=pytest.mark.slow),
        pytest.param("global", "dense", "0.3", marks=pytest.mark.slow),
    ],
)
def test_a_step_without_memory_is_not_taken(scope: str, compute: str, share: str) -> None:
    assert "refused" in run(SETTING + STEP + AGAIN, scope, compute, share)


@needs_kernels
@pytest.mark.parametrize("count", [1, 63, 1000, 4097])
@pytest.mark.parametrize("density", [0.001, 0.499, 0.6, 0.9, 1.0])
def test_the_room_is_enough(count: int, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guard words behind the working memory stay as they are when all slots are reborn at once."""
    from lightning_deepr import DeepR, sparsify
    from lightning_deepr.kernels.cpu import room
    from tests.helpers.state import all_slots, thetas

    made: list[tuple[torch.Tensor, int]] = []

    def guarded(size: int) -> torch.Tensor:
        whole = torch.full((size + room.LINE + 4096,), 91, dtype=torch.uint8)
        made.append((whole, size + room.LINE))
        return whole[: size + room.LINE]

    monkeypatch.setattr(room, "empty", guarded)
    columns = max(1, int(np.ceil(count / density / 8)))
    total = 8 * columns
    for scope, ranked in (("layer", False), ("layer", True), ("global", False)):
        with torch.device("meta"):
            net = torch.nn.Sequential(torch.nn.Linear(columns, 8, bias=False), torch.nn.Linear(8, 3, bias=False))
        connectivity = {"0": min(count, total), "1": 5} if scope == "layer" else min(count, total) + 5
        net = sparsify(net, connectivity, compute="sparse", seed=1, init="deepr", device="cpu", scope=scope)
        for slots in all_slots(net):
            slots.ranked = ranked
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        DeepR(l1=0.0, seed=1, scope=scope, lr_scale=1).attach(net, optimizer)
        for share in (1.0, 0.5, 1e-9):
            for theta in {id(one): one for one in thetas(net)}.values():
                dying = torch.rand_like(theta) < share
                theta.grad = torch.where(dying, theta.detach() + 1, 0.0)
            optimizer.step()
    assert made
    for whole, end in made:
        assert bool((whole[end:] == 91).all())
