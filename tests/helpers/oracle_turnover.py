"""The rule of alpha by turnover, computed from all counts of a training.

It shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHAPES = {
    "cosine": lambda p: (1 + np.cos(np.pi * p)) / 2,
    "linear": lambda p: 1 - p,
    "constant": lambda p: 1.0,
}


def alpha_after(
    counts: Sequence[tuple[int, int] | None],
    first: float,
    total: int | None,
    *,
    start: float,
    shape: str = "cosine",
    interval: int = 50,
    gain: float = 0.5,
    limit: float = 0.3,
    within: float = 1000.0,
) -> float:
    """alpha in the step that follows.

    Args:
        counts: of each step so far: slots reborn and K; None: it did not rewire.
        first: alpha in the first step.
        total: steps of the training; None: not known.
    """
    alpha, opened = first, list[tuple[int, int]]()
    for step, count in enumerate(counts, start=1):
        opened += [] if count is None else [count]
        if step % interval:
            continue
        wanted = start * SHAPES[shape](min(step / total, 1.0) if total else 0.0)
        reborn, slots = (sum(column) for column in zip(*opened, strict=True)) if opened else (0, 0)
        if reborn == 0 and wanted * slots < 1:
            continue  # it can't tell
        with np.errstate(divide="ignore"):
            change = np.clip(gain * (np.log(wanted) - np.log(np.float64(reborn) / slots)), -limit, limit)
        alpha = float(np.clip(alpha * np.exp(change), first / within, first * within))
        opened = []
    return alpha
