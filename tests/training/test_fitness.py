"""Thetas that do not fit their connections are refused by name: at the start of a training, and before a step writes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_deepr import DeepR, SoftDeepR, sparsify
from tests.helpers.state import all_slots, assert_connected, slots_by_name, theta_of

pytestmark = pytest.mark.filterwarnings("ignore:A backward pass reached", "ignore:.*FSDP", "ignore:.*deprecated")


def network(compute: str = "auto") -> nn.Sequential:
    torch.manual_seed(0)
    return sparsify(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5)), 0.1, compute=compute)  # type: ignore[return-value]


def trained(net: nn.Module, callback: Any = None) -> Callable[[], None]:
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    (callback or DeepR()).attach(net, optimizer)

    def step() -> None:
        optimizer.zero_grad()
        net(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()

    step()
    return step


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def fsdp1(net: nn.Module, **options: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(net, device_id=torch.device("cpu"), **options)


def fsdp2(net: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    return net


@pytest.mark.parametrize("shard", [
    lambda net: fsdp1(net, use_orig_params=True), lambda net: fsdp1(net, use_orig_params=False), fsdp2,
], ids=["FSDP1, own parameters", "FSDP1, flat", "FSDP2"])  # fmt: skip
@pytest.mark.feature("Sharding: sharded thetas in a plain loop", refused=True)
def test_sharded_thetas_are_refused_at_the_start(shard: Any, group: None) -> None:
    net = shard(network())
    with pytest.raises(ValueError, match=r"0\.weight.*expected a plain.*found.*DistributedDataParallel"):
        DeepR().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))


def test_layers_beside_sharded_ones_are_trained(group: None) -> None:
    net = network()
    net.append(fsdp1(nn.Linear(5, 3), use_orig_params=True))
    step = trained(net)
    step()
    assert_connected(net)


def shorter(net: nn.Module) -> None:
    theta_of(net, "0.weight").data = torch.zeros(7)


def to_meta(net: nn.Module) -> None:
    net.to("meta")


def through_meta(net: nn.Module) -> None:
    net.to("meta").to_empty(device="cpu")


def beyond(net: nn.Module) -> None:
    net[0].parametrizations.weight[0].places[3] = 32 * 64


def below(net: nn.Module) -> None:
    net[0].parametrizations.weight[0].places[3] = -1


def twice(net: nn.Module) -> None:
    places = net[0].parametrizations.weight[0].places
    places[3] = places[4]


DAMAGE = {
    "shorter": shorter,
    "meta": to_meta,
    "to_empty after meta": through_meta,
    "beyond": beyond,
    "below": below,
    "twice": twice,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("how", ["attach", "Fabric"])
def test_a_damaged_network_is_refused_at_the_start(damage: Callable[[nn.Module], None], how: str) -> None:
    net = network()
    damage(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def begin() -> None:
        if how == "attach":
            DeepR().attach(net, optimizer)
        else:
            lightning.Fabric(accelerator="cpu", callbacks=[DeepR()]).setup(net, optimizer, move_to_device=False)

    with pytest.raises(ValueError, match=r"`0\.weight`: .*expected|`0\.weight`: .*lost"):
        begin()


def test_a_trainer_refuses_before_the_first_step() -> None:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()
            self.steps = 0

        def training_step(self, batch: Any, number: int) -> Any:
            self.steps += 1
            return self.net(batch).square().mean()

        def on_fit_start(self) -> None:
            shorter(self.net)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_steps=2, accelerator="cpu", callbacks=[DeepR()], enable_model_summary=False, **options)
    with pytest.raises(ValueError, match=r"`net\.0\.weight`: theta: expected"):
        trainer.fit(module, torch.utils.data.DataLoader(torch.randn(4, 32), batch_size=2))
    assert module.steps == 0


@pytest.mark.parametrize("damage", [beyond, below, twice], ids=lambda one: one.__name__)
@pytest.mark.parametrize("compute", ["dense", "sparse"])
def test_places_that_were_written_to_are_refused_before_a_kernel_reads_them(compute: str, damage: Any) -> None:
    net = network(compute)
    step = trained(net)
    damage(net)
    with pytest.raises(RuntimeError, match=r"places: expected .* found .*Load a state_dict"):
        net(torch.randn(8, 32))
    with pytest.raises(RuntimeError, match=r"places: expected .* found .*Load a state_dict"):
        step()


def test_a_replaced_theta_is_refused() -> None:
    net = network()
    step = trained(net)
    net[0].parametrizations.weight.original = nn.Parameter(theta_of(net, "0.weight").detach().clone())  # type: ignore[union-attr, index]
    with pytest.raises(RuntimeError, match=r"`0\.weight`: theta was replaced by another parameter, which Adam does not hold"):
        step()


@pytest.mark.parametrize("move", [
    lambda net: net.to_empty(device="cpu"), lambda net: net.share_memory(), lambda net: net.double().float(),
    lambda net: net.type(torch.float64).type(torch.float32), lambda net: net.half().float(),
], ids=["to_empty", "share_memory", "double", "type", "half"])  # fmt: skip
@pytest.mark.feature("Modules: a module that moves to another device or dtype")
def test_connections_follow_a_module_that_moves(move: Any) -> None:
    net = network("sparse")
    step = trained(net)
    kept = [(slots.places.clone(), slots.born.clone(), slots.signs.clone()) for slots in all_slots(net)]
    values = {name: p.detach().clone() for name, p in net.named_parameters()}
    move(net)
    for slots, (places, born, signs) in zip(all_slots(net), kept, strict=True):
        assert torch.equal(slots.places, places) and torch.equal(slots.born, born) and torch.equal(slots.signs, signs)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(values[name])  # to_empty leaves the values open
    step()
    assert_connected(net)


def test_a_load_repairs_a_network_that_was_on_the_meta_device() -> None:
    net, other = network(), network()
    through_meta(net)
    with pytest.raises(RuntimeError, match="were lost on the meta device"):
        net(torch.randn(8, 32))
    net.load_state_dict(other.state_dict())
    trained(net)
    assert_connected(net)
    assert slots_by_name(net)["0.weight"].exceptions.numel() == 0


def test_a_theta_for_every_place_is_checked_too() -> None:
    soft = SoftDeepR(0.1, temperature=1e-6, l1=1e-3)
    net = soft.prepare(nn.Sequential(nn.Linear(32, 8)))
    step = trained(net, soft)
    step()
    theta_of(net, "0.weight").data = torch.zeros(8, 31)
    with pytest.raises(RuntimeError):
        step()
    theta_of(net, "0.weight").data = torch.zeros(8, 32, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        step()
