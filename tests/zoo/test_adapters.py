"""The zoo's adapters: they turn a model of the zoo into another, and leave it as it is."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch

from lightning_deepr import zoo
from lightning_deepr.adapters import detach, merge, unmerge
from lightning_deepr.weights.find import converted_tensors
from lightning_deepr.zoo import adapters, loading, make_adapter


def test_an_adapter_of_the_zoo_reads_turned_digits() -> None:
    (entry,) = adapters.ADAPTERS
    base, net = zoo.load(entry.base, dense=True), zoo.load_adapter(entry.name)
    assert not net.training and sum(one.slots.count for one in converted_tensors(net)) == 1597
    # the recorded numbers; another BLAS may round one digit to the other side
    assert abs(make_adapter.right(net) - 2810) <= 3 and abs(make_adapter.right(net, is_turned=False) - 854) <= 3
    assert make_adapter.right(base) < 400 and make_adapter.right(base, is_turned=False) > 2940
    text = (loading.folder() / "adapters" / "README.md").read_text(encoding="utf-8")
    assert entry.sha256 in text and f"| {entry.path.stat().st_size:,} |" in text and "2,810 turned and 854 upright" in text

    before = {name: value.clone() for name, value in detach(copy.deepcopy(net)).state_dict().items()}
    again = detach(unmerge(merge(net))).state_dict()
    for name, value in base.state_dict().items():
        assert torch.equal(before[name], value) and torch.equal(again[name], value), name


def test_a_damaged_or_unknown_adapter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"one of lenet300_100.rotated_digits, found 'lenet300_100'"):
        zoo.load_adapter("lenet300_100")
    (entry,) = adapters.ADAPTERS
    shutil.copytree(loading.folder() / "adapters", tmp_path / "adapters")
    monkeypatch.setattr(loading, "folder", lambda: tmp_path)
    raw = bytearray(entry.path.read_bytes())
    raw[-1] ^= 1
    entry.path.write_bytes(raw)
    with pytest.raises(zoo.FormatError, match=r"rotated_digits.safetensors.*expected sha256 f000f12"):
        zoo.load_adapter(entry.name)


def test_the_folder_and_the_registry_agree() -> None:
    found = sorted(file.stem for file in (loading.folder() / "adapters").glob("*.safetensors"))
    assert found == zoo.list_adapters()
