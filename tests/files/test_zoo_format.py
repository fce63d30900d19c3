"""The file of a sparse model: equality after loading, its size, refused files, and a reader without the package."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_deepr
from lightning_deepr import DeepR, SoftDeepR, connections, densify, load_state_dict, save_sparse, sparsify, zoo
from lightning_deepr.files import container, gaps
from lightning_deepr.files.checkpoint import report_of_checkpoint
from lightning_deepr.models import CIFAR10CNN, BLSTMClassifier, LeNet300100
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.fuzz_format import Parts
from tests.helpers.fuzz_format import signed as with_digest
from tests.helpers.paths import ROOT
from tests.helpers.tensors_made import Recording


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))


def batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(16, 12, generator=generator), torch.randint(4, (16,), generator=generator)) for _ in range(count)]


def train(net: nn.Module, callback: Any, data: list[tuple[Tensor, Tensor]]) -> nn.Module:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    rewiring = callback.attach(net, optimizer, total_steps=len(data))
    for x, y in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    rewiring.remove()
    return net


def trained(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return train(sparsify(mlp(), 0.3, seed=3, **options), DeepR(l1=0.05, temperature=1e-6, seed=5), batches(20))


def numbered_by_place(net: nn.Module) -> nn.Module:
    """Return the same network with its slots in the order of the file."""
    net = copy.deepcopy(net)
    for converted in converted_tensors(net):
        slots, order = converted.slots, converted.slots.places.argsort()
        converted.theta.data = converted.theta.data[order]
        for name in ("places", "born", "signs"):
            getattr(slots, name).copy_(getattr(slots, name)[order])
        slots.places_changed()
    return net


def everything(net: nn.Module, but: tuple[str, ...] = ("born",)) -> dict[str, Any]:
    """Collect the complete state of a network."""
    state = {name: value for name, value in net.state_dict().items() if not name.endswith(but)}
    for converted in converted_tensors(net):
        state[converted.name + " signs"] = converted.slots.signs
        state[converted.name + " last birth"] = torch.tensor(converted.slots.last_birth())
    return state


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name
        if value.is_floating_point():
            assert torch.equal(torch.signbit(value), torch.signbit(second[name])), f"{name}: a sign was lost"


# -- gaps -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 7, 8, 9, 12, 16, 31, 40])
def test_every_width_brings_back_the_places(bits: int) -> None:
    rng = np.random.default_rng(bits)
    for total, count in [(1, 1), (5, 5), (2000, 1), (2000, 700), (2000, 1999), (300_000, 40_000 if bits > 3 else 400)]:
        places = np.sort(rng.choice(total, count, replace=False))
        stream = gaps.encode(places, bits)
        assert np.array_equal(gaps.decode(stream, count, bits, total=total), places)
        with pytest.raises(zoo.FormatError):
            gaps.decode(stream, count, bits, total=int(places[-1]))
        with pytest.raises(zoo.FormatError):
            gaps.decode(stream + b"\0" * 5, count, bits, total=total)
        if count > 1:
            with pytest.raises(zoo.FormatError):
                gaps.decode(stream[: len(stream) // 2], count, bits, total=total)


def test_places_as_far_apart_as_can_be() -> None:
    places = np.array([0, 2**47, 2**48 - 1])
    width = gaps.best_width(places)
    assert gaps.decode(gaps.encode(places, width), 3, width, total=2**48).tolist() == places.tolist()
    with pytest.raises(zoo.FormatError, match="places below"):  # no sum overflows
        gaps.decode(b"\xff" * 5 * (1 << 16) + b"\0" * 5, 1, 40, total=2**48)


@pytest.mark.parametrize("density", [0.002, 0.01, 0.05, 0.2, 0.5])
def test_the_places_take_a_tenth_more_than_their_entropy(density: float) -> None:
    total = 400_000
    places = np.sort(np.random.default_rng(0).choice(total, round(density * total), replace=False))
    width = gaps.best_width(places)
    entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density)) * total / 8
    sizes = [len(gaps.encode(places, bits)) for bits in range(1, 21)]
    assert sizes[width - 1] == min(sizes) < 1.1 * entropy


# -- what is equal ----------------------------------------------------------------------------------------------------------


def test_equal_after_loading(tmp_path: Path) -> None:
    net = trained()
    theta = next(converted_tensors(net)).theta
    theta.data[:6] = 0.0  # newborns of either sign
    path = save_sparse(net, tmp_path / "net.safetensors", seeds=[1, 2], note="ä < ö")
    loaded = load_state_dict(mlp(), path)
    assert_same(everything(loaded), everything(numbered_by_place(net)))
    x = batches(1)[0][0]
    torch.testing.assert_close(loaded(x), net(x))
    values = zoo.connections_of(path)["0.weight"][2]
    assert bool((torch.signbit(values) & (values == 0)).any()), "no -0.0 among the newborns"
    assert report_of_checkpoint(path).active == sum(len(values) for _, _, values in connections(net).values())
    # the same contents are the same bytes
    again = save_sparse(loaded, tmp_path / "again.safetensors", note="ä < ö", seeds=[1, 2])
    assert again.read_bytes() == path.read_bytes()


def test_training_on_after_loading_equals_never_having_saved(tmp_path: Path) -> None:
    """This holds for slots numbered by place, because births are drawn by slot number."""
    net = trained()
    loaded = load_state_dict(mlp(), save_sparse(net, tmp_path / "net.safetensors"))
    twice = load_state_dict(mlp(), save_sparse(loaded, tmp_path / "twice.safetensors"))

    def further(net: nn.Module) -> dict[str, Any]:
        return everything(train(net, DeepR(l1=0.05, temperature=1e-6, seed=5, check_invariants=True), batches(30, seed=1)))

    never_saved = further(numbered_by_place(net))
    assert int(never_saved["0.weight last birth"]) > 20, "nothing was born after loading"
    assert_same(further(loaded), never_saved)
    assert_same(further(twice), never_saved)


def test_until_the_first_birth_the_order_of_slots_does_not_matter(tmp_path: Path) -> None:
    net = trained()
    loaded = load_state_dict(mlp(), save_sparse(net, tmp_path / "net.safetensors"))
    for one in (net, loaded):
        train(one, DeepR(l1=0.0, rewire_every_n_steps=1000), batches(10, seed=1))
    for name, weight in densify(loaded).state_dict().items():
        torch.testing.assert_close(weight, densify(copy.deepcopy(net)).state_dict()[name])


def test_exceptions_that_are_dormant_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = train(sparsify(mlp(), 0.3, init="largest"), DeepR(l1=0.3), batches(20))
    slots = next(converted_tensors(net)).slots
    dormant = np.setdiff1d(slots.exceptions.numpy(), slots.places.numpy())
    assert dormant.size and dormant.size < slots.exceptions.numel(), "this training does not produce the case"
    loaded = load_state_dict(mlp(), save_sparse(net, tmp_path / "net.safetensors"))
    assert_same(everything(loaded), everything(numbered_by_place(net)))


def test_weights_that_passed_through_zero(tmp_path: Path) -> None:
    net = trained()
    theta = next(converted_tensors(net)).theta
    theta.data[::3] *= -1
    loaded = load_state_dict(mlp(), save_sparse(net, tmp_path / "net.safetensors"))
    assert torch.equal(densify(copy.deepcopy(loaded))[0].weight, densify(copy.deepcopy(net))[0].weight)
    assert all(float(converted.theta.min()) >= 0 for converted in converted_tensors(loaded))
    train(loaded, DeepR(l1=0.05, check_invariants=True), batches(5))


def test_soft_networks_are_written_by_their_active_connections(tmp_path: Path) -> None:
    """Their exceptions stay, also those at dormant places and at weights of 0."""
    torch.manual_seed(0)
    net = SoftDeepR(0.3, temperature=1e-3, init="largest").prepare(mlp())
    soft = next(converted_tensors(net)).slots
    theta = next(converted_tensors(net)).theta
    active = (theta >= 0).reshape(-1).nonzero().view(-1)
    theta.data.view(-1)[active[:8]] = 0.0
    theta.data.view(-1)[active[8:16]] = -0.5
    loaded = load_state_dict(mlp(), save_sparse(net, tmp_path / "net.safetensors"))
    slots = next(converted_tensors(loaded)).slots
    assert torch.equal(slots.exceptions, soft.exceptions) and soft.exceptions.numel() > 5
    assert torch.equal(slots.signs, soft.signs.reshape(-1)[slots.places])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    net = sparsify(LeNet300100().to(dtype), 0.01)
    loaded = zoo.load(save_sparse(net, tmp_path / "net.safetensors"))
    for one in converted_tensors(net):  # a file has the values of the weight, in its dtype
        one.theta.data = one.theta.data.to(dtype).to(one.theta.dtype)
    assert_same(everything(loaded), everything(numbered_by_place(net)))


def test_what_is_not_sparse_is_kept_as_it_is(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(96, 5))
    net(torch.randn(8, 2, 6, 6))
    net.register_buffer("flags", torch.tensor([True, False]))
    net.register_buffer("nothing", torch.empty(0, 3, dtype=torch.int16))
    sparsify(net, 0.2, target_modules=["3"])
    fresh = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(96, 5))
    fresh.register_buffer("flags", torch.zeros(2, dtype=torch.bool))
    fresh.register_buffer("nothing", torch.ones(0, 3, dtype=torch.int16))
    path = save_sparse(net, tmp_path / "net.safetensors")
    assert_same(everything(zoo.load(path, module=fresh)), everything(numbered_by_place(net)))


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = save_sparse(trained(), tmp_path / "net.safetensors", license="MIT")
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == [
            "0.bias",
            "0.weight.gaps",
            "0.weight.values",
            "2.bias",
            "2.weight.gaps",
            "2.weight.values",
        ]
        assert json.loads(file.metadata()["record"])["metadata"] == {"license": "MIT"}
        assert torch.equal(file.get_tensor("0.weight.values"), zoo.connections_of(path)["0.weight"][2])


def test_the_reader_in_the_documentation(tmp_path: Path) -> None:
    """A Python that can't import the package runs the 30 lines of the reader."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "format.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None and len(code[1].splitlines()) <= 30
    assert set(re.findall(r"^import (\w+)", code[1], re.MULTILINE)) == {"hashlib", "json", "struct", "numpy"}
    for i, net in enumerate((LeNet300100(), CIFAR10CNN(), BLSTMClassifier(hidden=16))):
        path = save_sparse(sparsify(net, 0.05, init="largest"), tmp_path / f"{i}.safetensors")
        torch.save(zoo.load(path, dense=True).state_dict(), tmp_path / f"{i}.pt")
    (tmp_path / "reader.py").write_text(
        code[1] + "\n\nfor i in range(3):\n    np.savez(f'{i}.npz', **read(f'{i}.safetensors')[0])\n"
    )
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'safetensors', 'lightning_deepr')));"
    subprocess.run([sys.executable, "-c", blocked + "exec(open('reader.py').read())"], cwd=tmp_path, check=True)
    for i in range(3):
        arrays, state = np.load(tmp_path / f"{i}.npz"), torch.load(tmp_path / f"{i}.pt")
        assert sorted(arrays) == sorted(state)
        for name, value in state.items():
            assert np.array_equal(arrays[name], value.numpy()), name


# -- size -------------------------------------------------------------------------------------------------------------------


def test_bytes_per_connection(tmp_path: Path) -> None:
    """LeNet-300-100 at 1 %, the whole file with the metadata of a zoo model."""
    metadata = {
        "algorithm": {"name": "DeepR", "hyperparameters": {"l1": 1e-4, "temperature": {"coefficient": 1e-12, "power": 2}}},
        "metrics": {"test_accuracy": {"value": 0.9741, "correct": 9741, "examples": 10000, "mean": 0.973, "std": 0.001}},
        "data": {"name": "mnist", "split": "test", "sha256": "0" * 64},
        "seeds": list(range(5)),
        "recipe": {"name": "mnist", "overrides": ["--sparsity.connectivity", "0.01"]},
        "license": "Apache-2.0",
    }
    for net in (sparsify(LeNet300100(), 0.01), sparsify(LeNet300100(), 0.01, init="largest")):
        path = save_sparse(net, tmp_path / "net.safetensors", **metadata)
        file = path.read_bytes()
        header, count = 8 + struct.unpack("<Q", file[:8])[0], 2662
        assert header <= 4096 and len(file) <= 6.5 * count + 4096
        assert len(file) - header <= 5.8 * count, "values, places and the dense biases"


@pytest.mark.parametrize("make", [LeNet300100, CIFAR10CNN, BLSTMClassifier])
def test_no_dense_tensor_is_built_in_sparse_loading(tmp_path: Path, make: Callable[[], nn.Module]) -> None:
    path = zoo.save(sparsify(make(), 0.05), tmp_path / "net.safetensors")
    rows = zoo.info(path)["connectivity"]["rows"]
    with Recording() as seen:
        zoo.load(path)
    # the largest tensor is a piece of the file in bytes, from which values are checked and read
    most = path.stat().st_size
    assert 0 < seen.largest <= most < max(row["total"] for row in rows)
    with Recording() as seen:
        zoo.load(path, dense=True)
    assert seen.largest >= max(row["total"] for row in rows), "the measure does not see a dense tensor"


# -- what is refused --------------------------------------------------------------------------------------------------------


def changed(path: Path, change: Callable[[Parts], Any]) -> Path:
    """Change a file, and write the right digest."""
    parts = Parts(path.read_bytes())
    change(parts)
    path.write_bytes(parts.file())
    return path


def entry(parts: Parts, **values: Any) -> None:
    parts.record["sparse"]["fc1.weight"].update(values)


def nan(parts: Parts) -> None:
    begin = parts.header["fc1.weight.values"]["data_offsets"][0]
    parts.data[begin : begin + 4] = struct.pack("<f", math.nan)


def infinite_bias(parts: Parts) -> None:
    begin = parts.header["fc2.bias"]["data_offsets"][0]
    parts.data[begin : begin + 4] = struct.pack("<f", math.inf)


def far_place(parts: Parts) -> None:
    begin, end = parts.header["fc3.weight.gaps"]["data_offsets"]
    parts.data[begin:end] = b"\xff" * (end - begin - 1) + b"\0"


REFUSED: dict[str, tuple[Callable[[Parts], Any], str]] = {
    "K": (lambda parts: entry(parts, active=1811), "connectivity: expected|expected 1811 floats"),
    "K above N": (lambda parts: entry(parts, active=10**12), "expected K <= N"),
    "negative K": (lambda parts: entry(parts, active=-1), "active: expected a whole number from 1"),
    "K is no int": (lambda parts: entry(parts, active=True), "active: expected a whole number"),
    "huge shape": (lambda parts: entry(parts, shape=[2**40, 2**40]), r"at most 2\^48 elements"),
    "negative shape": (lambda parts: entry(parts, shape=[-300, -784]), r"sizes from 0 to 2\^48"),
    "another shape": (lambda parts: entry(parts, shape=[784, 300]), r"shape \(300, 784\), the file has shape \(784, 300\)"),
    "width": (lambda parts: entry(parts, bits=41), "bits: expected a whole number from 1 to 40"),
    "rule": (lambda parts: entry(parts, l1=0.1), "l1: expected text of at most 500 characters, found 0.1"),
    "long rule": (lambda parts: entry(parts, l1="x" * 501), "l1: expected text of at most 500 characters"),
    "too wide": (lambda parts: entry(parts, bits=40), "expected at least 1810 units of 40 bits"),
    "narrow": (lambda parts: entry(parts, bits=3), "expected"),
    "far": (far_place, "fc3.weight.*(expected places below 1000|expected 90 places)"),
    "nan": (nan, "fc1.weight.values.*NaN or infinity"),
    "inf": (infinite_bias, "fc2.bias.*NaN or infinity"),
    "sums": (lambda parts: parts.record["connectivity"].update(active=1), "the sums over the tensors"),
    "gone": (lambda parts: parts.record["sparse"].pop("fc3.weight"), "connectivity: expected"),
    "offsets": (lambda parts: parts.header["fc1.bias"].update(data_offsets=[4, 1204]), "tensors lie end to end"),
    "dtype": (lambda parts: parts.header["fc1.bias"].update(dtype="F8_E5M2"), "dtype: expected one of F64"),
    "floats": (
        lambda parts: parts.header["fc1.bias"].update(dtype="I32"),
        "fc1.bias.*expected torch.float32.*found torch.int32",
    ),
    "left over": (lambda parts: parts.data.extend(b"1234"), "bytes of data, found"),
    "newer": (lambda parts: parts.header["__metadata__"].update(version="2"), "expected 1, found '2'.*update lightning-deepr"),
    "version": (lambda parts: parts.header["__metadata__"].update(version="one"), "expected 1, found 'one'.*damaged"),
    "another format": (
        lambda parts: parts.header["__metadata__"].update(format="pt"),
        "expected 'lightning-deepr', found 'pt'",
    ),
    "architecture": (
        lambda parts: parts.record.update(architecture="os.system"),
        r"expected one of lenet300_100.*module=Net\(\)",
    ),
    "no architecture": (lambda parts: parts.record.update(architecture=None), r"the file names none.*module=Net\(\)"),
    "arguments": (lambda parts: parts.record.update(arguments={"bias": 10**9}), "expected among its arguments bias"),
    "biases": (lambda parts: parts.record.update(arguments={"bias": False}), "has no such tensor, the file has shape"),
    "huge": (
        lambda parts: parts.record.update(architecture="timit_blstm", arguments={"hidden": 10**12}),
        r"hidden \(int, 1 to 65536\)",
    ),
    "record": (lambda parts: parts.record.pop("left_out"), "record: expected"),
    "nesting": (lambda parts: setattr(parts, "text", "[" * 10**5), "record: expected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_right_digest(tmp_path: Path, case: str) -> None:
    path = zoo.save(sparsify(LeNet300100(), 0.01), tmp_path / "net.safetensors")
    change, message = REFUSED[case]
    with pytest.raises(zoo.FormatError, match=f"(?s)^{re.escape(str(path))}: .*({message})"):
        zoo.load(changed(path, change))


def test_the_change_itself_does_no_harm(tmp_path: Path) -> None:
    """Otherwise every case above would be refused, whatever it changes."""
    path = zoo.save(sparsify(LeNet300100(), 0.01), tmp_path / "net.safetensors")
    before = path.read_bytes()
    assert_same(everything(zoo.load(changed(path, lambda parts: None))), everything(zoo.load(path)))
    assert len(path.read_bytes()) <= len(before)


def test_a_flipped_bit_anywhere_is_seen(tmp_path: Path) -> None:
    path = zoo.save(sparsify(LeNet300100(), 300), tmp_path / "net.safetensors")
    file = path.read_bytes()
    for where in [*range(110), *range(110, len(file), 23)]:
        path.write_bytes(file[:where] + bytes([file[where] ^ 1 << where % 8]) + file[where + 1 :])
        with pytest.raises(zoo.FormatError):
            zoo.load(path)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "net.safetensors"
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(zoo.FormatError, match="a pickle or a zip file"):
        zoo.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(zoo.FormatError, match=r"another safetensors file .*load_file"):
        load_state_dict(nn.Linear(3, 1), path)
    for content, found in [
        (b"", "0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n" + b"0" * 200, "git lfs pull"),
        (b"\x80\x04" + b"." * 200, "a pickle"),
        (struct.pack("<Q", 2**63) + b"x" * 200, "something else, or cut off"),
    ]:
        path.write_bytes(content)
        with pytest.raises(zoo.FormatError, match=found):
            zoo.load(path)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint at"):
        load_state_dict(nn.Linear(3, 1), tmp_path / "nothing.safetensors")
    file = bytearray(zoo.save(sparsify(LeNet300100(), 300), path).read_bytes())
    length = struct.unpack("<Q", file[:8])[0]
    file[8 + length : 8 + length] = b" " * (5 << 20)
    file[:8] = struct.pack("<Q", length + (5 << 20))
    path.write_bytes(with_digest(file))
    with pytest.raises(zoo.FormatError, match="expected a header of at most 4,194,304 bytes"):
        zoo.load(path)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    net = sparsify(LeNet300100(), 0.01)
    save_sparse(net, path)
    before = path.read_bytes()
    for metadata, message in [
        ({"sha256": "x"}, "found sha256"),
        ({"note": object()}, "expected JSON values"),
        ({"note": math.nan}, "expected JSON values"),
        ({"note": "x" * (5 << 20)}, "Give less metadata"),
        ({"architecture": "cifar10_cnn"}, "expected 'lenet300_100' with"),
        ({"arguments": {"bias": True}}, "expected them with `architecture`"),
    ]:
        with pytest.raises(ValueError, match=message):
            save_sparse(net, path, **metadata)
    net.fc1.bias.data[0] = math.inf
    with pytest.raises(ValueError, match=r"`fc1\.bias` holds NaN or infinity"):
        save_sparse(net, path)
    net.fc1.bias.data[0] = 0.0
    next(converted_tensors(net)).theta.data[0] = math.nan
    with pytest.raises(ValueError, match=r"`fc1\.weight` holds NaN or infinity"):
        save_sparse(net, path)
    assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["net.safetensors"]
    half = nn.Linear(3, 2).to(torch.complex64)
    with pytest.raises(ValueError, match=r"expected one of torch.float64.*found torch.complex64"):
        save_sparse(half, path)


def test_an_entry_that_poses_as_a_part_of_a_converted_tensor(tmp_path: Path) -> None:
    path = zoo.save(sparsify(LeNet300100(), 0.01), tmp_path / "net.safetensors")
    name = "fc1.parametrizations.weight.0.places"

    def rename(parts: Parts) -> None:
        parts.header = {name if key == "fc1.bias" else key: value for key, value in parts.header.items()}

    with pytest.raises(zoo.FormatError, match="expected a dense tensor, found a part of a converted one"):
        load_state_dict(LeNet300100(), changed(path, rename))


# -- fuzzing ----------------------------------------------------------------------------------------------------------------


def fuzz(count: int, seed: int, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.fuzz_format", str(count), str(seed)],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_mutated_files(tmp_path: Path) -> None:
    out = fuzz(300, 7, tmp_path)
    assert "executed, unpickled: nothing" in out and int(re.findall(r"(\d+) mutants", out)[0]) > 250


@pytest.mark.slow
def test_twenty_thousand_mutated_files(tmp_path: Path) -> None:
    out = fuzz(22_000, 0, tmp_path)
    assert "executed, unpickled: nothing" in out and int(re.findall(r"(\d+) mutants", out)[0]) >= 20_000
    assert float(re.findall(r"grew by ([\d.]+) MiB", out)[0]) < 96


def test_the_format_is_read_without_the_safetensors_library() -> None:
    assert "safetensors" not in Path(container.__file__).read_text(encoding="utf-8").replace("safetensors library", "").split(
        '"""'
    )[2].replace("(safetensors whose", "").replace("safetensors file", "").replace("safetensors.torch.load_file", "")
    assert lightning_deepr.zoo is zoo
