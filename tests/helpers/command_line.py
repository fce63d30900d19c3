"""The command line in a process of its own, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """What it says and how it ends."""
    return subprocess.run(
        [sys.executable, "-m", "lightning_deepr.commands.main", *arguments],
        cwd=cwd,
        env={**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=1800,
    )
