"""Loads the weights of the best validation when training ends, to be used with early stopping."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lightning_deepr.packages.classes import Callback
from lightning_deepr.packages.messages import rank_zero_info
from lightning_deepr.packages.names import is_a

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint


class BestWeights(Callback):
    """Loads the best checkpoint of the Trainer's ``ModelCheckpoint(monitor=...)`` when training ends.

    The Trainer then tests and saves the best weights. List this callback after an averaging callback and before a callback that
    writes the network to a file: an averaging callback writes its average to the network when training ends, and the checkpoint
    has the average of its own epoch.

    Raises:
        ValueError: no ModelCheckpoint has a ``monitor``.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not self._watching(trainer):
            raise ValueError(
                "BestWeights: expected a ModelCheckpoint with a monitor among the Trainer's callbacks, found none: "
                'add one, such as ModelCheckpoint(monitor="val_frame_error").'
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for checkpoint in self._watching(trainer):
            if not checkpoint.best_model_path:  # stopped before the first validation
                continue
            path = trainer.strategy.broadcast(checkpoint.best_model_path)
            state = torch.load(path, map_location=pl_module.device, weights_only=True)
            pl_module.load_state_dict(state["state_dict"])
            rank_zero_info(
                f"The network has the weights of its best validation: {checkpoint.monitor} "
                f"{float(checkpoint.best_model_score or 0):.4f} after epoch {state['epoch']}."
            )
            return

    @staticmethod
    def _watching(trainer: Trainer) -> list[ModelCheckpoint]:
        return [
            one  # type: ignore[misc]
            for one in trainer.checkpoint_callbacks
            if is_a(one, "callbacks.model_checkpoint", "ModelCheckpoint") and one.monitor  # type: ignore[attr-defined]
        ]
