"""Adapters as files, several on one network, merged, exported."""

from __future__ import annotations

import copy
import importlib.util
import math
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_deepr import (
    SET,
    DeepR,
    adapt,
    connectivity_report,
    densify,
    load_adapter,
    load_state_dict,
    prune_dead_units,
    save_adapter,
    save_sparse,
    sparsify,
)
from lightning_deepr.adapters import Adapters, adapter_of, average, detach, merge, read_adapter, save_shira, unmerge
from lightning_deepr.adapters.adapter import digest_of
from lightning_deepr.export import to_c_header, to_csr, to_dense_state_dict
from lightning_deepr.files.gaps import FormatError
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.paths import ROOT


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))


X = torch.randn(7, 40, generator=torch.Generator().manual_seed(1))


def trained(net: nn.Module, method: Any = DeepR, steps: int = 8, seed: int = 1) -> nn.Module:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.3)
    rewiring = method(seed=seed, **({"rewire_every_n_steps": 3} if method is SET else {})).attach(
        net, optimizer, total_steps=steps
    )
    target = torch.randint(0, 5, (7,), generator=torch.Generator().manual_seed(seed))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(net(X), target).backward()
        optimizer.step()
    rewiring.remove()
    return net


def weights(net: nn.Module) -> dict[str, Tensor]:
    return dict(densify(copy.deepcopy(net)).state_dict())


def same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


# -- files --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [DeepR, SET])  # SET's signs are free: theta may be negative
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_gives_the_same_network_back(method: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    net = network()
    pretrained = copy.deepcopy(net)
    net = trained(adapt(net, 0.1, trainable=["2.bias"]), method)
    if dtype is torch.bfloat16:  # a frozen weight of fewer bits: the file has the difference in float32
        net.to(dtype)
        pretrained.to(dtype)
    again = load_adapter(pretrained, save_adapter(net, tmp_path / "a.safetensors"))
    assert same(again, net)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in net.named_parameters() if p.requires_grad
    }
    assert save_adapter(again, tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_a_connection_takes_about_5_bytes(tmp_path: Path) -> None:
    net = adapt(nn.Linear(2000, 1000), 0.01)
    with torch.no_grad():
        net.parametrizations.weight.original.uniform_()
    assert save_adapter(net, tmp_path / "a.safetensors").stat().st_size < 5.2 * 20_000
    half = save_adapter(net, tmp_path / "b.safetensors", dtype=torch.float16)
    assert half.stat().st_size < 3.2 * 20_000
    values = read_adapter(half).tensors["weight"].values
    torch.testing.assert_close(values, adapter_of(net).tensors["weight"].values, rtol=1e-3, atol=1e-7)


def test_another_network_is_refused_by_name(tmp_path: Path) -> None:
    net = network()
    pretrained = copy.deepcopy(net)
    path = save_adapter(trained(adapt(net, 0.1, trainable=["2.bias"])), tmp_path / "a.safetensors")
    other = copy.deepcopy(pretrained)
    with torch.no_grad():
        other[2].weight[3, 4] += 1e-3
    before = {name: value.clone() for name, value in other.state_dict().items()}
    digests = digest_of(pretrained[2].weight), digest_of(other[2].weight)
    with pytest.raises(ValueError, match=rf"`2.weight`: the adapter belongs to another.*{digests[0]}, found {digests[1]}"):
        load_adapter(other, path)
    wider = nn.Sequential(nn.Linear(41, 30), nn.ReLU(), nn.Linear(30, 5))
    with pytest.raises(ValueError, match=r"`0.weight`: expected a weight of shape \(30, 40\).*found \(30, 41\)"):
        load_adapter(wider, path)
    with pytest.raises(ValueError, match=r"difference for `0.weight`, but Linear has no such weight"):
        load_adapter(nn.Linear(40, 30), path)
    with pytest.raises(ValueError, match=r"`0.weight`: the adapter belongs to another.*bfloat16"):
        load_adapter(copy.deepcopy(pretrained).bfloat16(), path)
    no_bias = copy.deepcopy(pretrained)
    no_bias[2].bias = None
    with pytest.raises(ValueError, match=r"`2.bias`, which was trained beside the adapter"):
        load_adapter(no_bias, path)
    with pytest.raises(ValueError, match=r"`0.weight` is converted already"):
        load_adapter(sparsify(copy.deepcopy(pretrained), 0.1), path)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    assert type(other[0]) is nn.Linear and other[0].weight.requires_grad


def test_the_kinds_of_files_are_not_mixed_up(tmp_path: Path) -> None:
    net, sparse = adapt(network(), 0.1), sparsify(network(), 0.1)
    path, other = save_adapter(net, tmp_path / "a.safetensors"), save_sparse(sparse, tmp_path / "s.safetensors")
    with pytest.raises(FormatError, match="found an adapter"):
        load_state_dict(network(), path)
    with pytest.raises(FormatError, match="expected the file of an adapter"):
        load_adapter(network(), other)
    with pytest.raises(ValueError, match=r"save_sparse: `0.weight` is a difference.*save_adapter"):
        save_sparse(net, tmp_path / "n.safetensors")
    with pytest.raises(ValueError, match=r"`0.weight` is sparse without a frozen weight"):
        save_adapter(sparse, tmp_path / "n.safetensors")
    with pytest.raises(ValueError, match="has no adapter"):
        save_adapter(network(), tmp_path / "n.safetensors")
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(FormatError, match="damaged"):
        load_adapter(network(), path)


def test_a_thousand_steps_leave_the_frozen_weights_alone() -> None:
    net = network()
    digests = {n: digest_of(net[n].weight) for n in (0, 2)}
    trained(adapt(net, 0.1), steps=1000)
    assert {n: digest_of(net[n].parametrizations.weight[0].base) for n in (0, 2)} == digests


# -- several ------------------------------------------------------------------------------------------------------------------


def test_switch_scale_average_and_remove(tmp_path: Path) -> None:
    base = network()
    pretrained = copy.deepcopy(base)
    files = [
        save_adapter(
            trained(adapt(copy.deepcopy(base), 0.1, seed=n, trainable=["2.bias"]), seed=n), tmp_path / f"{n}.safetensors"
        )
        for n in (1, 2)
    ]
    memory = base[0].weight.data_ptr()
    bank = Adapters(base)
    bank.add("one", files[0])
    bank.add("two", files[1])
    with pytest.raises(ValueError, match="an adapter 'one' already"):
        bank.add("one", files[1])
    with pytest.raises(KeyError, match="no adapter 'three': the names are 'one', 'two'"):
        bank.use("three")
    bank.average("mean", {"one": 0.5, "two": 0.5})
    assert list(bank) == ["one", "two", "mean"] and len(bank) == 3
    found = {}
    for name in bank:
        bank.use(name)
        found[name] = weights(base)
    own = pretrained.state_dict()
    for name in own:
        middle = (found["one"][name] + found["two"][name]) / 2
        torch.testing.assert_close(found["mean"][name], middle)
    assert same(base, load_adapter(copy.deepcopy(pretrained), bank["mean"]))
    bank.use("one", scale=0.25)
    for name in ("0.weight", "2.weight"):
        torch.testing.assert_close(weights(base)[name], own[name] + 0.25 * (found["one"][name] - own[name]))
    bank.use("one", scale=-1.0)
    torch.testing.assert_close(weights(base)["0.weight"], 2 * own["0.weight"] - found["one"]["0.weight"])
    bank.remove("one")
    assert bank.active is None and "one" not in bank and type(base[0]) is nn.Linear
    assert all(torch.equal(value, own[name]) for name, value in base.state_dict().items())  # the bias, too
    assert list(base.state_dict()) == list(own)  # in order
    assert base[0].weight.data_ptr() == memory


def test_places_that_agree_are_averaged(tmp_path: Path) -> None:
    net = adapt(network(), 0.1)
    one = adapter_of(trained(copy.deepcopy(net), steps=1))
    two = one.scaled(3.0)
    mean = average({one: 0.5, two: 0.5})
    assert mean.count == one.count
    torch.testing.assert_close(mean.tensors["0.weight"].values, 2 * one.tensors["0.weight"].values)


def test_two_names_of_one_adapter_are_averaged_as_two() -> None:
    bank = Adapters(trained(adapt(network(), 0.1)))
    bank.add("one")
    bank.add("two", bank["one"])
    bank.average("mean", {"one": 0.25, "two": 0.5})
    values = bank["one"].tensors["0.weight"].values
    torch.testing.assert_close(bank["mean"].tensors["0.weight"].values, 0.75 * values)


@pytest.mark.parametrize("value", [math.nan, math.inf, "half", None, True])
def test_numbers_that_are_none_are_refused(value: Any) -> None:
    """A scale of nan would make every weight nan, and nobody would be told."""
    bank = Adapters(trained(adapt(network(), 0.1)))
    bank.add("one")
    before = weights(bank.net)
    for call in (
        lambda: bank.use("one", value), lambda: bank["one"].scaled(value), lambda: bank.average("mean", {"one": value}),
        lambda: average({bank["one"]: value}),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=r"(scale|average: weight): expected a (finite )?number, found"):
            call()
    assert list(bank) == ["one"] and all(torch.equal(one, before[name]) for name, one in weights(bank.net).items())
    with pytest.raises(TypeError, match="name: expected a text"):
        bank.add(value if not isinstance(value, str) else 3)


def test_a_difference_of_adapters_with_a_head_has_no_mean_head() -> None:
    net = adapt(network(), 0.1, trainable=["biases"])
    one, two = adapter_of(trained(copy.deepcopy(net))), adapter_of(trained(copy.deepcopy(net), seed=2))
    with pytest.raises(ValueError, match=r"average: `0.bias` was trained beside.*expected weights whose sum is not 0"):
        average({one: 1.0, two: -1.0})


def test_an_adapter_that_was_trained_is_not_lost() -> None:
    net = network()
    bank = Adapters(adapt(net, 0.1))
    bank.add("first")
    trained(net)
    with pytest.raises(RuntimeError, match=r"trained since it was added.*overwrite=True"):
        bank.use(None)
    bank.add("first", overwrite=True)
    bank.use(None)
    optimizer = torch.optim.SGD(adapt(net, 0.1).parameters(), 0.1)
    rewiring = DeepR().attach(net, optimizer)
    for work in (lambda: bank.use("first"), lambda: merge(net), lambda: detach(net), lambda: load_adapter(net, bank["first"])):
        with pytest.raises(RuntimeError, match=r"DeepR is at work on this network|not among these"):
            work()
    rewiring.remove()


def test_what_was_trained_beside_an_adapter_does_not_leak() -> None:
    net = network()
    pretrained = copy.deepcopy(net)
    alone = adapter_of(adapt(copy.deepcopy(pretrained), 0.1))
    bank = Adapters(trained(adapt(net, 0.1, trainable=["biases"])))
    bank.add("mine")
    with pytest.raises(RuntimeError, match=r"`0.bias` was trained beside an adapter.*former value is not known"):
        bank.use(None)
    with pytest.raises(ValueError, match=r"`0.bias` was trained beside the present adapter"):
        load_adapter(net, alone)


# -- merging ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_merge_and_unmerge_bit_for_bit(dtype: torch.dtype, scope: str) -> None:
    net = network().to(dtype)
    adapt(net, 0.1, scope=scope)
    with torch.no_grad():
        for one in converted_tensors(net):
            one.theta.uniform_(0, 0.3)
    x = X.to(dtype)
    before = [one.slots.base.detach().clone() for one in converted_tensors(net)]  # type: ignore[attr-defined]
    state, oracle = copy.deepcopy(net.state_dict()), densify(copy.deepcopy(net))
    y = net(x).detach()
    assert merge(net) is net
    assert torch.equal(net(x), oracle(x)) and same(net, oracle)
    torch.testing.assert_close(net(x), y, rtol=2e-2, atol=2e-2)
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name  # a checkpoint does not know of the merging
    twin = copy.deepcopy(net)
    for merged in (net, twin):
        with pytest.raises(RuntimeError, match="merged already"):
            merge(merged)
        unmerge(merged)
        for one, wanted in zip(converted_tensors(merged), before, strict=True):
            assert torch.equal(one.slots.base, wanted)  # type: ignore[attr-defined]
        assert torch.equal(merged(x), y)
    with pytest.raises(RuntimeError, match="is not merged"):
        unmerge(net)


def test_merging_with_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True)
    net = adapt(network(), 0.1)
    state = copy.deepcopy(net.state_dict())
    for name, value in unmerge(merge(net)).state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_merged_network_is_not_trained_loaded_or_taken_apart() -> None:
    net = merge(adapt(network(), 0.1))
    with pytest.raises(ValueError, match="merged into the frozen weight"):
        DeepR().attach(net, torch.optim.SGD(net.parameters(), 0.1))
    with pytest.raises(RuntimeError, match="merged into the frozen weight"):
        net.load_state_dict(net.state_dict())
    with pytest.raises(RuntimeError, match="merged into the weight"):
        detach(net)


def test_merging_a_compiled_or_distributed_network_is_refused() -> None:
    net = adapt(network(), 0.1)
    compiled = torch.compile(net, backend="eager")
    with pytest.raises(RuntimeError, match=r"merge: `.*` is compiled"):
        merge(compiled)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        net = adapt(network(), 0.1)
        wrapped = nn.parallel.DistributedDataParallel(net)
        assert sum(one.numel() for one in wrapped._build_params_for_reducer()[0]) == 135  # the frozen weights are in no bucket
        for one in (net, wrapped):
            with pytest.raises(RuntimeError, match="within DistributedDataParallel"):
                merge(one)
        trained(wrapped)
        bases = [one.slots.base for one in converted_tensors(net)]  # type: ignore[attr-defined]
        assert all(torch.equal(base, network()[n].weight) for n, base in zip((0, 2), bases, strict=True))
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(ValueError, match="has no adapter"):
        merge(network())


@pytest.mark.slow
def test_the_compiled_graph_sees_a_merge_of_the_network_inside() -> None:
    net = adapt(network(), 0.1)
    with torch.no_grad():
        for one in converted_tensors(net):
            one.theta.uniform_()
    compiled = torch.compile(net, backend="aot_eager")
    with torch.no_grad():
        y = compiled(X)
        merge(net)
        torch.testing.assert_close(compiled(X), y, rtol=1e-4, atol=1e-4)
        unmerge(net)
        torch.testing.assert_close(compiled(X), y)


# -- exports ------------------------------------------------------------------------------------------------------------------


def test_exporters_write_the_sum(tmp_path: Path) -> None:
    net = trained(adapt(network(), 0.1))
    oracle = densify(copy.deepcopy(net))
    state = to_dense_state_dict(net)
    assert state.keys() == oracle.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in oracle.state_dict().items())
    matrices = to_csr(net)
    assert all(torch.equal(matrices[f"{n}.weight"].to_dense(), oracle[n].weight) for n in (0, 2))
    assert to_c_header(net, tmp_path / "a.h").path.read_text() == to_c_header(oracle, tmp_path / "a.h").path.read_text()
    with pytest.raises(ValueError, match=r"prune_dead_units: `0.weight` has a frozen weight"):
        prune_dead_units(net)
    assert connectivity_report(net).adapted is not None


@pytest.mark.slow
def test_onnx_writes_the_sum(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from lightning_deepr.export import to_onnx

    net = trained(adapt(network(), 0.1))
    assert to_onnx(net, tmp_path / "net.onnx", X).max_error < 1e-5


@pytest.mark.slow  # peft imports transformers
def test_peft_loads_the_adapter_without_this_package(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("safetensors")
    pretrained = network()
    pretrained.config = {"model_type": "custom"}  # what peft asks of a network
    net = trained(adapt(copy.deepcopy(pretrained), {"0": 140, "2": 33}))
    save_shira(net, tmp_path / "adapter", base_model="pretrained")
    loaded = peft.PeftModel.from_pretrained(pretrained, str(tmp_path / "adapter"))
    assert loaded.peft_config["default"].r == 2 and loaded.base_model.model[0].shira_weight["default"].numel() == 140
    torch.testing.assert_close(loaded(X), net(X))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(X), net(X))
    headed = trained(adapt(copy.deepcopy(network()), 0.05, trainable=["2"]))
    again = network()
    again.config = {"model_type": "custom"}
    save_shira(headed, tmp_path / "headed")
    torch.testing.assert_close(peft.PeftModel.from_pretrained(again, str(tmp_path / "headed"))(X), headed(X))


@pytest.mark.slow  # peft imports transformers
def test_the_benchmarks_lora_is_that_of_peft() -> None:
    peft = pytest.importorskip("peft")
    digits = imported("benchmarks/adapters/digits.py")
    layer = nn.Linear(12, 9)
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=3, lora_alpha=3, target_modules=["0"]), nn.Sequential(copy.deepcopy(layer))
    )[0]  # fmt: skip
    mine = digits.LoRA(layer, 3)
    x = torch.randn(4, 12)
    assert torch.equal(mine(x), theirs(x)) and torch.equal(mine(x), layer(x))
    with torch.no_grad():
        mine.a.copy_(theirs.lora_A["default"].weight)
        mine.b.uniform_()
        theirs.lora_B["default"].weight.copy_(mine.b)
    torch.testing.assert_close(mine(x), theirs(x))


def imported(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("adapters_digits", ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    before = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


def test_the_snippet_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    assert (tmp_path / "mine.safetensors").stat().st_size < 15_000


def test_what_shira_has_no_place_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`0.bias`.*expects whole layers"):
        save_shira(adapt(network(), 0.02, trainable=["0.bias"]), tmp_path)
    with pytest.raises(ValueError, match=r"`weight` belongs to a Conv2d|`0.weight` belongs to a Conv2d"):
        save_shira(adapt(nn.Sequential(nn.Conv2d(3, 4, 3)), 0.1), tmp_path)
    with pytest.raises(ValueError, match=r"`2.weight` has 150 places, and PEFT's r = 9"):
        save_shira(adapt(network(), {"0": 600, "2": 20}), tmp_path)
