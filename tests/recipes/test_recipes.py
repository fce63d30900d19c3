"""Recipes: each can be built, the quickstart writes its files and reaches its accuracy, and the wheel contains them."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_deepr import DeepR, connections, load_state_dict
from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes import running
from tests.helpers.command_line import run
from tests.helpers.optional import needs
from tests.helpers.paths import ROOT

# -- recipes ------------------------------------------------------------------------------------------------------------------


@needs("jsonargparse")
@pytest.mark.parametrize("name", sorted(running.packaged_recipes()))
@pytest.mark.feature("Command line: every recipe")
def test_every_recipe_instantiates(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-deepr"])
    made = running.train(
        ["--config", name, "--sparsity.connectivity", "0.05", "--trainer.max_epochs", "3", "--seed_everything", "7"], run=False
    )
    assert made.trainer.max_epochs == 3
    assert isinstance(made.trainer.callbacks[0], DeepR)
    assert made.trainer.callbacks[0].connectivity == 0.05
    assert made.trainer.callbacks[0].seed == 7  # --seed_everything also seeds the rewiring
    callbacks = [c for c in made.trainer.callbacks if isinstance(c, DeepR)]
    assert len(callbacks) == 1
    head = Path(running.find_recipe(name)).read_text(encoding="utf-8").splitlines()
    assert head[0].startswith("# ")
    assert f"lightning-deepr fit --config recipes/{name}.yaml" in "\n".join(head[:4])


def test_the_packaged_recipes_are_those_of_the_repository() -> None:
    assert set(running.packaged_recipes()) == {file.stem for file in (ROOT / "recipes").glob("*.yaml")}


@pytest.mark.slow
def test_quickstart_leaves_what_it_promises(tmp_path: Path) -> None:
    done = run("fit", "--config", "mnist_quickstart", "--trainer.max_steps", "120", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    left = tmp_path / "runs" / "mnist_quickstart"
    assert (left / "connectivity.png").read_bytes().startswith(b"\x89PNG")
    assert list((left / "wandb").glob("offline-run-*/*.wandb"))
    assert (left / "checkpoints" / "last.ckpt").is_file()
    assert "Connectivity before training" in done.stdout
    assert "Connectivity after training" in done.stdout
    assert "test_accuracy" in done.stdout
    assert "offline" in done.stdout + done.stderr
    with next(left.glob("csv/*/metrics.csv")).open() as file:
        columns = next(csv.reader(file))
    assert {"train_loss", "test_accuracy", "deepr/turnover"} <= set(columns)

    net = load_state_dict(LeNet300100(), left / "sparse.safetensors")
    assert sum(values.numel() for _, _, values in connections(net).values()) == 2662
    report = run("report", "runs/mnist_quickstart/checkpoints/last.ckpt", cwd=tmp_path)
    assert "2,662" in report.stdout, report.stderr

    again = run(
        "fit", "--config", "mnist_quickstart", "--trainer.max_steps", "150", cwd=tmp_path, OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr[-3000:]
    resumed = run(
        "fit", "--config", "mnist_quickstart", "--trainer.max_steps", "160",
        "--ckpt_path", "runs/mnist_quickstart/checkpoints/last.ckpt", cwd=tmp_path, OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr[-3000:]


@pytest.mark.slow
def test_quickstart_reaches_its_accuracy(tmp_path: Path) -> None:
    done = run("fit", "--config", str(ROOT / "recipes" / "mnist_quickstart.yaml"), cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    with next((tmp_path / "runs" / "mnist_quickstart").glob("csv/*/metrics.csv")).open() as file:
        found = [float(row["test_accuracy"]) for row in csv.DictReader(file) if row["test_accuracy"]]
    assert found[-1] >= 0.93, found


# -- package ------------------------------------------------------------------------------------------------------------------


def test_import_is_light() -> None:
    heavy = ["wandb", "torchvision", "matplotlib", "huggingface_hub", "lightning", "torchmetrics"]
    code = (
        "import sys, torch, lightning_deepr as d; n = d.sparsify(torch.nn.Linear(50, 9), .1); d.densify(n); "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1800)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_carries_recipes_and_digits(tmp_path: Path) -> None:
    import zipfile

    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for name in ("mnist_quickstart.yaml", "mnist.yaml", "mnist_best.yaml", "mnist_digits.xz", "sweeps/method.yaml"):
        assert f"lightning_deepr/recipes/data/{name}" in names
    assert "lightning_deepr/py.typed" in names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
