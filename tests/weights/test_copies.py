"""Copies of a network that is rewired: averages that follow, mixtures that are refused, and state_dicts that are averaged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader

from lightning_deepr import SET, DeepR, SoftDeepR, connections, follow, kernels, load_state_dict, sparsify
from lightning_deepr.weights.find import converted_tensors
from tests.helpers.regression import SEED, batches, loss_of, mlp, plain_mlp
from tests.helpers.trainer import trainer

Make = Callable[[nn.Module], nn.Module]
METHODS: dict[str, Callable[[], Any]] = {
    "deepr": lambda: DeepR(l1=0.5, seed=SEED, check_invariants=True),
    "deepr of a network": lambda: DeepR(scope="global", l1=0.5, seed=SEED, check_invariants=True),
    "set": lambda: SET(rewire_every_n_steps=2, rewire_until=None, seed=SEED, check_invariants=True),
}


def loaded(net: nn.Module) -> nn.Module:
    other = mlp(seed=SEED + 1)
    other.load_state_dict(net.state_dict())
    return other


COPIES: dict[str, Make] = {"deepcopy": copy.deepcopy, "load_state_dict": loaded}


@torch.no_grad()
def lerp(target: nn.Module, net: nn.Module) -> None:
    for p, q in zip(target.parameters(), net.parameters(), strict=True):
        p.lerp_(q, 0.5)


@torch.no_grad()
def foreach(target: nn.Module, net: nn.Module) -> None:
    torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), 0.5)


def data_copy(target: nn.Module, net: nn.Module) -> None:  # raises no version
    for p, q in zip(target.parameters(), net.parameters(), strict=True):
        p.data.copy_(0.5 * p.data + 0.5 * q.data)


def data_set(target: nn.Module, net: nn.Module) -> None:
    for p, q in zip(target.parameters(), net.parameters(), strict=True):
        p.data = 0.5 * p.data + 0.5 * q.data


def vector(target: nn.Module, net: nn.Module) -> None:
    mean = (parameters_to_vector(target.parameters()) + parameters_to_vector(net.parameters())) / 2
    vector_to_parameters(mean.detach(), target.parameters())


def floats_of_state_dict(target: nn.Module, net: nn.Module) -> None:
    theirs = net.state_dict()
    for name, value in target.state_dict().items():
        if value.is_floating_point():
            value.lerp_(theirs[name], 0.5)


MIXTURES = {one.__name__: one for one in (lerp, foreach, data_copy, data_set, vector, floats_of_state_dict)}


def fit(net: nn.Module, after: Callable[[nn.Module], None] | None = None, method: str = "deepr", steps: int = 8) -> Any:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    rewiring = METHODS[method]().attach(net, optimizer)
    before = {name: places for name, (_, places, _) in connections(net).items()}
    for batch in batches(steps):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        optimizer.step()
        if after is not None:
            after(net)
    assert all(not torch.equal(before[name], places) for name, (_, places, _) in connections(net).items()), "not rewired"
    return rewiring


def train(net: nn.Module, scope: str, steps: int = 8) -> None:
    fit(net, method="deepr" if scope == "layer" else "deepr of a network", steps=steps).remove()


# -- what mixes slots of different places is refused --------------------------------------------------------------------------

USES: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda net: net(batches(1)[0][0]),
    "weight": lambda net: net[0].weight + 0,  # type: ignore[index]
    "state_dict": lambda net: net.state_dict(),
    "connections": connections,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("compute", ["dense", "sparse"])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("made", COPIES)
def test_a_mixture_is_refused_before_it_is_used(made: str, mixture: str, compute: str, use: str) -> None:
    net = mlp(compute=compute)
    target = COPIES[made](net)
    fit(net)
    USES[use](target)  # untouched: what it was
    MIXTURES[mixture](target, net)
    with pytest.raises(
        RuntimeError, match=r"`0\.weight` of a copy: .* have moved since.*`lightning_deepr\.follow\(copy, source\)`"
    ):
        USES[use](target)


@pytest.mark.parametrize("method", ["deepr", "set"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_mixture_in_the_loop_is_refused_in_the_loop(mixture: str, scope: str, method: str) -> None:
    if scope == "global" and method == "set":
        pytest.skip("SET works with K per tensor")
    net = mlp(scope=scope)
    target = copy.deepcopy(net)
    if scope == "global":
        method = "deepr of a network"
    with pytest.raises(RuntimeError, match="of a copy"):
        fit(net, lambda net: MIXTURES[mixture](target, net), method)


def test_a_mixture_with_equal_places_is_an_average() -> None:
    net = mlp()
    target = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for batch in batches(4):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        optimizer.step()
        lerp(target, net)
    target(batches(1)[0][0])


@pytest.mark.parametrize("made", COPIES)
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.feature("Modules: deepcopy of a converted network")
def test_what_is_no_mixture_is_not_refused(scope: str, made: str) -> None:
    """A snapshot stays as it is, a copy may be loaded again, trained on its own, or declared to stand on its own."""
    if (scope, made) == ("global", "load_state_dict"):
        pytest.skip("the loaded network has K per tensor")
    make, x = COPIES[made], batches(1)[0][0]
    nets = {one: mlp(scope=scope) for one in ("snapshot", "loaded", "trained", "rewired", "declared")}
    kept = {one: make(net) for one, net in nets.items()}
    expected = kept["snapshot"](x)

    for net in nets.values():
        train(net, scope)
    assert torch.equal(kept["snapshot"](x), expected)
    kept["loaded"].load_state_dict(nets["loaded"].state_dict())
    assert torch.equal(kept["loaded"](x), nets["loaded"](x))
    optimizer = torch.optim.SGD(kept["trained"].parameters(), lr=0.1)
    for batch in batches(3):
        optimizer.zero_grad()
        loss_of(kept["trained"], batch).backward()
        optimizer.step()
    train(kept["rewired"], scope)
    follow(kept["declared"], None)
    with torch.no_grad():
        for p in kept["declared"].parameters():
            p.mul_(2.0)
    for net in nets.values():
        train(net, scope)
    for net in kept.values():
        net(x)


# -- averages that follow -----------------------------------------------------------------------------------------------------


def born_of(one: Any) -> Tensor:
    return one.slots.born.clone()


class Oracle:
    """An average of each connection since its birth, by place: {tensor: {place: value}}.

    Args:
        net: the network that is trained.
        average: what the average starts with; None: the network.
    """

    def __init__(self, net: nn.Module, average: nn.Module | None = None) -> None:
        start = connections(average or net)
        self.values = {n: dict(zip(p.tolist(), v.tolist(), strict=True)) for n, (_, p, v) in start.items()}
        self.born = {one.name: born_of(one) for one in converted_tensors(net)}
        self.restarts = 0

    def update(self, net: nn.Module) -> None:
        for one in converted_tensors(net):
            _, places, values = connections(net)[one.name]
            reborn = born_of(one) != self.born[one.name]
            self.restarts += int(reborn.sum())
            self.born[one.name] = born_of(one)
            old = self.values[one.name]
            held = {p: 0.0 if r else old[p] for p, r in zip(places.tolist(), reborn.tolist(), strict=True)}
            self.values[one.name] = {p: (held[p] + v) / 2 for p, v in zip(places.tolist(), values.tolist(), strict=True)}

    def check(self, average: nn.Module) -> None:
        for name, (_, places, values) in connections(average).items():
            assert set(places.tolist()) == set(self.values[name])
            expected = torch.tensor([self.values[name][place] for place in places.tolist()])
            torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("method", ["deepr", "set"])
@pytest.mark.parametrize("mixture", [name for name in MIXTURES if name != "floats_of_state_dict"])
def test_a_copy_that_follows_is_an_average_by_place(mixture: str, method: str) -> None:
    net = mlp()
    target = follow(copy.deepcopy(net), net)
    assert not any(one.theta.requires_grad for one in converted_tensors(target))
    oracle = Oracle(net)

    def after(net: nn.Module) -> None:
        MIXTURES[mixture](target, net)
        oracle.update(net)
        oracle.check(target)

    fit(net, after, method)
    assert oracle.restarts > 5
    x = batches(1)[0][0]
    dense = copy.deepcopy(plain_mlp())
    with torch.no_grad():
        for i in (0, 2):
            shape, places, values = connections(target)[f"{i}.weight"]
            dense[i].weight.copy_(torch.zeros(shape.numel()).index_copy(0, places, values).view(shape))
            dense[i].bias.copy_(target[i].bias)  # type: ignore[index]
    torch.testing.assert_close(target(x), dense(x))


class ModelEma(nn.Module):
    """A stand-in for timm's ModelEmaV2: it averages everything in the state_dict, integers too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)

    def update(self, model: nn.Module) -> None:
        with torch.no_grad():
            for e, m in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
                e.copy_(0.5 * e + 0.5 * m)


def timm_v2(net: nn.Module) -> Any:
    return pytest.importorskip("timm.utils").ModelEmaV2(net, decay=0.5)


def timm_v3(net: nn.Module) -> Any:
    return pytest.importorskip("timm.utils").ModelEmaV3(net, decay=0.5)


@pytest.mark.parametrize("make", [ModelEma, timm_v2, timm_v3])
def test_averages_of_known_names_follow_by_themselves(make: Callable[[nn.Module], Any]) -> None:
    net = mlp()
    ema = make(net)
    oracle = Oracle(net)

    def after(net: nn.Module) -> None:
        ema.update(net)
        oracle.update(net)
        oracle.check(ema.module)

    fit(net, after)
    assert oracle.restarts > 5


def test_follow_a_network_of_other_places() -> None:
    """Two networks that were converted apart: common places keep the copy's values, others take the source's."""
    net, other = mlp(seed=1), mlp(seed=2)
    before, theirs = connections(other), connections(net)
    follow(other, net)
    after = connections(other)
    for name in theirs:
        old = dict(zip(before[name][1].tolist(), before[name][2].tolist(), strict=True))
        assert torch.equal(after[name][1], theirs[name][1])
        common = [place in old for place in theirs[name][1].tolist()]
        assert any(common) and not all(common)
        pairs = zip(theirs[name][1].tolist(), theirs[name][2].tolist(), strict=True)
        torch.testing.assert_close(after[name][2], torch.tensor([old.get(place, value) for place, value in pairs]))
    oracle = Oracle(net, other)

    def update(net: nn.Module) -> None:
        lerp(other, net)
        oracle.update(net)
        oracle.check(other)

    fit(net, update)


def test_follow_makes_a_dense_copy_sparse() -> None:
    net, teacher = mlp(), plain_mlp()
    follow(teacher, net)
    x = batches(1)[0][0]
    assert torch.equal(teacher(x), net(x))
    oracle = Oracle(net)

    def update(net: nn.Module) -> None:
        lerp(teacher, net)
        oracle.update(net)
        oracle.check(teacher)

    fit(net, update)


@pytest.mark.parametrize("compute", ["dense", "sparse"])
def test_follow_in_all_scopes(compute: str) -> None:
    net = mlp(scope="global")
    teacher = follow(copy.deepcopy(net), net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    DeepR(scope="global", l1=0.5, seed=SEED).attach(net, optimizer)
    for batch in batches(6):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(teacher.parameters(), net.parameters(), strict=True):
                p.lerp_(q, 1.0)
        assert torch.equal(teacher(batch[0]), net(batch[0]))


def test_follow_under_soft_deepr() -> None:
    soft = SoftDeepR(0.3, temperature=1e-3, l1=0.1, theta_min=-1e-3)
    net = soft.prepare(plain_mlp())
    teacher = follow(copy.deepcopy(net), net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    soft.attach(net, optimizer, total_steps=6)
    for batch in batches(6):
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        optimizer.step()
        lerp(teacher, net)
    for name, (_, places, _) in connections(net).items():
        assert torch.equal(connections(teacher)[name][1], places)


class Distillation(pl.LightningModule):
    """Student and teacher in one module. The callback converts the student; the teacher is frozen, and follows."""

    def __init__(self) -> None:
        super().__init__()
        self.student = plain_mlp()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def setup(self, stage: str) -> None:
        follow(self.teacher, self.student)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return loss_of(self.student, batch) + (self.student(batch[0]) - self.teacher(batch[0])).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        lerp(self.teacher, self.student)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(batches(8), batch_size=None)  # type: ignore[arg-type]


@pytest.mark.feature("Modules: student and momentum teacher in one module")
def test_student_and_teacher_in_one_module() -> None:
    module = Distillation()
    oracles: list[Oracle] = []

    class Watch(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            oracles.append(Oracle(module.student))

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            oracles[0].update(module.student)

    trainer(DeepR(0.3, l1=0.5, check_invariants=True), Watch(), max_epochs=1).fit(module)
    oracles[0].check(module.teacher)
    assert oracles[0].restarts > 5
    both = copy.deepcopy(module)  # the copy of the teacher follows the copy of the student
    oracle = Oracle(both.student, both.teacher)

    def update(net: nn.Module) -> None:
        lerp(both.teacher, net)
        oracle.update(net)
        oracle.check(both.teacher)

    fit(both.student, update)
    for name, (_, places, _) in connections(module.teacher).items():
        assert torch.equal(places, connections(module.student)[name][1]), "the original pair has not moved"


def test_student_and_teacher_go_on_exactly_after_a_resume(tmp_path: Any) -> None:
    def fit(epochs: int, **options: Any) -> tuple[Any, Distillation]:
        module = Distillation()
        loop = trainer(DeepR(0.3, l1=0.5, check_invariants=True), max_epochs=epochs)
        loop.fit(module, **options)
        return loop, module

    _, straight = fit(3)
    loop, _ = fit(2)
    loop.save_checkpoint(tmp_path / "last.ckpt")
    _, resumed = fit(3, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    for name, (_, places, _) in connections(straight.teacher).items():
        assert torch.equal(places, connections(straight.student)[name][1])


def test_a_network_that_loads_its_copy() -> None:
    """Early stopping restores the best weights, and Lookahead the slow ones: afterwards both have the same places."""
    net = mlp()
    best = copy.deepcopy(net)
    train(net, "layer")
    net.load_state_dict(best.state_dict())
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    before = best(batches(1)[0][0])
    lerp(best, net)
    assert not torch.equal(best(batches(1)[0][0]), before)
    best(batches(1)[0][0])
    train(net, "layer")
    slow = follow(copy.deepcopy(net), net)
    for _ in range(3):
        train(net, "layer", 4)
        lerp(slow, net)
        net.load_state_dict(slow.state_dict())
        assert torch.equal(net(batches(1)[0][0]), slow(batches(1)[0][0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda: (mlp(), plain_mlp()), "follow expects a converted source, found Sequential without a converted tensor"),
        (lambda: (lambda net: (net, net))(mlp()), "found `0.weight` of the source to be that of the copy"),
        (lambda: (lambda net: (net, follow(copy.deepcopy(net), net)))(mlp()), "or to follow it"),
        (lambda: (plain_mlp((12, 10)), mlp()), r"expected a layer for `2.weight` of shape \(6, 10\) in the copy, found none"),
        (lambda: (plain_mlp((12, 9, 6)), mlp()), r"expected a layer for `0.weight` of shape \(10, 12\)"),
        (lambda: (mlp(scope="global"), mlp()), "expected the same kind of conversion"),
        (lambda: (plain_mlp(), mlp(scope="global")), "Make the copy by copy.deepcopy"),
    ],
)
def test_what_can_not_follow(arguments: Callable[[], tuple[nn.Module, nn.Module]], message: str) -> None:
    target, net = arguments()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        follow(target, net)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


# -- state_dicts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["layer", "global", "soft"])
def test_a_state_dict_hands_out_no_live_connections(method: str) -> None:
    if method == "soft":
        net = SoftDeepR(0.3, temperature=1e-3, l1=0.1, theta_min=-1e-3).prepare(plain_mlp())
    else:
        net = sparsify(plain_mlp(), 0.3, scope=method, init="largest")  # with exceptions
    x = batches(1)[0][0]
    expected, before = net(x), {name: value.clone() for name, value in net.state_dict().items()}
    for value in net.state_dict().values():
        if not value.is_floating_point():
            value.zero_() if value.dtype == torch.bool else value.sub_(1)
    assert torch.equal(net(x), expected)
    torch.testing.assert_close(dict(net.state_dict()), before, rtol=0, atol=0, equal_nan=True)


def averaged(a: dict[str, Tensor], b: dict[str, Tensor], which: str) -> dict[str, Tensor]:
    def mean(p: Tensor, q: Tensor) -> Tensor:
        if which == "floats" and not p.is_floating_point():
            return p
        found = 0.3 * p + 0.7 * q
        return found.to(p.dtype) if which == "in_place" else found

    return {name: mean(a[name], b[name]) for name in a}


@pytest.mark.parametrize("which", ["all", "floats", "in_place"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_an_average_of_state_dicts_with_different_connections_is_refused(scope: str, which: str) -> None:
    net = mlp(scope=scope)
    first = copy.deepcopy(net.state_dict())
    train(net, scope)
    second = net.state_dict()
    if scope == "global":  # counts have moved between the layers: torch itself can't average
        first = {name: value if value.shape == second[name].shape else second[name] for name, value in first.items()}
    target = mlp(scope=scope)
    with pytest.raises(RuntimeError, match=r"places of one network, found|average of networks with different connections"):
        target.load_state_dict(averaged(first, second, which))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("which", ["all", "floats"])
def test_an_average_of_state_dicts_with_equal_connections_is_loaded(which: str, dtype: torch.dtype) -> None:
    net = mlp()

    def state() -> dict[str, Tensor]:
        found = net.state_dict().items()
        return {name: value.to(dtype, copy=True) if value.is_floating_point() else value for name, value in found}

    first = state()
    with torch.no_grad():
        for one in converted_tensors(net):
            one.theta.mul_(2)
    second = state()
    target = copy.deepcopy(net)
    target.load_state_dict(averaged(first, second, which))
    for name, (_, places, values) in connections(target).items():
        assert torch.equal(places, connections(net)[name][1])
        torch.testing.assert_close(values, connections(net)[name][2] * (0.3 / 2 + 0.7), rtol=1e-2, atol=1e-2)


def test_a_state_dict_without_a_fingerprint_is_loaded_but_not_averaged() -> None:
    net = mlp()
    old = {name: value for name, value in net.state_dict().items() if not name.endswith("fingerprint")}
    assert len(old) == len(net.state_dict()) - 2
    other = mlp(seed=SEED + 1)
    other.load_state_dict(old)
    assert torch.equal(other(batches(1)[0][0]), net(batches(1)[0][0]))
    with pytest.raises(RuntimeError, match="expected the values and the places of one network"):
        other.load_state_dict(averaged(old, old, "all"))


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("change", ["rewired", "loaded"])
def test_a_state_dict_that_outlives_a_rewiring(
    scope: str, compiled: bool, change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its values are the parameters themselves, its places are not: used later, it would mix them."""
    if not compiled:
        monkeypatch.setattr(kernels, "available", lambda: False)
    net = sparsify(plain_mlp((12, 10, 4)), 0.3, seed=1, scope=scope)
    kept, copied = net.state_dict(), copy.deepcopy(net.state_dict())
    before = [(c.name, c.slots.places.clone()) for c in converted_tensors(net)]
    load_state_dict(plain_mlp((12, 10, 4)), kept)  # nothing has changed yet
    if change == "rewired":
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        DeepR(l1=3.0, scope=scope).attach(net, optimizer)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(8, 12)).square().sum().backward()
            optimizer.step()
    else:
        net.load_state_dict(sparsify(plain_mlp((12, 10, 4)), 0.3, seed=2, scope=scope).state_dict())
    torch.save(kept, tmp_path / "kept.pt")
    for what in (kept, torch.load(tmp_path / "kept.pt")):
        with pytest.raises((ValueError, RuntimeError), match=r"copy\.deepcopy\(net\.state_dict\(\)\)"):
            load_state_dict(plain_mlp((12, 10, 4)), what)
        with pytest.raises(RuntimeError, match=r"copy\.deepcopy\(net\.state_dict\(\)\)"):
            sparsify(plain_mlp((12, 10, 4)), 0.3, seed=1, scope=scope).load_state_dict(what)
    loaded = load_state_dict(plain_mlp((12, 10, 4)), copied)
    assert all(torch.equal(c.slots.places, places) for c, (_, places) in zip(converted_tensors(loaded), before, strict=True))
    load_state_dict(plain_mlp((12, 10, 4)), net.state_dict())
