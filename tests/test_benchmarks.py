"""The benchmark scripts run; what they measure is not tested."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_deepr.cli import find_recipe

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_step_time(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "step_time.py"), "--rounds", "1", "--steps", "4", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    with (tmp_path / "step_time.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["batch"], row["arm"]) for row in rows} >= {("10", "dense"), ("10", "DeepR, Trainer"), ("128", "masked dense")}
    assert (tmp_path / "step_time.png").is_file()


def test_the_table_of_the_mnist_results_is_printed_from_the_recorded_runs() -> None:
    command = [sys.executable, str(SCRIPTS / "reproduction" / "mnist.py"), "--table"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    with (SCRIPTS / "reproduction" / "results.csv").open() as file:
        arms = {row["arm"] for row in csv.DictReader(file)}
    assert arms
    assert all(f"| {arm} |" in done.stdout for arm in arms)


@pytest.mark.parametrize(("arm", "recipe"), [("best", "mnist_best"), ("paper", "mnist")])
def test_an_arm_has_the_settings_of_its_recipe(arm: str, recipe: str) -> None:
    """The accuracies in the README are of the arms; the recipe that they are said to be of must not drift away."""
    spec = importlib.util.spec_from_file_location("mnist_study", SCRIPTS / "reproduction" / "mnist.py")
    assert spec is not None
    assert spec.loader is not None
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    settings = study.ARMS[arm]
    written = yaml.safe_load(Path(find_recipe(recipe)).read_text())

    assert settings["model"] == written["model"]["init_args"]
    assert {"root": "data", "batch_size": 10, **settings["data"]} == written["data"]["init_args"]
    assert settings.get("epochs", 10) == written["trainer"]["max_epochs"]

    def plain(value: object) -> object:
        """A schedule as the recipe writes it."""
        if hasattr(value, "__dict__"):
            return {"class_path": f"lightning_deepr.{type(value).__name__}", "init_args": vars(value)}
        return value

    assert written["sparsity"]["class_path"] == "lightning_deepr.DeepR"
    assert {name: plain(value) for name, value in settings["deepr"].items()} == written["sparsity"]["init_args"]
