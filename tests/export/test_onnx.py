"""onnxruntime reproduces the network from the ONNX file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import sparsify, zoo
from lightning_deepr.export import to_onnx, to_scipy
from lightning_deepr.models import BLSTMClassifier, LeNet300100
from lightning_deepr.recipes.sequences import SequenceBatches
from lightning_deepr.recipes.timit_data import load_timit
from tests.helpers.exported import KINDS, inputs_of, small_net
from tests.helpers.layers import flat
from tests.helpers.made_up_timit import real_sample
from tests.helpers.optional import needs

pytestmark = pytest.mark.filterwarnings("ignore:.* is an int and means one single connection", "ignore:LSTM with projections")


def onnx_outputs(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    """Read and run a file without this package."""
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
    )  # sizes that to_onnx did not check
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
    """Use the test speakers' utterances if the TIMIT sample is there, and sizes that the exporter has not seen."""
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
    assert net.training  # not changed


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


@needs("scipy")
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
    assert scatter_weights(proto) == ("weight",)  # the full one would become larger
    onnx.checker.check_model(proto, full_check=True)
    after = proto.SerializeToString()
    assert len(after) < len(before) - weight.nbytes + 1500
    x = np.random.default_rng(1).normal(size=(4, 300)).astype(np.float32)
    one, other = (runtime.InferenceSession(model).run(None, {"x": x})[0] for model in (before, after))
    assert np.array_equal(one, other)
