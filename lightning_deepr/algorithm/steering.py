"""An alpha that follows the turnover: a wanted share of the slots is reborn per step.

How many connections a fixed alpha keeps in play depends on the connectivity, the optimizer and the batch. Here alpha is a
function of counts, in Python's floats: all ranks compute the same value, and nothing is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

SHAPES = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


class TurnoverTarget:
    """A target for alpha: the wanted share of a tensor's slots that is reborn per step.

    ``l1="auto"`` is a target with the default values.

    alpha starts at the value that ``l1=None`` takes for the optimizer, times ``lr_scale``. At the end of every interval of a
    tensor's steps it is multiplied by exp(clip(gain * log(wanted / seen), -limit, limit)). ``seen`` is the share that was
    reborn per step, the mean over the rewiring steps of the interval. ``wanted`` is the target at the end of the interval. An
    interval stays open, and the next one is added to it, if nothing was reborn and the target asks for less than one
    connection, or if no step rewired.

    Args:
        start: the wanted share at the start of the training, in (0, .5].
        shape: how the wanted share falls to 0 over the training: "cosine" (start * (1 + cos(pi * progress)) / 2) | "linear" |
            "constant" (it does not fall).
        interval: the number of a tensor's steps between two changes of its alpha.
        gain: the strength of a change, above 0.
        limit: the bound of the logarithm of one change, above 0.
        within: the largest factor between alpha and its start, in both directions; above 1.

    Raises:
        TypeError, ValueError: an argument is invalid.

    Example::

        >>> TurnoverTarget(start=0.1).wanted(0.5)
        0.05
    """

    def __init__(
        self,
        start: float = 0.1,
        shape: str = "cosine",
        interval: int = 50,
        gain: float = 0.5,
        limit: float = 0.3,
        within: float = 1000.0,
    ) -> None:
        _check_number("start", start, "a share of the slots in (0, 0.5]", 0 < start <= 0.5 if _is_number(start) else False)
        if not isinstance(shape, str) or shape not in SHAPES:
            raise ValueError(f"TurnoverTarget: shape: expected one of {', '.join(SHAPES)}, found {shape!r}.")
        whole = isinstance(interval, int) and not isinstance(interval, bool)
        if not whole or interval < 1:
            raise ValueError(f"TurnoverTarget: interval: expected an int of at least 1, found {interval!r}.")
        for name, value in (("gain", gain), ("limit", limit)):
            _check_number(name, value, "a finite number above 0", 0 < value < math.inf if _is_number(value) else False)
        _check_number("within", within, "a finite number above 1", 1 < within < math.inf if _is_number(within) else False)
        self.start, self.shape, self.interval = start, shape, interval
        self.gain, self.limit, self.within = gain, limit, within

    def wanted(self, progress: float) -> float:
        """Return the wanted share.

        Args:
            progress: the progress of the training, from 0 to 1.
        """
        return self.start * SHAPES[self.shape](progress)

    def factor(self, seen: float, wanted: float) -> float:
        """Return the factor by which alpha is multiplied."""
        if seen == 0 or wanted == 0:
            return math.exp(self.limit if seen == 0 else -self.limit)
        return math.exp(min(max(self.gain * math.log(wanted / seen), -self.limit), self.limit))

    def _values(self) -> tuple[Any, ...]:
        return self.start, self.shape, self.interval, self.gain, self.limit, self.within

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TurnoverTarget) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        usual, names = TurnoverTarget(), ("interval", "gain", "limit", "within")
        more = "".join(f", {name}={getattr(self, name)}" for name in names if getattr(self, name) != getattr(usual, name))
        return f"TurnoverTarget(start={self.start}, shape={self.shape!r}{more})"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_number(name: str, value: Any, expected: str, holds: bool) -> None:
    if not holds:
        error = ValueError if _is_number(value) else TypeError
        raise error(f"TurnoverTarget: {name}: expected {expected}, found {value!r}.")


@dataclass
class Steering:
    """The steered alpha of a tensor, or of tensors that share a theta.

    Attributes:
        target: the wanted turnover.
        alpha: the present alpha; None before the first step.
        first: the first alpha of the training.
        reborn: the number of slots that were reborn in the open interval.
        exposed: the number of slots that could be reborn in the open interval: the sum of K over its rewiring steps.
        rests: whether alpha is the value that ``l1=None`` takes: the training continues from a checkpoint without steering.
    """

    target: TurnoverTarget
    alpha: float | None = None
    first: float = 0.0
    reborn: int = 0
    exposed: int = 0
    rests: bool = False

    def begin(self, alpha: float) -> None:
        """Set alpha for the first step of a training.

        Args:
            alpha: the value that ``l1=None`` takes.
        """
        self.alpha = self.first = alpha

    def reset(self) -> None:
        """Forget alpha and the counts, for a new training."""
        self.alpha, self.first, self.reborn, self.exposed, self.rests = None, 0.0, 0, 0, False

    def rest(self) -> None:
        """Leave alpha to ``l1=None`` until a new training begins."""
        self.reset()
        self.rests = True

    def add(self, reborn: int, count: int) -> None:
        """Count a rewiring step of a tensor.

        Args:
            reborn: the number of slots that were reborn.
            count: K, the number of the tensor's slots.
        """
        self.reborn += reborn
        self.exposed += count

    def close(self, progress: float) -> None:
        """End an interval: change alpha, or leave the interval open if its counts decide nothing.

        Args:
            progress: the progress of the training, from 0 to 1.
        """
        if self.alpha is None:
            return
        wanted = self.target.wanted(progress)
        if self.reborn == 0 and wanted * self.exposed < 1:
            return
        changed = self.alpha * self.target.factor(self.reborn / self.exposed, wanted)
        self.alpha = min(max(changed, self.first / self.target.within), self.first * self.target.within)
        self.reborn = self.exposed = 0

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        names = ("rests",) if self.rests else ("alpha", "first", "reborn", "exposed")
        return {name: getattr(self, name) for name in names}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from the state that :meth:`state` returned."""
        self.reset()
        for name in state.keys() & {"alpha", "first", "reborn", "exposed", "rests"}:
            setattr(self, name, state[name])
