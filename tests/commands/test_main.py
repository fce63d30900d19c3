"""The command line says what it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes.loggers import wandb_mode
from tests.helpers.command_line import run


def test_unknown_recipe_lists_the_recipes(tmp_path: Path) -> None:
    done = run("fit", "--config", "mnist_fast", cwd=tmp_path)
    assert done.returncode != 0
    assert "mnist_quickstart" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_command(tmp_path: Path) -> None:
    done = run("train", cwd=tmp_path)
    assert done.returncode != 0
    assert "expected fit" in done.stderr


def test_report_of_what_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save(LeNet300100().state_dict(), tmp_path / "dense.pt")
    for name, words in (("dense.pt", "expected a sparse checkpoint"), ("nothing.pt", "no checkpoint")):
        done = run("report", name, cwd=tmp_path)
        assert done.returncode != 0
        assert words in done.stderr
        assert "Traceback" not in done.stderr


def test_wandb_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode() == "online"
