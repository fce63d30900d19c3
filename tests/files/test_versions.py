"""Every reader refuses by name what a newer version wrote, changes nothing then, and reads what older versions wrote."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_deepr
from lightning_deepr import DeepR, Topology, load_state_dict, methods, save_sparse, sparsify, zoo
from lightning_deepr.files import container
from lightning_deepr.files.amending import amend
from lightning_deepr.files.checkpoint import report_of_checkpoint
from lightning_deepr.recipes import run_folders
from lightning_deepr.training.callback import STATE_VERSION
from lightning_deepr.weights.base import FORMAT_VERSION, RANKED_VERSION, RESTING_VERSION
from tests.helpers.paths import ROOT

OLD_ZOO_FILE = ROOT / "tests/data/zoo_without_input.safetensors"  # written before files recorded how the input looks


OPTIONS: dict[str, dict[str, float]] = {
    "SoftDeepR": {"temperature": 1e-6},
    "L1Shrinkage": {"l1": 1e-4},
    "SET": {"rewire_every_n_steps": 2},
    "RigL": {"rewire_every_n_steps": 2},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3))


def newer_file(path: Path) -> Path:
    """Write a sparse file of the next format version, with a right digest."""
    raw = save_sparse(sparsify(network(), 0.2), path).read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"]["version"] = str(container.VERSION + 1)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    path.write_bytes(container.sign(bytearray(struct.pack("<Q", len(text)) + text + raw[8 + length :])))
    return path


READERS: dict[str, Callable[[Path], Any]] = {
    "load_state_dict": lambda path: load_state_dict(network(), path),
    "zoo.load": lambda path: zoo.load(path, module=network()),
    "zoo.info": zoo.info,
    "zoo.verify": zoo.verify,
    "zoo.connections_of": zoo.connections_of,
    "report": report_of_checkpoint,
    "amend": lambda path: amend(path, license="MIT"),
    "Topology": lambda path: sparsify(network(), Topology(str(path))),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_newer_sparse_file_is_refused(reader: str, tmp_path: Path) -> None:
    file = newer_file(tmp_path / "net.safetensors")
    before = file.read_bytes()
    wanted = rf"{re.escape(str(file))}: format version: expected 1, found '2'\. The file is newer than this package: update"
    with pytest.raises(ValueError, match=wanted):
        READERS[reader](file)
    assert file.read_bytes() == before


def test_a_newer_state_dict_is_refused(tmp_path: Path) -> None:
    net = sparsify(network(), 0.2)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    name = next(name for name in state if name.endswith("lightning_deepr.load_state_dict"))
    state[name] = torch.tensor(RESTING_VERSION + 1)
    torch.save(state, tmp_path / "net.pt")
    for load in (lambda: load_state_dict(network(), tmp_path / "net.pt"), lambda: net.load_state_dict(state)):
        with pytest.raises((ValueError, RuntimeError), match=r"expected format 4 or older, found 5: update lightning-deepr"):
            load()


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("version", [STATE_VERSION + 1, 0, "2", None])
def test_a_newer_state_of_a_callback_is_refused(method: str, version: Any) -> None:
    made = getattr(methods, method)(0.2, **OPTIONS.get(method, {}))
    net = made.prepare(network())
    rewiring = made.attach(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=10)
    state = rewiring.state_dict()
    assert state["version"] == STATE_VERSION
    for step in range(2):  # the refusal changes nothing: the state of before loads afterwards
        with pytest.raises(
            ValueError, match=rf"{method}: expected a callback's state of version 2 or older, found {version!r}"
        ):
            rewiring.load_state_dict({**state, "version": version, "seed": 99})
        assert made.seed == state["seed"], step
    rewiring.load_state_dict(state)


def test_a_newer_run_folder_is_refused(tmp_path: Path) -> None:
    record = {"format": run_folders.FORMAT + 1, "package_version": "9.0.0"}
    (tmp_path / run_folders.RECORD).write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"expected a run folder of format 1 or older, found 2, written by lightning-deepr 9\.0\.0"
    ):
        run_folders.read_record(tmp_path)


def test_a_zoo_file_of_before_loads_and_knows_its_input(tmp_path: Path) -> None:
    assert "input" not in container.read(OLD_ZOO_FILE).record["metadata"], "this file is to be one without it"
    today = zoo.load("lenet300_100.deepr_0p5pct_mnist")
    old = zoo.load(OLD_ZOO_FILE)
    assert old.preprocess == today.preprocess
    for mine, yours in zip(old.state_dict().values(), today.state_dict().values(), strict=True):
        assert torch.equal(mine, yours)
    assert zoo.info(OLD_ZOO_FILE)["input"] == zoo.info("lenet300_100.deepr_0p5pct_mnist")["input"]


# -- metadata that are added later --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", zoo.ENTRIES, ids=lambda entry: entry.name)
def test_every_file_of_the_zoo_has_its_record_inside(entry: zoo.Entry) -> None:
    found = container.read(zoo.path_of(entry.name)).record["metadata"]
    assert found["input"] == zoo.info(entry.name)["input"] and found["license"] == "Apache-2.0"


def test_amended_files_keep_their_tensors(tmp_path: Path) -> None:
    """Also those of the zoo: the file of before, with today's metadata, is today's file."""
    name = "lenet300_100.deepr_0p5pct_mnist"
    before, today = container.read(OLD_ZOO_FILE), container.read(zoo.path_of(name))
    assert before.pieces.keys() == today.pieces.keys()
    assert all(bytes(piece.data) == bytes(today.pieces[key].data) for key, piece in before.pieces.items())
    added = {key: value for key, value in today.record["metadata"].items() if before.record["metadata"].get(key) != value}
    written = amend(OLD_ZOO_FILE, tmp_path / "net.safetensors", **added)
    assert written.read_bytes() == zoo.path_of(name).read_bytes()
    assert hashlib.sha256(OLD_ZOO_FILE.read_bytes()).hexdigest().startswith("e3109ad2"), "the fixture was not changed"
    with pytest.raises(ValueError, match=r"expected names that zoo\.info does not fill in itself, found sha256"):
        amend(written, sha256="0" * 64)
    with pytest.raises(ValueError, match="metadata: expected JSON values"):
        amend(written, notes=float("nan"))
    damaged = bytearray(written.read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    with pytest.raises(zoo.FormatError, match="damaged"):
        amend(tmp_path / "damaged.safetensors", license="MIT")
    assert (tmp_path / "damaged.safetensors").read_bytes() == damaged


def test_the_page_of_versions_has_the_numbers_of_today() -> None:
    page = (ROOT / "docs/versions.md").read_text(encoding="utf-8")
    assert f"| {container.VERSION} | `version` in the metadata" in page
    ranked, resting = f"{RANKED_VERSION} for a dense one (docs/internals.md)", f"{RESTING_VERSION} for one with K = N"
    assert f"| {FORMAT_VERSION}; {ranked}; {resting} |" in page
    assert f"| {STATE_VERSION} | `version` in the state |" in page
    assert f"| {run_folders.FORMAT} | `format` in its record |" in page
    assert DeepR.__module__.startswith(lightning_deepr.__name__)
