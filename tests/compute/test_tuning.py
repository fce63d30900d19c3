"""compute="tune": both ways are timed once per shape, the faster one computes, and the answer is kept in the user's cache."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import connectivity_report, sparsify
from lightning_deepr.compute import tuning
from lightning_deepr.compute.tuning import Times
from lightning_deepr.kernels import available
from tests.helpers.plain import PlainDeepR as DeepR
from tests.helpers.state import all_slots, thetas

pytestmark = pytest.mark.skipif(not available(), reason="no kernels here")
FASTER, SLOWER = Times(0.001, 0.002), Times(0.002, 0.001)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "path", lambda: tmp_path / "cache" / tuning.NAME)
    monkeypatch.setattr(tuning, "_known", {})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Times]:
    """Answer with the last of these times instead of a measurement. A measurement leaves None behind."""
    answers: list[Any] = [FASTER]

    def measure(module: Any, x: Tensor, ask: Any) -> Times:
        answers.insert(0, None)
        return answers[-1]  # type: ignore[no-any-return]

    monkeypatch.setattr(tuning, "measure", measure)
    return answers


def layer(kind: str = "linear", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    made = nn.Linear(60, 40, dtype=dtype) if kind == "linear" else nn.Conv2d(6, 8, 3, dtype=dtype)
    x = torch.randn(5, 60, dtype=dtype) if kind == "linear" else torch.randn(2, 6, 9, 9, dtype=dtype)
    return sparsify(made, 0.2, compute="tune", seed=1), x


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_faster_one_computes_and_the_report_shows_the_times(kind: str, measured: list[Any]) -> None:
    for times, chosen in ((FASTER, "sparse"), (SLOWER, "dense")):
        tuning._known.clear()
        tuning.path().unlink(missing_ok=True)  # type: ignore[union-attr]
        measured[-1] = times
        net, x = layer(kind)
        net(x)
        report = connectivity_report(net)
        assert report[0]["compute"] == chosen and report[0]["measured"] == tuple(times)
        assert f"sparse {1e3 * times.sparse:g} ms and dense {1e3 * times.dense:g} ms" in str(report)


def test_each_shape_is_measured_once_also_in_later_processes(measured: list[Any]) -> None:
    net, x = layer()
    for rows in (5, 5, 3, 5, 3):
        net(x[:rows])
    assert measured.count(None) == 2
    layer()[0](x)
    tuning._known.clear()  # another process
    copy.deepcopy(net)(x)
    assert measured.count(None) == 2
    with torch.no_grad():
        net(x)  # forward alone has other times
    assert measured.count(None) == 3
    torch.set_num_threads(threads := torch.get_num_threads())
    try:
        torch.set_num_threads(threads + 1)
        layer()[0](x)
    finally:
        torch.set_num_threads(threads)
    assert measured.count(None) == 4


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 3}', '{"a": ["x", 1.0]}', '{"a": [1.0, -1.0]}', "\0\xff"])
def test_a_damaged_file_is_no_answer(content: str, measured: list[Any]) -> None:
    path = tuning.path()
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="latin-1")
    net, x = layer()
    net(x)
    assert measured.count(None) == 1 and list(json.loads(path.read_text()).values()) == [list(FASTER)]


def test_without_a_folder_or_the_right_to_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, measured: list[Any]) -> None:
    (tmp_path / "file").write_text("")
    for path in (None, tmp_path / "file" / tuning.NAME):
        tuning._known.clear()
        monkeypatch.setattr(tuning, "path", lambda path=path: path)
        net, x = layer()
        net(x)
        assert connectivity_report(net)[0]["compute"] == "sparse"


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_measurement_leaves_nothing_behind(kind: str) -> None:
    net, x = layer(kind)
    calls: list[int] = []
    net.register_forward_hook(lambda *_: calls.append(1))
    generator, threads = torch.get_rng_state(), torch.get_num_threads()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    y = net(x)
    assert calls == [1] and all(p.grad is None for p in net.parameters()) and not x.requires_grad
    assert torch.equal(torch.get_rng_state(), generator) and torch.get_num_threads() == threads
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    (slots,) = all_slots(net)
    assert slots.measured is not None and min(slots.measured) > 0
    dense = copy.deepcopy(net)
    all_slots(dense)[0].policy = all_slots(dense)[0].compute = "dense"
    torch.testing.assert_close(y, dense(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError):
        net(torch.zeros(2, 61) if kind == "linear" else torch.zeros(2, 7, 9, 9))
    assert net(x[:0]).shape[0] == 0


def test_other_layers_go_by_the_rule(measured: list[Any]) -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.weight) * 2

    for module, x in ((nn.LSTM(12, 16), torch.randn(3, 2, 12)), (Own(60, 40), torch.randn(5, 60))):
        sparsify(module, 0.2, compute="tune")(x)
    assert None not in measured


def test_200_steps_are_those_of_dense_compute(measured: list[Any]) -> None:
    """The shapes of the batches alternate, and so does the choice."""
    nets = []
    for compute in ("tune", "dense"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 5)).double()
        nets.append(sparsify(net, 0.3, compute=compute, seed=3))
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9) for net in nets]
    for net, optimizer in zip(nets, optimizers, strict=True):
        DeepR(l1=0.01, check_invariants=True).attach(net, optimizer)
    generator = torch.Generator().manual_seed(1)
    for step in range(200):
        measured[-1] = FASTER if step % 2 else SLOWER
        rows = 4 + step % 2
        x, target = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (30, 5))
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.zero_grad()
            (net(x) - target).square().mean().backward()
            optimizer.step()
        for one, other in zip(all_slots(nets[0]), all_slots(nets[1]), strict=True):
            assert torch.equal(one.places, other.places)
    for theta, other in zip(thetas(nets[0]), thetas(nets[1]), strict=True):
        torch.testing.assert_close(theta, other, rtol=1e-9, atol=1e-9)
    assert {row["compute"] for row in connectivity_report(nets[0])} == {"sparse"}
