"""The benchmark scripts run; their measurements are not tested."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_deepr import zoo
from lightning_deepr.recipes.running import find_recipe
from lightning_deepr.recipes.timit_cache import Frames
from lightning_deepr.recipes.timit_data import TIMIT
from lightning_deepr.zoo import make
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow  # each test starts a process that imports everything and compiles with the smallest settings

SCRIPTS = ROOT / "benchmarks"


def run(script: str, out: Path, *arguments: str) -> tuple[list[dict[str, str]], str]:
    """Run a script, and return the rows that it writes and the text that it prints."""
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), "--rounds", "1", "--threads", "1", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / f"{script}.png").is_file()
    with (out / f"{script}.csv").open(encoding="utf-8") as file:
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
    assert taken["MLP, dense"] > 4 * 20e6 * 4 / 1e6 * 0.9  # weight, gradient and Adam's two moments: the measurement works
    assert taken["MLP, DeepR"] < taken["MLP, dense"]


def test_break_even(tmp_path: Path) -> None:
    sizes = ("--sizes", "64x64,256x256", "--densities", "0.01,0.5", "--batches", "1,128", "--budget", "0.003")
    arguments = (*sizes, "--fit", "--only", "linear;conv 1x1")
    rows, printed = run("break_even", tmp_path, *arguments)
    # float32 has two densities, bfloat16 four; three 1 x 1 convolutions with three batches and four densities in both dtypes
    assert len(rows) == 2 * 2 * (2 + 4) + 3 * 3 * 4 * 2
    assert all(float(row["sparse_us"]) > 0 and float(row["dense_us"]) > 0 for row in rows)
    assert "| linear 256x256 | float32 | 128 |" in printed
    assert "sparse, float32, few rows: (" in printed and "dense convolution, bfloat16: (" in printed
    again, _ = run("break_even", tmp_path, *arguments)
    assert again == rows, "what is measured is not measured again"


def test_networks(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    arguments = ["--rounds", "1", "--budget", "0.01", "--out", str(tmp_path), "--only", "mobilenet_v3_small"]
    for _ in range(2):  # the second time there is nothing to do
        command = [sys.executable, str(SCRIPTS / "networks.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-2000:]
        with (tmp_path / "networks.csv").open(encoding="utf-8") as file:
            rows = {row["arm"]: row for row in csv.DictReader(file)}
        assert "| torchvision/mobilenet_v3_small |" in done.stdout and "| **median** |" in done.stdout
    assert {"dense", "masked 10%", "DeepR 1%", "DeepR 5%", "DeepR 10%", "DeepR 30%"} <= set(rows)
    # AdamW keeps two moments of K values for a converted weight, and of N for a dense one
    state = {arm: float(row["state_MB"]) for arm, row in rows.items() if row["state_MB"]}
    assert state["DeepR 1%"] < state["DeepR 10%"] < 0.2 * state["dense"] and state["masked 10%"] == state["dense"]


@pytest.mark.parametrize(("script", "arguments"), [("distributions", []), ("deployment", ["--rounds", "1"])])
def test_what_the_documentation_shows_is_what_the_script_finds(script: str, arguments: list[str], tmp_path: Path) -> None:
    """Nothing of these tables depends on the machine: how connections are shared out, and which layer exports where."""
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), *arguments, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / f"{script}.csv").read_text(encoding="utf-8") == (SCRIPTS / f"{script}.csv").read_text(encoding="utf-8")
    if script == "deployment":
        page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
        with (tmp_path / "deployment.csv").open(encoding="utf-8") as file:
            assert all(f"| {' | '.join(row.values())} |" in page for row in csv.DictReader(file))


def test_the_table_of_the_mnist_results_is_printed_from_the_recorded_runs() -> None:
    command = [sys.executable, str(SCRIPTS / "reproduction" / "mnist.py"), "--table"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    with (SCRIPTS / "reproduction" / "results.csv").open(encoding="utf-8") as file:
        arms = {row["arm"] for row in csv.DictReader(file)}
    assert arms
    assert all(f"| {arm} |" in done.stdout for arm in arms)


@pytest.mark.parametrize(("arm", "recipe"), [("best", "mnist_best"), ("paper", "mnist")])
def test_an_arm_has_the_settings_of_its_recipe(arm: str, recipe: str) -> None:
    """The README's accuracies come from the arms, so the settings of the named recipe must stay those of the arm."""
    spec = importlib.util.spec_from_file_location("mnist_study", SCRIPTS / "reproduction" / "mnist.py")
    assert spec is not None
    assert spec.loader is not None
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    settings = study.ARMS[arm]
    written = yaml.safe_load(Path(find_recipe(recipe)).read_text(encoding="utf-8"))

    assert settings["model"] == written["model"]["init_args"]
    assert {"root": "data", "batch_size": 10, **settings["data"]} == written["data"]["init_args"]
    assert settings.get("epochs", 10) == written["trainer"]["max_epochs"]

    def plain(value: object) -> object:
        """Write a schedule in the form of the recipe."""
        if hasattr(value, "__dict__"):
            return {"class_path": f"lightning_deepr.{type(value).__name__}", "init_args": vars(value)}
        return value

    assert written["sparsity"]["class_path"] == "lightning_deepr.DeepR"
    assert {name: plain(value) for name, value in settings["deepr"].items()} == written["sparsity"]["init_args"]


def test_the_cifar10_recipe_has_the_settings_of_the_study() -> None:
    study, written = (
        script("reproduction/cifar10.py"),
        yaml.safe_load(Path(find_recipe("cifar10_best")).read_text(encoding="utf-8")),
    )
    settings = study.settings_of("deepr", 0.05)
    model, sparsity = written["model"]["init_args"], written["sparsity"]["init_args"]
    assert {name: model[name] for name in ("lr", "momentum", "weight_decay")} == {
        name: settings[name] for name in ("lr", "momentum", "weight_decay")
    }
    assert model["warmup_epochs"] == settings["warmup"] and sparsity["l1"]["init_args"] == {"start": settings["l1"], "end": 0.0}
    assert sparsity["connectivity"] == study.budget(0.05, settings["shares"])
    assert written["trainer"]["max_epochs"] == study.EPOCHS["study"]


def test_the_timit_recipe_has_the_settings_of_the_study() -> None:
    study, written = (
        script("reproduction/timit.py"),
        yaml.safe_load(Path(find_recipe("timit_sample")).read_text(encoding="utf-8")),
    )
    settings = study.settings_of("deepr", 0.05)
    model, sparsity = written["model"]["init_args"], written["sparsity"]["init_args"]
    found = (model["lr"], model["input_noise"], model["input_offset"], model.get("dropout", 0.0))
    assert found == (settings["lr"], settings["noise"], settings["offset"], settings["dropout"])
    assert list(sparsity["l1"]["init_args"].values()) == settings["l1"][1:]
    assert sparsity["connectivity"] == study.budget(0.05, settings["shares"])


def test_the_zoo_has_the_settings_of_the_studies() -> None:
    cifar10, timit = script("reproduction/cifar10.py"), script("reproduction/timit.py")
    for tag, counts in make.CIFAR10_COUNTS.items():
        c, plan = int(tag) / 100, make.PLANS[f"cifar10_cnn.deepr_{tag}pct_cifar10"]
        settings = cifar10.settings_of("deepr", c)
        assert counts == cifar10.budget(c, settings["shares"])
        assert plan.overrides.get("sparsity.l1.init_args.start", cifar10.OWN["deepr"]["l1"]) == settings["l1"]
    for tag, counts in make.TIMIT_COUNTS.items():
        c, plan = int(tag) / 100, make.PLANS[f"timit_blstm.deepr_{tag}pct_timit_sample"]
        settings = timit.settings_of("deepr", c)
        assert counts == timit.budget(c, settings["shares"])
        assert plan.overrides.get("model.dropout", 0.0) == settings["dropout"]
        assert plan.overrides.get("sparsity.l1.init_args.start", timit.OWN["deepr"]["l1"][1]) == settings["l1"][1]


def script(path: str) -> Any:
    """Import a study's script as a module."""
    file = SCRIPTS / path
    name = "study_" + file.stem + file.parent.name
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_first(study: Any, parts: tuple[str, ...], *arguments: Any) -> None:
    """Check that the first job of each arm (and of each variant of some parts) trains and fills the file's columns."""
    jobs = [job for part in parts for job in study.jobs(part, list(study.ARMS))]
    first = {(job.part, job.arm, job.trial if job.part == "scope" else ""): job for job in reversed(jobs)}
    for job in first.values():
        row = study.run(job, *arguments)
        wanted = round(job.connectivity * study.TOTAL)
        assert int(row["connections"]) == wanted or job.arm in ("soft_deepr", "l1_shrinkage", "small_dense"), row
        columns = set(study.RESULTS.columns) - {field.name for field in dataclasses.fields(job)} - {"torch"}
        assert set(row) == columns
    assert {arm for _, arm, _ in first} == set(study.ARMS)


def test_every_arm_of_the_comparison_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = script("comparison/mnist.py")
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(300, 784, generator=generator), torch.randint(0, 10, (300,), generator=generator)
    monkeypatch.setattr(comparison, "digits", lambda root, split: (x, y, x, y))
    monkeypatch.setattr(comparison, "epochs_of", lambda part: 1)
    train_first(comparison, ("common", "tune", "scope", "rewiring"), "")


def run_on_noise(study: Any, monkeypatch: pytest.MonkeyPatch, epochs: int) -> list[int]:
    """Run CIFAR-10's study on 256 made-up images, and list the epochs that were trained."""
    images = torch.randint(0, 256, (356, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made_up = images[:256], torch.arange(256) % 10, images[256:], torch.arange(100) % 10
    monkeypatch.setattr(study.CIFAR10DataModule, "load", lambda self: made_up)
    monkeypatch.setattr(study, "EPOCHS", {"study": epochs})
    trained: list[int] = []

    class Watched(study.Crops):  # type: ignore[misc]
        def set_epoch(self, epoch: int) -> None:
            trained.append(epoch)
            super().set_epoch(epoch)

    monkeypatch.setattr(study, "Crops", Watched)
    return trained


def test_every_arm_trains_on_cifar10(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    study = script("reproduction/cifar10.py")
    run_on_noise(study, monkeypatch, 2)
    train_first(study, ("study",), "", str(tmp_path))
    # when a run ends, its state for interruptions is removed, and its network stays
    assert {file.name for file in tmp_path.iterdir()} == {
        f"study_{arm}_0.05_0.safetensors" for arm in study.ARMS if arm != "dense"
    }
    assert zoo.info(tmp_path / "study_deepr_0.05_0.safetensors")["connectivity"]["active"] == 53_379 - 6_720


@pytest.mark.parametrize(("arm", "shared"), [("pruning", 1), ("l1_shrinkage", 3), ("deepr", 0)])
def test_what_the_connectivities_of_an_arm_share_is_trained_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arm: str, shared: int
) -> None:
    study = script("reproduction/cifar10.py")
    trained = run_on_noise(study, monkeypatch, 5)
    cut = {"pruning": {"prune_from": 0.3}, "l1_shrinkage": {"freeze_at": 0.7, "l1": 1e-4}}.get(arm, {})
    settings = json.dumps({**study.settings_of(arm, 0.05), **cut})
    jobs = [next(job for job in study.jobs("study", [arm]) if job.connectivity == c) for c in (0.05, 0.2)]
    first, second = (dataclasses.replace(job, settings=settings) for job in jobs)
    study.run(first, "", str(tmp_path))
    assert trained == [0, 1, 2, 3, 4]
    trained.clear()
    found = study.run(second, "", str(tmp_path))
    assert trained == list(range(shared, 5))
    alone = study.run(second, "", None)
    assert {**found, "seconds": 0} == {**alone, "seconds": 0}
    assert found["connections"] == 213_517


def test_a_run_stopped_with_other_settings_is_begun_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    study = script("reproduction/cifar10.py")
    trained = run_on_noise(study, monkeypatch, 3)
    job = study.jobs("study", ["deepr"])[0]

    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    def stopped_before_the_test() -> None:
        with monkeypatch.context() as context:
            context.setattr(study, "connectivity_report", stop)
            with pytest.raises(KeyboardInterrupt):
                study.run(job, "", str(tmp_path))
        trained.clear()

    stopped_before_the_test()
    found = study.run(job, "", str(tmp_path))
    assert trained == []  # all three epochs were kept
    assert found["train_loss"] > 0

    stopped_before_the_test()
    study.run(dataclasses.replace(job, settings=json.dumps({**json.loads(job.settings), "lr": 0.01})), "", str(tmp_path))
    assert trained == [0, 1, 2]


def timit_on_noise(monkeypatch: pytest.MonkeyPatch, steps: int, frames: int) -> Any:
    study = script("reproduction/timit.py")
    frames = Frames(torch.randn(frames, 39), torch.arange(frames) % 60, torch.arange(0, frames + 1, 200))
    made_up = TIMIT(frames, frames, frames, {}, torch.zeros(39), torch.ones(39))
    monkeypatch.setattr(study, "load_timit", lambda *arguments, **options: made_up)
    monkeypatch.setattr(study, "COMMON", {**study.COMMON, "steps": steps})
    return study


@pytest.mark.parametrize("in_common", [3, 4])  # steps: to the end of an epoch, and to its middle
@pytest.mark.parametrize("arm", ["pruning", "l1_shrinkage"])
def test_what_the_connectivities_of_an_arm_share_on_timit_is_trained_once(
    monkeypatch: pytest.MonkeyPatch, arm: str, in_common: int
) -> None:
    study = timit_on_noise(monkeypatch, 8, 8000)  # three batches an epoch
    monkeypatch.setattr(study, "EVERY", 3)
    cut = (in_common + 1) / 8
    cutting = {"pruning": {"prune_from": cut, "prune_until": 0.9}, "l1_shrinkage": {"freeze_at": cut}}[arm]
    settings = {**study.COMMON, **study.OWN[arm], **cutting, "dropout": 0.2}
    jobs = [next(job for job in study.jobs("study", [arm]) if job.connectivity == c) for c in (0.05, 0.2)]
    first, second = (dataclasses.replace(job, settings=json.dumps(settings)) for job in jobs)
    study.run(first, "", None)
    assert len(study._begun) == 1
    monkeypatch.setattr(study, "SequenceBatches", counted := count_batches(study.SequenceBatches))
    found = study.run(second, "", None)
    assert counted.training == 8 - in_common
    study._begun.clear()
    alone = study.run(second, "", None)
    assert counted.training == 8 - in_common + 8
    assert {**found, "seconds": 0} == {**alone, "seconds": 0}
    study.run(dataclasses.replace(second, seed=1), "", None)
    assert {key[1] for key in study._begun} == {1}  # the runs of the other split are forgotten


def count_batches(kind: Any) -> Any:
    class Counted(kind):  # type: ignore[misc]
        training = 0

        def __iter__(self) -> Any:
            for batch in super().__iter__():
                Counted.training += self.shuffle
                yield batch

    return Counted


def test_every_arm_trains_on_timit(monkeypatch: pytest.MonkeyPatch) -> None:
    study = timit_on_noise(monkeypatch, 6, 2000)
    monkeypatch.setattr(study, "OWN", {arm: {k: v for k, v in own.items() if k != "steps"} for arm, own in study.OWN.items()})
    monkeypatch.setattr(study, "best_trial", lambda arm, connectivity: "first")
    train_first(study, ("study",), "", None)


def test_the_best_trial_is_that_of_those_that_are_sparse_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    study = script("reproduction/timit.py")
    rows: list[dict[str, str]] = []

    def tried(trial: str, connectivity: str, seed: int, error: float, connections: int, arm: str = "deepr") -> None:
        rows.append(
            {
                "part": "tune",
                "arm": arm,
                "trial": trial,
                "connectivity": connectivity,
                "seed": str(seed),
                "val_error": str(error),
                "connections": str(connections),
            }
        )

    monkeypatch.setattr(type(study.RESULTS), "read", lambda self: rows)
    monkeypatch.setattr(study, "TRIALS", {arm: {trial: {} for trial in "abcde"} for arm in study.TRIALS})
    assert study.best_trial("deepr", 0.05) == "first" and study.finalists("deepr", 0.05) == []
    for arm in ("deepr", "soft_deepr"):
        for trial, first, second, found in (
            ("a", 41, 43, 9_318),
            ("b", 40, 39, 11_000),
            ("c", 41, 41, 9_318),
            ("d", 44, 46, 9_000),
        ):
            tried(trial, "0.05", 0, first, 9_318, arm)
            tried(trial, "0.05", 1, second, found, arm)
    assert study.best_trial("deepr", 0.05) == study.best_trial("deepr", 0.01) == "c"  # b had too many connections once
    assert study.best_trial("soft_deepr", 0.05) == "b"  # soft-DEEP R only aims at the number: b's 1.18 times is no fault
    assert study.best_trial("pruning", 0.05) == study.best_trial("deepr", 0.1) == "first"
    assert study.finalists("deepr", 0.05) == [], "a trial is missing"
    tried("e", "0.05", 0, 42, 9_318), tried("e", "0.05", 1, 43, 9_318)
    assert study.finalists("deepr", 0.05) == ["c", "a", "e"]
    assert {(job.part, job.trial, job.seed) for job in study.jobs("finals", ["deepr"])} == {
        ("tune", trial, split) for trial in "cae" for split in (2, 3)
    }
    for trial, error in (("c", 45), ("a", 40)):
        tried(trial, "0.05", 2, error, 9_318), tried(trial, "0.05", 3, error, 9_318)
    assert study.best_trial("deepr", 0.05) == "a"  # over all four splits
    assert study.finalists("deepr", 0.05) == ["c", "a", "e"]
    tried("d", "0.1", 0, 30, 18_637), tried("d", "0.1", 1, 30, 18_637)
    assert study.best_trial("deepr", 0.1) == study.best_trial("deepr", 0.2) == "d" and study.best_trial("deepr", 0.05) == "a"


def test_a_study_does_again_what_had_other_settings(tmp_path: Path) -> None:
    grid = script("grid.py")
    results = grid.Results(tmp_path / "r.csv", "error")
    for seed, settings in ((0, '{"a": 1}'), (1, '{"a": 2}')):
        results.write({"part": "study", "arm": "x", "connectivity": "0.05", "seed": seed, "trial": "", "settings": settings})
    jobs = [grid.Job("study", "x", 0.05, seed, "", "test", '{"a": 1}') for seed in (0, 1, 2)]
    results.forget(jobs[:1])
    assert len(results.read()) == 2
    results.forget(jobs)
    assert [row["seed"] for row in results.read()] == ["0"]


def test_data_loading(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "data_loading.py"), "--steps", "1", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    with (tmp_path / "data_loading.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["recipe"].split(",")[0] for row in rows} == {"mnist_best", "cifar10", "timit_sample", "timit"}
    assert all(0 < float(row["share_of_step"].rstrip(" %")) < 100 for row in rows)
