"""Matrices that are stacked in one tensor count as matrices: in every distribution and in the start values."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import DeepR, connections, connectivity_report, sparsify
from lightning_deepr.conversion.allocation import allocate
from lightning_deepr.conversion.kinds import Kind, kernel_fan_in, kernels, register_kind
from lightning_deepr.conversion.selection import Candidate, candidates
from tests.helpers.optional import Optional
from tests.helpers.state import theta_of

stats = Optional("scipy.stats")


class Experts(nn.Module):
    """Matrices [experts, outputs, inputs] of a mixture, as in Mixtral."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-1]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...o", x, self.gate_up_proj.flatten(0, -3))


def found(*shapes: tuple[str, tuple[int, ...], nn.Module]) -> list[Candidate]:
    return [Candidate(name, name, module, "weight", shape, None) for name, shape, module in shapes]


@pytest.mark.parametrize("distribution", ["erdos_renyi", "erk"])
@pytest.mark.parametrize("before", [(), (8,), (3, 5), (2, 2, 2)], ids=str)
def test_a_stack_has_the_density_of_one_of_its_matrices(distribution: str, before: tuple[int, ...]) -> None:
    out, inside = 280, 410
    tensors = found(("q", (400, 400), nn.Linear(1, 1)), ("stack", (*before, out, inside), nn.Identity()))
    counts = allocate(tensors, 0.05, distribution)
    ratio = Fraction(out + inside, out * inside) / Fraction(800, 400 * 400)
    density = {c.name: counts[c.name] / c.total for c in tensors}
    assert density["stack"] / density["q"] == pytest.approx(float(ratio), rel=1e-2)
    assert sum(counts.values()) == round(0.05 * sum(c.total for c in tensors))
    alone = allocate(found(("a", (out, inside), nn.Identity()), ("b", (out, inside), nn.Linear(1, 1))), 0.05, distribution)
    assert abs(alone["a"] - alone["b"]) <= 1, "an unknown module's matrix is a matrix"


def test_kernels_belong_to_convolutions() -> None:
    shape = (20, 20, 5, 5)
    for distribution in ("erdos_renyi", "erk"):
        densities = {}
        for name, module in (("conv", nn.Conv2d(20, 20, 5)), ("stack", nn.Identity())):
            tensors = found(("other", (100, 100), nn.Linear(1, 1)), (name, shape, module))
            densities[name] = allocate(tensors, 0.05, distribution)[name] / 10000
        assert densities["conv"] < densities["stack"], distribution  # [20, 20] of 5 x 5 against 400 matrices [5, 5]


def test_bilinear_sums_over_pairs() -> None:
    tensors = found(("bilinear", (7, 5, 6), nn.Bilinear(5, 6, 7)), ("linear", (7, 30), nn.Linear(30, 7)))
    for distribution in ("erdos_renyi", "erk"):
        counts = allocate(tensors, 0.3, distribution)
        assert counts["bilinear"] == counts["linear"] == 63


class Kernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 12, 3, 3))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [(lambda: Experts(6, 40, 25), 25), (lambda: Experts(2, 3, 40, 25), 25), (Kernel, 12 * 9)],
    ids=["experts", "nested", "kernel"],
)
def test_the_start_follows_the_fan_in_of_one_matrix(make: Callable[[], nn.Module], inputs: int) -> None:
    if make is Kernel:
        register_kind(Kind((Kernel,), sizes=kernels, fan_in=kernel_fan_in))
    module = make()
    (candidate,) = candidates(module)
    sparsify(module, {candidate.tensor_name: 0.3}, init="deepr")
    theta = theta_of(module, candidate.name).detach()
    assert stats.kstest(theta.numpy() * math.sqrt(inputs), "halfnorm").pvalue > 1e-3


def test_the_step_of_a_stack_follows_its_own_density() -> None:
    net = nn.Sequential(nn.Linear(60, 60), Experts(4, 30, 60))
    sparsify(net, {"0": 0.2, "1.gate_up_proj": 0.05})
    optimizer = torch.optim.Adam(net.parameters())
    rewiring = DeepR(lr_scale="auto").attach(net, optimizer)
    net(torch.randn(5, 60)).sum().backward()
    optimizer.step()
    scales = {row["name"]: row["lr_scale"] for row in connectivity_report(net)}
    rewiring.remove()
    assert scales == {"0.weight": pytest.approx(5.0), "1.gate_up_proj": pytest.approx(20.0)}


def test_a_mixture_of_others() -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, vocab_size=50,
    )  # fmt: skip
    net = transformers.MixtralModel(config)
    stacks = [c.name for c in candidates(net) if len(c.shape) == 3]
    assert stacks, "the experts are stacked"
    sparsify(net, 0.05, target_modules=["self_attn.*", *stacks])
    density = {row["name"]: row["connectivity"] for row in connectivity_report(net)}
    for name in stacks:
        out, inside = connections(net)[name][0][-2:]
        expected = (out + inside) / (out * inside) / ((64 + 64) / (64 * 64))
        assert density[name] / density["layers.0.self_attn.q_proj.weight"] == pytest.approx(expected, rel=0.05)
