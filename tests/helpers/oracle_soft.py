"""A slow soft-DEEP R (Algorithm 2) in NumPy, one connection after the other. :mod:`tests.helpers.oracle` has Algorithm 1."""

from __future__ import annotations

import math

import numpy as np

from tests.helpers import oracle


def theta_min(temperature: float, alpha: float, count: int, total: int) -> float:
    p = count / total
    return -temperature * (1 - p) / (alpha * p)


def step(
    before: np.ndarray,
    after: np.ndarray,
    *,
    index: int,
    seed: int,
    number: int,
    lr: float,
    alpha: float,
    temperature: float,
    bound: float,
    rewires: bool = True,
) -> np.ndarray:
    """Compute the new theta (flat) from theta before and after the optimizer's step."""
    kind = after.dtype.type
    stream = oracle.key(seed, oracle.NOISE, number)
    nu = oracle.normal(stream, [index * 2**40 + k for k in range(len(after))])
    theta = np.empty_like(after)
    for k in range(len(after)):
        noise = kind(math.sqrt(2 * lr * temperature) * nu[k])
        if before[k] >= 0:  # active: the optimizer's step counts, and L1
            moved = kind(kind(after[k] - kind(lr * alpha)) + noise)
            theta[k] = max(moved, kind(bound)) if rewires else max(moved, kind(0))
        elif rewires:  # dormant: only the noise counts
            theta[k] = max(kind(before[k] + noise), kind(bound))
        else:
            theta[k] = before[k]
    return theta


def weight(theta: np.ndarray, signs: np.ndarray) -> np.ndarray:
    return np.array([s * t if t >= 0 else 0 for s, t in zip(signs, theta, strict=True)], theta.dtype)


def start(total: int, count: int, index: int, seed: int, bound: float) -> tuple[list[int], np.ndarray]:
    """Return the places that are active at the start, and the thetas of all others (0 at the active places)."""
    places = oracle.start_places(total, count, index, seed)
    word = oracle.bits(oracle.key(seed, oracle.START_THETA, 1), [index * 2**40 + k for k in range(total)])
    uniform = ((word >> np.uint64(40)).astype(np.float64) + 1) / 2**24
    theta = uniform * bound
    theta[places] = 0
    return places, theta
