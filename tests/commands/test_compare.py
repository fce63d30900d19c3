"""`compare`, `report` and the page: sources of every kind, figures against sets, no more than 80 columns."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_deepr import SoftDeepR, save_sparse, sparsify, zoo
from lightning_deepr.commands.compare import common
from lightning_deepr.commands.drawings import png, thinned
from lightning_deepr.commands.main import main
from lightning_deepr.commands.sources import open_source
from lightning_deepr.conversion.table import table
from lightning_deepr.models import LeNet300100
from lightning_deepr.recipes import run_folders
from tests.helpers.command_line import run
from tests.helpers.optional import needs

ZOO = "lenet300_100.deepr_1pct_mnist"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sparse file, a checkpoint of another seed, and a run's folder with a log."""
    monkeypatch.chdir(tmp_path)
    save_sparse(sparsify(LeNet300100(), 0.02, seed=1), "a.safetensors", metrics={"test_accuracy": {"value": 0.5}})
    net = sparsify(torch.nn.Sequential(LeNet300100()), 0.02, seed=2)
    torch.save({"state_dict": {f"net.{key[2:]}": value for key, value in net.state_dict().items()}}, "b.ckpt")
    folder = run_folders.claim("run", {"recipe": "mnist", "status": "finished", "metrics": {"test_accuracy": 0.25}})
    save_sparse(sparsify(LeNet300100(), 0.02, seed=3), folder / "sparse.safetensors", submodule="net")
    (folder / "config.yaml").write_text(
        "seed_everything: 3\nsparsity:\n  class_path: lightning_deepr.DeepR\n  init_args:\n    connectivity: 0.02\n"
        "    l1: {class_path: lightning_deepr.LinearDecay, init_args: {start: 0.1, end: 0.0}}\n"
        "model:\n  class_path: x.Y\n  init_args: {lr: 0.1}\n"
    )
    (folder / "csv" / "version_0").mkdir(parents=True)
    lines = ["epoch,step,train_loss,deepr/net.fc1.weight/turnover,<b>&x"]
    lines += [f"0,{i},{2 / (i + 1)},,{i}" if i % 2 else f"0,{i},,0.1,nan" for i in range(400)]
    (folder / "csv" / "version_0" / "metrics.csv").write_text("\n".join(lines))
    return tmp_path


def test_common_connections_equal_those_of_sets(made: Path) -> None:
    first, second = open_source("a.safetensors"), open_source("b.ckpt")
    a = {name: set(places.tolist()) for name, (_, places, _) in zoo.connections_of("a.safetensors").items()}
    state = torch.load("b.ckpt", weights_only=True)["state_dict"]
    for one in common(first, second):
        b = set(state[f"net.{one.name.replace('.weight', '')}.parametrizations.weight.0.places"].tolist())
        both = a[one.name] & b
        assert (one.first, one.second, one.common) == (len(a[one.name]), len(b), len(both))
        assert one.overlap == len(both) / min(len(a[one.name]), len(b))
        assert one.by_chance == max(len(a[one.name]), len(b)) / one.total


@pytest.mark.parametrize("pair", [("a.safetensors", "run"), ("run", "b.ckpt"), (ZOO, "a.safetensors"), ("b.ckpt", ZOO)])
def test_compare(pair: tuple[str, str], made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", *pair])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80, out
    assert "overlap" in out and "fc1.weight" in out
    main(["compare", *pair, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["first"]["name"] == pair[0] and 0 < found["overlap"] < 1 and len(found["tensors"]) == 3
    assert found["first"]["active"] == sum(row["active"] for row in found["first"]["rows"])


def test_networks_with_nothing_in_common(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sparse(sparsify(torch.nn.Linear(30, 20), 0.1), "small.safetensors")
    save_sparse(LeNet300100(), "dense.safetensors")
    soft = LeNet300100()
    SoftDeepR(0.02, temperature=1e-9).prepare(soft)
    torch.save(soft.state_dict(), "soft.pt")
    for other in ("small.safetensors", "dense.safetensors", "soft.pt"):
        main(["compare", "a.safetensors", other])
        out = capsys.readouterr().out
        assert max(map(len, out.splitlines())) <= 80 and "5,324" in out, out
    main(["compare", "a.safetensors", "soft.pt", "--json"])
    assert json.loads(capsys.readouterr().out)["overlap"] is None


@pytest.mark.parametrize("source", ["a.safetensors", "b.ckpt", "run", "run/sparse.safetensors", ZOO])
def test_report(source: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", source])
    out = capsys.readouterr().out
    assert "fc1.weight" in out and max(map(len, out.splitlines())) <= 80
    assert "lr_scale" not in out and "compute" not in out, "columns that say nothing are left out"
    if source.startswith("run"):
        assert "LinearDecay(start=0.1, end=0)" in out and "0.25" in out
    main(["report", source, "--json"])
    assert json.loads(capsys.readouterr().out)["rows"][0]["name"].endswith("fc1.weight")


def test_what_cannot_be_read(made: Path) -> None:
    (made / "cut.safetensors").write_bytes(Path("a.safetensors").read_bytes()[:500])
    (made / "empty").mkdir()
    for command in ("report", "compare"):
        for name, words in (
            ("nothing.pt", "no checkpoint at"),
            ("lenet300_100.deepr_1pct", "Models: lenet300_100"),
            ("cut.safetensors", "expected"),
            ("empty", "expected the folder of a run"),
        ):
            with pytest.raises(SystemExit, match=words) as failed:
                main([command, name, *(["a.safetensors"] if command == "compare" else [])])
            assert isinstance(failed.value.code, str), "exit status 1"


# -- the page -----------------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    VOID = ("meta", "img", "line", "br", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("sources", [["run"], ["run", "b.ckpt"], [ZOO, "a.safetensors"], ["dense.safetensors"]])
def test_a_page_has_everything_in_itself(sources: list[str], made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sparse(LeNet300100(), "dense.safetensors")
    main(["report", *sources, "--html", "pages/page.html"])
    content = (made / "pages" / "page.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(content)
    assert reader.open == [], "every element is closed"
    assert not {"script", "link", "iframe"} & {tag for tag, _ in reader.tags}
    assert not re.search(r"https?://|@import|url\((?!data:)", content)
    assert all(attributes["src"].startswith("data:image/png;base64,") and attributes["alt"] for tag, attributes in reader.tags
               if tag == "img" and attributes["src"])  # fmt: skip
    assert "prefers-color-scheme: dark" in content and "width=device-width" in content
    for source in sources:
        assert source in reader.text
    if sources[0] == "run":
        assert "<b>&x" in reader.text and "<b>&x" not in content, "names are escaped"
        charts = [attributes["aria-label"] for tag, attributes in reader.tags if tag == "svg"]
        assert any((label or "").startswith("train_loss over the steps: A") for label in charts)
        assert "nan" not in content
    assert ("Common connections" in reader.text) == (len(sources) == 2)


def test_a_page_that_cannot_be_written(made: Path) -> None:
    with pytest.raises(SystemExit, match="report: "):
        main(["report", "run", "--html", "a.safetensors/page.html"])


@needs("matplotlib")
def test_png_is_read_by_another_reader() -> None:
    import io

    from matplotlib.image import imread

    values = np.array([[0, 1, 4], [9, 0, 0]])
    found = imread(io.BytesIO(png(values)), format="png")
    assert found.shape == (2, 3, 4)
    np.testing.assert_allclose(found[..., 3], np.sqrt(values / 9), atol=1 / 255)
    assert imread(io.BytesIO(png(np.zeros((2, 2)))), format="png")[..., 3].max() == 0


def test_a_long_curve_is_thinned_to_means() -> None:
    line = [(float(i), float(i % 2)) for i in range(1000)]
    short = thinned(line, most=100)
    assert len(short) == 100 and all(y == 0.5 for _, y in short) and short[0][0] == 4.5


# -- tables, messages and exit codes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [5, 30, 60, 79, 120])
@pytest.mark.parametrize("text", ["-", "short", "a rather long text that is not the same everywhere"])
def test_tables_fit_and_lose_nothing(length: int, text: str) -> None:
    rows = [
        (f"{'x' * length}{i}", "768x768", "589,824", "5,898", text if text == "-" else f"{text} {i}", "same") for i in range(3)
    ]
    out = table(("name", "shape", "total", "active", "l1", "compute"), rows, right=("total", "active"))
    assert max(map(len, out.splitlines())) <= max(80, length + 1), out
    for row in rows:
        assert all(cell in out for cell in row if cell != "-")
    assert ("l1" in out) == (text != "-")


@needs("jsonargparse")
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--model.lrr=1", "The nearest is --model.lr."),
        ("--sparsity.conectivity=.1", "The nearest is --sparsity.connectivity."),
        ("--trainer.max_epochz=1", "The nearest is --trainer.max_epochs."),
        ("--trainer.max_epochs=abc", "expected int or null, found 'abc'"),
        ("--data.batch_size=x", "--data.batch_size: expected int, found 'x'"),
        ("--sparsity.distribution=uniforn", "The nearest is uniform."),
        ("--sparsity.connectivity=2.0", "expected a fraction"),
        ("--sparsity=DeppR", "The nearest is DeepR."),
        ("--config=mnist_quickstrat", "The nearest is mnist_quickstart."),
        ("--model=Nope", "expected a class, found 'Nope'"),
        ("--config=wrong.yaml", "The nearest is --trainer.max_epochs."),
    ],
)
def test_wrong_arguments_are_three_lines(given: str, words: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("wrong.yaml").write_text("trainer:\n  max_epoch: 3\n")
    with pytest.raises(SystemExit) as refused:
        main(["fit", "--config", "mnist_quickstart", "--out", "out", given])
    err = capsys.readouterr().err
    lines = [line for line in err[err.index("lightning-deepr fit: ") :].splitlines() if line]
    assert refused.value.code == 2 and words in "\n".join(lines) and len(lines) <= 3, lines


def test_version_json_and_exit_codes(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert re.fullmatch(r"lightning-deepr \d+\.\d+\.\d+.*\n", capsys.readouterr().out)
    main(["recipes", "--json"])
    assert "mnist_quickstart" in json.loads(capsys.readouterr().out)
    main(["zoo", "list", "lenet*1pct*", "--json"])
    assert json.loads(capsys.readouterr().out)[ZOO]["connectivity"]["active"] == 2662
    main(["zoo", "verify", ZOO, "--json"])
    assert json.loads(capsys.readouterr().out)["as_recorded"][ZOO]["format"] == "1"
    for arguments in (["zoo", "list"], ["recipes"], ["zoo", "list", "lenet*"]):
        main(arguments)
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    with pytest.raises(SystemExit) as refused:
        main(["comapre", "a", "b"])
    assert refused.value.code == 2 and "The nearest is compare." in capsys.readouterr().err


@pytest.mark.slow
def test_exit_codes_of_the_process(made: Path) -> None:
    codes = [run(*arguments, cwd=made).returncode for arguments in (("--version",), ("report", "nothing.pt"), ("nothing",))]
    assert codes == [0, 1, 2]
