"""The kernels for an input of many rows give the numbers of the dense layer, whatever the batch, the threads and the values."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_deepr import DeepR, connections, sparsify
from lightning_deepr.compute import tokens
from tests.compute.test_sparse_linear import SHAPES, oracle_product
from tests.compute.test_sparse_training import Pair
from tests.helpers.sparse_linear import dense_twin, needs_kernels, sparse_layer, theta_gradient
from tests.helpers.state import all_slots, assert_equal_states, state_of, theta_of

ROOT = Path(__file__).parents[2]
pytestmark = [
    needs_kernels,
    pytest.mark.filterwarnings("ignore:A backward pass reached", "ignore:.*an int and means one single connection"),
]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Use these kernels for every batch, and list the calls."""
    seen: list[str] = []
    for name in ("forward", "backward"):
        plain = getattr(tokens, name)

        def noted(*args: object, name: str = name, plain: object = plain) -> object:
            seen.append(name)
            return plain(*args)  # type: ignore[operator]

        monkeypatch.setattr(tokens, name, noted)
    monkeypatch.setattr(tokens, "FROM", 1)
    monkeypatch.setattr(tokens, "suits", lambda *sizes: True)
    yield seen
    assert {"forward", "backward"} <= set(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_gradients_equal_the_oracle(
    shape: tuple[int, int, float | int], dtype: torch.dtype, always: list[str]
) -> None:
    columns, rows, connectivity = shape
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    for batch in (1, 17, 64, 130):
        layer = sparse_layer(columns, rows, connectivity, dtype=dtype)
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn(batch, columns, dtype=dtype, generator=generator)
        dy = torch.randn(batch, rows, dtype=dtype, generator=generator)
        expected = oracle_product(layer, x, dy)
        for needs in ((True, True, True), (False, True, True), (True, False, True), (False, True, False)):
            theta, leaf = theta_of(layer, "weight"), x.clone().requires_grad_(needs[0])
            theta.requires_grad_(needs[1])
            layer.bias.requires_grad_(needs[2])
            theta.grad = layer.bias.grad = None
            y = layer(leaf)
            y.backward(dy)
            found = {"y": y.detach(), "x": leaf.grad, "theta": theta.grad, "bias": layer.bias.grad}
            assert [found[name] is not None for name in ("x", "theta", "bias")] == list(needs)
            for name, value in found.items():
                if value is not None:
                    np.testing.assert_allclose(
                        value.numpy(), expected[name], rtol=tolerance, atol=20 * tolerance, err_msg=f"{name}, {batch}"
                    )


def test_many_rows_use_them_and_few_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = sparse_layer(40, 30, 0.2, dtype=torch.float64)
    plain, seen, forward = dense_twin(layer), [], tokens.forward
    monkeypatch.setattr(tokens, "forward", lambda *args: seen.append(args[0].shape[0]) or forward(*args))
    for size in ((tokens.FROM - 1, 40), (tokens.FROM, 40), (4, 300, 40), (0, 40)):
        x = torch.randn(size, dtype=torch.float64)
        torch.testing.assert_close(layer(x), plain(x))
        torch.testing.assert_close(F.linear(x, layer.weight), F.linear(x, plain.weight))
    assert seen == [tokens.FROM, tokens.FROM, 1200, 1200]


def test_wide_layers_use_them_from_fewer_rows_on(monkeypatch: pytest.MonkeyPatch) -> None:
    wide, narrow = (sparse_layer(columns, 30, 0.01, dtype=torch.float64) for columns in (tokens.WIDE - 30, tokens.WIDE - 31))
    for layer in (wide, narrow):
        plain, seen, forward = dense_twin(layer), [], tokens.forward
        monkeypatch.setattr(
            tokens, "forward", lambda *args, seen=seen, plain=forward: seen.append(len(args[0])) or plain(*args)
        )
        threads = torch.get_num_threads()
        try:
            for threads_now in (1, 2):
                torch.set_num_threads(threads_now)
                for batch in (tokens.FROM_IF_WIDE - 1, tokens.FROM_IF_WIDE, 2 * tokens.FROM_IF_WIDE):
                    x = torch.randn(batch, layer.in_features, dtype=torch.float64, requires_grad=True)
                    y, expected = layer(x), plain(x)
                    torch.testing.assert_close(y, expected)
                    dy = torch.randn_like(y)
                    torch.testing.assert_close(*(torch.autograd.grad(one, x, dy)[0] for one in (y, expected)))
        finally:
            torch.set_num_threads(threads)
        first = tokens.FROM_IF_WIDE
        assert seen == ([first, 2 * first, 2 * first] if layer is wide else [])


def test_strides_and_expanded_inputs() -> None:
    layer = sparse_layer(dtype=torch.float64)
    plain, many = dense_twin(layer), 600
    for leaf, view in (
        (torch.randn(14, many), lambda x: x.t()),
        (torch.randn(many, 28), lambda x: x[:, ::2]),
        (torch.randn(2 * many, 14), lambda x: x[1::2]),
        (torch.randn(1, 14), lambda x: x.expand(many, 14)),
        (torch.randn(many, 1), lambda x: x.expand(many, 14)),
        (torch.randn(3, 14, 200), lambda x: x.mT),
        (torch.randn(many + 13), lambda x: x.unfold(0, 14, 1)),
    ):
        ours, theirs = leaf.double().requires_grad_(), leaf.double().requires_grad_()
        for one, net in ((ours, layer), (theirs, plain)):
            net.zero_grad()
            net(view(one)).sum().backward()  # a gradient that is expanded, too
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(theta_of(layer, "weight").grad, theta_gradient(layer, plain.weight.grad))
        torch.testing.assert_close(layer.bias.grad, plain.bias.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_number_of_threads_changes_nothing(dtype: torch.dtype) -> None:
    def run(threads: list[int]) -> list[Tensor]:
        torch.manual_seed(0)
        net = sparsify(nn.Sequential(nn.Linear(90, 130), nn.ReLU(), nn.Linear(130, 90)).to(dtype), 0.2, compute="sparse")
        x = torch.randn(1030, 90, dtype=dtype).requires_grad_()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        DeepR(l1=0.5).attach(net, optimizer)
        for number in threads:
            torch.set_num_threads(number)
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        assert sum(int((s.born >= 1).sum()) for s in all_slots(net)) > 100
        return [*state_of(net), x.grad]

    before = torch.get_num_threads()
    try:
        one = run([1, 1, 1])
        assert_equal_states(one, run([2, 2, 2]))
        assert_equal_states(one, run([1, 2, 1]))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["block", "edge"])
def test_what_is_not_finite_comes_out_as_from_the_dense_layer(value: float, place: str) -> None:
    layer = sparse_layer(40, 30, 60, dtype=torch.float64)
    plain = dense_twin(layer)
    ((_, places, _),) = connections(layer).values()
    free = next(c for c in range(40) if c not in (places % 40).tolist())
    for column in (free, int(places[0]) % 40):
        for where in ("x", "dy", "both"):
            row = 5 if place == "block" else 601
            x, dy = torch.randn(602, 40, dtype=torch.float64), torch.randn(602, 30, dtype=torch.float64)
            if where != "dy":
                x[row, column] = value
            if where != "x":
                dy[row, int(places[0]) // 40] = value
            ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
            for leaf, net in ((ours, layer), (theirs, plain)):
                net.zero_grad()
                net(leaf).backward(dy)
            torch.testing.assert_close(layer(x), plain(x), equal_nan=True)
            torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True)
            theta = theta_of(layer, "weight").grad
            torch.testing.assert_close(theta, theta_gradient(layer, plain.weight.grad), equal_nan=True)
            torch.testing.assert_close(layer.bias.grad, plain.bias.grad, equal_nan=True)


def test_sparse_and_dense_training_agree(always: list[str]) -> None:
    pair = Pair()
    pair.train(200)
    assert pair.reborn / pair.slots >= 0.1, f"{pair.reborn / pair.slots:.1%} reborn per step: too few to test anything"


def in_a_fork() -> None:
    layer, x = sparse_layer(60, 40, 0.2), torch.randn(700, 60)
    y = layer(x)
    y.sum().backward()
    expected = theta_of(layer, "weight").grad.clone()
    child = os.fork()
    if child == 0:
        status = 1  # whatever happens, the child must not go on with what its parent does
        try:
            torch.set_num_threads(1)
            theta_of(layer, "weight").grad = None
            again = layer(x)
            again.sum().backward()
            status = int(not (torch.equal(again, y) and torch.equal(theta_of(layer, "weight").grad, expected)))
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
def test_a_fork_after_the_first_step() -> None:
    # In a process of its own: torch refuses a backward pass in the fork of a process whose autograd has started threads.
    code = "from tests.compute.test_tokens import in_a_fork; in_a_fork()"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]


def test_a_theta_too_large_for_sums_of_its_own_uses_the_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = sparse_layer(60, 40, 0.2, dtype=torch.float64)
    x, expected = torch.randn(700, 60, dtype=torch.float64), dense_twin(layer)
    monkeypatch.setattr(tokens, "MOST_SUMS", 3 * 8 * all_slots(layer)[0].count)
    monkeypatch.setattr(tokens, "forward", None)
    torch.testing.assert_close(layer(x), expected(x))
