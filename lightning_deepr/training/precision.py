"""The Trainer's true precisions: 64-true, 16-true and bf16-true."""

from __future__ import annotations

from typing import Any

from torch import nn

_CASTING = ("DoublePrecision", "HalfPrecision")


def cast_early(trainer: Any, module: nn.Module) -> None:
    """Cast the module now to the dtype of a precision that casts all of it.

    The Trainer restores a checkpoint first and casts the module afterwards: the float64 values of ``64-true`` would pass
    through float32, and a training that is resumed would not be the uninterrupted one.

    Args:
        trainer: the Trainer of either Lightning package.
        module: its LightningModule.
    """
    plugin = trainer.precision_plugin
    if any(kind.__name__ in _CASTING for kind in type(plugin).__mro__):
        plugin.convert_module(module)
