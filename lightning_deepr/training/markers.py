"""Marks in a Trainer's checkpoints, so that a dense network never loads a sparse one without a word.

``Model.load_from_checkpoint(path)`` builds the dense network. torch's ``load_state_dict`` refuses the names of a converted
weight and lists them, and one of them says what to call (:data:`lightning_deepr.weights.base.FORMAT_KEY`). With
``strict=False`` it skips them, and the network stays as it was drawn. But it always refuses a parameter of another shape: so
each converted weight has an empty tensor under the dense weight's name. A converted network skips it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_deepr.weights.find import converted_tensors


def mark(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Add the marks of all converted weights to a checkpoint's ``state_dict``. A mark has no elements."""
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict):
        return
    for converted in converted_tensors(module):
        owner = converted.name.removesuffix(converted.tensor_name)
        if f"{owner}parametrizations.{converted.tensor_name}.original" in state:
            state.setdefault(converted.name, torch.empty(0))


class Marking:
    """The marks of one module's checkpoints: around its ``on_save_checkpoint``, which weights-only checkpoints call, too."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

        def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
            type(module).on_save_checkpoint(module, checkpoint)  # type: ignore[attr-defined]
            mark(module, checkpoint)

        self._mine = on_save_checkpoint
        self._earlier = vars(module).get("on_save_checkpoint")
        if self._earlier is None:
            module.__dict__["on_save_checkpoint"] = on_save_checkpoint

    def remove(self) -> None:
        """Take them off the module again."""
        if vars(self._module).get("on_save_checkpoint") is self._mine:
            del self._module.__dict__["on_save_checkpoint"]
