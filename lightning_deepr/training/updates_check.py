"""Tell of a training that is too short for the interval of its method: it would train fixed connections."""

from __future__ import annotations

import math
from typing import Any

from lightning_deepr.packages.messages import rank_zero_warn

FEW = 3


def updates_to_come(every: int, until: int | float | None, total: float | None) -> int | None:
    """Count the steps of a training that rewire; None: its length is not known.

    Args:
        every: the number of steps between updates.
        until: a step (int), a fraction of the training (float) or None.
        total: the number of steps of the training.
    """
    if isinstance(until, float):
        until = None if total is None else until * total
    ends = [math.floor(total)] if total is not None else []
    ends += [math.ceil(until)] if until is not None else []
    return min(ends) // every if ends else None


def warn_of_few_updates(method: Any) -> None:
    """Warn at the start of a training whose connectivity is updated fewer than 3 times. A training that goes on is not new.

    Args:
        method: the callback; its ``total_steps`` are known by now, if anybody knows them.
    """
    every, until, total = method.rewire_every_n_steps, method.rewire_until, method.total_steps
    if (every == 1 and until is None) or until == 0 or any(tensor.done for tensor in method.tracked):
        return  # each step rewires, none is to, or the training goes on
    count = updates_to_come(every, until, total)
    if count is None or count >= FEW:
        return
    name = type(method).__name__
    length = "" if total is None else f" in {total:g} steps"
    what = f"{name}: {count} update{'s' * (count != 1)} of the connectivity to come{length} "
    fate = "no connection moves, as under FixedRandom" if count == 0 else "nearly all connections stay where they are"
    rank_zero_warn(
        f"{what}(rewire_every_n_steps={every}, rewire_until={until}): {fate}. Lower rewire_every_n_steps, or train for longer."
    )
