"""The Trainer: strategies, averages and other callbacks, and models that are built or changed late."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from lightning.fabric.strategies import FSDPStrategy as FabricFSDPStrategy
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn

from lightning_deepr import DeepR, sparsify
from lightning_deepr.training.guards import refuse_sharding
from tests.helpers.classifier import Net, batches, fit_plain
from tests.helpers.small import network, unchanged
from tests.helpers.state import assert_connected, slots_by_name
from tests.helpers.trainer import trainer


@pytest.mark.parametrize("averaging", [WeightAveraging, EMAWeightAveraging, lambda: StochasticWeightAveraging(swa_lrs=0.1)])
@pytest.mark.feature("Callbacks: an averaging callback listed before", refused=True)
def test_averaging_listed_before(averaging: Any) -> None:
    net, average = Net(), averaging()
    name = type(average).__name__
    with (
        unchanged(net),
        pytest.raises(ValueError, match=rf"{name} is listed before DeepR.*\[DeepR\(\.\.\.\), {name}\(\.\.\.\)\]"),
    ):
        trainer(average, DeepR(0.1)).fit(net, batches())


@pytest.mark.parametrize("strategy", [FSDPStrategy, FabricFSDPStrategy, ModelParallelStrategy])
@pytest.mark.feature("Sharding: strategies that shard parameters", refused=True)
def test_strategies_that_shard_are_refused_by_name(strategy: Any) -> None:
    with pytest.raises(ValueError, match=rf'found {strategy.__name__}, which shards them\. Use strategy="ddp"'):
        refuse_sharding(strategy())


def test_other_strategies_are_not_refused() -> None:
    refuse_sharding(DDPStrategy())
    refuse_sharding(SingleDeviceStrategy())


class BuiltIn(Net):
    """A module that builds its layers in the named hook."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook = hook
        self.fc1 = self.fc2 = None  # type: ignore[assignment]

    def build(self, hook: str) -> None:
        if hook == self.hook and self.fc1 is None:
            self.fc1, self.fc2 = nn.Linear(12, 16), nn.Linear(16, 4)

    def setup(self, stage: str) -> None:
        self.build("setup")

    def configure_model(self) -> None:
        self.build("configure_model")


@pytest.mark.feature("Modules: layers made in configure_model")
def test_a_model_built_in_configure_model_is_converted() -> None:
    net = BuiltIn("configure_model")
    trainer(DeepR(0.3, check_invariants=True)).fit(net, batches(3))
    assert_connected(net)
    assert len(net.losses) == 3


@pytest.mark.feature("Modules: layers made in the module's setup", refused=True)
def test_a_model_built_in_setup_is_told_where_to_build() -> None:
    with pytest.raises(
        ValueError, match=r"BuiltIn has nothing to convert.*Build the layers in `__init__` or in `configure_model`"
    ):
        trainer(DeepR(0.3)).fit(BuiltIn("setup"), batches())


CHANGES = [
    (lambda net: setattr(net, "fc1", nn.Linear(12, 16)), "`fc1.weight` was converted .* made anew"),
    (lambda net: nn.init.xavier_uniform_(net.fc1.weight), "`fc1.weight` was written to after it was converted"),
    (lambda net: net.fc2.reset_parameters(), "`fc2.weight` was written to"),
    (lambda net: net.fc1.weight.data.normal_(), "`fc1.weight` was written to"),
    (lambda net: [nn.init.normal_(p) for p in net.parameters()], "`fc1.weight` was written to"),
    (lambda net: net.lstm.reset_parameters(), "`lstm.weight_ih_l0` was written to"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_layers_that_are_changed_after_conversion(change: Any, message: str) -> None:
    class Changes(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(12, 4)

        def setup(self, stage: str) -> None:
            change(self)

    with pytest.raises(RuntimeError, match=message):
        trainer(DeepR(0.3)).fit(Changes(), batches())


def test_layers_that_are_only_read_after_conversion() -> None:
    class Reads(Net):
        def setup(self, stage: str) -> None:
            self.norm_at_start = self.fc1.weight.norm().item()
            nn.init.zeros_(self.fc1.bias)  # biases are not converted
            for parameter in self.parameters():
                if parameter.dim() > 1:  # a usual way to leave vectors out
                    nn.init.xavier_uniform_(parameter)

    net = Reads()
    trainer(DeepR(0.3)).fit(net, batches(2))
    assert net.norm_at_start > 0


@pytest.mark.feature("Callbacks: several callbacks, each for its own layers")
def test_two_callbacks_each_rewire_their_own_tensors() -> None:
    net = Net()
    options: dict[str, Any] = {"l1": 0.05, "check_invariants": True}
    first, second = DeepR({"fc1": 0.3}, **options), DeepR({"fc2": 0.5}, rewire_until=0, **options)
    assert first.state_key != second.state_key
    loop = trainer(first, second)
    loop.fit(net, batches(4))
    assert {key: [*state["tensors"]] for key, state in ((c.state_key, c.state_dict()) for c in (first, second))} == {
        first.state_key: ["fc1.weight"],
        second.state_key: ["fc2.weight"],
    }
    start = sparsify(sparsify(Net(), {"fc1": 0.3}), {"fc2": 0.5})
    found, before = slots_by_name(net), slots_by_name(start)
    assert not torch.equal(found["fc1.weight"].places, before["fc1.weight"].places)
    assert torch.equal(found["fc2.weight"].places, before["fc2.weight"].places), "the second was frozen from the start"
    assert_connected(net, {"fc1.weight": 58, "fc2.weight": 32})


def test_two_callbacks_in_a_plain_loop() -> None:
    net = sparsify(network(), 0.3)
    start = {name: slots.places.clone() for name, slots in slots_by_name(net).items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    first = DeepR(target_modules=["0"], l1=0.05).attach(net, optimizer)
    DeepR(target_modules=["2"], l1=0.05, rewire_until=0).attach(net, optimizer)
    fit_plain(net, optimizer, 5)
    moved = {name: not torch.equal(slots.places, start[name]) for name, slots in slots_by_name(net).items()}
    assert moved == {"0.weight": True, "2.weight": False}
    assert list(first.state_dict()["tensors"]) == ["0.weight"]


def test_training_without_a_callback_warns_once() -> None:
    net = sparsify(network(), 0.3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="no callback rewires it") as told:
        fit_plain(net, optimizer, 3)
    assert len(told) == 1
    other = sparsify(network(), 0.3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        callback = DeepR(l1=None)
        for _ in range(2):  # also the second time
            rewiring = callback.attach(other, optimizer)
            fit_plain(other, optimizer, 3)
            rewiring.remove()
    with pytest.warns(UserWarning, match="no callback rewires it"):
        fit_plain(other, optimizer, 1)


def loaded_by_assignment(net: torch.nn.Module) -> torch.nn.Module:
    other = sparsify(network(), 0.3, seed=1)
    other.load_state_dict(net.state_dict(), assign=True)
    return other


@pytest.mark.parametrize("make", [copy.deepcopy, loaded_by_assignment, lambda net: copy.deepcopy(net).double().float()])
def test_training_a_copy_without_a_callback_warns_once(make: Any) -> None:
    """A hook stays with its tensor, and these have another theta."""
    net = make(sparsify(network(), 0.3))
    with pytest.warns(UserWarning, match="no callback rewires it") as told:
        fit_plain(net, torch.optim.SGD(net.parameters(), lr=0.1), 3)
    assert len(told) == 1
    net = make(sparsify(network(), 0.3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(l1=None).attach(net, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_plain(net, optimizer, 3)
