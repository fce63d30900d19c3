"""A C header has only what is known exactly, under names that are free; an ONNX file has the opset that was asked for."""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization

from lightning_deepr import SparseLinear, connections, save_sparse, sparsify
from lightning_deepr.commands.main import main
from lightning_deepr.export import to_c_header, to_onnx
from tests.export.test_c import needs_cc, run_in_c

CC, CXX = shutil.which("cc"), shutil.which("c++")


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Called(nn.Linear):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) + 1


class Property(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.uniform_(self._parameters["weight"])  # type: ignore[arg-type]  # not 3 times it, as the property would give
        nn.init.uniform_(self.bias)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        if "weight" not in self._parameters:
            raise AttributeError("weight")
        return 3 * self._parameters["weight"]  # type: ignore[operator]

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        self._parameters["weight"] = value


class Leaky(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(x, 0.3)


class NoDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def chain(first: nn.Module | None = None, second: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(first or nn.Linear(8, 6), second or nn.ReLU(), nn.Linear(6, 4))


def with_(change: Callable[[Any], Any], convert: bool = False) -> nn.Sequential:
    net = chain()
    if convert:
        sparsify(net, 0.5)
    change(net)
    return net


def own_forward(net: Any) -> None:
    net[0].forward = lambda x: nn.functional.linear(x, net[0].weight) * 2


def roots_forward(net: Any) -> None:
    net.forward = lambda x: net[2](net[1](net[0](x))) * 2


def stale(net: Any) -> None:
    nn.utils.weight_norm(net[0])  # the old one: `weight` is computed in a hook before each forward
    with torch.no_grad():
        net[0].weight_g.mul_(2)


def pruned(net: Any) -> None:
    prune.l1_unstructured(net[0], "weight", 0.5)
    with torch.no_grad():
        net[0].weight_orig.mul_(2)


def hook_after(net: Any) -> None:
    net[0].register_forward_hook(lambda m, x, y: 2 * y)


def hook_before(net: Any) -> None:
    net[2].register_forward_pre_hook(lambda m, x: (2 * x[0],))


def hook_on_all(net: Any) -> None:
    net.register_forward_hook(lambda m, x, y: 2 * y)


def weight_norm(net: Any) -> None:
    parametrizations.weight_norm(net[0])


def spectral(net: Any) -> None:
    parametrizations.spectral_norm(net[0])


def doubled_bias(net: Any) -> None:
    register_parametrization(net[2], "bias", Double())


HOOK, UPON = "forward hook", r"`0` has another parametrization upon `weight`"
INEXACT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a subclass": (lambda: chain(Scaled(8, 6)), r"`0` is a Scaled with a `forward` of its own"),
    "a call of its own": (lambda: chain(Called(8, 6)), r"`0` has a `__call__` of its own"),
    "a property": (lambda: chain(Property(8, 6)), r"`0` is a Property with a `weight` of its own"),
    "a converted subclass": (lambda: sparsify(chain(Scaled(8, 6)), 0.5), r"`0` is a Scaled with a `forward` of its own"),
    "another ReLU": (lambda: chain(None, Leaky()), r"`1` is a Leaky with a `forward` of its own"),
    "another Dropout": (lambda: chain(None, NoDropout()), r"`1` is a NoDropout with a `forward` of its own"),
    "a forward of the object": (lambda: with_(own_forward), r"`0` has a `forward` of its own"),
    "a forward of the whole": (lambda: with_(roots_forward), r"`Sequential` has a `forward` of its own"),
    "a hook": (lambda: with_(hook_after), rf"`0` has a {HOOK}"),
    "a hook before": (lambda: with_(hook_before), rf"`2` has a {HOOK}"),
    "a hook on all": (lambda: with_(hook_on_all), rf"`Sequential` has a {HOOK}"),
    "a hook, converted": (lambda: with_(hook_after, True), rf"`0` has a {HOOK}"),
    "pruned": (lambda: with_(pruned), rf"`0` has a {HOOK}.*prune\.remove"),
    "weight_norm, old": (lambda: with_(stale), rf"`0` has a {HOOK}"),
    "spectral_norm, old": (lambda: with_(lambda net: nn.utils.spectral_norm(net[0])), rf"`0` has a {HOOK}"),
    "weight_norm": (lambda: with_(weight_norm), UPON),
    "spectral_norm": (lambda: with_(spectral), r"`0` has another parametrization"),
    "a parametrized bias": (lambda: with_(doubled_bias, True), r"`2` has another parametrization upon `bias`"),
    "upon connections": (lambda: with_(spectral, True), UPON),
}


@pytest.mark.parametrize("kind", INEXACT)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_c_refuses_what_is_not_exactly_the_layer(kind: str, tmp_path: Path) -> None:
    make, message = INEXACT[kind]
    net = make()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        to_c_header(net, tmp_path / "model.h")
    assert not (tmp_path / "model.h").exists()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_c_refuses_a_hook_on_all_modules(tmp_path: Path) -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: None)
    try:
        with pytest.raises(ValueError, match="forward hook of all modules"):
            to_c_header(chain(), tmp_path / "model.h")
    finally:
        handle.remove()
    to_c_header(chain(), tmp_path / "model.h")


class Constructed(nn.Linear):
    """A subclass that computes as its base does."""

    def __init__(self) -> None:
        super().__init__(8, 6)
        self.note = "of no account"


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return torch.relu(x) if not self.training else x


@needs_cc
@pytest.mark.parametrize(
    "make",
    [
        lambda: chain(SparseLinear(8, 6, 0.5)),
        lambda: sparsify(chain(Constructed()), 0.5),
        lambda: torch.compile(sparsify(chain(), 0.5), backend="eager"),
        lambda: sparsify(Noisy(), 0.5),
    ],
    ids=["SparseLinear", "constructed", "compiled", "in training mode"],
)
def test_c_takes_what_is_known(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    net, x = make(), torch.randn(7, 8)
    assert net.training
    to_c_header(net, tmp_path / "model.h")
    assert all(part.training for part in net.modules())
    wanted = net.eval()(x).detach()
    assert torch.allclose(run_in_c(tmp_path, x, wanted.shape[1]), wanted, atol=1e-5)


# -- names --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "why"),
    [
        *(
            (name, "keyword of C or C")
            for name in ("int", "restrict", "inline", "typeof", "nullptr", "class", "and", "xor_eq", "asm")
        ),
        *(
            (name, "the C library or of compilers")
            for name in ("main", "linux", "exp", "memcpy", "uint8_t", "INT8_MAX", "NULL")
        ),
        ("a__b", "two underscores"),
        ("net_", "two underscores"),
        *((name, "expected a C identifier") for name in ("_net", "2x", "a-b", "", "é", "a b", "net\n", 3, None)),
    ],
)
def test_names_that_mean_something_else_are_refused(name: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"name: .*{why}"):
        to_c_header(chain(), tmp_path / "model.h", name=name)
    assert not (tmp_path / "model.h").exists()


@needs_cc
@pytest.mark.skipif(CXX is None, reason="no C++ compiler (c++) on this machine")
def test_headers_stand_beside_each_other_in_c_and_cpp(tmp_path: Path) -> None:
    names = ["net", "Net", "sum", "row", "value", "place", "column", "out", "left", "config", "stdint"]
    for name in names:
        to_c_header(sparsify(chain(), 0.5), tmp_path / f"{name}_model.h", name=name)
    for suffix, compiler, first in ((".c", CC, "-std=c99"), (".cpp", CXX, "-std=c++17")):
        for number, group in enumerate(([name for name in names if name != "Net"], ["Net"])):
            source = tmp_path / f"all{number}{suffix}"
            lines = [f'#include "{name}_model.h"' for name in group] + ["void all(const float *x, float *y);"]
            calls = " ".join(f"{name}(x, y);" for name in group)
            source.write_text("\n".join([*lines, f"void all(const float *x, float *y) {{ {calls} }}", ""]))
            flags = [first, "-pedantic", "-Wall", "-Wextra", "-Werror", "-c", "-o", str(tmp_path / "all.o"), str(source)]
            done = subprocess.run([str(compiler), *flags], capture_output=True, text=True, timeout=1800, check=False)
            assert done.returncode == 0, done.stderr
    guards = {
        line for name in names for line in (tmp_path / f"{name}_model.h").read_text().splitlines() if line.startswith("#ifndef")
    }
    assert len(guards) == len(names), "names that differ in case only have different guards"


# -- ONNX ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [5, *(pytest.param(n, marks=pytest.mark.slow) for n in (11, 17, 20)), 18, 22])
def test_the_opset_that_was_asked_for(opset: int, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    net, path, x = sparsify(chain(), 0.5), tmp_path / "net.onnx", torch.randn(2, 8)
    if opset < 7:  # no exporter writes these
        with pytest.raises(RuntimeError, match=f"opset.*{opset}|{opset}.*opset"):
            to_onnx(net, path, x, opset=opset)
        assert not path.exists()
        return
    file = to_onnx(net, path, x, opset=opset)
    written = {entry.domain: entry.version for entry in onnx.load(path).opset_import}
    assert file.opset == opset == written[""]


@pytest.mark.parametrize("opset", [0, -3, 1000, 18.0, "18", True, None])
def test_an_opset_that_there_is_not(opset: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    with pytest.raises((ValueError, RuntimeError), match="opset"):
        to_onnx(chain(), tmp_path / "net.onnx", torch.randn(2, 8), opset=opset)
    assert not (tmp_path / "net.onnx").exists()


class Words(nn.Module):
    """A network that begins with an embedding; `tests.export.test_exact.Words` on the command line."""

    def __init__(self, rows: int = 30) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, words: Tensor) -> Any:
        return self.head(self.embed(words).mean(1))


@pytest.mark.parametrize(
    "extra", [["--input-dtype", "int64"], ["--input-dtype", "int32", "--input-below", "5", "--opset", "20"]], ids=str
)
def test_integer_inputs_from_the_command_line(extra: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    net = sparsify(Words(), {"embed": 0.4, "head": 0.5})
    path = save_sparse(net, tmp_path / "words")
    command = [
        "export",
        str(path),
        "--to",
        "onnx",
        "--out",
        str(tmp_path / "net.onnx"),
        "--module",
        "tests.export.test_exact.Words",
    ]
    main([*command, "--input-shape", "3,7", *extra])
    assert f"of {sum(shape.numel() for shape, _, _ in connections(net).values())} connections" in capsys.readouterr().out
    model = onnx.load(tmp_path / "net.onnx")
    wanted = {"int64": onnx.TensorProto.INT64, "int32": onnx.TensorProto.INT32}[extra[1]]
    assert model.graph.input[0].type.tensor_type.elem_type == wanted
    for bad in (["--input-dtype", "float32", "--input-below", "3"], ["--input-dtype", "int64", "--input-below", "0"]):
        with pytest.raises(SystemExit, match="--input-below: expected a number from 1 on, with an integer --input-dtype"):
            main([*command, "--input-shape", "3,7", *bad])


def test_a_second_parametrization_is_in_the_onnx_file(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    net = with_(lambda net: register_parametrization(net[0], "weight", Double()), True)
    kept = copy.deepcopy(net)
    assert to_onnx(net, tmp_path / "net.onnx", torch.randn(2, 8)).max_error < 1e-5
    x = torch.randn(3, 8)
    assert torch.equal(net(x), kept(x))
