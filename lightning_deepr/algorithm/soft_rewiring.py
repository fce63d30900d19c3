"""Algorithm 2 of "Deep Rewiring" (Bellec, Kappel, Maass, Legenstein, ICLR 2018), soft-DEEP R, on plain tensors.

    active k:   theta_k <- theta_k - eta * dE/dtheta_k - eta * alpha + sqrt(2 * eta * T) * nu_k
    dormant k:  theta_k <- max(theta_k + sqrt(2 * eta * T) * nu_k, theta_min)        (no gradient, no L1);  active once theta_k >= 0

There is a theta for every potential connection, and no hard bound on how many are active: without data the stationary
density is proportional to exp(-alpha * theta / T) where theta >= 0, of mass T / alpha, and flat on [theta_min, 0], so that
theta_min sets the fraction p that is active. The gradient step belongs to the optimizer, whichever it is; what it did to a
dormant theta (momentum, weight decay) is undone here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_deepr.algorithm import randomness

COARSE = 2.0  # eta * alpha^2 / T up to which the wanted connectivity is held (see `drift_ratio`)
_CHUNK = 1 << 16  # deviates at a time: the hash's intermediate results stay in the cache


def theta_min(temperature: float | Tensor, alpha: float | Tensor, count: int, total: int) -> float | Tensor:
    """The bound below which no theta goes, so that K of N connections are active: -T * (1 - p) / (alpha * p), p = K / N.

    Args:
        temperature: T, not 0.
        alpha: not 0.
        count: K; where it is N, nothing is ever dormant and the bound is 0.
        total: N.

    Example::

        >>> theta_min(temperature=0.5, alpha=0.25, count=1, total=4)
        -6.0
    """
    return 0.0 if count == total else -temperature * (total - count) / (alpha * count)


def drift_ratio(lr: float, alpha: float, temperature: float) -> float:
    """eta * alpha^2 / T: the drift of one step against T / alpha, the length on which the density of active theta falls.

    Simulated without data at p = 5 %: at 200 the connectivity ends at 15 %, at 2 and below at 4.8 to 5.1 %.
    """
    return lr * alpha * alpha / temperature


def deviates(shape: torch.Size, index: int, seed: int, step: int, device: torch.device) -> Tensor:
    """nu ~ N(0, 1) for every place of a tensor (float64).

    Args:
        shape: of the tensor.
        index: its place in the order of conversion.
        seed: the seed of all draws.
        step: the number of this step; with ``seed`` it is the whole random state.
        device: where they are made; the draws are the same on every device.
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
    """What follows the optimizer's step on a tensor, in place.

    Args:
        theta: after the optimizer's step.
        before: before it.
        decrement: eta * alpha.
        scale: sqrt(2 * eta * T).
        nu: from :func:`deviates`.
        bound: theta_min.
    """
    # active: theta_k <- theta_k - eta * alpha    (the gradient step was the optimizer's)
    # dormant: as before the optimizer's step: no gradient, no momentum, no weight decay, no L1
    moved = torch.where(before >= 0, theta - decrement, before)
    # theta_k <- max(theta_k + sqrt(2 * eta * T) * nu_k, theta_min)
    moved += (nu * scale).to(theta.dtype)
    theta.copy_(moved.clamp_(min=bound))


def step_without_rewiring(theta: Tensor, before: Tensor, decrement: float | Tensor, scale: float | Tensor, nu: Tensor) -> None:
    """The same where the connectivity is to stay: active connections are reflected to 0, dormant ones stay where they are."""
    moved = theta - decrement
    moved += (nu * scale).to(theta.dtype)
    theta.copy_(torch.where(before >= 0, moved.clamp_(min=0), before))
