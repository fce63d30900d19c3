"""What a sparse file or a module says about itself, for a model card."""

from __future__ import annotations

from os import PathLike
from typing import Any

from lightning_deepr.zoo.loading import info
from lightning_deepr.zoo.verification import verify


def describe(model: str | PathLike[str]) -> dict[str, Any]:
    """What a card says of a model: what ``zoo.info`` tells, once ``zoo.verify`` has nothing against it.

    Args:
        model: a name of the zoo or a path.

    Raises:
        ValueError: the file is damaged or no sparse model.
    """
    verify(model)
    return info(model)
