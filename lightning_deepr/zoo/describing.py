"""Collects what a model card says about a sparse file."""

from __future__ import annotations

from os import PathLike
from typing import Any

from lightning_deepr.zoo.loading import info
from lightning_deepr.zoo.verification import verify


def describe(model: str | PathLike[str]) -> dict[str, Any]:
    """Verify a model and return what ``zoo.info`` returns.

    Args:
        model: a name of the zoo or a path.

    Raises:
        ValueError: the file is damaged or is not a sparse model.
    """
    verify(model)
    return info(model)
