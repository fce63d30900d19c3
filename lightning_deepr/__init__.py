"""lightning-deepr: neural networks that are sparse from the first step to the last (DEEP R as a PyTorch Lightning plugin).

trainer = lightning.Trainer(callbacks=[DeepR(connectivity=0.01)])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_deepr._lazy import lazy
from lightning_deepr._version import __version__

if TYPE_CHECKING:
    from lightning_deepr import zoo
    from lightning_deepr.algorithm.steering import TurnoverTarget
    from lightning_deepr.conversion.convert import connections, densify, sparsify
    from lightning_deepr.conversion.layers import SparseLinear
    from lightning_deepr.conversion.report import connectivity_report
    from lightning_deepr.files.checkpoint import load_state_dict, save_sparse
    from lightning_deepr.methods import SET, DeepR, FixedRandom, L1Shrinkage, MagnitudePruning, RigL, SoftDeepR
    from lightning_deepr.training.callback import SparseTraining
    from lightning_deepr.training.schedules import LinearDecay, LrPower

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
    "TurnoverTarget",
    "__version__",
    "connections",
    "connectivity_report",
    "densify",
    "load_state_dict",
    "save_sparse",
    "sparsify",
    "zoo",
]

# The callbacks import Lightning. Converting, densifying and inspecting a network do not need it.
__getattr__, __dir__ = lazy(
    __name__,
    {
        **dict.fromkeys(
            ("DeepR", "FixedRandom", "L1Shrinkage", "MagnitudePruning", "RigL", "SET", "SoftDeepR"), "lightning_deepr.methods"
        ),
        "SparseTraining": "lightning_deepr.training.callback",
        "TurnoverTarget": "lightning_deepr.algorithm.steering",
        **dict.fromkeys(("LinearDecay", "LrPower"), "lightning_deepr.training.schedules"),
        **dict.fromkeys(("connections", "densify", "sparsify"), "lightning_deepr.conversion.convert"),
        "SparseLinear": "lightning_deepr.conversion.layers",
        "connectivity_report": "lightning_deepr.conversion.report",
        **dict.fromkeys(("load_state_dict", "save_sparse"), "lightning_deepr.files.checkpoint"),
        "zoo": "lightning_deepr.zoo",
    },
    __all__,
)
