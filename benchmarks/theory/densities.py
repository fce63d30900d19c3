"""Low-dimensional energies, and the densities that DEEP R and soft-DEEP R should sample from them, computed by quadrature.

An energy is a function of u = max(theta, 0) [..., N], the weights without their signs (w = s * u; the sampling scripts multiply
the weight by its signs). u is 0 for dormant weights. An additive constant of the energy does not matter.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

Energy = Callable[[Tensor], Tensor]
LARGEST = 7.0  # largest theta of the quadrature; the densities below have less than 1e-9 of their mass beyond it
MATRIX = torch.tensor(
    [[1.5, 0.9, 0.0, -0.5], [0.9, 1.2, 0.4, 0.0], [0.0, 0.4, 1.0, 0.6], [-0.5, 0.0, 0.6, 1.4]], dtype=torch.float64
)


def flat(u: Tensor) -> Tensor:
    return 0.0 * u.sum(-1)


def quadratic(u: Tensor) -> Tensor:
    """Separable: each weight has its own well; the third weight's lies below 0."""
    stiffness, centre = u.new_tensor([2.0, 1.0, 1.5, 0.7]), u.new_tensor([0.8, 0.2, -0.3, 1.2])
    return (0.5 * stiffness * (u - centre).square())[..., : u.shape[-1]].sum(-1)


def double_well(u: Tensor) -> Tensor:
    """Separable: each weight has two wells, near 0.2 and 1.6, of different depths."""
    height, tilt = u.new_tensor([0.6, 0.9, 0.4, 0.7]), u.new_tensor([0.1, -0.2, -0.1, 0.3])
    return (height * ((u - 0.9).square() - 0.49).square() + tilt * u)[..., : u.shape[-1]].sum(-1)


def correlated(u: Tensor) -> Tensor:
    """Not separable: a quadratic form, as in linear regression on correlated inputs."""
    n = u.shape[-1]
    away = u - u.new_tensor([0.9, 0.3, 0.7, 0.5])[:n]
    return 0.5 * ((away @ MATRIX[:n, :n].to(u)) * away).sum(-1)


def two_paths(u: Tensor) -> Tensor:
    """Not separable and not convex: products of neighbours should add up to 1, as in a linear net with one hidden layer."""
    return 1.5 * (u.unflatten(-1, (-1, 2)).prod(-1).sum(-1) - 1.0).square()


ENERGIES: dict[str, Energy] = {f.__name__: f for f in (flat, quadratic, double_well, correlated, two_paths)}


@dataclass(frozen=True)
class Target:
    """An energy with alpha and T: the density is proportional to exp(-(E(u) + alpha * sum of u) / T)."""

    energy: Energy
    alpha: float
    temperature: float

    def log_density(self, u: Tensor) -> Tensor:
        return -(self.energy(u) + self.alpha * u.sum(-1)) / self.temperature


def midpoints(cells: int) -> Tensor:
    return (torch.arange(cells, dtype=torch.float64) + 0.5) * (LARGEST / cells)


def _product(points: list[Tensor]) -> Tensor:
    return torch.stack(torch.meshgrid(*points, indexing="ij"), -1)


# -- soft-DEEP R: a density on theta >= theta_min, flat below 0 ---------------------------------------------------------------


@dataclass(frozen=True)
class Bins:
    """Bins along each dimension of theta, and their probabilities."""

    edges: list[Tensor]  # the inner edges of each dimension
    probabilities: Tensor  # [bins_1, bins_2, ...]

    def numbers(self, theta: Tensor) -> Tensor:
        """Return the bin number of each theta [..., N], counted over all dimensions: int64 [...]."""
        number = torch.zeros(theta.shape[:-1], dtype=torch.int64)
        for edges, size, value in zip(self.edges, self.probabilities.shape, theta.unbind(-1), strict=True):
            number = number * size + torch.bucketize(value.contiguous(), edges.to(value.dtype), right=True)
        return number


@cache
def soft_bins(target: Target, theta_min: float, dimensions: int, below: int, above: int, cells: int = 1400) -> Bins:
    """Make bins for soft-DEEP R: ``below`` bins of equal width in [theta_min, 0), ``above`` bins of about equal mass from 0 on.

    Args:
        target: energy, alpha and T.
        theta_min: the lower bound of theta.
        dimensions: N, 1 or 2.
        below, above: numbers of bins.
        cells: number of quadrature cells along [0, LARGEST].
    """
    points = torch.cat([torch.zeros(1, dtype=torch.float64), midpoints(cells)])  # the first point represents all theta < 0
    widths = torch.full((cells + 1,), LARGEST / cells, dtype=torch.float64)
    widths[0] = -theta_min
    mass = target.log_density(_product([points] * dimensions)).exp()
    for d in range(dimensions):
        mass = mass * widths.view([-1 if i == d else 1 for i in range(dimensions)])
    mass = mass / mass.sum()
    edges, starts = [], []
    for d in range(dimensions):
        marginal = mass if dimensions == 1 else mass.sum(1 - d)
        cuts = quantile_cells(marginal[1:], above)
        starts.append([0, 1] + [cut + 1 for cut in cuts])
        dormant = torch.linspace(theta_min, 0, below + 1, dtype=torch.float64)[1:]
        edges.append(torch.cat([dormant, torch.tensor(cuts, dtype=torch.float64) * (LARGEST / cells)]))
    for d in range(dimensions):
        mass = sums(mass, starts[d], d)
        lower = mass.narrow(d, 0, 1) / below
        mass = torch.cat([lower] * below + [mass.narrow(d, 1, above)], d)
    return Bins(edges, mass)


def quantile_cells(mass: Tensor, parts: int) -> list[int]:
    """Cut cells into parts of about equal mass: return the first cells of the second, third, ... part."""
    wanted = torch.arange(1, parts, dtype=torch.float64) / parts * mass.sum()
    return [int(cut) + 1 for cut in torch.searchsorted(mass.cumsum(0), wanted)]


def sums(mass: Tensor, starts: list[int], dimension: int) -> Tensor:
    ends = [*starts[1:], mass.shape[dimension]]
    return torch.stack([mass.narrow(dimension, a, b - a).sum(dimension) for a, b in zip(starts, ends, strict=True)], dimension)


# -- DEEP R: K of N connections ----------------------------------------------------------------------------------------------


def subsets(n: int, k: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(n), k))


def all_subsets(n: int) -> list[tuple[int, ...]]:
    """List all subsets in the order of their bit patterns: connection i is bit i."""
    return [tuple(i for i in range(n) if number >> i & 1) for number in range(1 << n)]


@cache
def weight_of_subset(target: Target, c: tuple[int, ...], n: int, nodes: int = 32) -> float:
    """Compute Z_c, the integral of exp(-(E + alpha * sum) / T) over the active theta >= 0 of c, by Gauss-Legendre quadrature.

    The dormant weights are 0.
    """
    if not c:
        return float(target.log_density(torch.zeros(n, dtype=torch.float64)).exp())
    x, w = np.polynomial.legendre.leggauss(nodes)
    points, widths = torch.from_numpy((x + 1) * LARGEST / 2), torch.from_numpy(w * LARGEST / 2)
    u = torch.zeros((nodes,) * len(c) + (n,), dtype=torch.float64)
    u[..., list(c)] = _product([points] * len(c))
    found = target.log_density(u).exp()
    for _ in c:
        found = found @ widths
    return float(found)


def closed_form(target: Target, n: int, k: int) -> Tensor:
    """Compute P(c) of a separable energy: the product of one-dimensional integrals Z_k, k in c, normalized over K-subsets."""
    nothing = weight_of_subset(target, (), n)
    single = [weight_of_subset(target, (i,), n) / nothing for i in range(n)]
    found = torch.tensor([np.prod([single[i] for i in c]) for c in subsets(n, k)], dtype=torch.float64)
    return found / found.sum()


def connectivities(target: Target, n: int, k: int) -> Tensor:
    """Compute P(c) of any energy over all K-subsets of N, by integrating over all active theta jointly."""
    found = torch.tensor([weight_of_subset(target, c, n) for c in subsets(n, k)], dtype=torch.float64)
    return found / found.sum()


def group_connectivities(target: Target, n: int, groups: int, total: int) -> Tensor:
    """Compute P(c) over all subsets of *one* group of n weights, where ``groups`` groups share ``total`` connections.

    The groups interact only through the number of connections: P(c) is proportional to Z_c times the weight of all ways to
    share out the other connections among the other groups. These weights are coefficients of a power of sum_m z_m x^m, z_m =
    sum of Z_c over |c| = m.
    """
    weights = torch.tensor([weight_of_subset(target, c, n) for c in all_subsets(n)], dtype=torch.float64)
    sizes = torch.tensor([len(c) for c in all_subsets(n)])
    by_size = np.array([float(weights[sizes == m].sum()) for m in range(n + 1)])
    # Tilt the weights so that a group has total / groups connections on average: the wanted coefficient then lies near the
    # maximum, where no precision is lost.
    low, high = 1e-6, 1e6
    for _ in range(200):
        tilt = (low * high) ** 0.5
        tilted = by_size * tilt ** np.arange(n + 1)
        mean = (tilted * np.arange(n + 1)).sum() / tilted.sum()
        low, high = (tilt, high) if mean < total / groups else (low, tilt)
    one = tilted / tilted.sum()
    others = np.array([1.0])
    for _ in range(groups - 1):
        others = np.convolve(others, one)
    found = weights * tilt**sizes * torch.tensor([others[total - int(m)] if total >= m else 0.0 for m in sizes])
    return found / found.sum()


@dataclass(frozen=True)
class PairBins:
    """Joint cells for K = 2: the connectivity, and for both active theta the part of its distribution."""

    n: int
    edges: Tensor  # [subsets, 2, parts - 1]
    probabilities: Tensor  # [subsets, parts, parts]

    def numbers(self, subset: Tensor, theta: Tensor) -> Tensor:
        """Return the cell of each chain, int64 [M], from the number of its subset [M] and its theta [M, N]."""
        parts = self.probabilities.shape[1]
        pairs = torch.tensor(subsets(self.n, 2))[subset]
        active = theta.gather(1, pairs)
        bins = (active.unsqueeze(-1) >= self.edges[subset].to(theta.dtype)).sum(-1)
        return subset * parts * parts + bins[:, 0] * parts + bins[:, 1]


@cache
def pair_bins(target: Target, n: int, parts: int = 3, cells: int = 700) -> PairBins:
    """Compute the joint distribution of connectivity and active theta for K = 2."""
    edges, masses = [], []
    for c in subsets(n, 2):
        u = torch.zeros((cells, cells, n), dtype=torch.float64)
        u[..., list(c)] = _product([midpoints(cells)] * 2)
        mass = target.log_density(u).exp()
        cuts = [quantile_cells(mass.sum(1 - d), parts) for d in range(2)]
        for d in range(2):
            mass = sums(mass, [0, *cuts[d]], d)
        edges.append(torch.tensor(cuts, dtype=torch.float64) * (LARGEST / cells))
        masses.append(mass)
    found = torch.stack(masses)
    return PairBins(n, torch.stack(edges), found / found.sum())
