"""Pruning with retraining and l1-shrinkage: dense training first, then exact counts and a mask that holds."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel

from lightning_deepr import (
    DeepR,
    L1Shrinkage,
    LinearDecay,
    MagnitudePruning,
    connections,
    connectivity_report,
    densify,
    load_state_dict,
    save_sparse,
    sparsify,
)
from lightning_deepr.files.checkpoint import report_of_checkpoint
from lightning_deepr.weights.dense_theta import MaskedTheta
from lightning_deepr.weights.find import converted_tensors
from lightning_deepr.weights.k_slots import KSlots
from tests.helpers.crashes import whole_and_resumed
from tests.helpers.dense_theta import (
    OPTIMIZERS,
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
from tests.helpers.regression import Branches, Regression, batches, loss_of, plain_mlp, train
from tests.helpers.trainer import trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
DATA = batches(STEPS)
FIRST, LAST = 6, 18  # the steps of the first and the last pruning
COUNTS = {"0.weight": 24, "2.weight": 12}  # 20 % of 120 and of 60


def pruning(connectivity: Any = 0.2, **options: Any) -> MagnitudePruning:
    default = {"prune_from": 0.25, "prune_until": 0.75, "prunings": 3, "distribution": "uniform", "check_invariants": True}
    return MagnitudePruning(connectivity, **{**default, **options})


def shrinkage(connectivity: Any = 0.2, **options: Any) -> L1Shrinkage:
    default = {"l1": 0.1, "freeze_at": 0.5, "distribution": "uniform", "check_invariants": True}
    return L1Shrinkage(connectivity, **{**default, **options})


def reference(
    make: Make, after_step: Callable[[int, dict[str, Tensor]], dict[str, Tensor]], steps: int = STEPS
) -> list[dict[str, Tensor]]:
    """Train a plain dense network. After each step a function sets the weights; weights at 0 then get no gradient.

    Returns:
        the weights after each step.
    """
    net = plain_mlp()
    optimizer = make(net.parameters())
    named = {"0.weight": net[0].weight, "2.weight": net[2].weight}
    masks: dict[str, Tensor] = {}
    history = []
    for number, batch in enumerate(DATA[:steps], start=1):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        for name, mask in masks.items():
            named[name].grad.mul_(mask)
        optimizer.step()
        with torch.no_grad():
            new = after_step(number, {name: weight.detach().clone() for name, weight in named.items()})
            for name, weight in named.items():
                weight.copy_(new[name])
                if f"mask {name}" in new:
                    masks[name] = new[f"mask {name}"]
        history.append({name: weight.detach().clone() for name, weight in named.items()})
    return history


def largest(weight: Tensor, count: int) -> Tensor:
    """Return the mask of the ``count`` largest magnitudes, by sorting."""
    order = sorted(range(weight.numel()), key=lambda place: -abs(float(weight.view(-1)[place])))
    mask = torch.zeros(weight.numel())
    mask[order[:count]] = 1
    return mask.view(weight.shape)


# -- pruning ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_pruning_is_dense_training_with_the_smallest_weights_cut(make: Make) -> None:
    """Densities are geometric, cut connections stay cut under momentum and weight decay, and K is exact in the end."""
    counts = {FIRST: 1 / 3, 12: 2 / 3, LAST: 1}
    masks: dict[str, Tensor] = {}

    def prune(number: int, new: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, weight in list(new.items()):
            if number in counts:
                total = weight.numel()
                left = round(total * (COUNTS[name] / total) ** counts[number])
                masks[name] = new[f"mask {name}"] = largest(weight * masks.get(name, 1), left)
            new[name] = weight * masks.get(name, 1)
        return new

    expected = reference(make, prune)
    net, optimizer = network(pruning(), make)
    for number, batch in enumerate(DATA, start=1):
        train(net, optimizer, [batch])
        for name, weight in weights(net).items():
            torch.testing.assert_close(weight, expected[number - 1][name], rtol=1e-5, atol=1e-7)
            if number < FIRST:
                assert torch.equal(weight, expected[number - 1][name])
    assert {row["name"]: row["active"] for row in connectivity_report(net)} == COUNTS
    assert {name: int((weight != 0).sum()) for name, weight in weights(net).items()} == COUNTS


def test_one_shot() -> None:
    callback = pruning(prune_from=0.5, prune_until=0.5)
    net, optimizer = network(callback)
    actives = []
    for batch in DATA:
        train(net, optimizer, [batch])
        actives.append(connectivity_report(net).active)
    assert actives == [180] * (STEPS // 2 - 1) + [36] * (STEPS // 2 + 1)


def test_one_threshold_for_the_network() -> None:
    net, optimizer = network(pruning(threshold="network", prune_from=0.5, prune_until=0.5))
    train(net, optimizer, DATA[: STEPS // 2 - 1])
    dense, _ = network(pruning(prune_from=1.0, prune_until=1.0))
    dense.load_state_dict(net.state_dict())
    plain = sgd(dense.parameters())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, DATA[STEPS // 2 - 1 : STEPS // 2])
    train(dense, plain, DATA[STEPS // 2 - 1 : STEPS // 2])
    everything = torch.cat([weight.view(-1) for weight in weights(dense).values()])
    expected = everything * largest(everything, 36).view(-1)
    found = torch.cat([weight.view(-1) for weight in weights(net).values()])
    assert torch.equal(found, expected)
    counts = [row["active"] for row in connectivity_report(net)]
    assert sum(counts) == 36 and counts != list(COUNTS.values())


def test_no_layer_is_pruned_to_nothing() -> None:
    callback = pruning(0.02, threshold="network", prune_from=0.5, prune_until=0.5)
    net, optimizer = network(callback)
    with torch.no_grad():
        next(iter(converted_tensors(net))).theta.mul_(1e-4)
    train(net, optimizer, DATA)
    assert [row["active"] for row in connectivity_report(net)] == [1, connectivity_report(net).active - 1]
    assert connectivity_report(net).active == 2 + 1  # round(.02 * 120) and of 60


def test_one_threshold_needs_all_tensors_in_one_step() -> None:
    callback = pruning(threshold="network", prune_from=0.5, prune_until=0.5)
    net = callback.prepare(Branches((8, 4)))
    first, second = (optim.SGD(part.parameters(), lr=0.1) for part in (net.a, net.b))
    callback.attach(net, first, total_steps=4)
    callback.attach(net, second, total_steps=4)
    net(torch.ones(2, 8)).sum().backward()
    first.step()
    with pytest.raises(RuntimeError, match=r'threshold="network" compares all tensors.*b\.weight'):
        first.step()


# -- l1-shrinkage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("connectivity", [0.2, None])
def test_shrinkage_is_soft_thresholding(make: Make, connectivity: float | None) -> None:
    freeze = STEPS // 2
    lr = make([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"]
    masks: dict[str, Tensor] = {}

    def shrink(number: int, new: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, weight in list(new.items()):
            if name in masks:
                new[name] = weight * masks[name]
                continue
            shrunk = torch.tensor([math.copysign(max(abs(w) - lr * 0.1, 0.0), w) for w in weight.double().view(-1).tolist()])
            new[name] = shrunk.view(weight.shape).to(weight)
            if connectivity is not None and number == freeze:
                masks[name] = largest(new[name], COUNTS[name]) * (new[name] != 0)
                new[name], new[f"mask {name}"] = new[name] * masks[name], masks[name]
        return new

    expected = reference(make, shrink)
    net, optimizer = network(shrinkage(connectivity), make)
    for number, batch in enumerate(DATA, start=1):
        train(net, optimizer, [batch])
        for name, weight in weights(net).items():
            torch.testing.assert_close(weight, expected[number - 1][name], rtol=1e-4, atol=2e-6)
    assert (connectivity_report(net).active == 36) == (connectivity is not None)


def test_fewer_than_wanted_stay_as_they_are() -> None:
    net, optimizer = network(shrinkage(0.9, l1=0.2))
    train(net, optimizer, DATA[: STEPS // 2])
    before = {row["name"]: row["active"] for row in connectivity_report(net)}
    assert 0 < sum(before.values()) < 0.9 * 180
    train(net, optimizer, DATA[STEPS // 2 :])
    assert {row["name"]: row["active"] for row in connectivity_report(net)} == before
    assert all(kind.fixed for kind in kinds(net).values())


def test_a_weight_at_zero_comes_back_until_the_mask_is_fixed() -> None:
    net, optimizer = network(shrinkage(None, l1=0.3))
    train(net, optimizer, DATA[:6])
    at_zero = weights(net)["0.weight"] == 0
    came_back = torch.zeros_like(at_zero)
    for batch in DATA[6:]:
        train(net, optimizer, [batch])
        came_back |= at_zero & (weights(net)["0.weight"] != 0)
    assert at_zero.any() and came_back.any()


# -- Trainer, Fabric, plain loop -- -------------------------------------------------------------------------------------------

CALLBACKS: dict[str, Callable[[], Any]] = {
    "pruning": pruning,
    "pruning, one threshold": lambda: pruning(threshold="network"),
    "shrinkage": lambda: shrinkage(l1=LinearDecay(0.2, 0.05)),
    "shrinkage to where l1 leads": lambda: shrinkage(None, l1={"0": 0.2, "2": 0.05}),
}
EVERY_CALLBACK = pytest.mark.parametrize("make_callback", CALLBACKS.values(), ids=CALLBACKS.keys())


@EVERY_CALLBACK
@pytest.mark.parametrize(("make", "accumulate"), [(sgd, 1), (adam, 2)], ids=["sgd", "adam, accumulated"])
def test_trainer_fabric_and_a_plain_loop_are_one(make_callback: Callable[[], Any], make: Make, accumulate: int) -> None:
    plain_net, optimizer = by_plain_loop(make_callback(), make, accumulate)
    plain = full_state(plain_net, optimizer)
    assert 0 < connectivity_report(plain_net).active < 180
    assert_same(full_state(*by_trainer(make_callback(), make, accumulate)), plain)
    assert_same(full_state(*by_fabric(make_callback(), make, accumulate, attach=True)), plain)


@EVERY_CALLBACK
@pytest.mark.parametrize("at", [3, 13, 20])
def test_a_plain_loop_resumes_exactly(make_callback: Callable[[], Any], at: int) -> None:
    whole, again = resumed(make_callback, sgd, at)
    assert_same(whole, again)


@EVERY_CALLBACK
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_crashed_fit_resumes_exactly(make_callback: Callable[[], Any], tmp_path: Path) -> None:
    whole, again = whole_and_resumed(tmp_path, lambda: [make_callback(), EMAWeightAveraging(decay=0.8)], every=5, crash_at=16)
    assert_same(again, whole)


@EVERY_CALLBACK
def test_a_second_fit_keeps_what_is_pruned(make_callback: Callable[[], Any]) -> None:
    callback = make_callback()
    module = Regression(sgd, STEPS)
    trainer(callback).fit(module)
    fixed = {name: kind.mask.clone() for name, kind in kinds(module).items() if kind.fixed}
    trainer(callback).fit(module)
    for name, mask in fixed.items():
        assert torch.equal(kinds(module)[name].mask, mask)
        assert not weights(module)[name][~mask].any()
    assert len(fixed) == (0 if getattr(callback, "freezes", True) is False else 2)


# -- the layers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_layer(layer: Layer, tmp_path: Path) -> None:
    callback = pruning(0.3, target_modules=layer.target)
    net = callback.prepare(layer.build())
    inputs = layer.feed()
    assert torch.equal(flat(net(*inputs)), flat(layer.build()(*inputs))), "it does not start as the dense layer"
    optimizer = adam(net.parameters())
    callback.attach(net, optimizer, total_steps=4)
    for _ in range(4):
        optimizer.zero_grad()
        layer_loss(net(*inputs)).backward()
        optimizer.step()
    output = flat(net(*inputs)).detach()
    assert {name: len(places) for name, (_, places, _) in connections(net).items()} == {
        name: kind.wanted for name, kind in kinds(net).items()
    }
    for name, (shape, places, values) in connections(net).items():
        dense = torch.zeros(shape.numel())
        dense[places] = values
        assert torch.equal(dense.view(shape), weights(net)[name])
    replica = copy.deepcopy(net)
    assert torch.equal(flat(replica(*inputs)), output)
    for kind in kinds(replica).values():
        kind.mask.fill_(False)  # its own copy
    assert connectivity_report(replica).active == 0 and torch.equal(flat(net(*inputs)), output)
    again = load_state_dict(layer.build(seed=5), net.state_dict())
    assert torch.equal(flat(again(*inputs)), output) and all(isinstance(kind, MaskedTheta) for kind in kinds(again).values())
    path = save_sparse(net, tmp_path / "net.safetensors")
    slots = load_state_dict(layer.build(seed=5), path)
    assert all(isinstance(kind, KSlots) for kind in kinds(slots).values())
    torch.testing.assert_close(flat(slots(*inputs)), output, rtol=1e-4, atol=1e-5)
    for name, weight in weights(net).items():
        assert torch.equal(weights(slots)[name], weight), "a free sign was lost"
    assert report_of_checkpoint(path).active == report_of_checkpoint(net.state_dict()).active == connectivity_report(net).active
    plain = densify(copy.deepcopy(net))
    assert torch.equal(flat(plain(*inputs)), output) and not kinds(plain)


def test_starts() -> None:
    """The start is the module's own weight or the paper's with random signs; a layer on the meta device gets one, too."""
    net = pruning(init="deepr").prepare(nn.Sequential(nn.Linear(400, 50)))
    weight = weights(net)["0.weight"]
    assert float(weight.std()) == pytest.approx(1 / 20, rel=0.05) and abs(float((weight > 0).float().mean()) - 0.5) < 0.02
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(400, 50))
    pruning().prepare(net)
    weight = weights(net)["0.weight"]
    assert float(weight.abs().max()) <= 1 / 20 and float(weight.std()) == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)


def test_a_pruned_network_goes_on_as_deepr(tmp_path: Path) -> None:
    """Free signs become exceptions to the hashed ones."""
    net, optimizer = network(pruning())
    train(net, optimizer, DATA)
    slots = load_state_dict(plain_mlp(), save_sparse(net, tmp_path / "net.safetensors"))
    assert kinds(slots)["0.weight"].exceptions.numel() > 3
    deepr, optimizer = DeepR(l1=0.05, check_invariants=True), sgd(slots.parameters())
    deepr.attach(slots, optimizer)
    train(slots, optimizer, DATA)
    assert connectivity_report(slots).active == 36


# -- averages -----------------------------------------------------------------------------------------------------------------


@EVERY_CALLBACK
def test_an_average_has_the_networks_connections(make_callback: Callable[[], Any]) -> None:
    net, optimizer = network(make_callback())
    average = AveragedModel(net)
    reference: dict[str, Tensor] = {}
    for count, batch in enumerate(DATA):
        train(net, optimizer, [batch])
        for name, weight in weights(net).items():
            mean = reference.get(name, weight.double()).clone()
            mean[weight == 0] = 0
            reference[name] = mean + (weight.double() - mean) / (count + 1)
        average.update_parameters(net)
        for name, weight in weights(average.module).items():
            torch.testing.assert_close(weight.double(), reference[name], rtol=1e-4, atol=1e-6)
    assert connectivity_report(average.module).active == connectivity_report(net).active < 180


# -- bad input ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make_callback", "error", "message"),
    [
        (lambda: MagnitudePruning(0.1, prune_from=1.5), ValueError, r"prune_from: expected a fraction .* found 1\.5"),
        (lambda: MagnitudePruning(0.1, prune_until="late"), TypeError, "prune_until: expected a fraction .* found 'late'"),
        (
            lambda: MagnitudePruning(0.1, prune_from=0.8, prune_until=0.4),
            ValueError,
            r"prune_until: expected at least prune_from = 0\.8",
        ),
        (lambda: MagnitudePruning(0.1, prunings=0), ValueError, "prunings: expected an int of at least 1, found 0"),
        (lambda: MagnitudePruning(0.1, prunings=1), ValueError, "prunings: expected at least 2 between"),
        (
            lambda: MagnitudePruning(0.1, threshold="global"),
            ValueError,
            "threshold: expected one of layer, network, found 'global'",
        ),
        (lambda: MagnitudePruning(1.5), ValueError, r"expected a fraction in \(0, 1\], found 1\.5"),
        (lambda: L1Shrinkage(0.1, l1=None), TypeError, "l1: expected .* found None: shrinkage has no default"),
        (lambda: L1Shrinkage(0.1), TypeError, "l1"),
        (lambda: L1Shrinkage(0.1, l1=-1.0), ValueError, "l1: expected a finite value of at least 0, found -1"),
        (lambda: L1Shrinkage(0.1, l1=0.1, freeze_at=math.nan), ValueError, "freeze_at: expected a fraction .* found nan"),
        (lambda: L1Shrinkage(0.0, l1=0.1), ValueError, r"found 0\.0"),
    ],
)
def test_arguments(make_callback: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_callback()


@pytest.mark.parametrize(
    ("make_callback", "what"), [(pruning, "prune_from and prune_until are each"), (shrinkage, "freeze_at is")]
)
def test_a_fraction_of_a_training_of_unknown_length(make_callback: Callable[[], Any], what: str) -> None:
    callback = make_callback()
    net = callback.prepare(plain_mlp())
    optimizer = sgd(net.parameters())
    with pytest.raises(ValueError, match=rf"{what} a fraction of the training.*Give attach\(\.\.\., total_steps=\.\.\.\)"):
        callback.attach(net, optimizer)
    with pytest.raises(ValueError, match="Give the Trainer max_epochs or max_steps"):
        trainer(make_callback(), max_epochs=-1).fit(Regression(sgd, 4))
    other = make_callback()
    net = other.prepare(plain_mlp())
    with pytest.raises(ValueError, match=r"call attach\(net, optimizer, total_steps=\.\.\.\)"):
        Fabric(accelerator="cpu", devices=1, callbacks=[other]).setup(net, sgd(net.parameters()))
    free = shrinkage(None)
    net = free.prepare(plain_mlp())
    free.attach(net, sgd(net.parameters()))  # l1 alone determines the connectivity: no fraction is needed


def test_kinds_are_not_mixed() -> None:
    slots = sparsify(plain_mlp(), 0.3)
    with pytest.raises(ValueError, match=r"MagnitudePruning expects a theta for every.*\(MaskedTheta\), found KSlots"):
        pruning().attach(slots, sgd(slots.parameters()), total_steps=4)
    net = pruning().prepare(plain_mlp())
    with pytest.raises(ValueError, match=r"\(MaskedTheta\): DeepR expects"):
        DeepR().attach(net, sgd(net.parameters()))


def test_loading_what_does_not_fit() -> None:
    net = pruning().prepare(plain_mlp())
    with pytest.raises(RuntimeError, match=r"expected a wanted connectivity of K = 60 .*found 24"):
        pruning(0.5).prepare(plain_mlp()).load_state_dict(net.state_dict())
    with pytest.raises(RuntimeError, match="expected what MaskedTheta records, found a checkpoint of another kind"):
        net.load_state_dict(sparsify(plain_mlp(), 0.2, distribution="uniform").state_dict())
    damaged = {name: value[:5] if name.endswith("mask") else value for name, value in net.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"expected a mask of shape \(10, 12\), found torch\.bool \(5, 12\): the file is damaged"
    ):
        pruning().prepare(plain_mlp()).load_state_dict(damaged)


def outside(theta: Tensor, mask: Tensor) -> None:
    theta.fill_(1.0)


def one_less(theta: Tensor, mask: Tensor) -> None:
    place = theta.abs().argmax()
    mask.view(-1)[place], theta.view(-1)[place] = False, 0.0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (outside, "a connection outside the mask has a weight"),
        (one_less, "expected 24 connections after the last pruning, found 23"),
    ],
)
def test_check_invariants_sees_what_breaks(damage: Callable[..., None], message: str) -> None:
    class Damaging(MagnitudePruning):
        def after_step(self, stepped: Any, optimizer: Any) -> Any:
            super().after_step(stepped, optimizer)
            if stepped[0].tensor.step == LAST:
                damage(stepped[0].theta, stepped[0].tensor.slots.mask)

    callback = Damaging(0.2, prune_from=0.25, prune_until=0.75, prunings=3, distribution="uniform", check_invariants=True)
    net, optimizer = network(callback)
    with pytest.raises(RuntimeError, match=rf"check_invariants: `0\.weight`, step {LAST}: {message}"):
        train(net, optimizer, DATA)


def test_statistics() -> None:
    callback = pruning()
    net, optimizer = network(callback)
    names = [f"magnitude_pruning/{name}connectivity" for name in ("", "0.weight/", "2.weight/")]
    assert {name: callback.statistics()[name] for name in names} == dict.fromkeys(names, 1.0)
    train(net, optimizer, DATA)
    assert {name: callback.statistics()[name] for name in names} == dict.fromkeys(names, 0.2)
    assert np.isclose(connectivity_report(net).to_dict()["connectivity"], 0.2)
