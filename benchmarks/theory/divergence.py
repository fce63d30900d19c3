"""How far is a sampled distribution from the true one, compared with a sampler without bias?

The Kullback-Leibler distance of a histogram from the true probabilities is never 0: a perfect sampler has about
(cells - 1) / (2 * number of independent samples), and successive states of a chain are far from independent. The method needs
no model of the autocorrelation: each of many independent chains gives a histogram, and the scatter of the histograms gives the
covariance of their mean. Without bias the distance is 1/2 * sum of (p - q)^2 / q, where p - q is normal with that covariance.
This sum of chi-square variables is approximated by one scaled chi-square of the same mean and variance (Satterthwaite), both
estimated without bias. The approximation gives the mean, the 95 % point and a p-value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DRAWS = 100_000  # draws from the scaled chi-square


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
        """Count one state, given by its cell, for each given chain; a chain may occur more than once."""
        self.counts += torch.bincount(chain * self.cells + cell, minlength=self.counts.numel())

    def frequencies(self) -> Tensor:
        """Return the relative frequencies, float64 [chains, cells]."""
        counts = self.counts.view(-1, self.cells)
        return counts / counts.sum(1, keepdim=True)


@dataclass(frozen=True)
class Divergence:
    """The distance of a sampled distribution from the true one, compared with a sampler without bias.

    Attributes:
        found: KL(sampled || true) in nats.
        expected: mean distance of a sampler without bias that has the same number of independent samples.
        limit: 95 % point of that sampler's distance.
        p: probability that the distance of that sampler is at least ``found``.
        effective: number of independent samples.
        bias: found - expected.
        error: standard error of ``bias``.
    """

    found: float
    expected: float
    limit: float
    p: float
    effective: float
    bias: float
    error: float

    @property
    def within(self) -> bool:
        return self.found <= self.limit


def divergence(frequencies: Tensor, true: Tensor) -> Divergence:
    """Compare histograms of independent chains with the true probabilities.

    Args:
        frequencies: [chains, cells] with rows that sum to 1, of at least 8 chains.
        true: [cells], the true probabilities.
    """
    q, units = true.reshape(-1).numpy(), frequencies.numpy()
    p = units.mean(0)
    seen = p > 0
    found = float((p[seen] * np.log(p[seen] / q[seen])).sum())
    # In the coordinates (p - q) / sqrt(q) the distance is half a squared length.
    free = len(units) - 1
    scatter = (units - p) / np.sqrt(q * len(units) * free)
    eigenvalues = np.linalg.svd(scatter, compute_uv=False) ** 2
    trace = float(eigenvalues.sum())
    # The sum of squares is too large if it is estimated from few chains; this corrects it.
    squares = (float((eigenvalues**2).sum()) - trace**2 / free) * free**2 / ((free + 2) * (free - 1))
    squares = min(max(squares, trace**2 / (len(q) - 1)), trace**2)
    degrees, scale = trace**2 / squares, squares / trace
    null = 0.5 * scale * np.random.default_rng(0).chisquare(degrees, DRAWS)
    # With a bias the distance scatters as without, plus a term that grows with the bias.
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
    """Extrapolate the histograms of two learning rates to 0, chain by chain; this cancels errors in proportion to the root.

    Args:
        coarse, fine: learning rate and frequencies [chains, cells]; chains with the same number are independent.
    """
    ratio = (coarse[0] / fine[0]) ** 0.5
    return (ratio * fine[1] - coarse[1]) / (ratio - 1)
