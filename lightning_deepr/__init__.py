"""lightning-deepr: neural networks that are sparse from the first step to the last (DEEP R as a PyTorch Lightning plugin).

trainer = lightning.Trainer(callbacks=[DeepR(connectivity=0.01)])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_deepr._lazy import lazy
from lightning_deepr._version import __version__

if TYPE_CHECKING:
    from lightning_deepr import adapters, pictures, zoo
    from lightning_deepr.adapters.file import load_adapter, save_adapter
    from lightning_deepr.algorithm.candidates import Band, Blocks, Local, NoSelf
    from lightning_deepr.algorithm.signs import Dale
    from lightning_deepr.algorithm.steering import TurnoverTarget
    from lightning_deepr.conversion.adapt import adapt
    from lightning_deepr.conversion.convert import connections, densify, sparsify
    from lightning_deepr.conversion.layers import SparseLinear
    from lightning_deepr.conversion.report import connectivity_report
    from lightning_deepr.conversion.weight_decay import decay_groups
    from lightning_deepr.files.checkpoint import load_state_dict, save_sparse
    from lightning_deepr.methods import SET, DeepR, FixedRandom, L1Shrinkage, MagnitudePruning, RigL, SoftDeepR
    from lightning_deepr.monitoring.ages import ages
    from lightning_deepr.monitoring.dead_units import dead_units
    from lightning_deepr.monitoring.prune import prune_dead_units
    from lightning_deepr.training.callback import SparseTraining
    from lightning_deepr.training.schedules import LinearDecay, LrPower
    from lightning_deepr.weights.following import follow
    from lightning_deepr.zoo.topology import Topology

__all__ = [
    "SET",
    "Band",
    "Blocks",
    "Dale",
    "DeepR",
    "FixedRandom",
    "L1Shrinkage",
    "LinearDecay",
    "Local",
    "LrPower",
    "MagnitudePruning",
    "NoSelf",
    "RigL",
    "SoftDeepR",
    "SparseLinear",
    "SparseTraining",
    "Topology",
    "TurnoverTarget",
    "__version__",
    "adapt",
    "adapters",
    "ages",
    "connections",
    "connectivity_report",
    "dead_units",
    "decay_groups",
    "densify",
    "follow",
    "load_adapter",
    "load_state_dict",
    "pictures",
    "prune_dead_units",
    "save_adapter",
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
        **dict.fromkeys(("Band", "Blocks", "Local", "NoSelf"), "lightning_deepr.algorithm.candidates"),
        "Dale": "lightning_deepr.algorithm.signs",
        "Topology": "lightning_deepr.zoo.topology",
        "TurnoverTarget": "lightning_deepr.algorithm.steering",
        **dict.fromkeys(("LinearDecay", "LrPower"), "lightning_deepr.training.schedules"),
        **dict.fromkeys(("connections", "densify", "sparsify"), "lightning_deepr.conversion.convert"),
        "SparseLinear": "lightning_deepr.conversion.layers",
        "connectivity_report": "lightning_deepr.conversion.report",
        **dict.fromkeys(("load_state_dict", "save_sparse"), "lightning_deepr.files.checkpoint"),
        "adapt": "lightning_deepr.conversion.adapt",
        "adapters": "lightning_deepr.adapters",
        **dict.fromkeys(("load_adapter", "save_adapter"), "lightning_deepr.adapters.file"),
        "ages": "lightning_deepr.monitoring.ages",
        "dead_units": "lightning_deepr.monitoring.dead_units",
        "prune_dead_units": "lightning_deepr.monitoring.prune",
        "pictures": "lightning_deepr.pictures",
        "decay_groups": "lightning_deepr.conversion.weight_decay",
        "follow": "lightning_deepr.weights.following",
        "zoo": "lightning_deepr.zoo",
    },
    __all__,
)
