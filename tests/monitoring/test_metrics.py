"""The metrics against counts with Python's sets."""

from __future__ import annotations

import pickle
from copy import deepcopy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from lightning_deepr import SET, DeepR, SoftDeepR, connections, dead_units, sparsify
from lightning_deepr.monitoring.metrics import ConnectionOverlap, ConnectionTurnover, DeadUnitShare
from tests.helpers.optimizers import sgd
from tests.helpers.regression import Regression, batches, plain_mlp, train
from tests.helpers.trainer import trainer


def places(net: nn.Module) -> set[tuple[str, int]]:
    return {(name, int(place)) for name, found in connections(net).items() for place in found[1]}


@pytest.mark.parametrize(
    "make",
    [
        lambda: DeepR(0.3, l1=0.1),
        lambda: SET(0.3, rewire_every_n_steps=2, rewire_until=None),
        lambda: SoftDeepR(0.3, l1=0.05, temperature=1e-4),
    ],
)
def test_turnover_and_overlap_are_those_of_sets(make: object) -> None:
    method = make()  # type: ignore[operator]
    net = method.prepare(plain_mlp())
    method.connectivity = None
    optimizer = sgd(net.parameters())
    method.attach(net, optimizer)
    both = MetricCollection([ConnectionTurnover(), ConnectionOverlap()])
    first = last = places(net)
    both.update(net)
    moved = kept = seen = 0
    for batch in batches(12):
        train(net, optimizer, [batch])
        now = places(net)
        moved, kept, seen = moved + len(now - last), kept + len(now & first), seen + len(now)
        both.update(net)
        last = now
    found = both.compute()
    start = len(first)
    assert moved and float(found["ConnectionTurnover"]) == pytest.approx(moved / seen, abs=0)
    assert float(found["ConnectionOverlap"]) == pytest.approx((start + kept) / (start + seen), abs=0)


def test_metrics_forget_and_travel() -> None:
    one, other = sparsify(plain_mlp(), 0.2, seed=0), sparsify(plain_mlp(), 0.2, seed=1)
    turnover = ConnectionTurnover()
    turnover.update(one)
    for copy in (deepcopy(turnover), pickle.loads(pickle.dumps(turnover))):
        copy.update(other)
        assert float(copy.compute()) == len(places(other) - places(one)) / len(places(other))
    turnover.update(one)
    assert float(turnover.compute()) == 0.0
    turnover.reset()  # the sums; the next update compares with the last network
    turnover.update(other)
    assert float(turnover.compute()) == len(places(other) - places(one)) / len(places(other))
    units = dead_units(one).total
    assert float(DeadUnitShare()(one)) == units["dead"] / units["units"]


def test_other_networks_are_refused() -> None:
    turnover, net = ConnectionTurnover(), sparsify(plain_mlp(), 0.2)
    with pytest.raises(ValueError, match=r"Expected a network with converted tensors .*, found Sequential without one"):
        turnover.update(plain_mlp())
    turnover.update(net)
    with pytest.raises(ValueError, match=r"Expected the tensors of the network before, found .*weight in one of both"):
        turnover.update(sparsify(nn.Sequential(nn.Linear(4, 4)), 0.5))


def test_a_module_logs_them() -> None:
    class Logs(Regression):
        def __init__(self) -> None:
            super().__init__(sgd)
            self.turnover = ConnectionTurnover()

        def on_train_batch_end(self, *_: object) -> None:
            self.turnover.update(self.net)
            self.log("turnover", self.turnover, on_step=False, on_epoch=True)

    module: pl.LightningModule = Logs()
    fit = trainer(DeepR(0.3, l1=0.1))
    fit.fit(module)
    assert 0 < float(fit.callback_metrics["turnover"]) < 1
    assert not any("turnover" in name for name in module.state_dict() if torch.is_tensor(module.state_dict()[name]))
