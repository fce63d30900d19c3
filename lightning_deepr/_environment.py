"""The callback that an environment variable asks for: ``LIGHTNING_DEEPR=0.01 python train.py`` needs no changed line.

Lightning calls :func:`callbacks` for every Trainer, by the entry points ``lightning.pytorch.callbacks_factory`` and
``pytorch_lightning.callbacks_factory``. Without the variable it imports nothing and does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

VARIABLE = "LIGHTNING_DEEPR"


def callbacks() -> list[Any]:
    """Return the callback for a Trainer: DEEP R with the connectivity in ``LIGHTNING_DEEPR``; none if it is empty or 0.

    The value is a fraction (0.01), a number of connections (2662) or a dict in YAML or JSON ({fc1: 0.01, fc2: 0.1}).

    Raises:
        ValueError: the value is none of these.
    """
    text = os.environ.get(VARIABLE, "").strip()
    if text in ("", "0"):
        return []
    from lightning_deepr.methods.from_environment import DeepRFromEnvironment

    return [DeepRFromEnvironment(connectivity(text))]


def connectivity(text: str) -> Any:
    """Read the value of the variable.

    Example::

        >>> connectivity("0.01"), connectivity("2662"), connectivity("{fc1: 0.1}")
        (0.01, 2662, {'fc1': 0.1})
    """
    import yaml  # type: ignore[import-untyped]

    try:
        value = yaml.safe_load(text)
        value = float(value) if isinstance(value, str) else value  # YAML takes 1e-2 for a word
    except (yaml.YAMLError, ValueError):
        value = None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and value != 1) and not (isinstance(value, Mapping) and value):
        raise ValueError(
            f"{VARIABLE}: expected a connectivity: a fraction such as 0.01, a number of connections such as 2662, or a dict "
            f"such as {{fc1: 0.01}}; found {text!r}. Unset it, or set it to 0, to train as usual."
        )
    return value
