"""A library call does not change the process: not its arguments, warning filters, log levels, seeds or environment."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_deepr import sparsify, zoo
from lightning_deepr.commands import main as command_line
from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes import running

ARGUMENTS = ["another_program", "--with", "arguments of its own"]
QUICK = [
    "--config",
    "mnist_quickstart",
    "--trainer.logger=false",
    "--trainer.callbacks=null",
    "--trainer.enable_checkpointing=false",
]
SHORT = ["--trainer.max_steps=2", "--trainer.limit_test_batches=1", "--trainer.enable_progress_bar=false"]


def of_the_process(names: Sequence[str]) -> dict[str, Any]:
    """Collect arguments, filters, and the levels of the named loggers: those that existed before (imports add others)."""
    levels = {name: logging.getLogger(name).level for name in names}
    return {"arguments": list(sys.argv), "filters": list(warnings.filters), "levels": levels}


def of_the_generators() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [str(part) for part in np.random.get_state()],  # noqa: NPY002 (the global generator is meant)
        "python": random.getstate(),
        "seed": os.environ.get("PL_GLOBAL_SEED"),
    }


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set up the process of a program with its own arguments and filters. Heavy imports come first, as they change filters."""
    pytest.importorskip("jsonargparse")
    import lightning.pytorch.cli  # noqa: F401

    pytest.importorskip("torchvision.datasets")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(ARGUMENTS))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "exists and is not empty")
        names = ["", *logging.root.manager.loggerDict]
        before = of_the_process(names)
        yield
        assert of_the_process(names) == before
    assert before["arguments"] == ARGUMENTS


@pytest.mark.usefixtures("process")
def test_a_recipe_is_made_without_a_trace() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = running.train([*QUICK, "--model.lr=0.123", "--sparsity.connectivity=0.05"], run=False)
    assert made.model.hparams["lr"] == 0.123 and made.trainer.callbacks[0].connectivity == 0.05
    assert not [one for one in caught if "command line arguments" in str(one.message)], "LightningCLI warned about sys.argv"


@pytest.mark.usefixtures("process")
def test_a_training_leaves_no_trace() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = running.train(["fit", *QUICK, *SHORT])
    assert done.trainer.global_step == 2
    assert not [one for one in caught if "many workers" in str(one.message)], (
        "harmless warnings are still filtered while it runs"
    )


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "no_such_recipe"], SystemExit),
        (["--config", "mnist_quickstart", "--sparsity=NoMethod"], SystemExit),
        ([*QUICK, "--model.no_such_setting=1"], SystemExit),
        ([*QUICK, "--data.batch_size=0"], ValueError),
    ],
)
def test_nor_does_one_that_fails(
    arguments: list[str], expected: type[BaseException], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(expected):
        running.train(arguments, run=False)


@pytest.mark.usefixtures("process")
@pytest.mark.parametrize(
    "arguments", [["recipes"], ["--help"], ["zoo", "list"], ["nothing"], ["report", "nothing.ckpt"], ["fit", *QUICK, *SHORT]]
)
def test_nor_does_a_command(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        command_line.main(arguments)
    assert capfd.readouterr().out or "nothing" in " ".join(arguments)


@pytest.mark.usefixtures("process")
def test_nor_does_a_verification_with_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also the generators keep their state: the recipe's seed_everything and its network would change it."""
    net, recipe = sparsify(LeNet300100(), 0.01), {"name": "mnist_quickstart", "overrides": {}}
    path = zoo.save(net, tmp_path / "net.safetensors", recipe=recipe, metrics={"a": {"correct": 0, "examples": 3000}})
    before = of_the_generators()
    with pytest.raises(ValueError, match="expected 0 of 3000 right"):
        zoo.verify(path, running.data_of_recipe(zoo.info(path)))
    with pytest.raises(SystemExit, match="expected 0 of 3000 right"):
        command_line.main(["zoo", "verify", str(path), "--data"])
    assert of_the_generators() == before


# -- importing ----------------------------------------------------------------------------------------------------------------


IMPORT = """
import sys, warnings, torch
from torch.nn.modules import module
from torch.optim import optimizer

CLASSES = (
    torch.nn.Module, torch.nn.Linear, torch.nn.Conv2d, torch.nn.RNNBase, torch.nn.LSTM, torch.optim.Optimizer, torch.Tensor
)

def hooks():
    everything = {**vars(module), **vars(optimizer)}
    return {name: len(value) for name, value in everything.items() if name.startswith("_global") and hasattr(value, "__len__")}

def rest():
    return list(warnings.filters), list(sys.argv), [dict(vars(one)) for one in CLASSES]

before = hooks(), rest()
assert len(before[0]) >= 10, before[0]
import lightning_deepr
"""
HEAVY = ("lightning", "wandb", "torchvision", "torchmetrics", "matplotlib", "huggingface_hub", "numba", "triton")


def test_the_import_does_nothing() -> None:
    """The package registers no hook, patches no class and filters no warning when it is imported, and imports nothing heavy."""
    code = IMPORT + f"assert before == (hooks(), rest())\nassert not {set(HEAVY)} & sys.modules.keys(), sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr


def test_a_conversion_hooks_what_averages_need_once() -> None:
    """The first conversion adds the only two hooks for the whole process: for copies, and for DDP."""
    code = IMPORT + (
        "for _ in range(2): lightning_deepr.sparsify(torch.nn.Linear(30, 9), 0.1)\n"
        "changed = {name: count - before[0][name] for name, count in hooks().items() if count != before[0][name]}\n"
        "assert changed == {'_global_module_registration_hooks': 2}, changed\n"
        "assert rest() == before[1]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
