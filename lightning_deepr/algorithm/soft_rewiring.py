"""Algorithm 2 of "Deep Rewiring" (Bellec, Kappel, Maass, Legenstein, ICLR 2018), soft-DEEP R, on plain tensors.

    active k:   theta_k <- theta_k - eta * dE/dtheta_k - eta * alpha + sqrt(2 * eta * T) * nu_k dormant k:  theta_k <-
        max(theta_k + sqrt(2 * eta * T) * nu_k, theta_min)        (no gradient, no L1);  active once theta_k >= 0

Every potential connection has a theta, and the number of active connections has no hard bound. Without data, the stationary
density is proportional to exp(-alpha * theta / T) for theta >= 0, with mass T / alpha, and flat on [theta_min, 0]. So theta_min
sets the active fraction p. Any optimizer does the gradient step; this module undoes its changes to dormant thetas (momentum,
weight decay).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_deepr.algorithm import randomness

COARSE = 2.0  # the largest eta * alpha^2 / T that holds the wanted connectivity (see `drift_ratio`)
_CHUNK = 1 << 16  # number of deviates at a time; the hash's intermediate results then fit the cache


def theta_min(temperature: float | Tensor, alpha: float | Tensor, count: int, total: int) -> float | Tensor:
    """Compute the lower bound of theta that keeps K of N connections active: -T * (1 - p) / (alpha * p), p = K / N.

    Args:
        temperature: T, not 0.
        alpha: alpha, not 0.
        count: K. If it equals N, no connection is ever dormant and the bound is 0.
        total: N.

    Example::

        >>> theta_min(temperature=0.5, alpha=0.25, count=1, total=4)
        -6.0
    """
    return 0.0 if count == total else -temperature * (total - count) / (alpha * count)


def drift_ratio(lr: float, alpha: float, temperature: float) -> float:
    """Compute eta * alpha^2 / T: the drift of one step over T / alpha, the decay length of the density of active theta.

    Simulated without data at p = 5 %: a ratio of 200 ends at a connectivity of 15 %, ratios up to 2 end at 4.8 to 5.1 %.
    """
    return lr * alpha * alpha / temperature


def deviates(shape: torch.Size, index: int, seed: int, step: int, device: torch.device) -> Tensor:
    """Draw nu ~ N(0, 1) for every place of a tensor (float64).

    Args:
        shape: the tensor's shape.
        index: the tensor's position in the order of conversion.
        seed: the seed of all draws.
        step: the number of this step. ``seed`` and ``step`` are the whole random state.
        device: the device of the result; the draws are the same on every device.
    """
    stream, total = randomness.key(seed, randomness.NOISE, step), shape.numel()
    chunk = _CHUNK if device.type == "cpu" else total
    parts = [
        randomness.normal(stream, randomness.counters(index, torch.arange(first, min(first + chunk, total), device=device)))
        for first in range(0, total, chunk)
    ]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).view(shape)


def step(
    theta: Tensor, before: Tensor, decrement: float | Tensor, scale: float | Tensor, nu: Tensor, bound: float | Tensor
) -> None:
    """Complete the optimizer's step on a tensor, in place.

    Args:
        theta: theta after the optimizer's step.
        before: theta before the optimizer's step.
        decrement: eta * alpha.
        scale: sqrt(2 * eta * T).
        nu: the result of :func:`deviates`.
        bound: theta_min.
    """
    # active: theta_k <- theta_k - eta * alpha    (the optimizer did the gradient step)
    # dormant: theta_k from before the optimizer's step: no gradient, no momentum, no weight decay, no L1
    moved = torch.where(before >= 0, theta - decrement, before)
    # theta_k <- max(theta_k + sqrt(2 * eta * T) * nu_k, theta_min)
    moved += (nu * scale).to(theta.dtype)
    theta.copy_(moved.clamp_(min=bound))


def step_without_rewiring(theta: Tensor, before: Tensor, decrement: float | Tensor, scale: float | Tensor, nu: Tensor) -> None:
    """Complete a step that does not rewire: active theta below 0 becomes 0, and dormant theta does not change."""
    moved = theta - decrement
    moved += (nu * scale).to(theta.dtype)
    theta.copy_(torch.where(before >= 0, moved.clamp_(min=0), before))
