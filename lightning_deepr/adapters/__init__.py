"""Sparse adapters: differences to a frozen pretrained network as files, several on one network, and merged into its weights.

:func:`lightning_deepr.adapt` (or ``DeepR(connectivity, of="difference")``) makes one. ``docs/adapters.md`` shows the use.
"""

from __future__ import annotations

from lightning_deepr.adapters.adapter import Adapter, adapter_of, average
from lightning_deepr.adapters.bank import Adapters
from lightning_deepr.adapters.file import load_adapter, read_adapter, save_adapter
from lightning_deepr.adapters.installing import detach, install_adapter
from lightning_deepr.adapters.merging import merge, unmerge
from lightning_deepr.adapters.shira import save_shira

__all__ = [
    "Adapter",
    "Adapters",
    "adapter_of",
    "average",
    "detach",
    "install_adapter",
    "load_adapter",
    "merge",
    "read_adapter",
    "save_adapter",
    "save_shira",
    "unmerge",
]
