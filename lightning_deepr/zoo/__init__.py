"""The zoo: sparse checkpoints in one safetensors file each, loaded in one line.

>>> from lightning_deepr import zoo
>>> isinstance(zoo.list_models(), list)
True

The folder ``zoo/`` of the repository travels in the wheel as ``lightning_deepr.zoo.data``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_deepr.checkpoint import save_sparse as save
    from lightning_deepr.zoo.gaps import FormatError
    from lightning_deepr.zoo.loading import connections_of, info, load, path_of, publish
    from lightning_deepr.zoo.registry import ENTRIES, Entry, list_models
    from lightning_deepr.zoo.verification import Verification, verify

_HOMES = {
    "ENTRIES": "zoo.registry",
    "Entry": "zoo.registry",
    "FormatError": "zoo.gaps",
    "Verification": "zoo.verification",
    "connections_of": "zoo.loading",
    "info": "zoo.loading",
    "list_models": "zoo.registry",
    "load": "zoo.loading",
    "path_of": "zoo.loading",
    "publish": "zoo.loading",
    "save": "checkpoint",
    "verify": "zoo.verification",
}

__all__ = [
    "ENTRIES",
    "Entry",
    "FormatError",
    "Verification",
    "connections_of",
    "info",
    "list_models",
    "load",
    "path_of",
    "publish",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    # the package's own modules read and write files through this one: what needs them is imported when it is used
    if name in _HOMES:
        home = importlib.import_module(f"lightning_deepr.{_HOMES[name]}")
        return getattr(home, "save_sparse" if name == "save" else name)
    raise AttributeError(f"module 'lightning_deepr.zoo' has no attribute {name!r}; it has {', '.join(__all__)}.")
