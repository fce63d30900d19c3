"""The zoo: names, loading, records, verification, the command line."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_deepr import DeepR, Topology, sparsify, zoo
from lightning_deepr.commands import main as command_line
from lightning_deepr.files import architectures
from lightning_deepr.models import CIFAR10CNN, BLSTMClassifier, LeNet300100
from lightning_deepr.recipes import running
from lightning_deepr.weights.find import converted_tensors
from lightning_deepr.zoo import comparing, loading, registry
from lightning_deepr.zoo.verification import evaluate, labels_hit
from tests.helpers.optional import Optional, needs

Image = Optional("PIL.Image")

NAME = "lenet300_100.deepr_1pct_test"
METADATA = {
    "algorithm": {"name": "DeepR", "hyperparameters": {"l1": 1e-4}},
    "metrics": {"test_accuracy": {"value": 0.5, "correct": 10, "examples": 20, "mean": 0.5, "std": 0.0, "seeds": [0]}},
    "license": "Apache-2.0",
}
NETWORKS = [
    (lambda: LeNet300100(), (torch.randn(2, 784),)),
    (lambda: LeNet300100(bias=False), (torch.randn(2, 1, 28, 28),)),
    (lambda: CIFAR10CNN(), (torch.randn(2, 3, 24, 24),)),
    (
        lambda: BLSTMClassifier(inputs=7, hidden=11, classes=5, layers=2, dropout=0.5),
        (torch.randn(2, 9, 7), torch.tensor([9, 4])),
    ),
]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of one model."""
    path = zoo.save(sparsify(LeNet300100(), 0.01, seed=1), tmp_path / f"{NAME}.safetensors", **METADATA)
    entry = registry.Entry(NAME, hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(registry, "ENTRIES", (entry, registry.Entry("cifar10_cnn.other", "0" * 64)))
    monkeypatch.setattr(loading, "folder", lambda: tmp_path)
    return path


# -- every model of the registry ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.list_models())
def test_every_model_of_the_zoo(name: str) -> None:
    verified = zoo.verify(name)
    info = zoo.info(name)
    assert ("network", name.partition(".")[0]) in verified.checks
    assert {"algorithm", "hyperparameters", "seeds", "metrics", "data", "recipe", "license"} <= info.keys()
    net, dense = zoo.load(name), zoo.load(name, dense=True)
    assert not net.training and sum(c.slots.count for c in converted_tensors(net)) == info["connectivity"]["active"]
    assert not list(converted_tensors(dense))


def test_the_whole_zoo_is_small() -> None:
    assert sum(file.stat().st_size for file in loading.folder().rglob("*") if file.is_file()) < 10e6


def test_names_are_in_the_order_of_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.x_0p5pct", "a.x_1pct", "a.x_2pct", "a.x_10pct", "b.x_1pct", "b.y"]
    monkeypatch.setattr(registry, "ENTRIES", tuple(registry.Entry(name, "0" * 64) for name in reversed(names)))
    assert zoo.list_models() == names


def test_results_are_of_the_models_that_are_there() -> None:
    with (loading.folder() / "results.csv").open(encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == zoo.list_models()
    readme = (loading.folder() / "README.md").read_text(encoding="utf-8")
    for name, row in rows.items():
        (metric,) = zoo.info(name)["metrics"].values()
        assert int(row["correct"]) == metric["correct"] == int(row["recorded"]) and int(row["bytes"]) == zoo.info(name)["bytes"]
        assert f"| `{name}` | {int(row['connections']):,} of " in readme and f"| {100 * float(row['value']):.2f} |" in readme


def test_the_folder_and_the_registry_agree() -> None:
    found = sorted(file.name for file in loading.folder().glob("*.safetensors"))
    assert found == sorted(entry.filename for entry in zoo.ENTRIES)
    assert all(entry.architecture in architectures.ARCHITECTURES for entry in zoo.ENTRIES)


# -- loading ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "inputs"), NETWORKS, ids=["lenet", "lenet without biases", "cnn", "blstm"])
def test_load_builds_what_was_saved(tmp_path: Path, make: type[nn.Module], inputs: tuple[torch.Tensor, ...]) -> None:
    net = sparsify(make(), 0.1).eval()
    path = zoo.save(net, tmp_path / "net.safetensors")
    state = torch.get_rng_state()
    loaded, dense, own = zoo.load(path), zoo.load(path, dense=True), zoo.load(path, module=make())
    with torch.device("meta"):
        meta = LeNet300100(bias="fc1.bias" in dict(net.named_parameters())) if isinstance(net, LeNet300100) else None
    torch.set_rng_state(state)
    again = zoo.load(path)
    assert torch.equal(torch.get_rng_state(), state), "loading draws from the global generator"
    for other in (loaded, dense, own, again, zoo.load(path, module=meta)):
        assert not other.training
        assert all(tensor.device.type == "cpu" for tensor in other.state_dict().values())
        with torch.no_grad():
            torch.testing.assert_close(other(*inputs), net(*inputs), rtol=1e-4, atol=1e-6)
    assert not list(converted_tensors(dense)) and type(dense) is type(make())
    assert dense.load_state_dict(make().state_dict()) is not None


def test_a_network_of_ones_own_needs_module(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 2))
    path = zoo.save(sparsify(net, 0.2), tmp_path / "net.safetensors")
    with pytest.raises(zoo.FormatError, match=r"the file names none.*zoo.load\(path, module=Net\(\)\)"):
        zoo.load(path)
    fresh = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 2))
    assert zoo.load(path, module=fresh) is fresh and not fresh.training
    with pytest.raises(ValueError, match=r"expected a weight of shape \(19, 30\), found \(20, 30\)"):
        zoo.load(path, module=nn.Sequential(nn.Linear(30, 19)))


class Classifier(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def test_a_loaded_model_trains_on(model: Path, tmp_path: Path) -> None:
    net = zoo.load(NAME)
    places = {c.name: c.slots.places.clone() for c in converted_tensors(net)}
    data = DataLoader(TensorDataset(torch.randn(40, 784), torch.randint(10, (40,))), 10)
    trainer = Trainer(
        max_epochs=2, callbacks=[DeepR(l1=0.05, check_invariants=True)], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Classifier(net.train()), data)
    assert any(not torch.equal(c.slots.places, places[c.name]) for c in converted_tensors(net)), "nothing was rewired"
    assert sum(c.slots.count for c in converted_tensors(net)) == 2662


def test_names(model: Path, tmp_path: Path) -> None:
    assert zoo.list_models() == ["cifar10_cnn.other", NAME] and zoo.list_models("*1pct*") == [NAME]
    assert zoo.path_of(NAME) == model == zoo.path_of(str(model)) == zoo.path_of(model)
    assert zoo.load(NAME).fc1.weight.shape == (300, 784)
    with pytest.raises(FileNotFoundError, match=r"'lenet300_100.deepr_1pct_tset'. Models: lenet300_100.deepr_1pct_test"):
        zoo.load("lenet300_100.deepr_1pct_tset")
    with pytest.raises(ValueError, match='source: expected "package" or "hub", found \'web\''):
        zoo.load(NAME, source="web")
    with pytest.raises(ValueError, match='revision: expected with source="hub" only'):
        zoo.load(NAME, revision="v1")
    # another valid file under a name of the zoo
    zoo.save(sparsify(LeNet300100(), 0.01, seed=2), model, **METADATA)
    with pytest.raises(zoo.FormatError, match=r"registry's.*Install the package again"):
        zoo.load(NAME)
    assert zoo.load(model) is not None


def test_a_model_that_the_wheel_does_not_have(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = (registry.Entry(NAME, registry.ENTRIES[0].sha256, in_wheel=False), *registry.ENTRIES[1:])
    monkeypatch.setattr(registry, "ENTRIES", entries)
    assert NAME in zoo.list_models() and zoo.load(NAME) is not None  # a checkout has it
    elsewhere = model.rename(tmp_path / "got.safetensors")
    assert NAME not in zoo.list_models() and zoo.list_models("lenet*") == []
    with pytest.raises(
        FileNotFoundError, match=rf"the wheel does not have this model.*Get zoo/{NAME}\.safetensors from the repo"
    ):
        zoo.load(NAME)
    assert zoo.load(elsewhere) is not None


def test_info(model: Path) -> None:
    info = zoo.info(NAME)
    assert info["name"] == NAME and info["bytes"] == model.stat().st_size and info["license"] == "Apache-2.0"
    assert info["sha256"] == hashlib.sha256(model.read_bytes()).hexdigest() != info["digest"]
    assert (info["architecture"], info["arguments"], info["format_version"]) == ("lenet300_100", {"bias": True}, 1)
    assert [row["active"] for row in info["connectivity"]["rows"]] == [1810, 668, 184]
    assert info["connectivity"]["connectivity"] == pytest.approx(0.01) and info["dense_parameters"] == 410
    assert info["metrics"] == METADATA["metrics"] and json.dumps(info)
    shape, places, values = zoo.connections_of(NAME)["fc3.weight"]
    assert shape == (10, 100) and len(places) == len(values) == 184


# -- verification -------------------------------------------------------------------------------------------------------------


def labelled(net: nn.Module, right: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """20 examples in two batches, ``right`` of them with the predicted label, and one example without a label."""
    x = torch.randn(21, 784, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = net(x).argmax(1)
    labels[right:] = (labels[right:] + 1) % 10
    labels[20] = -100
    return [(x[:8], labels[:8]), (x[8:], labels[8:])]


def test_verify(model: Path) -> None:
    net = zoo.load(NAME)
    checks = dict(zoo.verify(NAME).checks)
    assert checks["connectivity"] == "2,662 of 266,200 (1.000%)" and checks["network"] == "lenet300_100"
    assert "registry" in checks["sha256"] and "registry" not in dict(zoo.verify(model).checks)["sha256"]
    for right in (9, 10, 11):  # another BLAS may change one prediction
        assert dict(zoo.verify(NAME, labelled(net, right)).checks)["test_accuracy"].startswith(f"{right} of 20")
    for right in (8, 12):
        with pytest.raises(zoo.FormatError, match=f"test_accuracy: expected 10 of 20 right, as recorded, found {right} of 20"):
            zoo.verify(NAME, labelled(net, right))
    with pytest.raises(zoo.FormatError, match="found 7 of 8"):
        zoo.verify(NAME, [(x, y.where(torch.arange(8) != 0, (y + 1) % 10)) for x, y in labelled(net, 20)[:1]])
    zoo.save(net, model)
    with pytest.raises(ValueError, match="there is nothing to compare with"):
        zoo.verify(model, [])


def test_verify_what_the_zoo_can_not_build(tmp_path: Path) -> None:
    path = zoo.save(sparsify(nn.Linear(100, 10), 0.1), tmp_path / "net.safetensors")
    assert ("network", "not built: give module=") in zoo.verify(path).checks
    assert ("network", "ParametrizedLinear") in zoo.verify(path, module=nn.Linear(100, 10)).checks
    with pytest.raises(zoo.FormatError, match="module="):
        zoo.verify(path, [])
    file = bytearray(path.read_bytes())
    file[-3] ^= 4
    path.write_bytes(file)
    with pytest.raises(zoo.FormatError, match="sha256"):
        zoo.verify(path)


def test_timit_is_scored_in_39_classes(tmp_path: Path) -> None:
    from lightning_deepr.recipes.speech import frame_errors
    from lightning_deepr.recipes.timit_phones import folding

    net = sparsify(BLSTMClassifier(hidden=16), 0.3).eval()
    features, lengths = torch.randn(4, 30, 39), torch.tensor([30, 20, 25, 30])
    labels = torch.randint(60, (4, 30)).masked_fill_(torch.arange(30) >= lengths[:, None], -100)
    with torch.no_grad():
        wrong = frame_errors(net(features, lengths), labels, folding(60))
    metrics = {"test_frame_accuracy": {"correct": int((1 - wrong).sum()), "examples": wrong.numel()}}
    path = zoo.save(net, tmp_path / "net.safetensors", metrics=metrics)
    found = dict(zoo.verify(path, [(features, labels, lengths)]).checks)["test_frame_accuracy"]
    assert found.startswith(f"{int((1 - wrong).sum())} of 105")


# -- command line -------------------------------------------------------------------------------------------------------------


def test_command_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command_line.main(["zoo", "list", "lenet*"])
    header, _, row, metric = capsys.readouterr().out.splitlines()
    assert header == f"{'name':{len(NAME)}s}  connections  K / N  metric   bytes"
    assert row.split() == [NAME, "2,662", "1.00%", "0.5", f"{model.stat().st_size:,}"]
    assert metric == "metric: test_accuracy"
    for column in ("bytes", "connections", "connectivity", "metric", "name"):
        command_line.main(["zoo", "list", "lenet*", "--sort", column])
        assert NAME in capsys.readouterr().out
    command_line.main(["zoo", "info", NAME])
    out = capsys.readouterr().out
    assert "fc1.weight  300x784  235,200   1,810" in out and "license" in out and "lenet300_100" in out
    command_line.main(["zoo", "info", str(model), "--json"])
    assert json.loads(capsys.readouterr().out)["license"] == "Apache-2.0"
    command_line.main(["zoo", "verify", NAME, str(model)])
    assert "2 models are as recorded" in capsys.readouterr().out
    command_line.main(["zoo", "list", "nothing*"])
    assert "no such model" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"(?s)zoo verify: cifar10_cnn.other: There is no checkpoint"):
        command_line.main(["zoo", "verify"])
    assert f"{NAME}: as recorded" in capsys.readouterr().out, "one failure stopped the verification of the other models"
    with pytest.raises(SystemExit, match="zoo info: expected a model of the zoo or a file"):
        command_line.main(["zoo", "info", "nothing"])
    with pytest.raises(SystemExit, match=r"expected a recorded `recipe`, one of .*mnist.*, found none"):
        command_line.main(["zoo", "verify", NAME, "--data"])


def test_the_list_sorts_and_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def listed(*options: str) -> list[dict[str, object]]:
        command_line.main(["zoo", "list", *options])
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 80 and len(lines) > 3
        command_line.main(["zoo", "list", *options, "--json"])
        found = json.loads(capsys.readouterr().out)
        shown = [line.split()[0] for line in lines if line.split()[0] in found]
        assert shown == list(found)
        return list(found.values())

    assert [one["name"] for one in listed()] == zoo.list_models()
    for column, key in {
        "bytes": lambda info: info["bytes"],
        "connections": lambda info: info["connectivity"]["active"],
        "connectivity": lambda info: info["connectivity"]["connectivity"],
        "metric": lambda info: -next(iter(info["metrics"].values()))["value"],
    }.items():
        found = [key(one) for one in listed("--sort", column)]
        assert found == sorted(found) and len(set(found)) > 5
    few = listed("--task", "audio-classification", "--connectivity", "0.03", "--sort", "bytes")
    assert [one["name"] for one in few] == zoo.list_models(task="audio-classification", connectivity=0.03)
    with pytest.raises(SystemExit, match="zoo list: task: expected audio-classification, image-classification or text"):
        command_line.main(["zoo", "list", "--task", "text"])
    with pytest.raises(SystemExit):
        command_line.main(["zoo", "list", "--sort", "colour"])
    assert "invalid choice: 'colour'" in capsys.readouterr().err


@needs("huggingface_hub")
def test_every_reader_compares_the_sha256_of_a_name(model: Path, tmp_path: Path) -> None:
    """Another sound file under a name of the zoo: its own digest is right, the registry's is not."""
    zoo.save(sparsify(LeNet300100(), 0.01, seed=2), model, **METADATA)
    readers: dict[str, Callable[[], object]] = {
        "load": lambda: zoo.load(NAME),
        "info": lambda: zoo.info(NAME),
        "verify": lambda: zoo.verify(NAME),
        "connections_of": lambda: zoo.connections_of(NAME),
        "predict": lambda: zoo.predict(NAME, torch.zeros(28, 28)),
        "publish": lambda: zoo.publish(NAME, "someone/net"),
        "Topology": lambda: sparsify(LeNet300100(), Topology(NAME)),
        "export": lambda: command_line.main(["export", NAME, "--to", "c", "--out", str(tmp_path / "net.h")]),
        "report": lambda: command_line.main(["report", NAME]),
        "compare": lambda: command_line.main(["compare", NAME, str(model)]),
    }
    for name, read in readers.items():
        with pytest.raises((zoo.FormatError, SystemExit), match=r"registry's.*found") as caught:
            read()
        assert "Install the package again" in str(caught.value), name
    assert not (tmp_path / "net.h").exists()


def test_the_checksums_that_sha256sum_reads() -> None:
    lines = (loading.folder() / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{entry.sha256}  {entry.filename}" for entry in zoo.ENTRIES]


def test_the_comparison_is_that_of_the_files(tmp_path: Path) -> None:
    rows = comparing.rows()
    page = (loading.folder() / "comparison.md").read_text(encoding="utf-8")
    assert page == comparing.page(rows), "python -m lightning_deepr.zoo.comparing writes it anew"
    with Image.open(loading.folder() / "comparison.png") as picture:
        assert picture.text["Description"] == comparing.digest(rows), "the picture is of other files"
        assert picture.size[0] > 600
    assert len(rows) == len(zoo.ENTRIES)
    with (loading.folder() / "results.csv").open(encoding="utf-8") as file:
        measured = {row["name"]: int(row["correct"]) for row in csv.DictReader(file)}
    assert {row.name: row.correct for row in rows} == measured
    for data in {row.data for row in rows}:
        mine = [row for row in rows if row.data == data]
        assert [row.bytes for row in mine] == sorted(row.bytes for row in mine) and mine[0].best
        best = [row.accuracy for row in mine if row.best]
        assert best == sorted(set(best)) and best[-1] == max(row.accuracy for row in mine)
    comparing.main([str(tmp_path)])
    assert (tmp_path / "comparison.md").read_text(encoding="utf-8") == page and (tmp_path / "comparison.png").is_file()


@needs("jsonargparse")
def test_the_recorded_metric_on_the_test_set_of_the_recorded_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-deepr"])
    recipe = {"name": "mnist_quickstart", "overrides": ["--data.class_path=os.system", "--trainer.callbacks=os.system"]}
    net = sparsify(LeNet300100(), 0.01).eval()
    path = zoo.save(net, tmp_path / "net.safetensors", recipe=recipe)
    right, examples = evaluate(net, running.data_of_recipe(zoo.info(path)), labels_hit)
    assert examples == 3000 and 0 < right < 1200
    zoo.save(net, path, recipe=recipe, metrics={"test_accuracy": {"correct": right, "examples": examples}})
    command_line.main(["zoo", "verify", str(path), "--data"])
    assert f"{right} of 3,000" in capsys.readouterr().out
    zoo.save(net, path, recipe=recipe, metrics={"test_accuracy": {"correct": right + 2, "examples": examples}})
    with pytest.raises(SystemExit, match=f"expected {right + 2} of 3000 right, as recorded, found {right} of 3000"):
        command_line.main(["zoo", "verify", str(path), "--data"])
    zoo.save(net, path, recipe="timit_sample")
    with pytest.raises(SystemExit, match=r"not found in .*elsewhere, which is not a folder.* The option is --data\."):
        command_line.main(["zoo", "verify", str(path), "--data", "elsewhere"])
    zoo.save(net, path, recipe={"name": str(tmp_path / "own.yaml")})
    with pytest.raises(
        SystemExit, match="expected a recorded `recipe`, one of"
    ):  # a recipe outside the package can name any class
        command_line.main(["zoo", "verify", str(path), "--data"])
