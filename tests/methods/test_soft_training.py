"""soft-DEEP R in a training: Trainer, Fabric and plain loop, every layer, averages, reports and bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_deepr import (
    DeepR,
    LinearDecay,
    LrPower,
    SoftDeepR,
    connections,
    connectivity_report,
    densify,
    load_state_dict,
    save_sparse,
    sparsify,
)
from lightning_deepr.files.checkpoint import report_of_checkpoint
from lightning_deepr.weights.dense_theta import SoftTheta
from lightning_deepr.weights.k_slots import KSlots
from tests.helpers import oracle_soft
from tests.helpers.crashes import whole_and_resumed
from tests.helpers.dense_theta import (
    STEPS,
    Make,
    adam,
    assert_same,
    by_fabric,
    by_plain_loop,
    by_trainer,
    full_state,
    kinds,
    network,
    resumed,
    sgd,
    weights,
)
from tests.helpers.layers import LAYERS, Layer, flat
from tests.helpers.layers import loss_of as layer_loss
from tests.helpers.regression import Regression, batches, plain_mlp, train
from tests.helpers.soft import ALPHA, SEED, TEMPERATURE, soft, thetas
from tests.helpers.trainer import trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


# -- Trainer, Fabric, plain loop -- -------------------------------------------------------------------------------------------


SETTINGS: dict[str, tuple[dict[str, Any], Make, int]] = {
    "sgd": ({}, sgd, 1),
    "adam, accumulated": ({"l1": None}, adam, 2),
    "T by the learning rate, every 2 steps": ({"temperature": LrPower(0.1, 1), "rewire_every_n_steps": 2}, sgd, 1),
    "l1 falls, frozen late": ({"l1": LinearDecay(0.2, 0.01), "rewire_until": 0.7}, adam, 2),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_trainer_fabric_and_a_plain_loop_are_one(setting: tuple[dict[str, Any], Make, int]) -> None:
    options, make, accumulate = setting
    plain = full_state(*by_plain_loop(soft(**options), make, accumulate))
    assert_same(full_state(*by_trainer(soft(**options), make, accumulate)), plain)
    needs_length = "rewire_until" in options
    assert_same(full_state(*by_fabric(soft(**options), make, accumulate, attach=needs_length)), plain)
    other = full_state(*by_plain_loop(soft(**options, seed=SEED + 1) if "seed" not in options else soft(), make, accumulate))
    assert any(not torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("make", [sgd, adam], ids=["sgd", "adam"])
@pytest.mark.parametrize("at", [0, 7])
def test_a_plain_loop_resumes_exactly(make: Make, at: int) -> None:
    options = {"l1": LinearDecay(0.2, 0.05), "temperature": LrPower(0.1, 1)}
    whole, again = resumed(lambda: soft(**options), make, at)
    assert_same(whole, again)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("averaged", [False, True])
def test_a_crashed_fit_resumes_exactly(averaged: bool, tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [soft(l1=LinearDecay(0.2, 0.05)), *([EMAWeightAveraging(decay=0.8)] if averaged else [])]

    whole, again = whole_and_resumed(tmp_path, callbacks, every=3, crash_at=10)
    assert_same(again, whole)


def test_a_second_callback_goes_on_and_repeats_no_draws() -> None:
    net, optimizer = network(soft())
    train(net, optimizer, batches(5))
    first = kinds(net)["0.weight"].owner()
    assert first is not None
    first._stop()
    second = soft(None)
    second.attach(net, optimizer)
    bounds = [slots.theta_min for slots in kinds(net).values()]
    train(net, optimizer, batches(1))
    assert [entry["step"] for entry in second.state_dict()["tensors"].values()] == [6, 6]
    assert [slots.theta_min for slots in kinds(net).values()] == bounds


# -- the layers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_layer(layer: Layer, tmp_path: Path) -> None:
    callback = soft(0.3, target_modules=layer.target)
    net = callback.prepare(layer.build())
    assert {row["name"] for row in connectivity_report(net)} == set(layer.tensors)
    assert all(row["active"] == kinds(net)[row["name"]].wanted for row in connectivity_report(net))
    optimizer = adam(net.parameters())
    callback.attach(net, optimizer)
    inputs = layer.feed()
    for _ in range(3):
        optimizer.zero_grad()
        layer_loss(net(*inputs)).backward()
        optimizer.step()
    output = flat(net(*inputs)).detach()
    for name, (shape, places, values) in connections(net).items():
        dense = torch.zeros(shape.numel())
        dense[places] = values
        assert torch.equal(dense.view(shape), weights(net)[name])
        assert len(places) == next(row["active"] for row in connectivity_report(net) if row["name"] == name)

    replica = copy.deepcopy(net)
    assert (
        torch.equal(flat(replica(*inputs)), output) and connectivity_report(replica).active == connectivity_report(net).active
    )
    for theta in thetas(replica):
        theta.fill_(-1.0)  # its own copy
    assert connectivity_report(replica).active == 0 and torch.equal(flat(net(*inputs)), output)

    # a state_dict converts a dense model as recorded; save_sparse writes the active connections as K slots
    again = load_state_dict(layer.build(seed=5), net.state_dict())
    assert torch.equal(flat(again(*inputs)), output) and all(isinstance(kind, SoftTheta) for kind in kinds(again).values())
    path = save_sparse(net, tmp_path / "net.safetensors")
    slots = load_state_dict(layer.build(seed=5), path)
    assert all(isinstance(kind, KSlots) for kind in kinds(slots).values())
    torch.testing.assert_close(flat(slots(*inputs)), output, rtol=1e-4, atol=1e-5)
    assert report_of_checkpoint(path).active == report_of_checkpoint(net.state_dict()).active == connectivity_report(net).active

    plain = densify(copy.deepcopy(net))
    assert torch.equal(flat(plain(*inputs)), output) and not kinds(plain)
    assert layer.build().load_state_dict(plain.state_dict()) is not None
    double = net.to(torch.float64)
    assert all(theta.dtype == torch.float64 for theta in thetas(double))
    torch.testing.assert_close(flat(double(*layer.feed(torch.float64))).float(), output, rtol=1e-4, atol=1e-5)


def test_layers_of_the_meta_device() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6))
    callback = soft(0.3)
    callback.prepare(net)
    assert connectivity_report(net).active == 36 + 18 and float(weights(net)["0.weight"].abs().max()) > 0
    optimizer = sgd(net.parameters())
    callback.attach(net, optimizer)
    train(net, optimizer, batches(3))


def test_a_pretrained_networks_signs_stay(tmp_path: Path) -> None:
    """init="largest": the exceptions to the hashed signs survive copies, checkpoints and the conversion to K slots."""
    callback = soft(0.3, init="largest")
    net = callback.prepare(plain_mlp())
    assert kinds(net)["0.weight"].exceptions.numel() > 5
    optimizer = sgd(net.parameters())
    callback.attach(net, optimizer)
    train(net, optimizer, batches(4))
    loaded = load_state_dict(plain_mlp(), save_sparse(net, tmp_path / "net.safetensors"))
    for again in (load_state_dict(plain_mlp(), net.state_dict()), copy.deepcopy(net), loaded):
        for name, weight in weights(net).items():
            torch.testing.assert_close(weights(again)[name], weight, rtol=0, atol=0)
    deepr = DeepR(l1=0.0, check_invariants=True)
    optimizer = sgd(loaded.parameters())
    deepr.attach(loaded, optimizer)
    train(loaded, optimizer, batches(3))
    assert min(entry["step"] for entry in deepr.state_dict()["tensors"].values()) == 7, "it would repeat draws"


def test_where_nothing_is_active_one_connection_of_weight_zero_is_written(tmp_path: Path) -> None:
    net = soft(0.3).prepare(plain_mlp())
    thetas(net)[0].fill_(-0.1)
    loaded = load_state_dict(plain_mlp(), save_sparse(net, tmp_path / "net.safetensors"))
    assert [kind.count for kind in kinds(loaded).values()] == [1, 18]
    x = torch.randn(3, 12)
    torch.testing.assert_close(loaded(x), net(x))


# -- averages -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_has_the_networks_connections(use_buffers: bool) -> None:
    """Compare with a slow reference: the mean of theta since the connection last became active."""
    net, optimizer = network(soft())
    train(net, optimizer, batches(2))
    average = AveragedModel(net, use_buffers=use_buffers)
    reference = [theta.double().clone() for theta in thetas(net)]
    count, restarted = 0, 0
    for step, batch in enumerate(batches(12), start=1):
        train(net, optimizer, [batch])
        for i, theta in enumerate(thetas(net)):
            for place in range(theta.numel()):
                now = float(theta.view(-1)[place])
                if now < 0 or float(reference[i].view(-1)[place]) < 0:
                    restarted += now >= 0
                    reference[i].view(-1)[place] = now
        if step % 2 == 0:
            average.update_parameters(net)
            for i, theta in enumerate(thetas(net)):
                reference[i] += (theta.double() - reference[i]) / (count + 1)
            count += 1
        for theta, mean, current in zip(thetas(average.module), reference, thetas(net), strict=True):
            torch.testing.assert_close(theta.double(), mean, rtol=1e-4, atol=1e-6)
            assert torch.equal(theta >= 0, current >= 0)
    assert restarted > 10
    assert connectivity_report(average.module).active == connectivity_report(net).active


def test_weight_averaging_under_the_trainer() -> None:
    module = Regression(sgd, STEPS)
    callback = soft()
    runner = trainer(callback, EMAWeightAveraging(decay=0.8))
    runner.fit(module)
    plain, _ = by_trainer(soft(), sgd)
    assert connectivity_report(module).active == connectivity_report(plain).active
    assert not torch.equal(weights(module)["net.0.weight"], weights(plain)["net.0.weight"]), "nothing was averaged"
    for own, theirs in zip(weights(module).values(), weights(plain).values(), strict=True):
        assert not own[theirs == 0].any()


# -- reports -- ----------------------------------------------------------------------------------------------------------


def test_statistics_and_loggers(tmp_path: Path) -> None:
    callback = soft(log_every_n_steps=4)
    net, optimizer = network(callback)
    births = deaths = 0
    for batch in batches(6):
        was = thetas(net)[0] >= 0
        train(net, optimizer, [batch])
        now = thetas(net)[0] >= 0
        births, deaths = births + int((now & ~was).sum()), deaths + int((was & ~now).sum())
    assert births > 0 and deaths > 0
    found = callback.statistics()
    assert found["deepr/0.weight/births"] == births / 6 and found["deepr/0.weight/deaths"] == deaths / 6
    assert found["deepr/0.weight/connectivity"] == connectivity_report(net)[0]["connectivity"]
    assert callback.statistics()["deepr/0.weight/births"] == 0

    logger = CSVLogger(tmp_path)
    trainer(soft(log_every_n_steps=4, log_statistics="tensors"), logger=logger).fit(Regression(sgd, STEPS))
    logger.save()
    assert "deepr/net.0.weight/connectivity" in Path(logger.experiment.metrics_file_path).read_text(encoding="utf-8")


def test_report() -> None:
    net, _ = network(soft(l1=None))
    rows = connectivity_report(net)
    assert [(row["active"], row["l1"], row["compute"]) for row in rows] == [(36, 2e-4, "dense"), (18, 2e-4, "dense")]
    assert "SoftTheta(shape=(10, 12), K=36 of N=120" in repr(net)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda item, state: item.theta.sub_(5.0), "expected theta >= theta_min"),
        (lambda item, state: item.tensor.slots.signs.neg_(), "a sign is not that of its place"),
        (
            lambda item, state: state["momentum_buffer"].fill_(1.0),
            "momentum_buffer of a dormant connection is not at its start",
        ),
    ],
)
def test_check_invariants_sees_what_breaks(damage: Callable[..., Any], message: str) -> None:
    class Damaging(SoftDeepR):
        def after_step(self, stepped: Any, optimizer: Any) -> Any:
            super().after_step(stepped, optimizer)
            damage(stepped[0], optimizer.state[stepped[0].tensor.theta])

    callback = Damaging(0.3, temperature=TEMPERATURE, l1=ALPHA, check_invariants=True)
    net, optimizer = network(callback)
    with pytest.raises(RuntimeError, match=rf"check_invariants: `0\.weight`, step 0: .*{message}"):
        train(net, optimizer, batches(1))


def test_a_step_without_rewiring_is_checked_too() -> None:
    class Damaging(SoftDeepR):
        def after_step(self, stepped: Any, optimizer: Any) -> Any:
            super().after_step(stepped, optimizer)
            stepped[0].theta.abs_()

    callback = Damaging(0.3, temperature=TEMPERATURE, l1=ALPHA, check_invariants=True, rewire_until=0)
    net, optimizer = network(callback)
    with pytest.raises(RuntimeError, match="the connectivity has changed in a step without rewiring"):
        train(net, optimizer, batches(1))


# -- bad input ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, r"temperature: expected T > 0, found 0.*Set temperature"),
        ({"temperature": {"0": 1e-3, "2": 0}}, ValueError, r"temperature: expected T > 0, found 0"),
        ({"temperature": None}, TypeError, "temperature: expected a float"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a finite value of at least 0, found -1"),
        ({"l1": 0.0}, ValueError, r"l1: expected alpha > 0, found 0.*Set l1, or give theta_min"),
        ({"l1": {"0": 0.1, "2": 0.0}}, ValueError, r"l1: expected alpha > 0, found 0"),
        ({"theta_min": 0.0}, ValueError, r"theta_min: expected a finite value below 0, found 0\.0"),
        ({"theta_min": math.nan}, ValueError, "theta_min: expected a finite value below 0, found nan"),
        ({"theta_min": "low"}, TypeError, "theta_min: expected a float below 0 or None, found 'low'"),
        ({"rewire_every_n_steps": 0}, ValueError, "rewire_every_n_steps: expected an int of at least 1"),
    ],
)
def test_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SoftDeepR(0.1, **{"temperature": 1e-3, **options})


def test_the_temperature_has_to_be_given() -> None:
    with pytest.raises(TypeError, match="temperature"):
        SoftDeepR(0.1)  # type: ignore[call-arg]


@pytest.mark.parametrize("options", [{"temperature": LrPower(0.0, 1)}, {"l1": LinearDecay(0.0, 0.1)}], ids=["T", "alpha"])
def test_a_schedule_that_starts_at_zero(options: dict[str, Any]) -> None:
    net, optimizer = network(soft(**options))
    with pytest.raises(
        ValueError, match=r"`0\.weight`: theta_min = .* is undefined at the start, with T = .*set temperature and l1"
    ):
        train(net, optimizer, batches(1))


def test_a_warm_up_from_zero() -> None:
    """T follows the learning rate: theta_min becomes known at the first step with a learning rate above 0."""
    net, optimizer = network(soft(temperature=LrPower(0.1, 1)))
    optimizer.param_groups[0]["lr"] = 0.0
    before = thetas(net)[0].clone()
    train(net, optimizer, batches(2))
    assert torch.equal(thetas(net)[0], before) and math.isnan(kinds(net)["0.weight"].theta_min)
    optimizer.param_groups[0]["lr"] = 0.1
    train(net, optimizer, batches(2))
    bound = oracle_soft.theta_min(0.01, ALPHA, 36, 120)
    assert kinds(net)["0.weight"].theta_min == pytest.approx(bound) and float(thetas(net)[0].min()) >= np.float32(bound)


@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_a_schedule_that_makes_no_sense(value: float) -> None:
    net, optimizer = network(soft(temperature=lambda lr: value))
    with pytest.raises(ValueError, match=f"temperature: expected a finite value of at least 0, found {value}"):
        train(net, optimizer, batches(1))


def test_kinds_are_not_mixed() -> None:
    net = soft().prepare(plain_mlp())
    optimizer = sgd(net.parameters())
    with pytest.raises(
        ValueError, match=r"`0\.weight` has a theta for every potential connection \(SoftTheta\): DeepR expects"
    ):
        DeepR().attach(net, optimizer)
    slots = sparsify(plain_mlp(), 0.3)
    with pytest.raises(
        ValueError, match=r"SoftDeepR expects a theta for every.*found KSlots \(\d+ connections\).*densify.*prepare\(net\)"
    ):
        soft().attach(slots, sgd(slots.parameters()))
    plain = plain_mlp()
    with pytest.raises(ValueError, match=r"attach expects a converted network.*Call `prepare\(net\)` on the SoftDeepR"):
        soft().attach(plain, sgd(plain.parameters()))
    soft().attach(net, optimizer)  # no callback has taken it


def test_an_optimizer_of_before() -> None:
    net = plain_mlp()
    optimizer = sgd(net.parameters())
    callback = soft()
    callback.prepare(net)
    with pytest.raises(ValueError, match="optimizer made before"):
        callback.attach(net, optimizer)


def test_tied_weights_are_refused_and_nothing_is_changed() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match=r"shared \(tied\)"):
        soft().prepare(net)
    assert not kinds(net) and net[0].weight is net[1].weight


def test_loading_what_does_not_fit() -> None:
    net = soft(0.3).prepare(plain_mlp())
    with pytest.raises(RuntimeError, match=r"expected a wanted connectivity of K = 60 .*found 36"):
        soft(0.5).prepare(plain_mlp()).load_state_dict(net.state_dict())
    slots = sparsify(plain_mlp(), 0.3, distribution="uniform")
    with pytest.raises(RuntimeError, match="expected what SoftTheta records, found a checkpoint of another kind"):
        soft(0.3).prepare(plain_mlp()).load_state_dict(slots.state_dict())
    with pytest.raises(RuntimeError, match="expected what KSlots records, found a checkpoint of another kind"):
        slots.load_state_dict(net.state_dict())
    with pytest.raises(ValueError, match=r"`0\.weight` is converted for another method: expected KSlots, found SoftTheta"):
        load_state_dict(slots, net.state_dict())
    with pytest.raises(ValueError, match=r"`0\.weight` is converted with K = 60, found 36"):
        load_state_dict(soft(0.5).prepare(plain_mlp()), net.state_dict())


def test_re_initialization_after_the_conversion_is_told() -> None:
    class Late(Regression):
        def setup(self, stage: str) -> None:
            nn.init.xavier_uniform_(self.net[0].weight)

    class LateLSTM(Regression):
        def __init__(self) -> None:
            super().__init__(sgd, 4)
            self.net = nn.Sequential(nn.LSTM(12, 6))

        def setup(self, stage: str) -> None:
            self.net[0].reset_parameters()

    for module in (Late(sgd, 4), LateLSTM()):
        with pytest.raises(RuntimeError, match="was written to after it was converted"):
            trainer(soft(0.1)).fit(module)
