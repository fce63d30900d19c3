"""The benchmark scripts run; what they measure is not tested."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_deepr.cli import find_recipe

pytestmark = pytest.mark.slow  # a process each, that imports all and compiles at the least settings

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(script: str, out: Path, *arguments: str) -> tuple[list[dict[str, str]], str]:
    """The rows that a script leaves and what it prints."""
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), "--rounds", "1", "--threads", "1", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / f"{script}.png").is_file()
    with (out / f"{script}.csv").open() as file:
        return list(csv.DictReader(file)), done.stdout


def test_step_time(tmp_path: Path) -> None:
    rows, _ = run("step_time", tmp_path, "--steps", "2", "--only", "lenet")
    found = {(row["batch"], row["arm"]) for row in rows}
    assert found >= {("10", "dense"), ("10", "DeepR, Trainer"), ("128", "masked dense"), ("128", "DeepR, sparse")}
    ours = [row for row in rows if row["arm"].startswith("DeepR")]
    assert all(float(row["reborn_per_step"].rstrip("%")) >= 10 for row in ours), ours


def test_step_time_of_the_large_networks(tmp_path: Path) -> None:
    rows, _ = run("step_time", tmp_path, "--steps", "2", "--only", "mlp,cifar")
    assert {row["arm"] for row in rows if row["network"].startswith("CIFAR")} == {"dense", "DeepR, auto", "DeepR, dense"}
    assert {row["arm"] for row in rows} >= {"masked dense", "deep_rewire"}


def test_linear_layer(tmp_path: Path) -> None:
    rows, printed = run("linear_layer", tmp_path, "--only", "300x784", "--densities", "0.05", "--budget", "0.01")
    assert [row["arm"] for row in rows] == ["dense", "ours", "SparseProp", "CSR"]
    assert all(row["arm"] in printed for row in rows)
    assert all(row["ran"] == "yes" for row in rows if row["arm"] != "SparseProp")


def test_convolution(tmp_path: Path) -> None:
    rows, _ = run("convolution", tmp_path, "--budget", "0.02", "--only", "second", "--batches", "16")
    assert {row["arm"] for row in rows} == {"dense", "transient weight", "sparse"}


def test_recurrent(tmp_path: Path) -> None:
    options = ("--inputs", "39", "--hidden", "32", "--densities", "0.05", "--budget", "0.01")
    rows, _ = run("recurrent", tmp_path, *options)
    assert {"dense", "converted, dense", "converted, sparse"} <= {row["arm"] for row in rows}


def test_rewiring_cost(tmp_path: Path) -> None:
    rows, _ = run("rewiring_cost", tmp_path, "--largest", "1e5")
    by_count = [row for row in rows if row["series"] != "by N"]
    assert [row["K"] for row in by_count] == 2 * ["10000", "31623", "100000"]
    assert all(float(row["reborn_per_step"].rstrip("%")) >= 10 for row in rows)
    assert {row["N"] for row in rows if row["series"] == "by N"} == {"1e+07", "1e+08", "1e+09", "1e+10"}


def test_memory(tmp_path: Path) -> None:
    rows, _ = run("memory", tmp_path, "--steps", "2", "--only", "million,mlp")
    taken = {row["training"]: float(row["peak_MB_above_imports"]) for row in rows}
    assert taken["MLP, dense"] > 4 * 20e6 * 4 / 1e6 * 0.9  # weight, gradient and Adam's two moments: the figure is one
    assert taken["MLP, DeepR"] < taken["MLP, dense"]


def test_break_even(tmp_path: Path) -> None:
    arguments = ("--sizes", "64x64,256x256", "--densities", "0.01,0.5", "--batches", "1,128", "--budget", "0.003", "--fit")
    rows, printed = run("break_even", tmp_path, *arguments)
    assert len(rows) == 8
    assert all(float(row["sparse_us"]) > 0 and float(row["dense_us"]) > 0 for row in rows)
    assert "| 256x256 | 128 |" in printed
    assert "SPARSE = (" in printed


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


def test_every_arm_of_the_comparison_trains(tmp_path: Path) -> None:
    sys.path.insert(0, str(SCRIPTS / "comparison"))
    try:
        spec = importlib.util.spec_from_file_location("comparison", SCRIPTS / "comparison" / "mnist.py")
        assert spec is not None and spec.loader is not None
        comparison = sys.modules["comparison"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(comparison)
    finally:
        sys.path.pop(0)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(300, 784, generator=generator), torch.randint(0, 10, (300,), generator=generator)
    comparison._data.update(dict.fromkeys(("test", "validation"), (x, y, x, y)))
    threads = torch.get_num_threads()
    jobs = [job for part in ("common", "tune", "scope", "rewiring") for job in comparison.jobs(part, list(comparison.ARMS))]
    first = {(job.part, job.arm, job.trial if job.part == "scope" else ""): job for job in reversed(jobs)}
    try:
        for job in first.values():
            row = comparison.run(dataclasses.replace(job, epochs=1), "")
            wanted = round(job.connectivity * comparison.TOTAL)
            assert int(row["connections"]) == wanted or job.arm in ("soft_deepr", "l1_shrinkage"), row
            assert set(row) == set(comparison.COLUMNS)
    finally:
        torch.set_num_threads(threads)
    assert {arm for _, arm, _ in first} == set(comparison.ARMS)


def test_data_loading(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "data_loading.py"), "--steps", "1", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    with (tmp_path / "data_loading.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["recipe"].split(",")[0] for row in rows} == {"mnist_best", "cifar10", "timit_sample", "timit"}
    assert all(0 < float(row["share_of_step"].rstrip(" %")) < 100 for row in rows)
