"""The content of a file decides what it is, and a file that does not fit is refused by name before anything changes."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import connections, load_state_dict, save_sparse, sparsify, zoo
from lightning_deepr.commands.main import main
from lightning_deepr.files.checkpoint import load_sparse_file, report_of_checkpoint
from lightning_deepr.models import LeNet300100
from tests.helpers.small import unchanged


def net(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return sparsify(nn.Sequential(nn.Linear(9, 8), nn.LSTM(8, 6)), 0.4, **options)


def fresh() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 8), nn.LSTM(8, 6))


def in_old_format(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def in_new_format(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize("name", ["net.safetensors", "net.pt", "net.ckpt", "net.bin", "net"])
@pytest.mark.parametrize("kind", ["sparse", "zip", "pickle", "lightning"])
def test_the_name_of_a_file_does_not_matter(kind: str, name: str, tmp_path: Path) -> None:
    original, path = net(), tmp_path / name
    if kind == "sparse":
        save_sparse(original, path)
    else:
        state = {"state_dict": original.state_dict()} if kind == "lightning" else original.state_dict()
        path.write_bytes(in_old_format(state) if kind == "pickle" else in_new_format(state))
    loaded = load_state_dict(fresh(), path)
    for name_, (_, places, values) in connections(original).items():
        dense, mine = torch.zeros(500), torch.zeros(500)
        dense[places], mine[connections(loaded)[name_][1]] = values, connections(loaded)[name_][2]
        assert torch.equal(dense, mine)
    assert len(report_of_checkpoint(path)) == 3


FOREIGN = {
    "safetensors": lambda: struct.pack("<Q", 2) + b"{}",
    "empty": lambda: b"",
    "text": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "json": lambda: json.dumps({"fc.weight": [1.0] * 100}).encode(),
    "numpy": lambda: b"\x93NUMPY" + bytes(200),
}


@pytest.mark.parametrize("name", ["net.safetensors", "net.pt"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused_with_what_it_seems_to_be(kind: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FOREIGN[kind]())
    found = {"safetensors": "another safetensors file", "text": "a pointer of Git LFS"}.get(
        kind, "bytes that are something else"
    )
    target = fresh()
    for read in (lambda: load_state_dict(target, path), lambda: report_of_checkpoint(path), lambda: zoo.load(path)):
        with unchanged(target), pytest.raises(ValueError, match=f"{path}: expected a file of lightning-deepr.*found .*{found}"):
            read()
    with pytest.raises(FileNotFoundError, match="There is no checkpoint at"):
        load_state_dict(target, tmp_path / f"other.{name}")
    path.write_bytes(in_new_format(net().state_dict()))
    with pytest.raises(ValueError, match=r"a pickle or a zip file, as torch\.save writes: load_state_dict"):
        zoo.load(path)


class Trap:
    def __reduce__(self) -> Any:
        return print, ("sprung",)


@pytest.mark.parametrize("kind", ["damaged zip", "cut off", "a pickle of code", "a list"])
def test_a_file_that_torch_refuses(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = in_new_format(net().state_dict())
    content = {
        "damaged zip": b"PK\x03\x04" + bytes(300),
        "cut off": whole[: len(whole) // 2],
        "a pickle of code": pickle.dumps(Trap()),
        "a list": in_new_format([torch.zeros(3)]),
    }
    path, target = tmp_path / "net.pt", fresh()
    path.write_bytes(content[kind])
    with unchanged(target), pytest.raises(ValueError, match=f"{path}: expected a (checkpoint|state_dict)"):
        load_state_dict(target, path)
    with unchanged(target), pytest.raises(ValueError, match="expected a file of lightning-deepr"):
        load_sparse_file(target, path)
    assert "sprung" not in capsys.readouterr().out


# -- a checkpoint that lies ---------------------------------------------------------------------------------------------------

HEAD = "0.parametrizations.weight."


def put(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state.update({name: value(state[name]) if callable(value) else value})


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "shape": (
        put(HEAD + "0.shape", torch.tensor([8, 10])),
        r"`0\.weight`: expected a weight of shape \(8, 9\), found \(8, 10\)",
    ),
    "transposed": (
        put(HEAD + "0.shape", torch.tensor([9, 8])),
        r"`0\.weight`: expected a weight of shape \(8, 9\), found \(9, 8\)",
    ),
    "theta": (put(HEAD + "original", lambda v: v[:-1]), r"`0\.weight`: expected theta, places and births of one length K"),
    "births": (put(HEAD + "0.born", lambda v: v[:3]), r"`0\.weight`: expected theta, places and births of one length K"),
    "no theta": (
        lambda state: state.pop(HEAD + "original"),
        r"`0\.weight`: expected a tensor `0\.parametrizations\.weight\.original`",
    ),
    "no connection": (
        lambda state: state.update({HEAD + part: state[HEAD + part][:0] for part in ("original", "0.places", "0.born")}),
        r"`0\.weight`: expected K from 1 to N = 72, found 0",
    ),
    "a place outside": (put(HEAD + "0.places", lambda v: v + 72), "places"),
    "a place twice": (put(HEAD + "0.places", lambda v: v * 0 + 5), "different places"),
    "a bias": (put("0.bias", torch.zeros(7)), r"`0\.bias`: expected a tensor of shape \(8,\), .* found \(7,\)"),
    "a bias of an LSTM": (put("1.bias_hh_l0", torch.zeros(24, 2)), r"`1\.bias_hh_l0`: expected a tensor of shape \(24,\)"),
    "another layer": (put("7.weight", torch.zeros(3)), "Unexpected key"),
    "no bias": (lambda state: state.pop("0.bias"), "Missing key"),
    "another kind": (lambda state: state.update({HEAD + "0.mask": torch.ones(8, 9)}), r"`0\.weight`"),
}


@pytest.mark.parametrize("converted", [False, True], ids=["dense", "converted"])
@pytest.mark.parametrize("lie", LIES)
def test_a_checkpoint_that_lies_changes_nothing(lie: str, converted: bool) -> None:
    change, message = LIES[lie]
    state = dict(net().state_dict())
    change(state)
    target = sparsify(fresh(), 0.4, seed=3) if converted else fresh()
    order = [name for name, _ in target.named_parameters()]
    x = torch.randn(5, 2, 9)
    before = target(x)[0]
    with unchanged(target), pytest.raises((ValueError, RuntimeError), match=message):
        load_state_dict(target, state)
    assert [name for name, _ in target.named_parameters()] == order
    torch.testing.assert_close(target(x)[0], before)
    load_state_dict(target, net().state_dict())  # it can still be loaded
    torch.testing.assert_close(target(x)[0], net()(x)[0])


@pytest.mark.parametrize("make", [lambda: nn.Linear(10, 8), lambda: nn.Linear(9, 8, bias=False), lambda: nn.Linear(9, 9)])
def test_a_sparse_file_of_another_network_changes_nothing(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    path = save_sparse(net(), tmp_path / "net")
    target = nn.Sequential(make(), nn.LSTM(make().out_features, 6))
    with unchanged(target), pytest.raises((ValueError, RuntimeError), match=r"0\.(weight|bias)|1\.weight"):
        load_state_dict(target, path)


# -- 16-bit floats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_csr_of_every_floating_point_type(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = sparsify(LeNet300100().to(dtype), 0.02)
    path = save_sparse(network, tmp_path / "net.safetensors")
    main(["export", str(path), "--to", "csr", "--out", str(tmp_path / "net.npz")])
    arrays = np.load(tmp_path / "net.npz")
    weight: Tensor = network.fc1.weight + 0  # type: ignore[operator, union-attr, assignment]
    data, places, rows = (arrays[f"fc1.weight.{part}"] for part in ("data", "indices", "indptr"))
    built = np.zeros((300, 784), data.dtype)
    built[np.repeat(np.arange(300), np.diff(rows)), places] = data
    assert np.array_equal(built, weight.detach().double().numpy().astype(data.dtype))
    assert np.array_equal(arrays["fc1.bias"], network.fc1.bias.detach().float().numpy()) or dtype == torch.float64  # type: ignore[union-attr, operator]
