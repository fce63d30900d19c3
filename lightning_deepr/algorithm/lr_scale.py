"""Carry a learning rate over from a dense network to a sparse one: multiply theta's step by a number.

With K of N connections the weights are about sqrt(N / K) larger, and each output has K / N of the inputs. A step that suits the
dense weights is therefore too small for the sparse ones. The difference is largest if the optimizer normalizes its gradients,
because then the length of the step does not follow the gradient. For static random sparsity the right factor for such an
optimizer is N / K (S-mu-Par, Dey et al. 2024, arXiv 2405.15743).

To find out whether an optimizer normalizes its gradients, two further optimizers of its class take steps on their own
parameters. The gradients of one are ten times as large. If its steps are about as long, the optimizer normalizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_deepr.algorithm import probe


class Exponents(NamedTuple):
    """The exponents of ``lr_scale="auto"``: the scale is (N / K) ** exponent. Each method has its own.

    Attributes:
        normalizing: for optimizers that normalize their gradients: Adam's family, RMSprop, Rprop, Adagrad, ...
        plain: for others: SGD.
    """

    normalizing: float
    plain: float


DEEPR = Exponents(normalizing=1.0, plain=0.5)
LARGEST_SCALE = 500.0  # larger scales have not been tried

_LR, _START = 2.0**-6, 2.0**-10  # of the probe; theta is not 0: the step of some optimizers depends on its size
_STEPS = 10  # RAdam begins to normalize in its sixth step


def automatic(ratio: float, normalizing: bool, exponents: Exponents = DEEPR) -> float:
    """Return the scale that ``lr_scale="auto"`` takes.

    Args:
        ratio: N / K.
        normalizing: whether the optimizer normalizes its gradients, see :func:`normalizes`.
        exponents: the method's exponents.

    Returns:
        the scale: 1 at K = N, and at most 500. It is rounded to 6 digits, so that it is the same on every machine.

    Example::

        >>> automatic(100.0, normalizing=True), automatic(100.0, normalizing=False)
        (100.0, 10.0)
    """
    scale = ratio ** (exponents.normalizing if normalizing else exponents.plain)
    return min(float(f"{scale:.6g}"), LARGEST_SCALE)


def normalizes(optimizer: Optimizer, group: Mapping[str, Any], device: torch.device) -> bool | None:
    """Whether an optimizer normalizes its gradients: the length of its step does not depend on the length of the gradient.

    Args:
        optimizer: the optimizer. It does not change, and none of its hooks is called.
        group: the options of a parameter group.
        device: the device of theta.

    Returns:
        True or False; None if it could not be found out.
    """
    for make in probe.WAYS:
        try:
            short, long = (_last_step(make, optimizer, group, gradient, device) for gradient in (1.0, 10.0))
        except Exception:
            continue
        if short > 0 and math.isfinite(short) and math.isfinite(long):
            return long < math.sqrt(10.0) * short
    return None


def _last_step(make: Any, optimizer: Optimizer, group: Mapping[str, Any], gradient: float, device: torch.device) -> float:
    """Return the length of a second optimizer's last step. All of its steps have the same gradient."""
    one = nn.Parameter(torch.full((1,), _START, device=device))
    with torch.no_grad():
        return probe.take_steps(make(optimizer, probe.options_of(group, _LR), one), one, gradient, _STEPS)


def stretch(thetas: list[Tensor], befores: list[Tensor], scales: list[float]) -> None:
    """Compute theta <- before + scale * (theta - before) in place. Every operation rounds.

    Args:
        thetas: the thetas after the optimizer's step.
        befores: the thetas before that step.
        scales: the factor of each theta's step.
    """
    torch._foreach_sub_(thetas, befores)
    torch._foreach_mul_(thetas, scales)
    torch._foreach_add_(thetas, befores)
