"""The command ``lightning-deepr export``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_deepr import load_state_dict, prune_dead_units, save_sparse, sparsify, zoo
from lightning_deepr.commands.main import main
from lightning_deepr.export import to_csr, to_dense_state_dict
from lightning_deepr.models import LeNet300100
from tests.helpers.exported import lenet
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:.* is an int and means one single connection", "ignore:LSTM with projections")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_sparse(lenet(), tmp_path / "net.safetensors")


def test_command_line_writes_dense_csr_and_c(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = ["--module", "lightning_deepr.models.LeNet300100"]
    net = load_state_dict(LeNet300100(), checkpoint)
    main(["export", str(checkpoint), "--to", "dense", "--out", str(tmp_path / "dense.pt"), *network])
    state = torch.load(tmp_path / "dense.pt", weights_only=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in to_dense_state_dict(net).items())
    main(["export", str(checkpoint), "--to", "csr", "--out", str(tmp_path / "net.npz"), *network])
    arrays = np.load(tmp_path / "net.npz")
    assert torch.equal(torch.from_numpy(arrays["fc1.weight.data"]), to_csr(net)["fc1.weight"].values())
    assert np.array_equal(arrays["fc1.bias"], net.fc1.bias.detach().numpy())
    main(["export", str(checkpoint), "--to", "c", "--out", str(tmp_path / "net.h"), "--weights", "int8", *network])
    assert "static inline void predict" in (tmp_path / "net.h").read_text(encoding="utf-8")
    assert "2,682 of 266,200 connections as int8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "onnx", "--out", "net.onnx"], "--input-shape"),
        (["--to", "csr", "--out", "net.txt"], r"expected \.npz"),
        (["--to", "dense", "--out", "net.txt"], r"expected \.safetensors"),
        (["--to", "c", "--out", "net.h", "--submodule", "head"], "head"),
        (["--to", "csr", "--out", "net.npz", "--train"], "--train: expected --to c, found --to csr"),
        (["--to", "c", "--out", "net.h", "--batch", "2"], "--batch needs --train"),
        (["--to", "c", "--out", "net", "--train", "--weights", "int8"], "--theta int16 stores"),
        (["--to", "c", "--out", "net", "--train", "--prune"], "--prune is for inference"),
        (["--to", "c", "--out", "net", "--train", "--ram", "1000"], "No connectivity fits"),
        (["--to", "c", "--out", "net", "--train", "--l1", "-1"], "l1: expected finite values"),
    ],
)
def test_command_line_says_what_is_wrong(checkpoint: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["export", str(checkpoint), *arguments, "--module", "lightning_deepr.models.LeNet300100"])


def test_command_line_leaves_dead_units_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "lenet300_100.deepr_1pct_mnist"
    report = prune_dead_units(zoo.load(name))
    main(["export", name, "--to", "dense", "--out", str(tmp_path / "net.pt"), "--prune"])
    assert str(report) in capsys.readouterr().out
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    assert state["fc1.weight"].shape == (105, 784) and state["fc2.weight"].shape == (41, 105)


def test_command_line_writes_a_program_that_trains(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "build"
    options = [
        "--batch",
        "4",
        "--untrained",
        "--l1",
        "2e-4:0",
        "--temperature",
        "1e-12",
        "--theta",
        "int16",
        "--inputs",
        "float",
    ]
    main(["export", str(checkpoint), "--to", "c", "--train", "--out", str(out), *options, "--ram", "65536", "--prefix", "tiny"])
    assert "training of 2,682 of 266,200 connections in batches of 4" in capsys.readouterr().out
    header = (out / "tiny_net.h").read_text(encoding="utf-8")
    assert "#define TINY_BATCH 4" in header and "typedef float tiny_input;" in header
    assert "alpha 0.0002 to 0, T 1e-12" in header
    main(["export", "lenet300_100.deepr_1pct_mnist", "--to", "c", "--train", "--out", str(out)])
    assert "float deepr_train_step(deepr_net *net, const deepr_input *x," in (out / "deepr_net.h").read_text(encoding="utf-8")
    assert (out / "deepr_net.c").is_file()


def test_command_line_finds_the_network_or_asks_for_it(checkpoint: Path, tmp_path: Path) -> None:
    for module in (["--module", "torch.nn.functional.relu"], ["--module", "LeNet300100"]):
        with pytest.raises(SystemExit, match=r"expected the full name of an nn\.Module"):
            main(["export", str(checkpoint), "--to", "c", "--out", str(tmp_path / "net.h"), *module])
    torch.save({"state_dict": lenet().state_dict()}, tmp_path / "last.ckpt")
    with pytest.raises(SystemExit, match=r"last\.ckpt does not say which network it belongs to: give --module"):
        main(["export", str(tmp_path / "last.ckpt"), "--to", "c", "--out", str(tmp_path / "net.h")])
    main(["export", str(checkpoint), "--to", "c", "--out", str(tmp_path / "one.h")])  # a sparse file names its network
    main(
        [
            "export",
            str(tmp_path / "last.ckpt"),
            "--to",
            "c",
            "--out",
            str(tmp_path / "other.h"),
            "--module",
            "lightning_deepr.models.LeNet300100",
        ]
    )
    assert (tmp_path / "one.h").read_text(encoding="utf-8") == (tmp_path / "other.h").read_text(encoding="utf-8")


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


@pytest.mark.parametrize("kind", ["sparse", "state_dict"])
def test_a_part_from_the_file_of_the_whole_or_of_the_part_alone(kind: str, tmp_path: Path) -> None:
    net = sparsify(Whole(), 0.3)
    headers = []
    for name, saved in (("whole", net), ("part", net.net)):
        file = tmp_path / f"{name}.{'safetensors' if kind == 'sparse' else 'pt'}"
        save_sparse(saved, file) if kind == "sparse" else torch.save(saved.state_dict(), file)
        out = tmp_path / f"{name}.h"
        module = f"{__name__}.Whole"
        main(["export", str(file), "--module", module, "--submodule", "net", "--to", "c", "--out", str(out)])
        headers.append(out.read_text(encoding="utf-8"))
    assert headers[0] == headers[1]
    with pytest.raises(SystemExit, match="head"):
        main(["export", str(tmp_path / file.name.replace("part", "whole")), "--module", module, "--submodule", "head",
              "--to", "c", "--out", str(out)])  # fmt: skip


def test_a_class_in_a_file_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an installed program: its own folder is on the path of imports, the current one is not."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\nclass Mine(nn.Sequential):\n    def __init__(self):\n"
        "        super().__init__(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))\n"
    )
    (tmp_path / "needy.py").write_text("import no_such_library\n")
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "run.py").write_text("from lightning_deepr.commands.main import main\nmain()\n")
    save_sparse(sparsify(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)), 0.3), tmp_path / "net.safetensors")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(module: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(tmp_path / "program" / "run.py"), "export", "net.safetensors", "--module", module]
        return subprocess.run([*command, "--to", "c", "--out", "net.h"], cwd=tmp_path, capture_output=True, text=True)

    done = run("mine.Mine")
    assert done.returncode == 0 and (tmp_path / "net.h").is_file(), done.stderr
    done = run("yours.Mine")
    assert done.returncode == 1 and "there is no module 'yours', neither installed nor in the current folder" in done.stderr
    assert "expected the full name of an nn.Module" in run("mine.Other").stderr
    assert "No module named 'no_such_library'" in run("needy.Mine").stderr
