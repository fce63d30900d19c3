"""Model cards and pictures are made from metadata alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from lightning_deepr import connections, sparsify, zoo
from lightning_deepr.conversion.report import connectivity_report
from lightning_deepr.hub import evaluations
from lightning_deepr.hub.cards import card, metrics_table, table
from lightning_deepr.hub.pictures import counts, draw, per_input
from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes.cifar10 import CIFAR10DataModule
from lightning_deepr.recipes.digits import embedded_digits
from lightning_deepr.recipes.timit_corpus import find_utterances
from lightning_deepr.recipes.timit_data import load_timit
from lightning_deepr.recipes.timit_files import read_audio
from lightning_deepr.recipes.timit_phones import folding
from lightning_deepr.zoo import write_cards
from lightning_deepr.zoo.describing import describe
from tests.helpers.made_up_timit import noise, real_sample, write_riff
from tests.helpers.optional import Optional, needs
from tests.helpers.paths import ROOT

huggingface_hub, Image = Optional("huggingface_hub"), Optional("PIL.Image")


@pytest.fixture
def info() -> dict[str, Any]:
    return {
        "name": "lenet300_100.deepr_1pct_mnist",
        "architecture": "lenet300_100",
        "arguments": {"bias": True},
        "connectivity": connectivity_report(sparsify(LeNet300100(), 2662, distribution="deepr")).to_dict(),
        "algorithm": {"name": "DeepR", "temperature": 0.0, "l1": "LinearDecay(start=0.0002, end=0.0)"},
        "seeds": [0, 1, 2],
        "metrics": {
            "test_accuracy": {
                "value": 0.9741,
                "mean": 0.9738,
                "std": 0.0004,
                "seeds": [0, 1, 2],
                "correct": 9741,
                "examples": 10000,
                "selection": "none",
            }
        },
        "data": {"name": "MNIST", "split": "test", "sha256": "ab" * 32},
        "recipe": {"name": "mnist_best", "overrides": ["--trainer.max_epochs 100"]},
        "package_version": "0.1.0",
        "license": "Apache-2.0",
        "sha256": "cd" * 32,
        "bytes": 17_000,
    }


def test_what_a_card_says(info: dict[str, Any]) -> None:
    text = card(info, repo_id="me/lenet", recipe="mnist_best.yaml")
    for said in (
        "# lenet300_100.deepr_1pct_mnist",
        "2,662 of 266,200 connections (1.00%). It was sparse from the first step",
        "Measure it again: `lightning-deepr zoo verify --data FILE`.",
        'net = zoo.load("me/lenet", source="hub")',
        "| `fc1.weight` | 300 x 784 | 235,200 |",
        "| **all** | | 266,200 | 2,662 | 1.000% |",
        "Dense: `fc1.bias`, " if "fc1.bias" in info["connectivity"]["left_out"] else "| tensor |",
        "![connectivity](connectivity.png)",
        "| test accuracy | 0.9741 (9,741 of 10,000) | 0.9738 ± 0.0004 | 0, 1, 2 |",
        "test accuracy: selection none.",
        "- algorithm: DeepR (temperature = 0.0, l1 = LinearDecay(start=0.0002, end=0.0))",
        f"sha256 `{'ab' * 32}`",
        "| 0 | not recorded | not recorded | not recorded | not recorded |",
        "[`mnist_best.yaml`](mnist_best.yaml)",
        "lightning-deepr fit --config mnist_best --trainer.max_epochs 100",
        f"- sha256: `{'cd' * 32}`",
        "Apache-2.0",
        "@inproceedings{bellec2018deep",
    ):
        assert said in text
    assert 'zoo.load("lenet300_100.deepr_1pct_mnist")' in card(info)


def test_the_metadata_for_the_hub(info: dict[str, Any]) -> None:
    data = huggingface_hub.ModelCard(card(info)).data
    assert (data.license, data.pipeline_tag, data.library_name) == ("apache-2.0", "image-classification", "lightning-deepr")
    assert data.datasets == ["ylecun/mnist"] and "deep-r" in data.tags
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name, result.dataset_split) == (
        "accuracy",
        0.9741,
        "MNIST",
        "test",
    )
    assert data.model_name == info["name"]


def test_every_seed_has_a_row(info: dict[str, Any]) -> None:
    """What was recorded of it, and "not recorded" for the rest: nothing is estimated from something else."""
    info |= {"seeds": [1], "runs": [
        {"seed": 0, "correct": 9730, "examples": 10000, "sha256": "ef" * 32, "cpu_seconds": 720.0},
        {"seed": 1, "cpu_seconds": 1800.04, "wall_seconds": 950},
    ]}  # fmt: skip
    text = card(info)
    for said in (
        f"| 0 | 9,730 of 10,000 | `{'ef' * 32}` | 720 | 2 Wh |",
        "| 1 (this file) | 9,741 of 10,000 | below | 1,800 (950 s on the clock) | 5 Wh |",
        "| 2 | not recorded | not recorded | not recorded | not recorded |",
        "Energy proxy: CPU seconds times 10 W, a nominal figure for one core. Nothing was metered.",
        "not estimated here: accuracy of seed 2; digest of seed 2; CPU seconds and energy proxy of seed 2. The mean",
        "lightning-deepr fit --config mnist_best --trainer.max_epochs 100 --seed_everything 1\n",
    ):
        assert said in text
    info["runs"] += [{"seed": 2, "correct": 9740, "examples": 10000, "sha256": "ab" * 32, "cpu_seconds": 1}]
    assert "not estimated" not in card(info)
    del info["runs"]
    text = card(info)
    assert "accuracy of seed 0, 2; digest of seed 0, 2; CPU seconds and energy proxy of every seed." in text
    assert "Wh" not in text and "| 1 (this file) | 9,741 of 10,000 | below | not recorded | not recorded |" in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.49693123894725894, "0.4969"),
        (0.97, "0.97"),
        (0.00049329, "0.0005"),
        (0.0000123, "1.2e-05"),
        (12.34567, "12.3457"),
        (3, "3"),
    ],
)
def test_metrics_are_rounded(info: dict[str, Any], value: float, shown: str) -> None:
    info["metrics"] = {"test_accuracy": {"value": value, "mean": value, "std": value}}
    text = card(info)
    assert f"| test accuracy | {shown} | {shown} ± {shown} |" in text
    (result,) = huggingface_hub.ModelCard(text).data.eval_results
    assert result.metric_value == pytest.approx(float(shown), abs=1e-9)
    assert evaluations.evaluations(info)[0]["value"] == result.metric_value


def test_evaluation_results_in_the_hubs_present_form(info: dict[str, Any]) -> None:
    found = yaml.safe_load(evaluations.text(evaluations.evaluations(info)))
    assert found == [{
        "dataset": {"id": "ylecun/mnist", "task_id": "mnist"}, "value": 0.9741, "notes": "test accuracy, 9,741 of 10,000 right",
    }]  # fmt: skip
    parse = getattr(huggingface_hub, "parse_eval_result_entries", None)
    if parse is not None:  # the library's own reader, since 1.4
        (entry,) = parse(found)
        assert (entry.dataset_id, entry.task_id, entry.value) == ("ylecun/mnist", "mnist", 0.9741)
        assert huggingface_hub.eval_result_entries_to_yaml([entry]) == found
    assert evaluations.evaluations({**info, "data": {"name": "TIMIT sample"}}) == []  # not on the Hub
    assert evaluations.evaluations({**info, "metrics": {}}) == []


def test_what_is_not_recorded_is_left_out(info: dict[str, Any]) -> None:
    text = card({"connectivity": info["connectivity"]}, picture=None)
    assert "## Metrics" not in text and "## Training" not in text and "## Licence" not in text and "![" not in text
    data = huggingface_hub.ModelCard(text).data
    assert data.eval_results is None and data.license is None
    assert "sparse from the first step" not in text and "found by RigL" in card({**info, "algorithm": "RigL"})
    assert "module=Net()" in text  # the zoo can't build this architecture
    assert metrics_table({"metrics": {"accuracy": 0.5, "note": "text", "flag": True}}).count("\n") == 2
    assert card({**info, "data": "MNIST", "recipe": "mnist_best", "algorithm": "DeepR", "license": "EUPL-9"}).startswith(
        "---\n"
    )
    assert table({}).count("|") == 12


def test_text_of_a_file_stays_text(info: dict[str, Any]) -> None:
    info["license"] = "mit\ntags: [evil]"
    info["name"] = "a: b\n---\n# c"
    data = huggingface_hub.ModelCard(card(info)).data
    assert data.license == "other" and "evil" not in data.tags


def test_counts() -> None:
    net = sparsify(nn.Linear(1000, 300), 0.1)
    shape, places, _ = connections(net)["weight"]
    dense = (net.weight != 0).int().numpy()
    cells, (tall, wide) = counts(tuple(shape), places, cells=64)
    assert max(cells.shape) <= 64 and cells.sum() == 30_000
    padded = np.zeros((cells.shape[0] * tall, cells.shape[1] * wide), int)
    padded[:300, :1000] = dense
    assert np.array_equal(cells, padded.reshape(cells.shape[0], tall, cells.shape[1], wide).sum((1, 3)))
    assert per_input(tuple(shape), places) is None
    image = per_input((300, 784), torch.tensor([0, 784, 784 + 29]))
    assert image is not None and (image[0, 0], image[1, 1], image.sum()) == (2, 1, 3)


@needs("matplotlib")
def test_picture(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 5), nn.Conv1d(4, 4, 3), nn.Linear(20, 4))
    path = draw(connections(sparsify(net, 0.2)), tmp_path / "net.png", title="a title")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size < 200_000
    lenet = connections(sparsify(LeNet300100(), 0.01))
    first, second = draw(lenet, tmp_path / "a.png").read_bytes(), draw(lenet, tmp_path / "b.png").read_bytes()
    assert first == second
    with pytest.raises(ValueError, match="expected at least one sparse tensor"):
        draw({}, tmp_path / "none.png")


@needs("matplotlib")
def test_cards_are_written_by_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = zoo.save(sparsify(LeNet300100(), 0.01), tmp_path / "lenet300_100.mine.safetensors", metrics={"test_accuracy": 0.5})
    write_cards.main([str(tmp_path / "cards"), str(path)])
    text = (tmp_path / "cards/lenet300_100.mine.md").read_text(encoding="utf-8")
    assert "![connectivity](lenet300_100.mine.png)" in text and "| test accuracy | 0.5 |" in text
    assert "lenet300_100.mine.md" in capsys.readouterr().out
    assert (tmp_path / "cards/lenet300_100.mine.png").read_bytes()[:4] == b"\x89PNG"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="damaged"):
        write_cards.main([str(tmp_path / "cards"), str(path)])


CARDS = ROOT / "zoo" / "cards"


@pytest.mark.parametrize("name", zoo.list_models())
def test_the_cards_of_the_zoo_are_those_that_the_script_writes(name: str) -> None:
    assert (CARDS / f"{name}.png").is_file()
    assert (CARDS / f"{name}.md").read_text(encoding="utf-8") == card(describe(name), picture=f"{name}.png")


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=[] if one == "lenet300_100.deepr_1pct_mnist" else pytest.mark.slow) for one in zoo.list_models()],
)
def test_the_snippet_of_a_card_runs_on_a_raw_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image or a recording of the test set gets its right class; a made-up one, where there is no data, gets some class."""
    code = card(describe(name), picture=None).partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    data = os.environ.get("LIGHTNING_DEEPR_DATA", "")
    if "timit" in name:
        pytest.importorskip("soundfile")
        if data:
            timit = load_timit(real_sample())
            one = next(u for u in find_utterances(real_sample()) if u.name == timit.names["test"][0])
        write_riff(tmp_path / "recording.wav", read_audio(one.audio) if data else noise(16_000, 0))
    elif "cifar" in name:
        if data:
            _, _, images, labels = CIFAR10DataModule(data).load()
        else:
            images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        Image.fromarray(np.ascontiguousarray(images[0].permute(1, 2, 0).numpy())).save("image.png")
    elif "shakespeare" not in name:
        _, _, images, labels = embedded_digits()
        Image.fromarray(images[0].numpy()).save("image.png")
    found: dict[str, Any] = {}
    exec(code, found)
    if "shakespeare" in name:
        assert found["text"].startswith("ROMEO:\n") and len(found["text"]) == 207
        assert set(found["text"]) <= set(found["net"].preprocess.classes)
        return
    if "timit" in name:
        assert len(found["frames"]) == found["logits"].shape[1]
        assert {one.label for one in found["frames"]} <= set(found["net"].preprocess.classes)
        if not data:
            return
        wanted = timit.test.utterance(0)[1]
        right = [
            one.number == int(folding(60).argmax(1)[label])
            for one, label in zip(found["frames"], wanted, strict=True)
            if label >= 0
        ]
        assert sum(right) > 0.4 * len(right)
    else:
        best = int(found["logits"].argmax())
        assert zoo.predict(found["net"], found["image"]).label == found["net"].preprocess.classes[best]
        assert ("cifar" in name and not data) or best == int(labels[0])
