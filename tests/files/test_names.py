"""A network is saved under plain names and loaded under its own, whatever wrappers it or the checkpoint has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_deepr import connections, connectivity_report, densify, load_state_dict, save_sparse, sparsify
from lightning_deepr.export import to_csr, to_dense_state_dict
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.small import unchanged


class Versioned(nn.Linear):
    """A layer that reads only its own version of the state, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("version") != self._version:
            raise ValueError(f"version should be {self._version} instead of {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10), nn.Sequential(Versioned(10, 8), nn.Linear(8, 4)))


def part(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def wrapped(net: Any) -> nn.Module:
        net[2] = wrap(net[2])
        return net

    return wrapped


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")  # type: ignore[return-value]


def fabric(net: nn.Module) -> nn.Module:
    return Fabric(accelerator="cpu", devices=1).setup_module(net)  # type: ignore[no-any-return]


class Fsdp(nn.Module):
    """The names of FSDP1, which needs a process group: its own hooks take the prefix out of a whole state_dict."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = net

    def forward(self, x: Tensor) -> Any:
        return self._fsdp_wrapped_module(x)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda net: net,
    "compiled": compiled,
    "data parallel": nn.DataParallel,
    "fabric": fabric,
    "fsdp": Fsdp,
    "checkpointed": checkpoint_wrapper,
    "a compiled part": part(compiled),
    "a data parallel part": part(nn.DataParallel),
    "a part in Fabric": part(fabric),
    "compiled in data parallel": lambda net: nn.DataParallel(compiled(net)),
    "Fabric around a compiled part": lambda net: fabric(part(compiled)(net)),
    "compiled twice over a checkpointed part": lambda net: compiled(Fsdp(part(checkpoint_wrapper)(net))),
}
wrappers = pytest.mark.parametrize("name", WRAPPERS)
# A part that Fabric wrapped can't read its own state_dict within a larger module: torch goes around Fabric's load_state_dict.
readers = pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "a part in Fabric"])


def wrapped(name: str, converted: bool = True) -> tuple[nn.Module, nn.Module]:
    """Make a network of random weights and the wrapped one with the same weights."""
    torch.manual_seed(3)
    net = plain()
    if converted:
        sparsify(net, 0.3)
    net.eval()
    return net, WRAPPERS[name](copy.deepcopy(net)).eval()


NAMES = {"0.weight", "2.0.weight", "2.1.weight"}
X = torch.randn(5, 12)


@wrappers
def test_plain_names_on_the_way_out(name: str, tmp_path: Path) -> None:
    net, outer = wrapped(name)
    assert connections(outer).keys() == NAMES and {row["name"] for row in connectivity_report(outer)} == NAMES
    assert to_csr(outer).keys() == NAMES
    dense, expected = to_dense_state_dict(outer), densify(copy.deepcopy(net)).state_dict()
    assert dense.keys() == expected.keys() and all(torch.equal(dense[key], expected[key]) for key in dense)
    fresh = plain().eval()
    fresh.load_state_dict(dense)  # strict, and the version of each layer is there
    assert torch.allclose(fresh(X), net(X), atol=1e-6)
    assert save_sparse(outer, tmp_path / "a").read_bytes() == save_sparse(net, tmp_path / "b").read_bytes()


@readers
@pytest.mark.parametrize(
    "source",
    [
        pytest.param(name, marks=[] if name in ("plain", "fabric", "compiled in data parallel") else [pytest.mark.slow])
        for name in WRAPPERS
    ],
)
@pytest.mark.parametrize("converted", [False, True], ids=["into dense", "into converted"])
@pytest.mark.feature("Checkpoints: files of a network under torch.compile, DDP or Fabric")
def test_wrappers_on_either_side_on_the_way_in(name: str, source: str, converted: bool) -> None:
    net, outer = wrapped(source)
    target = wrapped(name, converted=False)[1]
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    if converted:
        sparsify(target, 0.3, seed=8)
    load_state_dict(target, outer.state_dict())
    torch.testing.assert_close(target(X), net(X))
    assert all(torch.equal(a, b) for a, b in zip(flat(target), flat(net), strict=True))


def flat(net: nn.Module) -> list[Tensor]:
    return [part for _, places, values in connections(net).values() for part in (places, values)]


@readers
def test_a_sparse_file_is_read_into_every_wrapper(name: str, tmp_path: Path) -> None:
    net, _ = wrapped("plain")
    target = wrapped(name, converted=False)[1]
    load_state_dict(target, save_sparse(net, tmp_path / "net.safetensors"))
    torch.testing.assert_close(target(X), net(X))


class OwnModule(nn.Module):
    """A network with a layer that its author called `module`, beside one of the same name outside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.ModuleDict({"fc": nn.Linear(6, 5)})
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.module["fc"](x))


def test_a_name_of_the_author_is_no_wrapper(tmp_path: Path) -> None:
    net, x = sparsify(OwnModule(), 0.5), torch.randn(3, 6)
    assert connections(net).keys() == {"module.fc.weight", "fc.weight"}
    for what in (net.state_dict(), save_sparse(net, tmp_path / "net"), compiled(net).state_dict()):
        torch.testing.assert_close(load_state_dict(OwnModule(), what)(x), net(x))
    assert to_dense_state_dict(net).keys() == OwnModule().state_dict().keys()
    for inside in (net, compiled(net)):  # DDP calls the network `module`, too
        torch.testing.assert_close(load_state_dict(OwnModule(), nn.DataParallel(inside).state_dict())(x), net(x))
    target = nn.DataParallel(OwnModule())
    torch.testing.assert_close(load_state_dict(target, nn.DataParallel(net).state_dict())(x), net(x))


def test_a_name_that_fits_two_tensors_is_refused() -> None:
    state = sparsify(OwnModule(), 0.5).state_dict()
    state = {name.replace("module.fc", "module.module.fc"): value for name, value in state.items()}
    target = OwnModule()
    with unchanged(target), pytest.raises(ValueError, match="they differ only by the prefixes of wrappers"):
        load_state_dict(target, state)


# -- one module on several paths ----------------------------------------------------------------------------------------------


class TwoPaths(nn.Module):
    """A part that is reached as `encoder` and in the list `layers`; the second layer of it is there a third time."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))
        self.layers = nn.ModuleList([self.encoder, nn.Linear(6, 3)])
        self.last = self.encoder[2]

    def forward(self, x: Tensor) -> Any:
        return self.layers[1](self.last(self.encoder(x)))


SHARING: dict[str, Callable[[], nn.Module]] = {
    "one layer three times": lambda: nn.Sequential(*[nn.Linear(6, 6)] * 3),
    "two paths": TwoPaths,
    "a compiled part twice": lambda: nn.Sequential(*[compiled(nn.Sequential(nn.Linear(6, 6)))] * 2),
}


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("kind", SHARING)
def test_a_module_on_several_paths(kind: str, scope: str, tmp_path: Path) -> None:
    make, x = SHARING[kind], torch.randn(4, 6)
    net = sparsify(make(), 0.4, scope=scope).eval()
    expected = flat(net)
    file = save_sparse(net, tmp_path / "net.safetensors")
    torch.save(net.state_dict(), tmp_path / "net.bin")
    for what in (net.state_dict(), file, tmp_path / "net.bin"):
        for target in (make(), sparsify(make(), 0.4, scope="layer" if what == file else scope, seed=5)):
            with torch.no_grad():
                for parameter in target.parameters():
                    parameter.abs_().mul_(2)
            loaded = load_state_dict(target, what).eval()
            torch.testing.assert_close(loaded(x), net(x))
            if what != file:
                assert all(torch.equal(a, b) for a, b in zip(flat(loaded), expected, strict=True))
            assert len(list(loaded.parameters())) == len({id(p) for p in loaded.parameters()})
    dense = load_state_dict(make(), to_dense_state_dict(net)).eval()
    torch.testing.assert_close(dense(x), net(x))


def test_a_shared_module_is_named_on_each_of_its_paths() -> None:
    for name in ("0", "1", "2.weight"):
        net = nn.Sequential(*[nn.Linear(6, 6)] * 3)
        assert connections(sparsify(net, {name: 0.5})).keys() == {"0.weight"}
        with pytest.raises(ValueError, match=r"`0\.weight` is converted already"):
            sparsify(net, {"1": 0.5})
    net = nn.Sequential(nn.Linear(6, 6), *[nn.Linear(6, 6)] * 2)
    assert connections(sparsify(net, 0.5, exclude_modules=["2"])).keys() == {"0.weight"}


def test_what_is_shared_on_one_side_only_is_refused_by_name(tmp_path: Path) -> None:
    apart, x = sparsify(nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)]), 0.4, distribution="uniform"), torch.randn(4, 6)
    target = nn.Sequential(*[nn.Linear(6, 6)] * 3)
    for what in (apart.state_dict(), save_sparse(apart, tmp_path / "apart")):
        with (
            unchanged(target),
            pytest.raises(ValueError, match=r"`0\.weight` and `1\.weight` are one tensor of this Sequential"),
        ):
            load_state_dict(target, what)
    with unchanged(target), pytest.raises(ValueError, match=r"`0\.weight` and `1\.weight` are one tensor"):
        load_state_dict(target, densify(copy.deepcopy(apart)).state_dict())
    together = sparsify(nn.Sequential(*[nn.Linear(6, 6)] * 3), 0.4)
    loaded = load_state_dict(nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)]), together.state_dict())
    torch.testing.assert_close(loaded(x), together(x))
    target = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])
    with unchanged(target), pytest.raises(RuntimeError, match=r"1\.weight"):
        load_state_dict(target, save_sparse(together, tmp_path / "together"))


def test_tied_thetas_keep_their_values(tmp_path: Path) -> None:
    net, x = sparsify(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), 0.5, distribution="uniform"), torch.randn(3, 6)
    first, second = converted_tensors(net)
    second.holder._parameters["original"] = first.theta
    for what in (net.state_dict(), save_sparse(net, tmp_path / "net")):
        loaded = load_state_dict(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), what)
        torch.testing.assert_close(loaded(x), net(x))


# -- versions -----------------------------------------------------------------------------------------------------------------


def test_the_version_of_a_module_is_kept_on_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = sparsify(nn.Sequential(Versioned(6, 5), nn.BatchNorm1d(5)), 0.5)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "last.ckpt")
    ways = [net.state_dict(), save_sparse(net, tmp_path / "net"), tmp_path / "last.ckpt", to_dense_state_dict(net)]
    for way in ways:
        load_state_dict(nn.Sequential(Versioned(6, 5), nn.BatchNorm1d(5)), way)
    monkeypatch.setattr(Versioned, "_version", 3)  # a later version of the same code
    for way in ways:
        target = nn.Sequential(Versioned(6, 5), nn.BatchNorm1d(5))
        with unchanged(target), pytest.raises(ValueError, match="version should be 3 instead of 2"):
            load_state_dict(target, way)
    assert to_dense_state_dict(net)._metadata == densify(copy.deepcopy(net)).state_dict()._metadata  # type: ignore[attr-defined]


def test_a_network_that_reads_versions_of_others() -> None:
    models = pytest.importorskip("torchvision").models
    net = sparsify(models.mnasnet0_5(), 0.1)
    target = load_state_dict(models.mnasnet0_5(), net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(flat(target), flat(net), strict=True))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_the_real_ddp(tmp_path: Path) -> None:
    net, _ = wrapped("plain")
    for outer in (nn.parallel.DistributedDataParallel(copy.deepcopy(net)), compiled(nn.parallel.DistributedDataParallel(net))):
        outer.eval()
        assert connections(outer).keys() == NAMES
        path = save_sparse(outer, tmp_path / "net")
        fresh = densify(copy.deepcopy(net))
        assert to_dense_state_dict(outer).keys() == fresh.state_dict().keys()
        for what in (path, copy.deepcopy(outer.state_dict())):
            torch.testing.assert_close(load_state_dict(plain(), what).eval()(X), net(X))
            load_state_dict(outer, what)
            target = nn.parallel.DistributedDataParallel(plain())
            with pytest.warns(UserWarning, match="Convert .*first, then wrap the network in DDP"):
                load_state_dict(target, what)
            torch.testing.assert_close(target.eval()(X), net(X))
    with pytest.warns(UserWarning, match="then wrap the network in DDP"):
        sparsify(nn.parallel.DistributedDataParallel(plain()), 0.5)
