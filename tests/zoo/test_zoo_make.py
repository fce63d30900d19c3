"""Training, collecting and testing models of the zoo, on the embedded digits."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from lightning_deepr import sparsify, zoo
from lightning_deepr.commands import main as command_line
from lightning_deepr.models import LeNet300100
from lightning_deepr.zoo import make, registry, results
from tests.helpers.optional import needs

DIGITS = make.DataSet("MNIST (embedded subset)", "test", "test_accuracy")
SHORT = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 60}


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-deepr"])
    monkeypatch.setitem(make.DATA_SETS, "digits", DIGITS)
    plan = make.Plan("mnist_quickstart", "digits", {**SHORT, "sparsity.connectivity": 5324}, "A test.", 2)
    monkeypatch.setattr(make, "PLANS", {"lenet300_100.deepr_2pct_digits": plan})


@pytest.mark.slow  # two trainings in separate processes
def test_a_model_is_trained_collected_and_tested(tmp_path: Path, plans: None, capsys: pytest.CaptureFixture[str]) -> None:
    (name,), runs, folder = make.PLANS, tmp_path / "runs", tmp_path / "zoo"
    make.main(["train", "--runs", str(runs), "--workers", "2"])
    made = {seed: runs / name / f"seed_{seed}" / "runs/mnist_quickstart/sparse.safetensors" for seed in (0, 1)}
    written = {seed: file.stat().st_mtime_ns for seed, file in made.items()}
    make.main(["train", "--runs", str(runs)])
    assert written == {seed: file.stat().st_mtime_ns for seed, file in made.items()}, "a finished training is not done again"

    make.main(["collect", "--runs", str(runs), "--folder", str(folder)])
    file = folder / f"{name}.safetensors"
    info = zoo.info(file)
    assert f'Entry("{name}", "{info["sha256"]}"),' in capsys.readouterr().out
    metric = info["metrics"]["test_accuracy"]
    assert metric["seeds"] == [0, 1] and metric["std"] > 0 and metric["value"] == metric["correct"] / 3000
    assert info["algorithm"] == "DeepR" and info["hyperparameters"]["l1"] == "LinearDecay(start=0.0002, end=0.0)"
    assert info["hyperparameters"]["connectivity"] == 5324 == info["connectivity"]["active"]
    assert info["recipe"] == {"name": "mnist_quickstart", "overrides": {**SHORT, "sparsity.connectivity": 5324}}
    assert info["data"]["sha256"] == "d432c6b219fcfe14a00e78eba5b29ca76a38489b386599ff1e9e8c40c118aac5"

    command_line.main(["zoo", "verify", "--data", str(file)])  # argparse takes the file for the folder of the data
    assert f"recorded {metric['correct']:,}" in capsys.readouterr().out
    results.main([str(file), "--out", str(tmp_path / "results.csv")])
    with (tmp_path / "results.csv").open(encoding="utf-8") as table:
        (line,) = csv.DictReader(table)
    assert (line["correct"], line["recorded"], line["seeds"]) == (str(metric["correct"]), str(metric["correct"]), "2")

    metric["correct"] -= 2
    zoo.save(zoo.load(file), file, metrics=info["metrics"], recipe=info["recipe"])
    with pytest.raises(SystemExit, match="not as recorded"):
        results.main([str(file), "--out", str(tmp_path / "results.csv")])


def test_what_is_not_there(tmp_path: Path, plans: None, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected its seed 0 trained, found none"):
        make.main(["collect", "--runs", str(tmp_path)])
    with pytest.raises(SystemExit):
        make.main(["train", "no_such_model"])
    assert "no plan for no_such_model. Plans: lenet300_100.deepr_2pct_digits" in capsys.readouterr().err


def test_what_was_trained_by_another_plan_is_refused(tmp_path: Path, plans: None) -> None:
    (name,) = make.PLANS
    folder = tmp_path / name / "seed_0"
    (folder / "runs/mnist_quickstart").mkdir(parents=True)
    zoo.save(sparsify(LeNet300100(), 0.01), folder / "runs/mnist_quickstart/sparse.safetensors")
    (folder / make.TRAINED_WITH).write_text(json.dumps(make.command(make.PLANS[name], 0, "")))
    assert make.train(name, 0, "", tmp_path).is_file()
    make.PLANS[name] = make.Plan("mnist_quickstart", "digits", {"model.lr": 0.1})
    with pytest.raises(ValueError, match=r"expected a training with .*model.lr=0.1.*Remove the folder to train anew"):
        make.train(name, 0, "", tmp_path)
    with pytest.raises(ValueError, match="Remove the folder"):
        make.main(["collect", "--runs", str(tmp_path), "--folder", str(tmp_path / "zoo")])


@pytest.mark.slow
def test_a_failed_training_says_where_its_log_is(tmp_path: Path, plans: None) -> None:
    (name,) = make.PLANS
    make.PLANS[name] = make.Plan("mnist_quickstart", "digits", {"model.no_such_setting": 1})
    with pytest.raises(RuntimeError, match=r"seed 0: the training ended with 2; see .*train.log"):
        make.train(name, 0, "", tmp_path)
    assert "no_such_setting" in (tmp_path / name / "seed_0" / "train.log").read_text(encoding="utf-8")


def test_every_model_of_the_registry_has_a_plan() -> None:
    planned = dict(make.PLANS)
    assert {entry.name for entry in registry.ENTRIES} <= planned.keys()
    for entry in registry.ENTRIES:
        recorded = zoo.info(entry.name)["recipe"]
        assert recorded["name"] == planned[entry.name].recipe
        assert recorded["overrides"] == json.loads(json.dumps(dict(planned[entry.name].overrides)))


@needs("jsonargparse")
def test_a_network_that_a_study_keeps(tmp_path: Path, plans: None, capsys: pytest.CaptureFixture[str]) -> None:
    (name,), study = make.PLANS, "python study.py --keep runs/zoo"
    make.PLANS[name] = make.Plan("mnist_quickstart", "digits", {}, "", 1, study, "kept_{seed}.safetensors")
    with pytest.raises(RuntimeError, match=r"expected .*kept_0.safetensors, which `python study.py --keep runs/zoo` writes"):
        make.train(name, 0, "", tmp_path)
    zoo.save(sparsify(LeNet300100(), 0.01), tmp_path / "kept_0.safetensors")
    make.main(["collect", "--runs", str(tmp_path), "--folder", str(tmp_path / "zoo")])
    info = zoo.info(tmp_path / "zoo" / f"{name}.safetensors")
    assert info["recipe"]["command"] == study and "std" not in info["metrics"]["test_accuracy"]
