"""What records, transforms or compiles a network sees the operators of its layers: the outputs are right, or it is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_deepr import export, sparsify
from lightning_deepr.weights.k_slots import KSlots
from tests.helpers.layers import LAYERS, Layer, flat, recurrent, set_dense
from tests.helpers.state import all_slots

pytestmark = pytest.mark.filterwarnings("ignore")

ALL = {layer.name: layer for layer in LAYERS}
WIDE = 200  # rows and columns of a layer whose dense weight a kernel scatters: it has over 2**13 connections
KINDS: dict[str, Layer] = {
    **{name: ALL[name] for name in ("linear", "conv1d", "conv2d", "conv3d", "bilinear", "embedding", "attention", "own_layer")},
    "lstm": Layer("lstm", lambda: nn.LSTM(11, 8), lambda: (torch.randn(5, 3, 11),), recurrent(1, 1)),
    "gru": Layer("gru", lambda: nn.GRU(11, 7, bidirectional=True), lambda: (torch.randn(5, 3, 11),), recurrent(1, 2)),
    "mlp": Layer(
        "mlp",
        lambda: nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4)),
        lambda: (torch.randn(5, 20),),
        ("0.weight", "2.weight"),
    ),
    "cnn": Layer(
        "cnn",
        lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)),
        lambda: (torch.randn(4, 3, 12, 12),),
        ("0.weight", "2.weight"),
    ),
    "wide": Layer("wide", lambda: nn.Linear(WIDE, WIDE), lambda: (torch.randn(5, WIDE),)),
    "wide_conv": Layer("wide_conv", lambda: nn.Conv2d(32, 64, 3, padding="same"), lambda: (torch.randn(2, 32, 6, 6),)),
}
Tracer = Callable[[nn.Module, tuple[Any, ...], Path], Callable[..., Any]]


def converted(kind: str, compute: str, state: str) -> tuple[nn.Module, nn.Module, tuple[Any, ...]]:
    """Make a network that has computed nothing yet, an ordinary one with its weights, and an input."""
    layer = KINDS[kind]
    connectivity = 0.3

    def make(seed: int) -> nn.Module:
        net = layer.build(seed)
        return sparsify(net, connectivity, target_modules=layer.target, compute=compute, init="deepr", seed=seed).eval()

    net = make(0)
    if state == "loaded":
        other = make(3)
        net.load_state_dict(other.state_dict())
    elif state == "used":
        net(*layer.feed())
    # (connections do not read the weights, so the first forward pass is the tracer's)
    return net, twin(layer, net), layer.feed()


def twin(layer: Layer, net: nn.Module) -> nn.Module:
    plain = layer.build(0)
    others = {name: value for name, value in net.state_dict().items() if "parametrizations" not in name}
    plain.load_state_dict(others, strict=False)
    return set_dense(plain, net).eval()


# -- tracers -----------------------------------------------------------------------------------------------------------------


def jit_trace(net: nn.Module, inputs: tuple[Any, ...], folder: Path) -> Callable[..., Any]:
    with torch.no_grad():
        traced = torch.jit.trace(net, inputs, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


def to_torchscript(net: nn.Module, inputs: tuple[Any, ...], folder: Path) -> Callable[..., Any]:
    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, *inputs: Any) -> Any:
            return self.net(*inputs)

    return Module().to_torchscript(method="trace", example_inputs=inputs)  # type: ignore[return-value]


def run_onnx(path: Path) -> Callable[..., Any]:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Any:
        named = zip(session.get_inputs(), inputs, strict=True)
        return tuple(torch.from_numpy(one) for one in session.run(None, {entry.name: x.numpy() for entry, x in named}))

    return run


def onnx_old(net: nn.Module, inputs: tuple[Any, ...], folder: Path) -> Callable[..., Any]:
    pytest.importorskip("onnx")
    torch.onnx.export(net, inputs, str(folder / "net.onnx"), dynamo=False)
    return run_onnx(folder / "net.onnx")


def onnx_new(net: nn.Module, inputs: tuple[Any, ...], folder: Path) -> Callable[..., Any]:
    pytest.importorskip("onnxscript")
    torch.onnx.export(net, inputs, str(folder / "net.onnx"), dynamo=True, verbose=False)
    return run_onnx(folder / "net.onnx")


def own_onnx(net: nn.Module, inputs: tuple[Any, ...], folder: Path) -> Callable[..., Any]:
    pytest.importorskip("onnxscript")
    return run_onnx(export.to_onnx(net, folder / "net.onnx", inputs, dynamic={}).path)


def exported(strict: bool, dynamic: bool = False) -> Tracer:
    def trace(net: nn.Module, inputs: tuple[Any, ...], folder: Path) -> Callable[..., Any]:
        shapes = None
        if dynamic:
            size = torch.export.Dim("batch", min=2, max=1024)
            shapes = tuple({0: size} for _ in inputs)
        program = torch.export.export(net, inputs, dynamic_shapes=shapes, strict=strict)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        return torch.export.load(file).module()

    return trace


def fx(**options: Any) -> Tracer:
    return lambda net, inputs, folder: make_fx(lambda *x: flat(net(*x)), **options)(*inputs)


def symbolic(net: nn.Module, inputs: tuple[Any, ...], folder: Path) -> Callable[..., Any]:
    return torch.fx.symbolic_trace(net)


def compiled(backend: str) -> Tracer:
    def trace(net: nn.Module, inputs: tuple[Any, ...], folder: Path) -> Callable[..., Any]:
        torch._dynamo.reset()
        return torch.compile(net, backend=backend)  # type: ignore[return-value]

    return trace


TRACERS: dict[str, Tracer] = {
    "jit.trace": jit_trace,
    "to_torchscript": to_torchscript,
    "onnx, dynamo=False": onnx_old,
    "onnx, dynamo=True": onnx_new,
    "to_onnx": own_onnx,
    "export": exported(False),
    "export, strict": exported(True),
    "export, dynamic batch": exported(False, dynamic=True),
    "make_fx": fx(),
    "make_fx, fake": fx(tracing_mode="fake", _allow_non_fake_inputs=True),
    "make_fx, symbolic": fx(tracing_mode="symbolic", _allow_non_fake_inputs=True),
    "make_fx, pre_dispatch": fx(pre_dispatch=True),
    "symbolic_trace": symbolic,
    "compile": compiled("eager"),
    "compile, aot": compiled("aot_eager"),
}
SLOW = {"onnx, dynamo=True", "to_onnx", "export, strict", "compile, aot", "make_fx, fake", "make_fx, symbolic"}
QUICK = {"mlp", "cnn", "lstm", "wide"}
# what torch does not record of the ordinary layers either (the first dimension of a sequence is no batch)
UNTRACEABLE: dict[str, set[str]] = {
    "export, dynamic batch": {"attention", "lstm", "gru"},
    "symbolic_trace": {"attention", "lstm", "gru"},
}


def is_slow(tracer: str, kind: str, compute: str) -> bool:
    if tracer == "compile":
        return kind not in ("mlp", "cnn") or compute == "dense"
    return tracer in SLOW or kind not in QUICK


CASES = [
    pytest.param(tracer, kind, compute, marks=[pytest.mark.slow] if is_slow(tracer, kind, compute) else [])
    for compute in ("auto", "dense", "sparse")
    for tracer in TRACERS
    for kind in KINDS
    if kind not in UNTRACEABLE.get(tracer, set())
]


@pytest.mark.parametrize(("tracer", "kind", "compute"), CASES)
@pytest.mark.feature("Compilers: torch.export, jit.trace, make_fx, fx, ONNX")
def test_a_recorded_network_gives_the_networks_outputs(tracer: str, kind: str, compute: str, tmp_path: Path) -> None:
    """The tracer sees the network before it has computed anything, or after a load."""
    for state in ("fresh", "loaded", "used"):
        net, plain, inputs = converted(kind, compute, state)
        decisions = [(slots.compute, slots._asked_size) for slots in all_slots(net) if isinstance(slots, KSlots)]
        try:
            recorded = TRACERS[tracer](net, inputs, tmp_path)
        except RuntimeError as error:
            if "to_onnx" in str(error) or isinstance(error, torch.onnx.errors.UnsupportedOperatorError):
                continue  # the latter: an operator that this exporter does not know in a dense network, either
            raise
        if not tracer.startswith(("compile", "to_torchscript")):  # these also call the network
            after = [(slots.compute, slots._asked_size) for slots in all_slots(net) if isinstance(slots, KSlots)]
            assert after == decisions, "a tracer changed the choice of compute"
        generator = torch.Generator().manual_seed(5)
        other = tuple(x[torch.randperm(len(x), generator=generator)] for x in inputs)
        for given in (inputs, other):
            with torch.no_grad():
                expected = flat(plain(*given))
            found = flat(recorded(*given))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compute", ["auto", "dense", "sparse"])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "lstm", "wide"])
def test_a_recorded_gradient_is_the_networks(kind: str, compute: str) -> None:
    net, plain, inputs = converted(kind, compute, "fresh")

    def gradient(of: nn.Module, *x: Tensor) -> Tensor:
        x = tuple(one.detach().requires_grad_() for one in x)
        return flat(torch.autograd.grad(flat(of(*x)).square().sum(), x))

    recorded = make_fx(lambda *x: gradient(net, *x))(*inputs)
    other = tuple(2 * x for x in inputs)
    torch.testing.assert_close(recorded(*other), gradient(plain, *other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("compute", ["auto", "dense", "sparse"])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "wide", "own_layer", "conv1d"])
def test_transforms_see_the_layers(kind: str, compute: str) -> None:
    net, plain, (x,) = converted(kind, compute, "fresh")
    net, plain, x = net.double(), plain.double(), x.double()
    tangent = torch.randn_like(x)
    for transform in (
        lambda of: torch.func.jvp(of, (x,), (tangent,))[1],
        lambda of: torch.func.grad(lambda y: of(y).square().sum())(x),
        lambda of: torch.func.vmap(lambda y: of(y[None])[0])(x),
        lambda of: torch.func.functionalize(of)(x),
        lambda of: torch.func.vmap(torch.func.grad(lambda y: of(y[None]).square().sum()))(x),
    ):
        torch.testing.assert_close(transform(net), transform(plain), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("compute", ["auto", "dense", "sparse"])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "wide"])
@pytest.mark.feature("Compilers: forward-mode differentiation")
def test_forward_mode_differentiation_loses_nothing(kind: str, compute: str, grad: bool) -> None:
    net, plain, (x,) = converted(kind, compute, "used")
    tangent = torch.randn_like(x)
    found = []
    for of in (net, plain):
        with torch.set_grad_enabled(grad), torch.autograd.forward_ad.dual_level():
            y = of(torch.autograd.forward_ad.make_dual(x, tangent))
            first = y[0] if isinstance(y, tuple) else y
            found.append(torch.autograd.forward_ad.unpack_dual(first).tangent)
    assert found[0] is not None
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "lstm"])
def test_a_backward_pass_alone_is_not_recorded_or_batched(kind: str) -> None:
    """Its forward pass has run in a kernel: no operators are left to record."""
    net, plain, (x,) = converted(kind, "sparse", "used")
    x.requires_grad_()
    y = flat(net(x))

    def pull(one: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, one, retain_graph=True)[0]

    with pytest.raises(RuntimeError, match="to_onnx"):
        make_fx(pull)(torch.ones_like(y))
    with pytest.raises(RuntimeError, match="to_onnx"):
        torch.func.vmap(pull)(torch.eye(y.numel())[:3])
    torch.testing.assert_close(pull(torch.ones_like(y)), torch.autograd.grad(flat(plain(x)).sum(), x)[0], rtol=1e-4, atol=1e-5)


def test_shapes_propagate_through_a_network_that_has_computed_nothing() -> None:
    for kind, compute in (("cnn", "sparse"), ("mlp", "sparse"), ("mlp", "auto")):
        net, plain, inputs = converted(kind, compute, "fresh")
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert net(*inputs).shape == plain(*inputs).shape
        torch.testing.assert_close(net(*inputs), plain(*inputs), rtol=1e-4, atol=1e-5)  # the order that was made is real
