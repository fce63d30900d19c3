"""A data module that goes on in the middle of an epoch."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning.pytorch import LightningDataModule

from lightning_deepr.recipes.batches import ResumableBatches

_Loader = TypeVar("_Loader", bound=ResumableBatches)


class ResumableDataModule(LightningDataModule):
    """Carries the state of the training batches in its own.

    Lightning saves a loader's state but restores it only where nothing has asked for the length of the training before: an optimizer whose
    schedule is over all steps asks in ``configure_optimizers``, and the epoch would begin anew. A data module is restored before that.
    """

    _batches: ResumableBatches | None = None
    _saved: dict[str, Any] | None = None

    def resuming(self, loader: _Loader) -> _Loader:
        """The loader of ``train_dataloader``, where the checkpoint left it."""
        if self._saved is not None:
            loader.load_state_dict(self._saved)
            self._saved = None
        self._batches = loader
        return loader

    def state_dict(self) -> dict[str, Any]:
        return {} if self._batches is None else {"batches": self._batches.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict.get("batches")
