"""The exported C source, compiled here, computes the same network; the example in examples/c runs."""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, relu

from lightning_deepr import densify, sparsify
from lightning_deepr.export import to_c_header, to_dense_state_dict
from lightning_deepr.export.encodings import gaps
from lightning_deepr.models import BLSTMClassifier
from tests.helpers.exported import KINDS, inputs_of, kinds, lenet, small_net
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:.* is an int and means one single connection", "ignore:LSTM with projections")


CC = shutil.which("cc")
needs_cc = pytest.mark.skipif(CC is None, reason="no C compiler (cc) on this machine")
EXAMPLE = ROOT / "examples" / "c"


# -- C ------------------------------------------------------------------------------------------------------------------------


def run_in_c(folder: Path, inputs: Tensor, outputs: int, name: str = "predict") -> Tensor:
    """Compile <folder>/model.h as a shared library, with all warnings as errors, and run it on each input."""
    assert CC is not None
    source, library = folder / "run.c", folder / "run.so"
    source.write_text(
        '#include "model.h"\nvoid run(const float *in, float *out);\n'
        f"void run(const float *in, float *out) {{ {name}(in, out); }}\n"
    )
    flags = ["-O2", "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    done = subprocess.run([CC, *flags, "-o", str(library), str(source)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    function = ctypes.CDLL(str(library)).run
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    result = torch.full((len(inputs), outputs), float("nan"))
    for x, y in zip(inputs.contiguous(), result, strict=True):
        function(x.data_ptr(), y.data_ptr())
    return result


@needs_cc
@kinds
def test_c_reproduces_the_network(kind: str, tmp_path: Path) -> None:
    net = KINDS[kind]().eval()
    header = to_c_header(net, tmp_path / "model.h")
    x = torch.randn(50, inputs_of(net))
    wanted = net(x).detach()
    assert torch.allclose(run_in_c(tmp_path, x, wanted.shape[1]), wanted, rtol=1e-5, atol=1e-5)
    assert header.connections == sum(int((w != 0).sum()) for n, w in to_dense_state_dict(net).items() if n.endswith("weight"))


SHAPES = {  # inputs and connections of a layer of 20 rows, for each kind of storage
    "gaps_with_escapes": (3000, 400, "gaps"),
    "columns_in_two_bytes": (60_000, 30, "columns"),
    "columns_in_four_bytes": (100_000, 30, "columns"),
    "dense": (30, 590, "dense"),
}


@needs_cc
@pytest.mark.parametrize("weights", ["float32", "int16", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_c_in_every_encoding(shape: str, weights: Any, tmp_path: Path) -> None:
    inputs, count, kind = SHAPES[shape]
    net = sparsify(nn.Sequential(nn.Linear(inputs, 20, bias=False), nn.ReLU()), count)
    header = to_c_header(net, tmp_path / "model.h", weights=weights, name="net")
    assert header.layers[0][1] == kind
    weight = densify(copy.deepcopy(net))[0].weight.detach().double()
    if weights != "float32":  # stored values are whole multiples of the largest weight over the number of levels
        scale = weight.abs().max() / {"int16": 32767, "int8": 127}[weights]
        rounded = (weight / scale).round() * scale
        assert header.rounding == pytest.approx(float((rounded - weight).abs().max()), abs=1e-6)
        weight = rounded
    else:
        assert header.rounding == 0
    x = torch.randn(20, inputs)
    wanted = (x.double() @ weight.T).relu().float()
    assert torch.allclose(run_in_c(tmp_path, x, 20, name="net"), wanted, rtol=1e-4, atol=1e-5)


def test_gaps_decode_to_the_columns() -> None:
    pointers, columns = np.array([0, 0, 4, 5, 6]), np.array([0, 255, 510, 1021, 254, 765])
    stored = iter(gaps(pointers, columns).tolist())
    decoded = []
    for row in range(4):
        column = 0
        for _ in range(pointers[row], pointers[row + 1]):
            while (gap := next(stored)) == 255:
                column += 255
            column += gap
            decoded.append(column)
    assert decoded == columns.tolist()
    assert not list(stored)


class Followed(nn.Module):
    """A forward with every operation that the export skips."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(12, 30), nn.Linear(30, 30), nn.Linear(30, 4)
        self.passed = nn.Sequential(nn.Dropout(0.5), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        x = torch.flatten(x, 1).view(-1, 12)
        x = dropout(relu(self.fc1(x)), training=self.training)
        return self.fc3(self.passed(torch.relu(self.fc2(x).reshape(-1, 30))))


@needs_cc
def test_c_follows_a_forward(tmp_path: Path) -> None:
    net = sparsify(Followed(), 0.2).eval()
    to_c_header(net, tmp_path / "model.h")
    x = torch.randn(9, 3, 4)
    assert torch.allclose(run_in_c(tmp_path, x.flatten(1), 4), net(x).detach(), atol=1e-5)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3)), r"`0` \(Conv2d\)"),
        (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), r"`1` \(BatchNorm1d\)"),
        (nn.Sequential(nn.Linear(3, 4), nn.Softmax(1)), r"`1` \(Softmax\).*left to the caller"),
        (nn.Sequential(nn.ReLU(), nn.Linear(3, 4)), "before the first linear layer"),
        (nn.Sequential(nn.Linear(3, 4), nn.Flatten(0)), r"`1` \(Flatten\)"),
        (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(5, 4)), "`0` has 4 outputs, and `2` takes 5"),
        (nn.Sequential(nn.Identity()), "no linear layer"),
        (BLSTMClassifier(), r"can't be followed|found"),
        (Residual(), "not a link of one chain"),
        (Branching(), "can't be followed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_c_refuses_other_networks_by_name(net: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        to_c_header(net, tmp_path / "model.h")
    assert not (tmp_path / "model.h").exists()


def test_c_refuses_bad_values_and_arguments(tmp_path: Path) -> None:
    net = small_net()
    with pytest.raises(ValueError, match="C identifier, found '2x'"):
        to_c_header(net, tmp_path / "model.h", name="2x")
    with pytest.raises(ValueError, match="\"int8\", found 'int4'"):
        to_c_header(net, tmp_path / "model.h", weights="int4")  # type: ignore[arg-type]
    net[2].weight.data[1, 1] = float("nan")
    with pytest.raises(ValueError, match="finite weights, found NaN or infinity in `2`"):
        to_c_header(net, tmp_path / "model.h")


# -- the example and the command line -----------------------------------------------------------------------------------------


def compile_example(folder: Path) -> subprocess.CompletedProcess[str]:
    assert CC is not None
    flags = ["-O2", "-std=c99", "-Wall", "-Werror"]
    subprocess.run([CC, *flags, "-o", str(folder / "digits"), str(folder / "main.c")], check=True, timeout=1800)
    return subprocess.run([str(folder / "digits")], capture_output=True, text=True, timeout=1800, check=False)


@needs_cc
def test_the_example_reproduces_100_digits_and_notices_another_network(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_example", EXAMPLE / "make_example.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    header = example.write(lenet(), tmp_path)
    assert header.constant_bytes < 16_000
    assert header.buffer_bytes == 1600
    done = compile_example(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "100 decided as by PyTorch" in done.stdout
    to_c_header(lenet(seed=1), tmp_path / "model.h")
    assert compile_example(tmp_path).returncode == 1
