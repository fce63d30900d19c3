"""Schedules of L1, temperature and learning rate: one per tensor, and bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from lightning_deepr import DeepR, LinearDecay, LrPower, sparsify
from tests.helpers.regression import SEED, mlp
from tests.helpers.state import thetas

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def free_step(net: nn.Module, lr: float = 0.1, steps: int = 1, **options: Any) -> list[Tensor]:
    """Return the change of each theta in the last of several steps of a DeepR without gradients."""
    optimizer = optim.SGD(thetas(net), lr=lr)
    DeepR(**options, seed=SEED).attach(net, optimizer, total_steps=10)
    for _ in range(steps):
        before = [theta.detach().clone() for theta in thetas(net)]
        for theta in thetas(net):
            theta.grad = torch.zeros_like(theta)
        optimizer.step()
    return [after.detach() - old for after, old in zip(thetas(net), before, strict=True)]


def test_schedules_per_tensor() -> None:
    net = mlp().double()
    for theta in thetas(net):
        theta.data += 1.0  # nothing goes dormant
    first, second = free_step(net, steps=4, l1={"0": LinearDecay(0.2, 0.1), "2": 0.3})
    torch.testing.assert_close(first, torch.full_like(first, -0.1 * 0.17))  # progress .3 in the fourth step
    torch.testing.assert_close(second, torch.full_like(second, -0.1 * 0.3))

    net = sparsify(nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60), nn.Linear(60, 60)), 0.5, seed=SEED).double()
    for theta in thetas(net):
        theta.data += 5.0
    moved = free_step(net, l1=0.0, temperature={"0": LrPower(2.0, 1), "1": 0.0, "[2]": lambda lr: 8 * lr})
    assert not moved[1].any()
    for found, temperature in ((moved[0], 0.2), (moved[2], 0.8)):
        expected = math.sqrt(2 * 0.1 * temperature)
        assert abs(float(found.std()) / expected - 1) < 4 / math.sqrt(2 * found.numel())


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (lambda _: math.nan, ValueError, "found nan"),
        (lambda _: -1e-3, ValueError, "found -0.001"),
        (lambda _: math.inf, ValueError, "found inf"),
        (lambda _: torch.tensor(math.nan), ValueError, "found nan"),
        (lambda _: torch.tensor(-0.5), ValueError, "found -0.5"),
        (lambda _: None, TypeError, "expected a number, found None"),
        (lambda _: torch.ones(3), TypeError, "expected a number"),
        (lambda _: "1", TypeError, "expected a number"),
    ],
)
@pytest.mark.parametrize("argument", ["l1", "temperature"])
@pytest.mark.parametrize("in_a_dict", [False, True])
def test_a_schedule_that_returns_nonsense(
    value: Any, error: type[Exception], words: str, argument: str, in_a_dict: bool
) -> None:
    given = {"0": 0.0, "2": value} if in_a_dict else value
    name = argument if argument == "temperature" and not in_a_dict else f"{argument} of `{'2' if in_a_dict else '0'}.weight`"
    with pytest.raises(error, match=f"{name}: .*{words}"):
        free_step(mlp(), **{argument: given})


@pytest.mark.parametrize("argument", ["l1", "temperature"])
def test_dicts_that_fit_no_tensor(argument: str) -> None:
    with pytest.raises(ValueError, match=rf"{argument}: no key matches `2\.weight`"):
        free_step(mlp(), **{argument: {"0": 0.0}})
    with pytest.raises(ValueError, match=argument):
        free_step(mlp(), **{argument: {"0": 0.0, "2": 0.0, "fc9": 0.0}})
    with pytest.raises(ValueError, match=rf"{argument}\['0'\]"):
        free_step(mlp(), **{argument: {"0": -1.0, "2": 0.0}})
