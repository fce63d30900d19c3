"""Units that are cut off: counted against a slow walk, and removed without a change of the outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import (
    Dale,
    DeepR,
    SoftDeepR,
    ages,
    connections,
    connectivity_report,
    dead_units,
    densify,
    load_state_dict,
    prune_dead_units,
    save_sparse,
    sparsify,
    zoo,
)
from lightning_deepr.export import to_c_header, to_csr, to_dense_state_dict, to_onnx
from lightning_deepr.models import ResNet20, ResponseNorm

GRID = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FLAT = torch.randn(5, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TIMES = torch.randn(5, 7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Residual(nn.Module):
    """Two branches that are added: a unit of the stream is written twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.back = nn.Linear(30, 25), nn.Linear(25, 40), nn.Linear(40, 25)
        self.norm, self.last = nn.BatchNorm1d(25), nn.Linear(25, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.norm(x + self.back(self.inner(x).relu())).relu())


class Views(nn.Module):
    """A flattening by view, functions instead of modules, an argument with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 20, 3), nn.Linear(20 * 9, 6)

    def forward(self, x: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> Tensor:
        x = nn.functional.max_pool2d(nn.functional.gelu(self.conv(x)), 2) * scale
        return self.linear(x.view(x.size(0), -1) if mask is None else mask)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.rnn = kind(12, 20, batch_first=True, **options)  # type: ignore[call-arg, arg-type]
        self.head = nn.Linear(20 * (1 + self.rnn.bidirectional), 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.head(y.tanh())


def conv(padding: int, bias: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 30, 3, bias=bias), nn.BatchNorm2d(30), nn.ReLU(), nn.Conv2d(30, 20, 3, padding=padding, bias=bias),
        nn.Sigmoid(), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(20, 3),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, float]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(30, 60), nn.ReLU(), nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 4)), FLAT, 0.02),
    "no biases": (
        lambda: nn.Sequential(nn.Linear(30, 60, bias=False), nn.Sigmoid(), nn.Linear(60, 4, bias=False)), FLAT, 0.02
    ),
    "convolutions": (lambda: conv(0), GRID, 0.03),
    "padded": (lambda: conv(1), GRID, 0.03),
    "padded, no biases": (lambda: conv(1, bias=False), GRID, 0.03),
    "response norm": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 30, 3), nn.ReLU(), ResponseNorm(30), nn.Conv2d(30, 8, 3, padding=1), nn.Flatten(), nn.Linear(288, 3)
        ), GRID, 0.02
    ),
    "residual": (Residual, FLAT, 0.03),
    "views": (Views, GRID, 0.02),
    "resnet": (lambda: ResNet20(classes=4), torch.randn(2, 3, 16, 16, dtype=torch.float64), 0.003),
    "lstm": (lambda: Recurrent(nn.LSTM), TIMES, 0.01),
    "bidirectional lstm of two levels": (lambda: Recurrent(nn.LSTM, bidirectional=True, num_layers=2), TIMES, 0.01),
    "gru": (lambda: Recurrent(nn.GRU, bias=False), TIMES, 0.02),
    "rnn": (lambda: Recurrent(nn.RNN), TIMES, 0.02),
}  # fmt: skip


def made(name: str, seed: int = 0, **options: object) -> tuple[nn.Module, Tensor]:
    """Make a converted network in float64, with batch norms and biases that are not 0."""
    make, x, connectivity = NETWORKS[name]
    torch.manual_seed(seed)
    net = make().double().eval()
    for part in net.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
            nn.init.normal_(part.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(part.running_var, 0.5, 2)  # type: ignore[arg-type]
    return sparsify(net, connectivity, seed=seed, **options), x  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NETWORKS)
def test_pruning_keeps_the_outputs(name: str) -> None:
    removed = 0
    for seed in range(3):
        net, x = made(name, seed)
        before, wanted = copy.deepcopy(net), net(x)
        report = prune_dead_units(net)
        torch.testing.assert_close(net(x), wanted, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(densify(copy.deepcopy(net))(x), wanted, rtol=1e-9, atol=1e-10)
        after = sum(p.numel() for p in net.parameters())
        assert sum(p.numel() for p in before.parameters()) >= after
        assert connectivity_report(before).active - report.connections == connectivity_report(net).active
        assert report.saved == report.bytes_before - report.bytes >= 0 and report.dense_saved >= 0
        again = prune_dead_units(net)
        assert (again.units, again.saved) == (0, 0), "everything is removed at once"
        removed += report.units
    assert removed > 0, "the network has dead units"


def test_a_dense_network_with_zeros_is_pruned_alike() -> None:
    net, x = made("linear")
    dense = densify(copy.deepcopy(net))
    wanted = net(x)
    sparse, plain = prune_dead_units(net), prune_dead_units(dense)
    assert sparse.units == plain.units > 0
    torch.testing.assert_close(dense(x), wanted, rtol=1e-9, atol=1e-10)
    assert [p.shape for p in densify(net).parameters()] == [p.shape for p in dense.parameters()]


def test_a_pruned_network_trains_and_is_saved(tmp_path: Path) -> None:
    net, x = made("linear")
    prune_dead_units(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rewiring = DeepR(check_invariants=True).attach(net, optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    rewiring.remove()
    path = save_sparse(net, tmp_path / "net.safetensors")
    sizes = [(part.in_features, part.out_features) for part in net if isinstance(part, nn.Linear)]  # type: ignore[attr-defined]
    fresh = nn.Sequential(
        nn.Linear(*sizes[0]), nn.ReLU(), nn.Linear(*sizes[1]), nn.Tanh(), nn.Linear(*sizes[2])
    ).double()  # fmt: skip
    torch.testing.assert_close(load_state_dict(fresh, path)(x), net(x))


def test_layers_with_one_theta_and_with_a_dense_theta() -> None:
    net, x = made("linear", scope="global")
    wanted = net(x)
    assert prune_dead_units(net).units > 0
    torch.testing.assert_close(net(x), wanted, rtol=1e-9, atol=1e-10)
    torch.manual_seed(0)
    soft = SoftDeepR(0.02, temperature=1e-9, l1=1e-3).prepare(NETWORKS["linear"][0]().double())
    wanted = soft(x)
    assert prune_dead_units(soft).units > 0
    torch.testing.assert_close(soft(x), wanted, rtol=1e-9, atol=1e-10)


def small_models() -> list[str]:
    return [name for name in zoo.list_models() if not name.startswith("cifar")]


SHAPES = {"lenet300_100": (16, 1, 28, 28), "cifar10_cnn": (4, 3, 24, 24), "timit_blstm": (2, 20, 39)}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name.endswith("_1pct_mnist") or "1pct_timit" in name else pytest.mark.slow)
        for name in zoo.list_models()
    ],
)
def test_every_model_of_the_zoo(name: str) -> None:
    net = zoo.load(name).double()
    if name.startswith("char_transformer"):  # its forward looks at the length of the text
        with pytest.raises(ValueError, match="the forward of CharTransformer can't be followed"):
            prune_dead_units(net)
        return
    x = torch.randn(SHAPES[name.split(".")[0]], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = net(x)
    cut_off = dead_units(net).total["dead"]
    report = prune_dead_units(net)
    assert float((net(x) - wanted).detach().abs().max()) < 1e-6
    assert 0 <= report.units <= cut_off
    net = net.float()
    assert (net(x.float()) - wanted).detach().abs().max() < 1e-5 * wanted.abs().max()


def test_dead_units_equal_a_slow_walk() -> None:
    net, _ = made("linear")
    found = dead_units(net)
    layers = [
        (shape, [(int(p) // shape[1], int(p) % shape[1]) for p in places]) for shape, places, _ in connections(net).values()
    ]
    reached, used = {*range(30)}, {*range(4)}
    alive = []
    for (rows, _), pairs in layers:
        reached = {r for r, c in pairs if c in reached}
        alive.append((rows, reached))
    users = []
    for _, pairs in reversed(layers):
        users.append(used)
        used = {c for r, c in pairs if r in used}
    for row, (size, reached_), used_, (_, pairs), name in zip(found, alive, users[::-1], layers, ("0", "2", "4"), strict=True):
        assert found.indices[name]["dead"] == [u for u in range(size) if u not in reached_ or u not in used_]
        assert found.indices[name]["without_input"] == [u for u in range(size) if u not in {r for r, _ in pairs}]
        assert row["to_nowhere"] == sum(1 for r, _ in pairs if r not in used_)
    assert "total" in str(found) and "<table>" in found._repr_html_() and found.to_dict()["rows"] == found.rows


def test_what_is_not_known_stays() -> None:
    class Softmax(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(30, 60), nn.Linear(60, 50), nn.Linear(50, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x).softmax(-1)).relu())

    torch.manual_seed(0)
    net = sparsify(Softmax().double(), 0.02)
    wanted = net(FLAT)
    report = prune_dead_units(net)
    assert net.a.out_features == 60 and net.b.out_features < 50 and report.units == 50 - net.b.out_features
    torch.testing.assert_close(net(FLAT), wanted)


def test_layers_with_hooks_shared_layers_and_writes_in_place_stay() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(self.a(x))
            y = self.b(x)
            z = y.relu_()
            return self.d(self.c(z) + y)

    torch.manual_seed(0)
    net = sparsify(Twice().double(), 0.03)
    net.c.register_forward_hook(lambda module, args, output: output + 1)
    wanted = net(FLAT)
    prune_dead_units(net)
    torch.testing.assert_close(net(FLAT), wanted)
    assert (net.a.out_features, net.c.out_features) == (30, 30)


def test_following_a_forward_leaves_no_trace() -> None:
    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.calls, self.last = nn.Linear(30, 3), 0, None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x  # type: ignore[assignment]
            return self.a(x) + torch.rand(())

    net = sparsify(Noting(), 0.1)
    net.train()
    state = torch.get_rng_state()
    dead_units(net)
    assert (net.calls, net.last, net.training) == (0, None, True) and torch.equal(torch.get_rng_state(), state)


# -- exports ------------------------------------------------------------------------------------------------------------------


def test_exports_leave_dead_units_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = sparsify(nn.Sequential(nn.Linear(30, 60), nn.ReLU(), nn.Linear(60, 50), nn.ReLU(), nn.Linear(50, 4)), 0.02)
    before = {name: tuple(value.shape) for name, value in densify(copy.deepcopy(net)).state_dict().items()}
    state = to_dense_state_dict(net, prune=True)
    assert state["0.weight"].shape[0] < 60 and to_csr(net, prune=True)["0.weight"].shape == state["0.weight"].shape
    whole, smaller = (to_c_header(net, tmp_path / f"{p}.h", prune=p) for p in (False, True))
    assert smaller.constant_bytes < whole.constant_bytes and smaller.buffer_bytes < whole.buffer_bytes
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    files = [to_onnx(net, tmp_path / f"{p}.onnx", FLAT.float(), prune=p) for p in (False, True)]
    assert files[1].size < files[0].size and files[1].max_error < 1e-5
    assert {name: tuple(v.shape) for name, v in densify(net).state_dict().items()} == before, "the network is as before"


# -- bad input ----------------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(30, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum() > 0 else self.net(-x)

    with pytest.raises(ValueError, match=r"forward of Branching can't be followed.*module\.net"):
        prune_dead_units(sparsify(Branching(), 0.1))
    assert dead_units(sparsify(Branching(), 0.1)).rows[0]["units"] == 3, "its parts are read"
    for function in (dead_units, prune_dead_units):
        with pytest.raises(ValueError, match=r"expected .*layers, found none in ReLU"):
            function(nn.ReLU())
    net, _ = made("linear", signs=Dale(0.8))
    shapes = [p.shape for p in net.parameters()]
    with pytest.raises(ValueError, match=r"`0\.weight` has places or signs that follow rules.*densify"):
        prune_dead_units(net)
    assert [p.shape for p in net.parameters()] == shapes
    net, _ = made("linear")
    rewiring = DeepR().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match=r"DeepR is at work on `0\.weight`"):
        prune_dead_units(net)
    rewiring.remove()
    prune_dead_units(net)


def test_ages() -> None:
    net, x = made("linear")
    assert all(int(found.max()) == 0 for found in ages(net).values()), "nothing has lived through a step"
    assert set(ages(net, 10)["0.weight"].tolist()) == {10}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    callback = DeepR(l1=1e-2)
    rewiring = callback.attach(net, optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    found = ages(net)
    for name, slots in ((c, t.slots) for c, t in zip(found, callback.tracked, strict=True)):
        assert np.array_equal(found[name].numpy(), 5 - slots.born.numpy())
    rewiring.remove()
    with pytest.raises(ValueError, match=r"expected a network with K slots per tensor.*found Linear"):
        ages(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="step: expected an int of at least"):
        ages(net, 0 if max(t.slots.last_birth() for t in callback.tracked) >= 0 else -1)
