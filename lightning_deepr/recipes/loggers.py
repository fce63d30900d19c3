"""A Weights & Biases logger that works without an account."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from lightning_deepr._needed import needed
from lightning_deepr.packages.classes import WandbLogger as _WandbLogger
from lightning_deepr.packages.messages import rank_zero_info


def wandb_mode() -> str:
    """Choose the mode: WANDB_MODE if that environment variable is set, else "online" with a key and "offline" without."""
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    import wandb

    return "online" if wandb.login(prompt=False) else "offline"


class WandbLogger(_WandbLogger):
    """Lightning's ``WandbLogger``, online with a key and offline without; it prints which.

    Args:
        project: the runs' project.
        save_dir: the folder for offline runs.
        name: the run's name.
        kwargs: further arguments of Lightning's logger.
    """

    def __init__(self, project: str = "lightning-deepr", save_dir: str = ".", name: str | None = None, **kwargs: Any) -> None:
        needed("wandb", purpose="WandbLogger")
        mode = wandb_mode()
        where = f"offline, in {os.path.join(save_dir, 'wandb')} (`wandb sync` uploads it)" if mode == "offline" else mode
        rank_zero_info(f"wandb logs {where}.")
        with contextlib.suppress(OSError):  # wandb then writes to a temporary folder, and says so
            os.makedirs(save_dir, exist_ok=True)
        os.environ.setdefault("WANDB_SILENT", "true")
        super().__init__(project=project, save_dir=save_dir, name=name, offline=mode == "offline", mode=mode, **kwargs)
