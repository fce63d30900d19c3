"""Neutral newborns in Triton's interpreter equal PyTorch's, bit for bit. ``tests/kernels/test_neutral.py`` runs this file:

TRITON_INTERPRET=1 pytest tests/kernels/triton_neutral.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, optim

from lightning_deepr import DeepR
from lightning_deepr.kernels.gpu import rewire as triton_rewire
from lightning_deepr.kernels.gpu import step as triton_step
from tests.helpers.kernel_steps import OPTIMIZERS, Run, Size, network
from tests.helpers.regression import SEED
from tests.helpers.state import all_slots, assert_equal_states, state_of, thetas
from tests.kernels.triton_interpreted import DTYPES, launches, on_the_cpu, pytestmark, pytorch  # noqa: F401

# (rows, columns, K): one block, several, one more than a full one, denser than half (PyTorch lists the places), K = 1
SIZES: list[Size] = [(20, 20, 100), (30, 30, 299), (30, 30, 257), (20, 10, 120), (5, 5, 1)]


class Second(optim.Optimizer):
    """A second moment in the dtype of theta. (The interpreter's types are too few for some of torch's operations.)"""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state["first"], state["second"] = torch.zeros_like(p), torch.full_like(p, 0.25)
            state["first"].mul_(0.5).add_(p.grad)
            state["second"].mul_(0.5).addcmul_(p.grad, p.grad)


@pytest.mark.parametrize("block", [32, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_means_are_pytorchs(
    dtype: torch.dtype,
    block: int,
    pytorch: Run,  # noqa: F811
    launches: list[int],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With small blocks there are several levels of sums."""
    monkeypatch.setattr(triton_step, "BLOCK", block)
    compare(lambda p: Second(p, lr=0.1), pytorch, dtype)
    assert launches


@pytest.mark.parametrize("name", ["Adam", "Adagrad", "RMSprop", "six state", "double state", "half state", "strided state"])
def test_optimizers(name: str, pytorch: Run, launches: list[int]) -> None:  # noqa: F811
    compare(OPTIMIZERS[name], pytorch, torch.float32, (0.3, 1.0))


def compare(
    make: Callable[[Any], optim.Optimizer],
    pytorch: Run,  # noqa: F811
    dtype: torch.dtype,
    shares: tuple[float, ...] = (0.3, 1.0, 0.0),
) -> None:
    nets = [network(SIZES, dtype), network(SIZES, dtype)]
    made = []
    for net in nets:
        made.append(make(net.parameters()))
        DeepR(l1=0.0, seed=SEED, newborn="neutral", check_invariants=True).attach(net, made[-1])
    means = 0
    for step, share in enumerate(shares):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(thetas(nets[0]), thetas(nets[1]), strict=True):
            dying = torch.rand(a.shape, generator=generator) < share
            for theta in (a, b):
                theta.data.copy_(torch.where(dying, -9.0, 9.0))
            a.grad = torch.randn(a.shape, generator=generator).to(a.dtype)
            b.grad = a.grad.clone()
        made[0].step()
        pytorch(made[1].step)
        assert_equal_states(state_of(nets[0], made[0]), state_of(nets[1], made[1]))
        for slots, theta in zip(all_slots(nets[0]), thetas(nets[0]), strict=True):
            born = slots.born == step
            means += sum(
                1 < int(born.sum()) < slots.count and value[born].unique().numel() == 1 and not bool((value[born] == 0).any())
                for value in made[0].state[theta].values()
                if isinstance(value, Tensor) and value.shape == theta.shape
            )
    assert means > 3


@pytest.mark.parametrize("count", [1, 255, 256, 257, 65_536, 65_537, 20_000_000])
def test_the_levels_of_the_sums_end_with_one_for_each_tensor(count: int) -> None:
    counts = [3, count, 700, 0]
    sums = [-(-one // triton_step.BLOCK) for one in counts]
    for level in triton_step._groups(counts):
        assert all(number <= triton_step.BLOCK for _, number in level)
        assert sum(number for _, number in level) == sum(sums)
        sums = [1] * len(level)
    assert len(sums) == len(counts)


def test_constants() -> None:
    numbers = [getattr(triton_rewire, name).value for name in ("FLOAT32", "FLOAT64", "BFLOAT16", "FLOAT16")]
    assert sorted(numbers) == [1, 2, 3, 4]
