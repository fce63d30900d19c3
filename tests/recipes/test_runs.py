"""Runs have folders of their own, go on with one option, are tested by their folder, and can be told apart in their loggers."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_deepr import connections, zoo
from lightning_deepr.commands.main import main
from lightning_deepr.recipes import run_folders, running
from tests.helpers import wandb_file
from tests.helpers.optional import needs
from tests.helpers.paths import ROOT

RECIPE = str(ROOT / "recipes" / "mnist_quickstart.yaml")
SHORT = [
    "--trainer.max_steps=3",
    "--trainer.limit_test_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return tmp_path


def fit(*arguments: str) -> Any:
    return running.train(["fit", "--config", RECIPE, *SHORT, *arguments])


# -- folders ------------------------------------------------------------------------------------------------------------------


def test_folders_are_claimed_once_each_also_at_the_same_time(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda number: run_folders.claim(tmp_path / "a", {"number": number}), range(32)))
    assert len(set(found)) == 32
    assert {path.name for path in found} == {"a", *(f"run_{i}" for i in range(2, 33))}
    numbers = {run_folders.read_record(path)["number"] for path in found}
    assert numbers == set(range(32))


def test_a_folder_of_an_older_version_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "sparse.safetensors").write_bytes(b"precious")
    assert run_folders.claim(tmp_path / "old", {}) == tmp_path / "old" / "run_2"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("mine")
    assert run_folders.claim(tmp_path / "data", {}) == tmp_path / "data"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"expected a folder that this run can write to.*--out"):
        run_folders.claim(tmp_path / "file", {})
    with pytest.raises(ValueError, match="expected a folder"):
        run_folders.claim(tmp_path / "file" / "below", {})


@needs("jsonargparse")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": 2, "package_version": "9.1"}', r"format 1 or older, found 2, written by lightning-deepr 9\.1"),
        ("{", "can't be read"),
        ("[]", "something else"),
    ],
)
def test_a_run_of_another_version(content: str, message: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = place / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        run_folders.find(folder)
    for arguments in (["test", "run"], ["fit", "--resume", "run"], ["report", "run"], ["compare", "run", "run"]):
        with pytest.raises(SystemExit, match=message):
            main(arguments)


@pytest.mark.slow
def test_everything_moves_with_one_option_and_a_second_run_overwrites_nothing(place: Path) -> None:
    first = fit("--out", "out", "--seed_everything=1")
    names = {"run.json", "config.yaml", "sparse.safetensors", "connectivity.png", "connections.png", "csv", "checkpoints"}
    assert names <= {path.name for path in (place / "out").iterdir()}
    assert {path.name for path in place.iterdir()} == {"out"}
    before = {path: path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()}
    fit("--trainer.default_root_dir=out", "--seed_everything=2")
    second = place / "out" / "run_2"
    assert names <= {path.name for path in second.iterdir()}
    assert {path: path.read_bytes() for path in before} == before
    for folder, seed in ((place / "out", 1), (second, 2)):
        assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
        record = run_folders.read_record(folder)
        assert (
            record["status"] == "finished" and record["recipe"] == "mnist_quickstart" and "test_accuracy" in record["metrics"]
        )
        assert yaml.safe_load((folder / "config.yaml").read_text())["seed_everything"] == seed
    assert first.trainer.default_root_dir.endswith("out")
    assert not (zoo.connections_of(place / "out/sparse.safetensors")["fc1.weight"][1]
                == zoo.connections_of(second / "sparse.safetensors")["fc1.weight"][1]).all()  # fmt: skip

    # test finds the configuration by itself, by the folder, the sparse file and the checkpoint
    wanted = run_folders.read_record(second)["metrics"]["test_accuracy"]
    for path in ("out/run_2", "out/run_2/sparse.safetensors", "out/run_2/checkpoints/last.ckpt"):
        done = running.train(["test", path, "--trainer.enable_progress_bar=false"])
        assert float(done.trainer.callback_metrics["test_accuracy"]) == pytest.approx(wanted)
        assert int(sum(len(values) for _, _, values in connections(done.model).values())) == 2662
    assert not (second / "run_2").exists()

    # one option resumes, in the run's own folder
    resumed = running.train(["fit", "--resume", "out/run_2", *SHORT, "--trainer.max_steps=5"])
    assert resumed.trainer.global_step == 5
    assert torch.load(second / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 5
    assert not list((place / "out").glob("run_3")) and not list(second.rglob("last-v*.ckpt"))
    moved = (place / "out").rename(place / "elsewhere")
    running.train(["fit", "--resume", str(moved / "run_2"), *SHORT, "--trainer.max_steps=6"])
    assert torch.load(moved / "run_2/checkpoints/last.ckpt", weights_only=True)["global_step"] == 6
    assert not (place / "out").exists()


@needs("jsonargparse")
def test_the_dense_network(place: Path) -> None:
    done = fit("--out", "dense", "--sparsity=null")
    assert connections(done.model) == {}
    assert run_folders.read_record(place / "dense")["status"] == "finished"
    again = running.train(["test", "dense", "--trainer.enable_progress_bar=false"])
    assert connections(again.model) == {}


@needs("jsonargparse")
def test_a_test_without_a_checkpoint_refuses(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("test", "validate", "predict"):
        with pytest.raises(SystemExit) as refused:
            main([command, "--config", RECIPE])
        assert refused.value.code == 2
        assert "expected a checkpoint, found none" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="found nothing there"):
        main(["test", "--config", RECIPE, "--ckpt_path", "nothing.ckpt"])
    (place / "empty").mkdir()
    with pytest.raises(SystemExit, match="expected the folder of a run"):
        main(["test", "empty"])


@needs("jsonargparse")
def test_a_wrong_value_leaves_no_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("--sparsity.connectivity=2.0", "--sparsity.distribution=uniforn", "--model.lrr=1"):
        with pytest.raises(SystemExit) as refused:
            fit("--out", "out", wrong)
        assert refused.value.code == 2
    assert not (place / "out").exists()


# -- a sweep ------------------------------------------------------------------------------------------------------------------


@needs("jsonargparse")
@pytest.mark.parametrize("name", ["connectivity", "method"])
def test_the_sweeps_can_be_run(name: str, place: Path) -> None:
    sweep = yaml.safe_load((ROOT / "recipes" / "sweeps" / f"{name}.yaml").read_text())
    assert sweep["metric"]["name"] == "test_accuracy" and "${args}" in sweep["command"]
    axes = {key: entry["values"] for key, entry in sweep["parameters"].items()}
    command = [word for word in sweep["command"][2:] if word != "${args}"]
    seen = set()
    for values in itertools.product(*axes.values()):
        given = dict(zip(axes, values, strict=True))
        if given["seed_everything"]:
            continue  # seeds differ in nothing else
        made = running.train([*command, *(f"--{key}={value}" for key, value in given.items())], run=False)
        callback = made.trainer.callbacks[0]
        seen.add((type(callback).__name__, str(getattr(callback, "connectivity", None))))
    assert len(seen) == len(axes["sparsity.connectivity" if name == "connectivity" else "sparsity"])


@pytest.mark.slow
def test_two_runs_of_a_sweep_at_the_same_time(tmp_path: Path) -> None:
    """Four runs, two at a time, in one folder: each is complete on disk and tells what it is in wandb."""

    def one(seed: int) -> subprocess.CompletedProcess[str]:
        arguments = ["fit", "--config", RECIPE, "--out", "sweep", *SHORT, f"--seed_everything={seed}"]
        arguments.append(f"--sparsity.connectivity={0.01 * (1 + seed % 2)}")
        return subprocess.run(
            [sys.executable, "-m", "lightning_deepr.commands.main", *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=600, env={**os.environ, "WANDB_MODE": "offline"},
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(one, range(4)):
            assert done.returncode == 0, done.stderr[-3000:]
    folders = [tmp_path / "sweep", *(tmp_path / "sweep" / f"run_{i}" for i in (2, 3, 4))]
    seen = set()
    for folder in folders:
        assert run_folders.read_record(folder)["status"] == "finished"
        assert zoo.verify(folder / "sparse.safetensors")
        assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
        found = wandb_file.read(folder / "wandb")
        seen.add((found.config["sparsity"]["seed"], found.config["sparsity"]["connectivity"], found.run.display_name))
    assert len(seen) == 4 and {seed for seed, _, _ in seen} == {0, 1, 2, 3}
    assert len({name for _, _, name in seen}) == 4


# -- wandb --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # a training in a process of its own
def test_an_offline_run_of_wandb(place: Path) -> None:
    """What a team searches, groups and opens is in the offline file, which is read without wandb's own reader."""
    environment = {**os.environ, "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, "-m", "lightning_deepr.commands.main", "fit", "--config", RECIPE, *SHORT, "--out", "out"],
        cwd=place, capture_output=True, text=True, timeout=600, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = wandb_file.read(place / "out")
    sparsity = found.config["sparsity"]
    assert (sparsity["method"], sparsity["connectivity"], sparsity["K"], sparsity["N"]) == ("DeepR", 2662, 2662, 266_200)
    assert (sparsity["density"], sparsity["distribution"], sparsity["init"], sparsity["seed"]) == (0.01, "deepr", "module", 0)
    assert sparsity["l1"] == {"schedule": "LinearDecay", "start": 2e-4, "end": 0.0}
    assert found.config["schedule"] == "cosine" and found.config["recipe"] == "mnist_quickstart"
    assert {"torch", "lightning_deepr", "python"} <= found.config["versions"].keys()
    assert len(found.config["data_digest"]) == 16
    assert found.run.display_name == "mnist_quickstart-DeepR-K2662-seed0"
    assert list(found.run.tags) == ["mnist_quickstart", "DeepR", "K2662"]
    assert found.run.run_group == "mnist_quickstart-DeepR-K2662"

    own = {key for key in found.summary if not key.startswith("_")}
    assert {"connectivity", "connections", "steps", "test_accuracy"} <= own
    assert (found.summary["connectivity"], found.summary["connections"]) == (0.01, 2662)
    assert not [key for key in own if key.startswith("deepr/")] and len(own) < 20

    media = next(row for row in found.history if "connections/_type" in row)
    assert media["connections/_type"] == "image-file" and media["connectivity/_type"] == "table-file"
    assert list((place / "out").rglob("files/media/images/*.png"))
    models = [one for one in found.artifacts if one.type == "model"]
    assert [[entry.path for entry in one.manifest.contents] for one in models] == [["sparse.safetensors"]]
    lineage = json.loads(models[0].metadata)
    assert lineage["sparsity"]["K"] == 2662 and lineage["data_digest"] == found.config["data_digest"]
    data = [one for one in found.artifacts if one.type == "dataset"]
    assert [json.loads(one.metadata)["digest"] for one in data] == [found.config["data_digest"]]
