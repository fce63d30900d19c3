"""A data module that resumes in the middle of an epoch."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning_deepr.packages.classes import LightningDataModule
from lightning_deepr.recipes.batches import ResumableBatches

_Loader = TypeVar("_Loader", bound=ResumableBatches)


class ResumableDataModule(LightningDataModule):
    """A data module that saves and restores the position of the training batches as part of its own state.

    Lightning also saves a loader's state, but does not restore it if something has asked for the length of the training before.
    A schedule over all steps asks in ``configure_optimizers``; the epoch would then begin anew. Lightning restores a data
    module before that.
    """

    _batches: ResumableBatches | None = None
    _saved: dict[str, Any] | None = None

    def resuming(self, loader: _Loader) -> _Loader:
        """Return the loader of ``train_dataloader``, moved to the position that the checkpoint saved."""
        if self._saved is not None:
            loader.load_state_dict(self._saved)
            self._saved = None
        self._batches = loader
        return loader

    def state_dict(self) -> dict[str, Any]:
        return {} if self._batches is None else {"batches": self._batches.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict.get("batches")
