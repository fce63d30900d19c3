"""DEEP R as an environment variable asks for it, see ``lightning_deepr/_environment.py``."""

# no `from __future__ import annotations`: see training/arguments.py

from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from lightning_deepr.methods.deepr import DeepR
from lightning_deepr.packages.messages import rank_zero_info, rank_zero_warn
from lightning_deepr.training.callback import SparseTraining

if TYPE_CHECKING:
    import lightning.pytorch as pl


@dataclass(kw_only=True, eq=False, repr=False)
class DeepRFromEnvironment(DeepR):
    """DEEP R for a Trainer that has no callback of this package. One that has keeps what it has."""

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        others = [one for one in trainer.callbacks if isinstance(one, SparseTraining) and one is not self]  # type: ignore[attr-defined]
        if others:
            rank_zero_warn(f"LIGHTNING_DEEPR is set, but the Trainer has {others[0]!r}: the variable is not used.")
            trainer.callbacks = [one for one in trainer.callbacks if one is not self]  # type: ignore[attr-defined]
            return
        rank_zero_info(f"LIGHTNING_DEEPR: training with DeepR(connectivity={self.connectivity!r}).")
        super().setup(trainer, pl_module, stage)
