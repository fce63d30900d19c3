"""Recipes, their data and the command line: from an installed package, in an empty folder, as a user runs them."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_deepr import DeepR, cli, connections, load_state_dict
from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes import digits
from lightning_deepr.recipes.batches import Batches
from lightning_deepr.recipes.callbacks import inputs_per_pixel
from lightning_deepr.recipes.loggers import wandb_mode

REPOSITORY = Path(__file__).resolve().parents[1]


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    import os

    return subprocess.run(
        [sys.executable, "-m", "lightning_deepr.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=1800,
    )


# -- recipes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(cli.packaged_recipes()))
def test_every_recipe_instantiates(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-deepr"])
    made = cli.train(
        ["--config", name, "--sparsity.connectivity", "0.05", "--trainer.max_epochs", "3", "--seed_everything", "7"], run=False
    )
    assert made.trainer.max_epochs == 3
    assert isinstance(made.trainer.callbacks[0], DeepR)
    assert made.trainer.callbacks[0].connectivity == 0.05
    assert made.trainer.callbacks[0].seed == 7  # one seed for all
    callbacks = [c for c in made.trainer.callbacks if isinstance(c, DeepR)]
    assert len(callbacks) == 1
    head = Path(cli.find_recipe(name)).read_text(encoding="utf-8").splitlines()
    assert head[0].startswith("# ")
    assert f"lightning-deepr fit --config recipes/{name}.yaml" in "\n".join(head[:4])


def test_the_packaged_recipes_are_those_of_the_repository() -> None:
    assert set(cli.packaged_recipes()) == {file.stem for file in (REPOSITORY / "recipes").glob("*.yaml")}


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
    with next(left.glob("csv/*/metrics.csv")).open(encoding="utf-8") as file:
        columns = next(csv.reader(file))
    assert {"train_loss", "test_accuracy", "deepr/net.fc1.weight/turnover"} <= set(columns)

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
    done = run("fit", "--config", str(REPOSITORY / "recipes" / "mnist_quickstart.yaml"), cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    with next((tmp_path / "runs" / "mnist_quickstart").glob("csv/*/metrics.csv")).open(encoding="utf-8") as file:
        found = [float(row["test_accuracy"]) for row in csv.DictReader(file) if row["test_accuracy"]]
    assert found[-1] >= 0.93, found


# -- command line -----------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command line says before it ends with an error of its own."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code not in (0, None)
    return f"{stopped.value.code}\n{capsys.readouterr().err}"


def test_unknown_recipe_lists_the_recipes(tmp_path: Path) -> None:
    done = run("fit", "--config", "mnist_fast", cwd=tmp_path)
    assert done.returncode != 0
    assert "mnist_quickstart" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected fit" in refused(capsys, "train")


def test_report_of_what_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(LeNet300100().state_dict(), "dense.pt")
    for name, words in (("dense.pt", "expected a sparse checkpoint"), ("nothing.pt", "no checkpoint")):
        assert words in refused(capsys, "report", name)


def test_missing_mnist_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import MNIST

    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # no network
    with pytest.raises(RuntimeError, match=r"(?s)MNIST was not found.*MNIST/raw.*--data.root.*mnist_quickstart"):
        digits.MNISTDataModule(str(tmp_path)).prepare_data()


def test_wandb_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_mode() == "online"


# -- data -------------------------------------------------------------------------------------------------------------------


def test_embedded_digits() -> None:
    train_images, train_labels, test_images, test_labels = digits.embedded_digits()
    assert train_images.shape == (17_000, 28, 28)
    assert test_images.shape == (3_000, 28, 28)
    for labels in (train_labels, test_labels):
        shares = torch.bincount(labels, minlength=10) / len(labels)
        assert shares.min() > 0.08  # MNIST's rarest digit has 9 %
        assert shares.max() < 0.13
    size = (REPOSITORY / "recipes" / digits.EMBEDDED).stat().st_size
    assert size <= 3_000_000


def test_damaged_digits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "EMBEDDED_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match="damaged"):
        digits.embedded_digits()


def some_images(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 6, 5), dtype=torch.uint8, generator=generator), torch.arange(count)


def test_batches_cover_an_epoch_once_in_a_new_order_each_time() -> None:
    loader = Batches(*some_images(), batch_size=7, shuffle=True, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        orders.append(torch.cat([labels for _, labels in loader]))
    assert len(loader) == 6
    assert all(torch.equal(order.sort().values, torch.arange(40)) for order in orders)
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])


def test_batches_go_on_in_the_middle_of_an_epoch() -> None:
    make = lambda: Batches(*some_images(), batch_size=7, shuffle=True, shift_probability=0.5)  # noqa: E731
    whole, first, second = list(make()), make(), make()
    stream = iter(first)
    for _ in range(3):
        next(stream)
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert len(rest) == 3
    for (images, labels), (expected_images, expected_labels) in zip(rest, whole[3:], strict=True):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


def test_shifts_are_the_nine_integer_shifts_with_their_probability() -> None:
    images, labels = some_images(2000)
    shifted, seen = Batches(images, labels, batch_size=2000, shift_probability=0.9), torch.zeros(9)
    (batch, _), *_ = shifted
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    versions = torch.stack([padded[:, y : y + 6, x : x + 5] for y in range(3) for x in range(3)], dim=1).div(255.0)
    equal = (versions == batch).all(dim=(2, 3))
    assert equal.any(dim=1).all()
    seen = equal.float().mean(0)
    expected = torch.full((9,), 0.1)
    expected[4] += 0.1
    assert (seen - expected).abs().max() < 0.03


def test_shifts_end() -> None:
    images, labels = some_images()
    loader = Batches(images, labels, batch_size=10, shift_probability=1.0, shift_epochs=1.5)
    unshifted = []
    for epoch in (0, 1, 2):
        loader.set_epoch(epoch)
        unshifted += [torch.equal(batch[:, 0], images[labels_].div(255.0)) for batch, labels_ in loader]
    assert unshifted == [False] * 6 + [True] * 6


def test_picture_counts_the_connections_of_each_pixel() -> None:
    from lightning_deepr import sparsify

    net = sparsify(LeNet300100(), 0.01)
    counts = inputs_per_pixel(net, "fc1.weight", (28, 28))
    _, places, _ = connections(net)["fc1.weight"]
    slow = torch.zeros(28, 28, dtype=torch.long)
    for place in places.tolist():
        slow[place % 784 // 28, place % 28] += 1
    assert torch.equal(counts, slow)
    with pytest.raises(ValueError, match="expected one of"):
        inputs_per_pixel(net, "fc9.weight", (28, 28))


# -- package ----------------------------------------------------------------------------------------------------------------


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
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(REPOSITORY)],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    for name in ("mnist_quickstart.yaml", "mnist.yaml", "mnist_best.yaml", "mnist_digits.xz"):
        assert f"lightning_deepr/recipes/data/{name}" in names
    assert "lightning_deepr/py.typed" in names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
