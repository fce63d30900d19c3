"""A Trainer for tests."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl


def trainer(*callbacks: Any, **options: Any) -> pl.Trainer:
    """Make a Trainer on the CPU that writes no files and no output."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "callbacks": [*callbacks], **quiet, **options})
