"""The compiled multiplication of steps has PyTorch's result, bit for bit, at all sizes and with any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn, optim

from lightning_deepr import DeepR, kernels
from lightning_deepr.algorithm import lr_scale
from tests.helpers.kernel_steps import network
from tests.helpers.regression import SEED
from tests.helpers.state import assert_equal_states, state_of, thetas

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no kernels here")

COUNTS = [1, 5, 1 << 14, (1 << 14) + 1, 150_001]


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("sizes", [[1], [3, 1, 7], COUNTS], ids=str)
def test_the_kernel_is_pytorchs(sizes: list[int], dtype: torch.dtype) -> None:
    from lightning_deepr.kernels.cpu.scaled_step import Table

    generator = torch.Generator().manual_seed(1)
    thetas = [torch.rand(size, generator=generator, dtype=dtype) for size in sizes]
    befores = [torch.full_like(theta, torch.nan) for theta in thetas]
    scales = [1.1 + i / 3 for i in range(len(sizes))]
    table = Table(thetas, befores, scales)
    table.keep()
    assert_equal_states(thetas, befores)
    for moved in ([True] * len(sizes), [i % 2 == 0 for i in range(len(sizes))], [True] * len(sizes)):
        for theta in thetas:
            theta += torch.randn(theta.shape, generator=generator, dtype=dtype)
        expected = [theta.clone() for theta in thetas]
        chosen = [i for i, does in enumerate(moved) if does]
        lr_scale.stretch([expected[i] for i in chosen], [befores[i] for i in chosen], [scales[i] for i in chosen])
        kept = [before.clone() for before in befores]
        table.stretch(moved)
        assert_equal_states(thetas, expected)
        assert_equal_states(befores, kept)
        table.keep()


def elsewhere(net: nn.Module) -> None:
    for theta in thetas(net):
        theta.data = theta.data.clone()


def in_double(net: nn.Module) -> None:
    net.double()


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("change", [elsewhere, in_double], ids=lambda change: change.__name__)
def test_thetas_that_move_in_memory_are_followed(
    change: Callable[[Any], None], scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel is given addresses: what theta is between two steps decides, and an optimizer may put its result elsewhere."""

    class Replacing(optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p.data = p.data - 0.1 * p.grad

    states = []
    for compiled in (True, False):
        net = network([(30, 20, 100), (20, 10, 90)])
        optimizer = Replacing(net.parameters(), {"lr": 0.1})
        DeepR(l1=0.05, seed=SEED, lr_scale=scale, compute="dense").attach(net, optimizer)
        with monkeypatch.context() as patch:
            if not compiled:
                patch.setattr(kernels, "available", lambda: False)
            for step in range(6):
                if step == 3:
                    change(net)
                generator = torch.Generator().manual_seed(step)
                for theta in thetas(net):
                    theta.grad = torch.randn(theta.shape, generator=generator).to(theta.dtype)
                optimizer.step()
        states.append(state_of(net, optimizer))
    assert_equal_states(*states)
