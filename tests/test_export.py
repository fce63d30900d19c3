"""Exports hold the same network: state_dict, CSR, ONNX in onnxruntime, C compiled by the machine's compiler."""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, relu

from lightning_deepr import (
    DeepR,
    MagnitudePruning,
    SoftDeepR,
    connections,
    densify,
    load_state_dict,
    save_sparse,
    sparsify,
    zoo,
)
from lightning_deepr.cli import main
from lightning_deepr.export import to_c_header, to_csr, to_dense_state_dict, to_onnx, to_scipy
from lightning_deepr.export.encodings import gaps
from lightning_deepr.models import BLSTMClassifier, LeNet300100
from lightning_deepr.recipes.sequences import SequenceBatches
from lightning_deepr.recipes.timit_data import load_timit

from .made_up_timit import real_sample
from .networks import LAYERS, Layer, flat

pytestmark = pytest.mark.filterwarnings("ignore:.* is an int and means one single connection", "ignore:LSTM with projections")
table = pytest.mark.parametrize("layer", LAYERS, ids=str)
CC = shutil.which("cc")
needs_cc = pytest.mark.skipif(CC is None, reason="no C compiler (cc) on this machine")
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "c"


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))


def after_training(callback: Any, net: nn.Module, size: int = 40, steps: int = 5) -> nn.Module:
    """A few steps of training in a plain loop, so that values, places and dormant weights are those of the method."""
    callback.prepare(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rewiring = callback.attach(net, optimizer, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, size)).square().sum().backward()
        optimizer.step()
    rewiring.remove()
    return net


def one_connection() -> nn.Module:
    return sparsify(small_net(), {"0": 1, "2": 1})


def empty_rows() -> nn.Module:
    return sparsify(nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 6)), {"0": 37, "2": 3})


KINDS = {
    "deepr": lambda: after_training(DeepR(0.1, l1=1e-3), small_net()),
    "global": lambda: after_training(DeepR(0.1, scope="global"), small_net()),
    "soft": lambda: after_training(SoftDeepR(0.1, temperature=1e-6, l1=1e-3), small_net()),
    "pruned": lambda: after_training(MagnitudePruning(0.1), small_net()),
    "one_connection": one_connection,
    "empty_rows": empty_rows,
    "all_connections": lambda: sparsify(small_net(), 1.0),
    "converted_in_part": lambda: sparsify(small_net(), {"0": 0.1}),
    "dense": small_net,
}
kinds = pytest.mark.parametrize("kind", KINDS)


def inputs_of(net: nn.Module) -> int:
    return next(layer.in_features for layer in net.modules() if isinstance(layer, nn.Linear))


# -- dense and CSR ------------------------------------------------------------------------------------------------------------


@table
def test_dense_state_dict_is_that_of_the_plain_layer(layer: Layer) -> None:
    sparse = sparsify(layer.build(), 0.3, target_modules=layer.target).eval()
    wanted = flat(sparse(*layer.feed()))
    before = {name: tensor.clone() for name, tensor in sparse.state_dict().items()}
    state = to_dense_state_dict(sparse)
    plain = layer.build(seed=5).eval()
    plain.load_state_dict(state)
    assert torch.allclose(flat(plain(*layer.feed())), wanted, atol=1e-5)
    for name, (_, places, values) in connections(sparse).items():
        assert torch.equal(state[name].reshape(-1)[places], values)
        assert int((state[name] != 0).sum()) == int((values != 0).sum())
    state[next(iter(state))].fill_(7)  # a copy: the module stays as it is
    assert all(torch.equal(tensor, before[name]) for name, tensor in sparse.state_dict().items())


@table
def test_csr_holds_every_connection(layer: Layer) -> None:
    sparse = sparsify(layer.build(), 0.3, target_modules=layer.target)
    dense, found = to_dense_state_dict(sparse), to_csr(sparse)
    assert found.keys() == connections(sparse).keys()
    for name, matrix in found.items():
        assert matrix.layout == torch.sparse_csr
        assert matrix.values().numel() == connections(sparse)[name][1].numel()
        assert torch.equal(matrix.to_dense(), dense[name].flatten(1))


@kinds
def test_every_method_exports_its_active_connections(kind: str) -> None:
    net = KINDS[kind]()
    plain = densify(copy.deepcopy(net))
    state = to_dense_state_dict(net)
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    for name, matrix in to_csr(net).items():
        assert torch.equal(matrix.to_dense(), state[name])


def test_scipy_multiplies_as_the_layer_does() -> None:
    pytest.importorskip("scipy")
    net = sparsify(nn.Linear(40, 30, bias=False), 0.1)
    x = torch.randn(7, 40)
    matrix = to_scipy(net)["weight"]
    assert matrix.nnz == 120
    assert np.allclose((matrix @ x.numpy().T).T, net(x).detach().numpy(), atol=1e-5)


def test_what_is_too_large_to_be_dense_is_refused_and_is_a_matrix() -> None:
    net = sparsify(nn.Sequential(nn.Linear(200_000, 100_000, device="meta")), 50, device="cpu")
    with pytest.raises(RuntimeError, match=r"75 GiB.*to_csr"):
        to_dense_state_dict(net)
    assert to_csr(net)["0.weight"].values().numel() == 50


# -- ONNX ---------------------------------------------------------------------------------------------------------------------


def onnx_outputs(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    """Read and run without this package's help."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {entry.name: x.numpy() for entry, x in zip(session.get_inputs(), inputs, strict=True)})


TIME = {0: "time", 1: "batch"}
ONNX_LAYERS: dict[str, tuple[Any, tuple[int, ...], dict[int, str]]] = {
    "linear": (lambda: nn.Linear(14, 9), (6, 14), {0: "batch"}),
    "mlp": (lambda: LeNet300100(), (1, 1, 28, 28), {0: "batch"}),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (3, 4, 7, 7), {0: "batch"}),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (3, 4, 5, 5), {0: "batch"}),
    "lstm": (lambda: nn.LSTM(11, 8, num_layers=2, bidirectional=True), (5, 3, 11), TIME),
    "gru": (lambda: nn.GRU(11, 7, bidirectional=True), (5, 3, 11), TIME),
    "blstm_classifier": (lambda: BLSTMClassifier(hidden=32), (2, 20, 39), {0: "batch", 1: "time"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", ONNX_LAYERS)
def test_onnxruntime_reproduces_the_network(name: str, sparse: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    make, shape, dynamic = ONNX_LAYERS[name]
    torch.manual_seed(0)
    net = sparsify(make(), 0.05).eval()
    file = to_onnx(net, tmp_path / "net.onnx", torch.randn(shape), dynamic=dynamic, sparse=sparse)
    assert file.size == (tmp_path / "net.onnx").stat().st_size
    assert file.max_error <= 1e-5
    assert len(file.checked_shapes) == 3
    other = tuple(
        size + 4 if dimension in dynamic else size for dimension, size in enumerate(shape)
    )  # sizes that no check has seen
    x = torch.randn(other)
    with torch.no_grad():
        wanted = flat(net(x)).numpy()
    given = np.concatenate([part.reshape(-1) for part in onnx_outputs(file.path, x)])
    assert np.abs(given - wanted).max() <= 1e-5
    assert str(tmp_path).encode() not in file.path.read_bytes()
    assert b"site-packages" not in file.path.read_bytes()  # the exporter's stack traces


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["speech", "noise"])
@pytest.mark.parametrize("name", zoo.list_models("timit_blstm.*"))
def test_onnxruntime_runs_the_lstms_of_the_zoo(name: str, kind: str, tmp_path: Path) -> None:
    """On the test speakers' utterances, where TIMIT's sample is at hand, and on sizes that the exporter has not seen."""
    pytest.importorskip("onnxscript")
    if kind == "speech":
        inputs = [x for x, _, _ in SequenceBatches(load_timit(real_sample(), cache_dir=tmp_path).test, 1)]
    else:
        inputs = [torch.randn(3, frames, 39) for frames in (1, 77, 400)]
    net = zoo.load(name).eval()
    file = to_onnx(net, tmp_path / "net.onnx", torch.randn(2, 50, 39), dynamic={0: "batch", 1: "time"}, sparse=True)
    for x in inputs:
        (given,) = onnx_outputs(file.path, x)
        with torch.no_grad():
            assert np.abs(given - net(x).numpy()).max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["soft", "one_connection", "empty_rows"])
def test_onnx_of_every_kind_and_its_size(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    net = KINDS[kind]()
    x = torch.randn(3, inputs_of(net))
    files = [to_onnx(net, tmp_path / f"{sparse}.onnx", x, sparse=sparse) for sparse in (False, True)]
    assert all(file.max_error <= 1e-5 for file in files)
    assert files[0].size > 4 * files[0].potential  # dense
    assert files[1].sparse_weights
    assert files[1].size < files[0].size
    assert net.training  # left as it was


@pytest.mark.slow
def test_onnx_that_differs_is_not_written(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(RuntimeError, match=r"Nothing was written.*tolerance"):
        to_onnx(small_net(), tmp_path / "net.onnx", torch.randn(2, 40), tolerance=-1)
    assert not (tmp_path / "net.onnx").exists()


def test_onnx_refuses_what_it_can_not_hold(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "net.onnx"
    with pytest.raises(ValueError, match="`0` is an LSTM with proj_size=3"):
        to_onnx(nn.Sequential(nn.LSTM(4, 5, proj_size=3)), path, torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match=r"found 2 where input 0 has shape \(2, 40\)"):
        to_onnx(small_net(), path, torch.randn(2, 40), dynamic={2: "time"})
    with pytest.raises(ValueError, match="found list at position 1"):
        to_onnx(small_net(), path, (torch.randn(2, 40), [1]))  # type: ignore[arg-type]
    large = sparsify(nn.Sequential(nn.Linear(50_000, 20_000, device="meta")), 50, device="cpu")
    with pytest.raises(ValueError, match=r"3\.7 GiB.*less than 2 GiB"):
        to_onnx(large, path, torch.randn(2, 50_000))
    assert not path.exists()


@pytest.mark.parametrize(("call", "missing"), [("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("scipy", "scipy.sparse")])
def test_a_missing_library_names_the_extra(call: str, missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if call == "onnx":
        pytest.importorskip("onnx")
    monkeypatch.setitem(sys.modules, missing, None)
    calls = {
        "onnx": lambda: to_onnx(small_net(), tmp_path / "net.onnx", torch.randn(2, 40)),
        "scipy": lambda: to_scipy(small_net()),
    }
    with pytest.raises(ImportError, match=rf"needs {missing}, not installed here: pip install 'lightning-deepr\[export\]'"):
        calls[call]()


def test_scattered_weights_are_the_same_in_onnxruntime(tmp_path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from lightning_deepr.export.onnx_weights import scatter_weights

    weight = np.zeros((300, 50), np.float32)
    weight[::7, 3] = np.arange(43)
    full = np.random.default_rng(0).normal(size=(300, 300)).astype(np.float32)
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [helper.make_node("MatMul", ["x", "full"], ["h"]), helper.make_node("MatMul", ["h", "weight"], ["y"])]
    ends = [helper.make_tensor_value_info(name, kind, ["n", size]) for name, size in (("x", 300), ("y", 50))]
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in (("full", full), ("weight", weight))]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], constants), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    before = proto.SerializeToString()
    assert scatter_weights(proto) == ("weight",)  # the full one takes less room as it is
    onnx.checker.check_model(proto, full_check=True)
    after = proto.SerializeToString()
    assert len(after) < len(before) - weight.nbytes + 1500
    x = np.random.default_rng(1).normal(size=(4, 300)).astype(np.float32)
    one, other = (runtime.InferenceSession(model).run(None, {"x": x})[0] for model in (before, after))
    assert np.array_equal(one, other)


# -- C ------------------------------------------------------------------------------------------------------------------------


def run_in_c(folder: Path, inputs: Tensor, outputs: int, name: str = "predict") -> Tensor:
    """Compile <folder>/model.h, strictly, as a shared library and give it the inputs one by one."""
    assert CC is not None
    source, library = folder / "run.c", folder / "run.so"
    source.write_text(
        f'#include "model.h"\nvoid run(const float *in, float *out);\nvoid run(const float *in, float *out) {{ {name}(in, out); }}\n'
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


SHAPES = {  # inputs, connections: how the connections of a 20-row layer are stored
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
    if weights != "float32":  # what is stored: whole multiples of the largest weight over the number of levels
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
    """All that is passed over, in one forward."""

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
        (Residual(), "no link of one chain"),
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


def lenet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return sparsify(LeNet300100(), 0.01, distribution="deepr", seed=seed)


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


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_sparse(lenet(), tmp_path / "net.safetensors")


def test_command_line_writes_dense_csr_and_c(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = ["--module", "lightning_deepr.models.LeNet300100"]
    net = load_state_dict(LeNet300100(), checkpoint)
    main(["export", str(checkpoint), "--to", "dense", "--out", str(tmp_path / "dense.pt"), *network])
    state = torch.load(tmp_path / "dense.pt", weights_only=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in to_dense_state_dict(net).items())
    main(["export", str(checkpoint), "--to", "csr", "--out", str(tmp_path / "net.npz"), *network])
    arrays = np.load(tmp_path / "net.npz")
    assert torch.equal(torch.from_numpy(arrays["fc1.weight.data"]), to_csr(net)["fc1.weight"].values())
    assert np.array_equal(arrays["fc1.bias"], net.fc1.bias.detach().numpy())
    main(["export", str(checkpoint), "--to", "c", "--out", str(tmp_path / "net.h"), "--weights", "int8", *network])
    assert "static inline void predict" in (tmp_path / "net.h").read_text(encoding="utf-8")
    assert "2,682 of 266,200 connections as int8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "onnx", "--out", "net.onnx"], "--input-shape"),
        (["--to", "csr", "--out", "net.txt"], r"expected \.npz"),
        (["--to", "dense", "--out", "net.txt"], r"expected \.safetensors"),
        (["--to", "c", "--out", "net.h", "--submodule", "head"], "head"),
    ],
)
def test_command_line_says_what_is_wrong(checkpoint: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["export", str(checkpoint), *arguments, "--module", "lightning_deepr.models.LeNet300100"])


def test_command_line_finds_the_network_or_asks_for_it(checkpoint: Path, tmp_path: Path) -> None:
    for module in (["--module", "torch.nn.functional.relu"], ["--module", "LeNet300100"]):
        with pytest.raises(SystemExit, match=r"expected the full name of an nn\.Module"):
            main(["export", str(checkpoint), "--to", "c", "--out", str(tmp_path / "net.h"), *module])
    torch.save({"state_dict": lenet().state_dict()}, tmp_path / "last.ckpt")
    with pytest.raises(SystemExit, match=r"last\.ckpt does not say which network it is of: give --module"):
        main(["export", str(tmp_path / "last.ckpt"), "--to", "c", "--out", str(tmp_path / "net.h")])
    main(["export", str(checkpoint), "--to", "c", "--out", str(tmp_path / "one.h")])  # a sparse file names its own
    main(
        [
            "export",
            str(tmp_path / "last.ckpt"),
            "--to",
            "c",
            "--out",
            str(tmp_path / "other.h"),
            "--module",
            "lightning_deepr.models.LeNet300100",
        ]
    )
    assert (tmp_path / "one.h").read_text(encoding="utf-8") == (tmp_path / "other.h").read_text(encoding="utf-8")
