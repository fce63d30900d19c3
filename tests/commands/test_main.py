"""The command line's messages on unknown recipes, commands and checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lightning_deepr
from lightning_deepr.commands.main import main
from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes.loggers import wandb_mode
from tests.helpers.command_line import run


@pytest.mark.slow
def test_unknown_recipe_lists_the_recipes(tmp_path: Path) -> None:
    done = run("fit", "--config", "mnist_fast", cwd=tmp_path)
    assert done.returncode != 0
    assert "mnist_quickstart" in done.stderr
    assert "Traceback" not in done.stderr


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command line, which must end with an error, and return its messages."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code not in (0, None)
    return f"{stopped.value.code}\n{capsys.readouterr().err}"


def test_as_a_module(tmp_path: Path) -> None:
    done = run("--version", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip().endswith(lightning_deepr.__version__)
    done = run("trian", cwd=tmp_path)
    assert done.returncode == 2 and "lightning-deepr: " in done.stderr and "Traceback" not in done.stderr


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected fit" in refused(capsys, "train")


def test_report_of_what_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(LeNet300100().state_dict(), "dense.pt")
    for name, words in (("dense.pt", "expected a sparse checkpoint"), ("nothing.pt", "no checkpoint")):
        assert words in refused(capsys, "report", name)


def test_wandb_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode() == "online"
