"""The seed that ``seed_everything`` of either package has set."""

from __future__ import annotations

import os

VARIABLE = "PL_GLOBAL_SEED"  # both packages keep it there, and the processes that a strategy starts inherit it


def seed_everything_seed() -> int | None:
    """Return the seed that ``seed_everything`` has set in this process, or None."""
    try:
        return int(os.environ.get(VARIABLE, ""))
    except ValueError:
        return None


def seed_or_default(seed: int | None) -> int:
    """Return a seed: the given one, else that of ``seed_everything`` where it was called in this process, else 0.

    Example::

        >>> seed_or_default(3)
        3
    """
    found = seed_everything_seed() if seed is None else seed
    return 0 if found is None else found
