"""Everything works under ``torch.use_deterministic_algorithms(True)``, and gives what it gives without."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_deepr import (
    SET,
    DeepR,
    FixedRandom,
    RigL,
    SoftDeepR,
    adapt,
    densify,
    load_adapter,
    load_state_dict,
    save_adapter,
    save_sparse,
    sparsify,
)
from lightning_deepr.adapters import merge, unmerge
from lightning_deepr.export import to_csr, to_dense_state_dict
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.layers import LAYERS, Layer, flat, loss_of
from tests.helpers.regression import SEED

METHODS: dict[str, Callable[[], Any]] = {
    "DeepR": lambda: DeepR(connectivity=0.2, seed=SEED),
    "DeepR, global": lambda: DeepR(connectivity=0.2, seed=SEED, scope="global"),
    "SoftDeepR": lambda: SoftDeepR(temperature=1e-6, connectivity=0.2, seed=SEED),
    "SET": lambda: SET(connectivity=0.2, seed=SEED, rewire_every_n_steps=3),
    "RigL": lambda: RigL(connectivity=0.2, seed=SEED, rewire_every_n_steps=3),
    "FixedRandom": lambda: FixedRandom(connectivity=0.2, seed=SEED),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def both(work: Callable[[], list[Tensor]]) -> None:
    """Compare what ``work`` gives with and without the setting, bit for bit. The suite's fixture takes it back."""
    wanted = work()
    torch.use_deterministic_algorithms(True)
    found = work()
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def steps(net: nn.Module, inputs: tuple[Any, ...], method: Any, count: int = 9) -> None:
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 0.05)
    attached = method.attach(net, optimizer, total_steps=count)
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(net(*inputs)).backward()
        optimizer.step()
    attached.remove()


def values(net: nn.Module) -> list[Tensor]:
    return [value.clone() for value in net.state_dict().values() if isinstance(value, Tensor)]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("compute", ["dense", "sparse", "auto"])
def test_each_layer(layer: Layer, compute: str) -> None:
    def work() -> list[Tensor]:
        net = sparsify(layer.build(), connectivity=0.3, target_modules=layer.target, seed=SEED, compute=compute)
        steps(net, layer.feed(), DeepR(seed=SEED))
        return [*values(net), flat(net(*layer.feed())).detach(), *to_dense_state_dict(net).values()]

    both(work)


@pytest.mark.parametrize("name", METHODS)
def test_each_method_and_what_leaves_it(name: str, tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(14, 12), nn.Tanh(), nn.Linear(12, 5))

    def work() -> list[Tensor]:
        net, x = network(), torch.randn(6, 14, generator=torch.Generator().manual_seed(1))
        method = METHODS[name]()
        method.prepare(net)
        steps(net, (x,), method)
        kept = values(net)
        save_sparse(net, tmp_path / "net.safetensors")
        loaded = load_state_dict(network(), tmp_path / "net.safetensors")
        matrices = [part for matrix in to_csr(net).values() for part in (matrix.crow_indices(), matrix.values())]
        return [*kept, *matrices, loaded(x).detach(), *values(densify(net))]

    both(work)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_adapters(layout: torch.memory_format, tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, 5))
        return net.to(memory_format=layout)

    x = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(1))

    def work() -> list[Tensor]:
        net = adapt(network(), 0.2, seed=SEED)
        before = [one.slots.base.detach().clone() for one in converted_tensors(net)]  # type: ignore[attr-defined]
        steps(net, (x,), DeepR(seed=SEED))
        y, alone = net(x).detach(), values(net)
        save_adapter(net, tmp_path / "adapter.safetensors")
        other = load_adapter(network(), tmp_path / "adapter.safetensors")
        merged = values(densify(copy.deepcopy(merge(net))))
        torch.testing.assert_close(net(x), y)
        unmerge(net)
        for one, wanted in zip(converted_tensors(net), before, strict=True):
            assert torch.equal(one.slots.base, wanted)  # type: ignore[attr-defined]
        assert torch.equal(net(x), y)
        return [y, *alone, *merged, other(x).detach()]

    both(work)
