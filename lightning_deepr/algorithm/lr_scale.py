"""A learning rate that carries over from a dense network to a sparse one: theta's step is multiplied by a number.

With K of N connections the weights are about sqrt(N / K) larger and each output has K / N of the inputs: a step that suits the
dense weights is too small for the sparse ones, most of all where the optimizer normalizes its gradients, so that the step's length does not
follow them. For static random sparsity the right factor there is N / K (S-mu-Par, Dey et al. 2024, arXiv 2405.15743).

Which kind an optimizer is shows in the steps of a second one of its kind: do gradients ten times as large make them longer?
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_deepr.algorithm.optimizer_state import _by_constructor, _by_copy

# lr_scale="auto": (N / K) ** exponent
EXPONENT_NORMALIZING = 1.0  # Adam's family, RMSprop, Rprop, Adagrad, ...
EXPONENT_PLAIN = 0.25  # SGD
LARGEST_SCALE = 500.0  # nothing beyond has been tried

_LR, _START = 2.0**-6, 2.0**-10  # of the probe; theta is not 0: an optimizer may go by its size
_STEPS = 10  # RAdam begins to normalize in its sixth step


def automatic(ratio: float, normalizing: bool) -> float:
    """The scale that ``lr_scale="auto"`` takes.

    Args:
        ratio: N / K.
        normalizing: see :func:`normalizes`.

    Returns:
        1 at K = N, never more than 500; of 6 digits, so that every machine has the same number.

    Example::

        >>> automatic(100.0, normalizing=True), automatic(100.0, normalizing=False)
        (100.0, 3.16228)
    """
    scale = ratio ** (EXPONENT_NORMALIZING if normalizing else EXPONENT_PLAIN)
    return min(float(f"{scale:.6g}"), LARGEST_SCALE)


def normalizes(optimizer: Optimizer, group: Mapping[str, Any], device: torch.device) -> bool | None:
    """Whether the length of an optimizer's step does not depend on that of the gradient; None: that could not be found out.

    Args:
        optimizer: is left as it is; no hook of it is called.
        group: the options of a parameter group.
        device: of theta.
    """
    # the learning rate may be 0 at the moment, in a warm-up; the kind does not depend on it
    options = {name: value for name, value in group.items() if name not in ("params", "initial_lr")} | {"lr": _LR}
    for make in (_by_copy, _by_constructor):
        try:
            short, long = (_last_step(make, optimizer, options, gradient, device) for gradient in (1.0, 10.0))
        except Exception:
            continue
        if short > 0 and math.isfinite(short) and math.isfinite(long):
            return long < math.sqrt(10.0) * short
    return None


def _last_step(make: Any, optimizer: Optimizer, options: dict[str, Any], gradient: float, device: torch.device) -> float:
    """The length of a second optimizer's step, after some others with the same gradient."""
    probe = nn.Parameter(torch.full((1,), _START, device=device))
    step, before = inspect.unwrap(type(optimizer).step), _START  # unwrapped: no hook fires
    with torch.no_grad():
        second = make(optimizer, dict(options), probe)
        for _ in range(_STEPS):
            before = float(probe.detach())
            probe.grad = torch.full_like(probe, gradient)
            step(second)
    return abs(float(probe.detach()) - before)


def stretch(thetas: list[Tensor], befores: list[Tensor], scales: list[float]) -> None:
    """theta <- before + scale * (theta - before), in place; every operation rounds.

    Args:
        thetas: after the optimizer's step.
        befores: before it.
        scales: of each.
    """
    torch._foreach_sub_(thetas, befores)
    torch._foreach_mul_(thetas, scales)
    torch._foreach_add_(thetas, befores)
