"""p-values."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.helpers.optional import Optional

stats = Optional("scipy.stats")


def chi_square_p(observed: Any, expected: Any = None) -> float:
    """Return the p-value of counts. The default expectations are equal."""
    observed = np.asarray(observed, dtype=np.float64).ravel()
    expected = np.full_like(observed, observed.mean()) if expected is None else np.asarray(expected, dtype=np.float64)
    assert expected.min() >= 5, "too few expected for the chi-square distribution"
    # (scipy's chisquare also requires sums that are equal to 1e-8)
    return float(stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), observed.size - 1))
