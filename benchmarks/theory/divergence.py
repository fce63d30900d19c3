"""How far is what was sampled from what should be, and how far would a sampler without any bias be?

The Kullback-Leibler distance of a histogram from the true probabilities is never 0: a perfect sampler leaves about
(cells - 1) / (2 * number of independent samples), and successive states of a chain are far from independent. No autocorrelation
is modelled: each of many independent chains gives a histogram, and the scatter of those gives the covariance of their mean.
Without bias the distance is 1/2 * sum of (p - q)^2 / q, p - q normal with that covariance: a sum of chi-square variables, taken for one scaled
chi-square of the same mean and variance (Satterthwaite), both estimated without bias. Its mean, its 95 % point and a p-value follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DRAWS = 100_000  # of the scaled chi-square


class Histograms:
    """Counts per chain and cell.

    Args:
        chains: number of independent chains.
        cells: number of cells.
    """

    def __init__(self, chains: int, cells: int) -> None:
        self.cells = cells
        self.counts = torch.zeros(chains * cells, dtype=torch.float64)

    def add(self, chain: Tensor, cell: Tensor) -> None:
        """Count one state (its cell) of each given chain; a chain may occur more than once."""
        self.counts += torch.bincount(chain * self.cells + cell, minlength=self.counts.numel())

    def frequencies(self) -> Tensor:
        """[chains, cells]"""
        counts = self.counts.view(-1, self.cells)
        return counts / counts.sum(1, keepdim=True)


@dataclass(frozen=True)
class Divergence:
    found: float  # KL(sampled || true), nats
    expected: float  # of a sampler without bias and with as many independent samples
    limit: float  # its 95 % point
    p: float  # probability that a sampler without bias is as far off
    effective: float  # number of independent samples
    bias: float  # found - expected
    error: float  # standard error of ``bias``

    @property
    def within(self) -> bool:
        return self.found <= self.limit


def divergence(frequencies: Tensor, true: Tensor) -> Divergence:
    """Compare histograms of independent chains with the true probabilities.

    Args:
        frequencies: [chains, cells], rows sum to 1; at least 8 chains.
        true: [cells].
    """
    q, units = true.reshape(-1).numpy(), frequencies.numpy()
    p = units.mean(0)
    seen = p > 0
    found = float((p[seen] * np.log(p[seen] / q[seen])).sum())
    # in the coordinates (p - q) / sqrt(q) the distance is half a squared length
    free = len(units) - 1
    scatter = (units - p) / np.sqrt(q * len(units) * free)
    eigenvalues = np.linalg.svd(scatter, compute_uv=False) ** 2
    trace = float(eigenvalues.sum())
    # the squares' sum is too large when taken from few chains
    squares = (float((eigenvalues**2).sum()) - trace**2 / free) * free**2 / ((free + 2) * (free - 1))
    squares = min(max(squares, trace**2 / (len(q) - 1)), trace**2)
    degrees, scale = trace**2 / squares, squares / trace
    null = 0.5 * scale * np.random.default_rng(0).chisquare(degrees, DRAWS)
    # about a bias the distance scatters by as much as without, and by a term that grows with the bias
    error = float(np.sqrt(squares / 2 + ((scatter @ ((p - q) / np.sqrt(q))) ** 2).sum()))
    return Divergence(
        found=found,
        expected=trace / 2,
        limit=float(np.quantile(null, 0.95)),
        p=float((null >= found).mean()),
        effective=(len(q) - 1) / trace,
        bias=found - trace / 2,
        error=error,
    )


def extrapolated(coarse: tuple[float, Tensor], fine: tuple[float, Tensor]) -> Tensor:
    """Histograms of two learning rates, extrapolated to 0 chain by chain: what is off by a multiple of the root is cancelled.

    Args:
        coarse, fine: learning rate and frequencies [chains, cells]; chains of the same number are independent.
    """
    ratio = (coarse[0] / fine[0]) ** 0.5
    return (ratio * fine[1] - coarse[1]) / (ratio - 1)
