"""The example that trains: on a PC, and built for Cortex-M4F and Cortex-M0+ and run under QEMU, with equal results."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch import Tensor

from lightning_deepr import sparsify
from lightning_deepr.export import to_c
from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes.digits import embedded_digits
from tests.helpers.paths import ROOT

EXAMPLE = ROOT / "examples" / "c" / "training"
TRAIN, TEST = 400, 150


def write_idx(folder: Path) -> None:
    """Write embedded digits in MNIST's own format."""
    images, labels, more_images, more_labels = embedded_digits()

    def write(name: str, values: Tensor) -> None:
        head = bytes([0, 0, 8, values.dim()]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
        (folder / name).write_bytes(head + values.byte().numpy().tobytes())

    write("train-images-idx3-ubyte", images[:TRAIN].view(-1, 28, 28))
    write("train-labels-idx1-ubyte", labels[:TRAIN])
    write("t10k-images-idx3-ubyte", more_images[:TEST].view(-1, 28, 28))
    write("t10k-labels-idx1-ubyte", more_labels[:TEST])


def make(target: str, folder: Path, *needed: str) -> str:
    for program in ("make", *needed):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not on this machine")
    settings = [f"TRAIN={TRAIN}", f"TEST={TEST}", "SEED=2", "SHIFTS=1", "EPOCHS=2", f"NET={folder}", f"DATA={folder}"]
    done = subprocess.run(
        ["make", "-s", "-f", str(EXAMPLE / "Makefile"), target, *settings], capture_output=True, text=True, timeout=600
    )
    if done.returncode and re.search(r"(cannot read spec file|cannot find).*nano\.specs", done.stderr):
        pytest.skip("newlib for Arm is not on this machine")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("board")
    write_idx(made)
    to_c(sparsify(LeNet300100(), 2662, distribution="deepr"), made, train=True, untrained=True)
    return made


def results(text: str) -> list[str]:
    return re.findall(r"epoch .*", text)


@pytest.fixture(scope="module")
def on_this_machine(folder: Path) -> list[str]:
    make("host", folder, "cc")
    done = subprocess.run([str(folder / "train-host")], cwd=folder, capture_output=True, text=True, timeout=600, check=True)
    assert len(results(done.stdout)) == 2
    return results(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("board", "most"), [("m4", 300_000), ("m0plus", 3_000_000)])
def test_boards_compute_the_same(board: str, most: int, folder: Path, on_this_machine: list[str]) -> None:
    text = make(f"run-{board}", folder, "arm-none-eabi-gcc", "qemu-system-arm")
    assert results(text) == on_this_machine
    stack = int(re.findall(r"most stack: (\d+)", text)[0])
    forward, backward, rewiring = map(int, re.findall(r"forward (\d+), backward (\d+), rewiring (\d+)", text)[0])
    assert 0 < stack <= 1024  # the linker has refused a program that needs more than 32 KB with 1 KB of stack
    assert 0 < forward < backward
    assert 0 < forward + backward + rewiring < most


def test_the_example_runs_here(on_this_machine: list[str]) -> None:
    assert on_this_machine[0].startswith("epoch 1: loss ")
