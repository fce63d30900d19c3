"""lightning-deepr: neural networks that are sparse from the first step to the last (DEEP R as a PyTorch Lightning plugin).

trainer = lightning.Trainer(callbacks=[DeepR(connectivity=0.01)])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_deepr._version import __version__ as __version__
from lightning_deepr.checkpoint import load_state_dict, save_sparse
from lightning_deepr.conversion import connections, densify, sparsify
from lightning_deepr.layers import SparseLinear
from lightning_deepr.report import connectivity_report
from lightning_deepr.schedules import LinearDecay, LrPower

if TYPE_CHECKING:
    from lightning_deepr import zoo
    from lightning_deepr.callback import SparseTraining
    from lightning_deepr.comparisons import SET, FixedRandom
    from lightning_deepr.deepr import DeepR
    from lightning_deepr.pruning import L1Shrinkage, MagnitudePruning
    from lightning_deepr.rigl import RigL
    from lightning_deepr.soft_deepr import SoftDeepR

__all__ = [
    "SET",
    "DeepR",
    "FixedRandom",
    "L1Shrinkage",
    "LinearDecay",
    "LrPower",
    "MagnitudePruning",
    "RigL",
    "SoftDeepR",
    "SparseLinear",
    "SparseTraining",
    "connections",
    "connectivity_report",
    "densify",
    "load_state_dict",
    "save_sparse",
    "sparsify",
    "zoo",
]


CALLBACKS = {
    "DeepR": "deepr",
    "FixedRandom": "comparisons",
    "L1Shrinkage": "pruning",
    "MagnitudePruning": "pruning",
    "RigL": "rigl",
    "SET": "comparisons",
    "SoftDeepR": "soft_deepr",
    "SparseTraining": "callback",
}


def __getattr__(name: str) -> Any:
    # the callbacks import Lightning; converting, densifying and inspecting a network do not need it
    if name in CALLBACKS:
        return getattr(importlib.import_module(f"lightning_deepr.{CALLBACKS[name]}"), name)
    raise AttributeError(f"module 'lightning_deepr' has no attribute {name!r}; its callbacks are {', '.join(CALLBACKS)}.")
