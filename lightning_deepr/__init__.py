"""lightning-deepr: neural networks that are sparse from the first step to the last (DEEP R as a PyTorch Lightning plugin).

trainer = lightning.Trainer(callbacks=[DeepR(connectivity=0.01)])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_deepr.checkpoint import load_state_dict, save_sparse
from lightning_deepr.conversion import connections, densify, sparsify
from lightning_deepr.layers import SparseLinear
from lightning_deepr.report import connectivity_report
from lightning_deepr.schedules import LinearDecay, LrPower

if TYPE_CHECKING:
    from lightning_deepr.callback import SparseTraining
    from lightning_deepr.deepr import DeepR

__version__ = "0.1.0"
__all__ = [
    "DeepR",
    "LinearDecay",
    "LrPower",
    "SparseLinear",
    "SparseTraining",
    "connections",
    "connectivity_report",
    "densify",
    "load_state_dict",
    "save_sparse",
    "sparsify",
]


def __getattr__(name: str) -> Any:
    # the callbacks import Lightning; converting, densifying and inspecting a network do not need it
    if name == "DeepR":
        from lightning_deepr.deepr import DeepR

        return DeepR
    if name == "SparseTraining":
        from lightning_deepr.callback import SparseTraining

        return SparseTraining
    raise AttributeError(f"module 'lightning_deepr' has no attribute {name!r}")
