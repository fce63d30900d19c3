"""The samples agree with theory, at small scale (at full scale: benchmarks/theory). Seeds fix every draw.

A step of finite length has a bias. Tests of soft-DEEP R can see this bias, so they extrapolate two learning rates to 0. Tests
of DEEP R cannot see it at a small learning rate, so they use one. A test fails if an unbiased sampler would be as far off only
once in a thousand runs.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch

from tests.helpers.paths import ROOT

FOLDER = ROOT / "benchmarks" / "theory"
LEAST_P = 1e-3


def load(name: str) -> Any:
    """Load a module of benchmarks/theory, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # they import each other by these names
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def theory() -> Any:
    """Load the modules by name, and undo their changes to sys afterwards."""
    before_path, before_modules = list(sys.path), set(sys.modules)
    found = {name: load(name) for name in ("densities", "divergence", "chains", "hard", "soft")}
    yield type("Theory", (), found)
    sys.path[:] = before_path
    for name in set(sys.modules) - before_modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER.parent)):
            del sys.modules[name]


# -- the references and the comparison -- -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flat", "quadratic", "double_well"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_closed_form_is_the_integral(theory: Any, name: str, k: int) -> None:
    target = theory.densities.Target(theory.densities.ENERGIES[name], 0.7, 0.4)
    closed, integral = theory.densities.closed_form(target, 4, k), theory.densities.connectivities(target, 4, k)
    torch.testing.assert_close(closed, integral, rtol=1e-5, atol=1e-9)


def test_groups_that_share_connections(theory: Any) -> None:
    """Two groups of 2 weights that share 2 connections are 4 weights with K = 2 and the sum of both energies."""
    target = theory.densities.Target(theory.densities.two_paths, 0.7, 0.4)
    whole = theory.densities.Target(lambda u: target.energy(u[..., :2]) + target.energy(u[..., 2:]), 0.7, 0.4)
    found = torch.zeros(4, dtype=torch.float64)
    for c, p in zip(theory.densities.subsets(4, 2), theory.densities.connectivities(whole, 4, 2), strict=True):
        found[sum(1 << i for i in c if i < 2)] += p
    torch.testing.assert_close(theory.densities.group_connectivities(target, 2, 2, 2), found, rtol=1e-5, atol=1e-9)


def test_density_of_a_flat_energy(theory: Any) -> None:
    """theta_min holds the wanted share: the mass is |theta_min| below 0 and T / alpha above."""
    bins = theory.soft.bins_of(theory.densities.Target(theory.densities.flat, theory.soft.ALPHA, theory.soft.TEMPERATURE), 1)
    assert theory.soft.true_share(bins, 8) == pytest.approx(theory.soft.WANTED, rel=1e-4)


@pytest.mark.parametrize("away", [0.0, 0.03])
def test_divergence_tells_bias_from_sampling_error(theory: Any, away: float) -> None:
    """Simulate chains that do not move half of the time; the share ``away`` of the first cell's mass moves to the second."""
    generator = torch.Generator().manual_seed(0)
    true = torch.tensor([0.3, 0.1, 0.2, 0.15, 0.25], dtype=torch.float64)
    sampled = true + away * torch.tensor([-1.0, 1, 0, 0, 0], dtype=torch.float64)
    chains, steps, runs = 60, 100, 60
    state = torch.multinomial(sampled, chains * steps * runs, True, generator=generator).view(steps, runs, chains)
    stays = torch.rand(steps, runs, chains, generator=generator) < 0.5
    for t in range(1, steps):
        state[t] = torch.where(stays[t], state[t - 1], state[t])
    found = []
    for run in range(runs):
        histograms = theory.divergence.Histograms(chains, 5)
        histograms.add(torch.arange(chains).repeat(steps), state[:, run].flatten())
        found.append(theory.divergence.divergence(histograms.frequencies(), true))
    # chains that do not move half of the time: a sample counts as a third
    assert sum(d.effective for d in found) / runs == pytest.approx(chains * steps / 3, rel=0.1)
    rejected = sum(not d.within for d in found) / runs
    assert rejected < 0.15 if away == 0 else rejected > 0.9


# -- soft-DEEP R -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flat", pytest.param("correlated", marks=pytest.mark.slow)])
def test_soft_deep_r_samples_the_density(theory: Any, name: str) -> None:
    soft, dimensions = theory.soft, theory.soft.DIMENSIONS[name]
    target = theory.densities.Target(theory.densities.ENERGIES[name], soft.ALPHA, soft.TEMPERATURE)
    runs = {lr: soft.run(target, dimensions, lr, 10.0, seed, chains=800) for seed, lr in enumerate((0.02, 0.005))}
    true = runs[0.02]["bins"].probabilities
    limit = theory.divergence.extrapolated(*[(lr, run["frequencies"]) for lr, run in runs.items()])
    coarse, fine = (run["divergence"] for run in runs.values())
    assert coarse.bias > 2 * fine.bias, "the bias should be about proportional to the learning rate"
    assert theory.divergence.divergence(limit, true).p > LEAST_P


# -- DEEP R ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "name", "k", "lr"),
    [
        pytest.param((64, 1), "correlated", 2, 0.005, marks=pytest.mark.slow),
        pytest.param((64, 1), "quadratic", 3, 0.01, marks=pytest.mark.slow),
        ((24, 60), "correlated", 2, 0.01),
    ],
    ids=["2 of 4", "3 of 4", "rows of a layer"],
)
def test_deep_r_samples_connectivities_and_weights(theory: Any, shape: tuple[int, int], name: str, k: int, lr: float) -> None:
    target = theory.densities.Target(theory.densities.ENERGIES[name], theory.hard.ALPHA, theory.hard.TEMPERATURE)
    fine = theory.hard.run(shape, target, k, lr, 12.0, 0, beginning=8.0)
    for what in fine["truth"]:
        assert fine[what].p > LEAST_P, what
    if shape[1] > 1:  # precise enough to see the bias of a coarse step
        coarse = theory.hard.run(shape, target, k, 0.2, 12.0, 0, beginning=8.0)
        assert coarse["c"].p < 1e-4 < fine["c"].p


def test_weights_of_deep_r_are_exponential_without_data(theory: Any) -> None:
    """With a flat energy all connectivities are equally likely, and active thetas have the prior's density.

    This density is alpha / T * exp(-alpha * theta / T).
    """
    target, tensors, cells = theory.densities.Target(theory.densities.flat, theory.hard.ALPHA, theory.hard.TEMPERATURE), 24, 6
    scale = target.temperature / target.alpha
    edges = -scale * torch.log1p(-torch.arange(1, cells) / cells)
    true, found = torch.full((cells,), 1 / cells, dtype=torch.float64), []
    for seed, lr in enumerate((0.04, 0.01)):
        numbers = {"alpha": target.alpha, "temperature": target.temperature, "seed": seed}
        chains = theory.chains.Chains(tensors, 60, 4, 2, target.energy, lambda p, lr=lr: torch.optim.SGD(p, lr=lr), **numbers)
        histograms = theory.divergence.Histograms(tensors, cells)
        for step in range(round(20 / lr)):
            chains.step()
            if step * lr >= 8 and step % round(0.4 / lr) == 0:
                active, u = chains.state()
                row = active.nonzero()[:, 0]
                histograms.add(chains.tensor_of_row[row], torch.bucketize(u[active], edges, right=True))
        chains.close()
        found.append((lr, histograms.frequencies()))
    coarse = theory.divergence.divergence(found[0][1], true)
    limit = theory.divergence.divergence(theory.divergence.extrapolated(*found), true)
    assert coarse.p < 1e-4, "at this learning rate the bias should be seen"
    assert limit.p > LEAST_P
