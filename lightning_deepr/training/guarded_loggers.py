"""A logger that fails does not end a training: it is told once, and the training goes on.

A log folder that can't be written, a disk that fills, a service that is gone: each raises inside Lightning's own calls of the
logger. The calls of a guarded logger give a warning instead, once per logger.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning_deepr.packages.messages import rank_zero_warn

_CALLS = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")
_MARK = "_lightning_deepr_guarded"


def guard(trainer: Any) -> None:
    """Guard the loggers of a trainer until Lightning finalizes them, which it does at the end of each fit or test."""
    for logger in trainer.loggers:
        if _MARK in vars(logger):
            continue
        told: list[str] = []
        names = [name for name in _CALLS if name not in vars(logger) and callable(getattr(logger, name, None))]
        for name in names:
            setattr(logger, name, _guarded(getattr(logger, name), logger, told))
        setattr(logger, _MARK, names)


def _unguard(logger: Any) -> None:
    """Give a logger its own calls back."""
    for name in vars(logger).pop(_MARK, ()):
        vars(logger).pop(name, None)


def _guarded(call: Callable[..., Any], logger: Any, told: list[str]) -> Callable[..., Any]:
    @functools.wraps(call)
    def guarded(*arguments: Any, **options: Any) -> Any:
        try:
            return call(*arguments, **options)
        except Exception as error:
            if not told:
                told.append(call.__name__)
                tell(logger, error)
        finally:
            if call.__name__ == "finalize":
                _unguard(logger)

    return guarded


def tell(logger: Any, error: Exception) -> None:
    """Warn of a logger that failed."""
    rank_zero_warn(
        f"{type(logger).__name__} failed ({type(error).__name__}: {error}). The training goes on; what this logger should have "
        "recorded is missing. This is said once."
    )


def drop_unusable(trainer: Any) -> None:
    """Leave out the loggers that can't begin: Lightning asks each for its experiment before any callback is called."""
    kept = []
    for logger in trainer.loggers:
        try:
            _ = getattr(logger, "experiment", None)
        except Exception as error:
            tell(logger, error)
        else:
            kept.append(logger)
    if len(kept) < len(trainer.loggers):
        trainer.loggers = kept
