"""Run the command line in its own process, as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Return the output and the exit status."""
    return subprocess.run(
        [sys.executable, "-m", "lightning_deepr", *arguments],
        cwd=cwd,
        env={**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=1800,
    )
