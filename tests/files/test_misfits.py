"""Checkpoints that do not fit are refused, and the network does not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_deepr import DeepR, load_state_dict, sparsify
from tests.helpers.classifier import Net, batches
from tests.helpers.small import network, unchanged
from tests.helpers.state import assert_connected, slots_by_name
from tests.helpers.trainer import trainer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train one epoch with DEEP R, and return its checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint")
    trainer(DeepR(0.3), ModelCheckpoint(folder, filename="sparse"), enable_checkpointing=True).fit(Net(), batches(3))
    return folder / "sparse.ckpt"


def test_load_from_checkpoint_of_a_class_that_builds_the_dense_model(checkpoint: Path) -> None:
    with pytest.raises(RuntimeError, match=r"lightning_deepr\.load_state_dict"):
        Net.load_from_checkpoint(checkpoint)
    net = load_state_dict(Net(), checkpoint)  # the advice of the message
    assert_connected(net, {"fc1.weight": 45, "fc2.weight": 32})


@pytest.mark.parametrize(
    ("callback", "net", "message"),
    [
        (DeepR(0.2), Net(), r"expected K = 30 connections .*found 45 .*lightning_deepr\.load_state_dict"),
        (DeepR(0.3, distribution="uniform"), Net(), r"expected K = 58 connections .* found 45"),
        (DeepR(77), Net(hidden=20), r"expected connections of a weight of shape \(20, 12\), found \(16, 12\)"),
        (DeepR(0.3, target_modules=["fc1"]), Net(), r"fc2\.parametrizations\.weight"),
    ],
    ids=["connectivity", "distribution", "model", "selection"],
)
def test_a_checkpoint_of_something_else(checkpoint: Path, callback: DeepR, net: Net, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        trainer(callback, max_epochs=2).fit(net, batches(3), ckpt_path=checkpoint, weights_only=True)


def test_resuming_with_another_selection_of_the_callback(checkpoint: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)["callbacks"]
    (mine,) = [value for key, value in state.items() if key.startswith("DeepR")]
    net = sparsify(network(), {"0": 45})
    rewiring = DeepR().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with (
        unchanged(net),
        pytest.raises(ValueError, match=r"expected the tensors \['0\.weight'\], found \['fc1\.weight', 'fc2\.weight'\]"),
    ):
        rewiring.load_state_dict(mine)
    other = Net()
    sparsify(other, {"fc1": 45, "fc2": 25})
    rewiring = DeepR().attach(other, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"`fc2\.weight`: expected a checkpoint with K = 25, found 32"):
        rewiring.load_state_dict(mine)


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 16)
        self.fc2 = nn.Linear(16, 4)
        self.fc3 = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(12, 16)), r"has connections for `fc1\.weight`, but Sequential has no such weight"),
        (lambda: Net(hidden=20), r"`fc1\.weight`: expected a weight of shape \(20, 12\), found \(16, 12\)"),
        (lambda: sparsify(Net(), 0.2), r"`fc1\.weight` is converted with K = 30, found 45.*densify"),
        (Other, r"Missing key.*fc3\.weight"),
    ],
    ids=["names", "shape", "count", "missing"],
)
def test_load_state_dict_into_something_else(checkpoint: Path, make: Any, message: str) -> None:
    module = make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError), match=f"(?s){message}"):
        load_state_dict(module, checkpoint)
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_damaged_and_newer_files() -> None:
    net = sparsify(network(), 0.3)
    for key, value, message in [
        ("places", torch.zeros_like(slots_by_name(net)["0.weight"].places), "expected .* different places in 0 ... 191"),
        ("places", slots_by_name(net)["0.weight"].places + 192, "the file is damaged"),
        ("lightning_deepr.load_state_dict", torch.tensor(99), "expected format 4 or older, found 99"),
    ]:
        state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        state[f"0.parametrizations.weight.0.{key}"] = value
        with unchanged(net), pytest.raises(RuntimeError, match=message):
            net.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.parametrizations\.weight\.0\.places"):
        net.load_state_dict({name: value for name, value in state.items() if not name.endswith("places")})


def test_a_dense_state_dict_into_a_converted_module() -> None:
    net = sparsify(network(), 0.3)
    places = slots_by_name(net)["0.weight"].places.clone()
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*Unexpected key.*"0\.weight"'):
        net.load_state_dict(network().state_dict())
    assert torch.equal(slots_by_name(net)["0.weight"].places, places)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    net = network()
    with unchanged(net), pytest.raises(FileNotFoundError, match=r"There is no checkpoint at .*nothing\.pt"):
        load_state_dict(net, tmp_path / "nothing.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with unchanged(net), pytest.raises(ValueError, match="expected a state_dict or a Lightning checkpoint, found list"):
        load_state_dict(net, tmp_path / "list.pt")
