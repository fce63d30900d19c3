"""The Triton kernels without a GPU: they are compiled for real GPUs, and they run in Triton's interpreter.

``tests/kernels/triton_interpreted.py`` holds the tests that run in the interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_deepr import DeepR, kernels, sparsify
from lightning_deepr.compute import gpu_check as linear_check
from lightning_deepr.kernels.gpu import gate
from lightning_deepr.training import gpu_check
from tests.helpers.paths import ROOT

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton can't be imported here")


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("marked", ["not slow", "slow"])
def test_in_the_interpreter(marked: str) -> None:
    said = run(
        *("-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-m", marked, "tests/kernels/triton_interpreted.py"),
        TRITON_INTERPRET="1",
    )
    closing = said.strip().splitlines()[-1]  # (a warning above it may use these words)
    assert " passed" in closing and "failed" not in closing and "skipped" not in closing


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "dtypes"),
    [
        ("cuda:90", "fp32"),
        ("cuda:80 cuda:90 cuda:100", "fp32 fp64 bf16 fp16"),
    ],
)
def test_the_kernels_compile_for_gpus_that_are_not_here(targets: str, dtypes: str, tmp_path: Path) -> None:
    """They compile down to machine code. The compiler does not accept everything that the interpreter accepts."""
    said = run("-m", "tests.kernels.triton_compiled", targets, dtypes, TRITON_CACHE_DIR=str(tmp_path))
    made = [line.split() for line in said.splitlines()]
    assert len(made) == 10 * len(targets.split()) * len(dtypes.split())
    assert {target for target, *_ in made} == set(targets.split())
    assert all(int(size) > 1000 for *_, size in made)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_the_benchmark_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    assert run("benchmarks/gpu.py", "--out", str(tmp_path)) == "Not measured on a GPU: none is here.\n"
    assert not list(tmp_path.iterdir())
    options = ("--device", "cpu", "--only", "rewiring,lstm", "--rounds", "1", "--largest", "1e4")
    said = run("benchmarks/gpu.py", "--out", str(tmp_path), *options)
    assert "| by K | PyTorch | 10000 |" in said and "both ways | 0" in said
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_rewiring.csv", "gpu_lstm.csv"}


@pytest.mark.slow
def test_nothing_imports_triton_before_a_gpu_is_used() -> None:
    code = """
import sys, torch
import lightning.pytorch, torch.utils.data, numba
before = "triton" in sys.modules
from lightning_deepr import DeepR, sparsify
net = sparsify(torch.nn.Linear(20, 10), 0.1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
DeepR().attach(net, optimizer)
net(torch.ones(2, 20)).sum().backward()
optimizer.step()
ours = [name for name in sys.modules if name.startswith("lightning_deepr.kernels.gpu.") and "gate" not in name]
print(before, "triton" in sys.modules, ours)
"""
    before, after, ours = run("-c", code).split(" ", 2)
    assert before == after and ours.strip() == "[]"


def test_the_cpu_has_no_use_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(gate.DEVICE_TYPES) == ["cuda"]
    monkeypatch.setattr(gate, "_triton_step", lambda: pytest.fail("asked for"))
    assert not gpu_check.rewires(torch.zeros(3), None)


def test_without_triton_or_with_kernels_turned_off_pytorch_rewires(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "DEVICE_TYPES", {"cpu"})
    ask: Any = gate._triton_step.__wrapped__
    monkeypatch.setattr(gate, "_triton_step", ask)
    monkeypatch.setenv("LIGHTNING_DEEPR_KERNELS", "0")
    assert not gpu_check.rewires(torch.zeros(3), None)
    monkeypatch.setenv("LIGHTNING_DEEPR_KERNELS", "1")
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it raises
    for name in [name for name in sys.modules if name.startswith("lightning_deepr.kernels.gpu.") and name != gate.__name__]:
        monkeypatch.delitem(sys.modules, name)
        # `from package import module` looks at the attribute first
        monkeypatch.delattr(kernels.gpu, name.rsplit(".", 1)[1], raising=False)
    assert not gpu_check.rewires(torch.zeros(3), None)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(dtype: torch.dtype) -> None:
    for check in (gpu_check.rewiring_differs, linear_check.linear_differs):
        assert check(torch.device("cuda", torch.cuda.current_device()), dtype) is None


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("l1", [0.5, "auto"])
def test_on_a_gpu_the_host_waits_for_nothing(l1: Any) -> None:
    net = sparsify(torch.nn.Sequential(torch.nn.Linear(50, 40), torch.nn.ReLU(), torch.nn.Linear(40, 30)), 0.2).cuda()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    callback = DeepR(l1=l1)
    callback.attach(net, optimizer, total_steps=100)
    x = torch.randn(8, 50, device="cuda")
    for step in range(20):  # the first step looks for values that are not finite, and checks the kernels
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum(callback.statistics().values()) > 0
