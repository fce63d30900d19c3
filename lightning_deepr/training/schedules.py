"""Values that change during training: temperature as a function of the learning rate, l1 as a function of the progress."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import SGD, NAdam, Optimizer, RAdam, RMSprop
from torch.optim import Adam as _Adam
from torch.optim import Adamax as _Adamax

from lightning_deepr.algorithm.steering import TurnoverTarget


class LrPower:
    """T = coefficient * lr ** power. The paper's MNIST experiment has T = eta^2 * 1e-12.

    Args:
        coefficient: the factor, at least 0.
        power: the exponent of the learning rate.

    Example::

        >>> LrPower(coefficient=1e-12, power=2)(0.05)
        2.5000000000000004e-15
    """

    def __init__(self, coefficient: float = 1e-12, power: float = 2) -> None:
        if not coefficient >= 0:
            raise ValueError(f"LrPower: expected coefficient >= 0, found {coefficient}.")
        self.coefficient, self.power = coefficient, power

    def __call__(self, lr: Any) -> Any:
        return self.coefficient * lr**self.power

    def __repr__(self) -> str:
        return f"LrPower(coefficient={self.coefficient}, power={self.power})"


class LinearDecay:
    """A value that changes linearly with the progress, from ``start`` at the beginning of training to ``end`` at its end.

    Args:
        start: the value at progress 0.
        end: the value at progress 1.

    Example::

        >>> LinearDecay(start=2e-4)(0.5)
        0.0001
    """

    def __init__(self, start: float, end: float = 0.0) -> None:
        if not (start >= 0 and end >= 0):
            raise ValueError(f"LinearDecay: expected start >= 0 and end >= 0, found {start} and {end}.")
        self.start, self.end = start, end

    def __call__(self, progress: float) -> float:
        return self.start + (self.end - self.start) * progress

    def __repr__(self) -> str:
        return f"LinearDecay(start={self.start}, end={self.end})"


_NORMALIZING = (_Adam, _Adamax, NAdam, RAdam, RMSprop)
L1_PLAIN, L1_NORMALIZED = 1e-4, 0.03


def default_l1(optimizer: Optimizer, group: Mapping[str, Any]) -> tuple[float, str | None]:
    """Choose alpha by the optimizer, from the paper's two values.

    alpha is 1e-4 / (1 - momentum) under SGD, and .03 under an optimizer that normalizes its gradients (Adam's family, RMSprop).

    Returns:
        alpha, and a message for the user if the optimizer is unknown, else None.
    """
    if isinstance(optimizer, SGD):
        return L1_PLAIN / (1 - group["momentum"]), None
    kinds = {kind.__name__.lower() for kind in type(optimizer).__mro__}
    if isinstance(optimizer, _NORMALIZING) or any("adam" in kind or "rmsprop" in kind for kind in kinds):
        return L1_NORMALIZED, None
    return L1_PLAIN, (
        f"DeepR: no default l1 is known for {type(optimizer).__name__}; took {L1_PLAIN:g}, the value for SGD. Give l1=... "
        f"(about {L1_NORMALIZED:g} if it normalizes its gradients)."
    )


def check_l1(l1: Any, where: str = "l1") -> None:
    """Validate the ``l1`` argument."""
    if l1 is None or callable(l1) or is_steered(l1):
        return
    if isinstance(l1, Mapping):
        for pattern, value in l1.items():
            if isinstance(value, Mapping) or value is None:
                raise TypeError(f"{where}[{pattern!r}]: expected a number or a schedule, found {value!r}.")
            check_l1(value, f"{where}[{pattern!r}]")
    elif isinstance(l1, (bool, str)) or not isinstance(l1, (int, float)):
        raise TypeError(
            f'{where}: expected a float, a dict, "auto", TurnoverTarget, LinearDecay, a function of the progress or None, '
            f"found {l1!r}."
        )
    elif not (l1 >= 0 and math.isfinite(l1)):
        raise ValueError(f"{where}: expected a finite value of at least 0, found {l1}.")


def is_steered(l1: Any) -> bool:
    """Whether the turnover steers this value of ``l1``, or an entry of it if it is a dict."""
    if isinstance(l1, Mapping):
        return any(is_steered(value) for value in l1.values())
    return isinstance(l1, TurnoverTarget) or (isinstance(l1, str) and l1 == "auto")


def check_temperature(temperature: Any, where: str = "temperature") -> None:
    """Validate the ``temperature`` argument."""
    if callable(temperature):
        return
    if isinstance(temperature, Mapping):
        for pattern, value in temperature.items():
            if isinstance(value, Mapping):
                raise TypeError(f"{where}[{pattern!r}]: expected a number or a schedule, found {value!r}.")
            check_temperature(value, f"{where}[{pattern!r}]")
    elif isinstance(temperature, (bool, str)) or not isinstance(temperature, (int, float)):
        raise TypeError(
            f"{where}: expected a float, LrPower or a function of the learning rate, or a dict of those, found {temperature!r}."
        )
    elif not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"{where}: expected a finite value of at least 0, found {temperature}.")


def evaluate(schedule: Any, argument: Any, what: str) -> Any:
    """Evaluate a schedule and check the value: a number (or a tensor of one element) that is finite and not negative."""
    value: Any = schedule(argument) if callable(schedule) else schedule
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value  # a check would cost a host synchronization
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float, np.number, Tensor))
        or (isinstance(value, Tensor) and value.numel() != 1)
    ):
        raise TypeError(f"{what}: expected a number, found {value!r} from {schedule!r} at {argument}.")
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"{what}: expected a finite value of at least 0, found {value} from {schedule!r} at {argument}.")
    return value


def is_documented(schedule: Any) -> bool:
    """Whether a schedule can be written to YAML and to a checkpoint (a lambda cannot)."""
    if isinstance(schedule, Mapping):
        return all(is_documented(value) for value in schedule.values())
    return not callable(schedule) or isinstance(schedule, (LrPower, LinearDecay))
