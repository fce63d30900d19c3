"""Neutral newborns are the same in compiled code, in PyTorch and in the oracle, bit for bit, also with one K for all layers."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, optim

from lightning_deepr import DeepR, kernels
from tests.helpers import oracle_newborns
from tests.helpers.global_scope import RULES, network, shared
from tests.helpers.kernel_steps import OPTIMIZERS, Run, Size
from tests.helpers.kernel_steps import network as separate
from tests.helpers.regression import SEED
from tests.helpers.state import all_slots, assert_equal_states, state_of, thetas
from tests.kernels.test_triton import run

pytestmark = [
    pytest.mark.skipif(not kernels.available(), reason="no kernels here"),
    pytest.mark.filterwarnings("ignore:.*an int and means one single connection"),
]
# (rows, columns, K); blocks of the sum are full, nearly full, one over, or alone
SIZES: list[Size] = [(30, 20, 100), (40, 20, 128), (40, 20, 129), (60, 50, 999), (7, 5, 30), (5, 5, 1), (90, 80, 2177)]
KINDS = {**OPTIMIZERS, "Adafactor": lambda p: optim.Adafactor(p, lr=0.02), "NAdam": lambda p: optim.NAdam(p, lr=0.02)}
AVERAGED = ("exp_avg_sq", "max_exp_avg_sq", "sum", "square_avg", "variance", "level")


def start_of(name: str, key: str) -> float:
    if name == "Adagrad":
        return 0.1
    if name.endswith("state"):
        return float(key[-1]) if key[-1].isdigit() else 0.5
    return 0.0


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in KINDS), ("Adam", torch.float64), ("Adagrad", torch.float64)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_a_step_equals_pytorchs_and_the_oracles(name: str, dtype: torch.dtype, pytorch: Run) -> None:
    nets = [separate(SIZES, dtype), separate(SIZES, dtype)]
    made = []
    for net in nets:
        made.append(KINDS[name](net.parameters()))
        DeepR(l1=0.0, seed=SEED, check_invariants=True, newborn="neutral").attach(net, made[-1])
    means = 0
    for step, share in enumerate((0.3, 0.0, 1.0, 0.05, 0.6)):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(thetas(nets[0]), thetas(nets[1]), strict=True):
            dying = torch.rand(a.shape, generator=generator) < share
            for theta in (a, b):
                theta.data.copy_(torch.where(dying, -9.0, 9.0))
            a.grad = torch.randn(a.shape, generator=generator, dtype=dtype)
            b.grad = a.grad.clone()
        twin = KINDS[name]([theta.detach().clone() for theta in thetas(nets[0])])
        twin.load_state_dict(made[0].state_dict())
        copied = twin.param_groups[0]["params"]
        for own, theta in zip(copied, thetas(nets[0]), strict=True):
            own.grad = theta.grad
            twin.state[own] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in made[0].state[theta].items()}
        twin.step()
        made[0].step()
        pytorch(made[1].step)
        assert_equal_states(state_of(nets[0], made[0]), state_of(nets[1], made[1]))
        for slots, theta, own in zip(all_slots(nets[0]), thetas(nets[0]), copied, strict=True):
            reborn = (slots.born == step).nonzero().view(-1).tolist()
            for key, value in made[0].state[theta].items():
                if value.shape == theta.shape and value.dtype in kernels.TYPES and reborn and name != "Rprop":
                    before, start = twin.state[own][key].numpy(), start_of(name, key)
                    neutral = key.rstrip("012345") in AVERAGED
                    expected = oracle_newborns.newborn_value(before, reborn, start) if neutral else start
                    assert {float(one) for one in value[reborn]} == {float(expected)}, key
                    means += neutral and len(reborn) < theta.numel()
    assert means > 10 or name in ("momentum", "Rprop", "half state")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("rule", RULES)
def test_with_one_k_for_all_layers_the_mean_is_the_layers(rule: str, dtype: torch.dtype, pytorch: Run) -> None:
    nets = [network().to(dtype), network().to(dtype)]
    made = []
    for net in nets:
        made.append(optim.Adam(net.parameters(), lr=0.02, amsgrad=True))
        options = {"reactivation": rule, "seed": SEED, "check_invariants": True}
        DeepR(l1=0.0, scope="global", newborn="neutral", **options).attach(net, made[-1])
    means = 0
    for step, share in enumerate((0.3, 0.0, 1.0, 0.05, 0.6)):
        generator = torch.Generator().manual_seed(step)
        a, b = shared(nets[0]), shared(nets[1])
        dying = torch.rand(a.shape, generator=generator) < share
        grad = torch.randn(a.shape, generator=generator, dtype=dtype)
        for theta in (a, b):
            theta.data.copy_(torch.where(dying, -9.0, 9.0))
            theta.grad = grad.clone()
        for net in nets:
            for p in net.parameters():
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
        made[0].step()
        pytorch(made[1].step)
        assert_equal_states(state_of(nets[0], made[0]), state_of(nets[1], made[1]))
        start = 0
        for slots in all_slots(nets[0]):
            reborn = (slots.born == step).nonzero().view(-1).tolist()
            for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                value = made[0].state[a][key][start : start + slots.count].numpy()
                if reborn:
                    mean = oracle_newborns.newborn_value(value, reborn, 0.0) if key != "exp_avg" else 0.0
                    assert {float(one) for one in value[reborn]} == {float(mean)}, key
                    means += mean > 0
            start += slots.count
    assert means > 10


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton can't be imported here")
@pytest.mark.slow
def test_in_tritons_interpreter() -> None:
    said = run("-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "tests/kernels/triton_neutral.py", TRITON_INTERPRET="1")
    closing = said.strip().splitlines()[-1]  # (a warning above it may use these words)
    assert " passed" in closing and "failed" not in closing and "skipped" not in closing
