"""``l1="auto"``: alpha follows the turnover, in every loop, after every interruption, by every backend."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn, optim

import lightning_deepr
from lightning_deepr import (
    SET,
    FixedRandom,
    L1Shrinkage,
    MagnitudePruning,
    RigL,
    SoftDeepR,
    TurnoverTarget,
    connectivity_report,
    kernels,
    load_state_dict,
    save_sparse,
    sparsify,
    zoo,
)
from lightning_deepr.algorithm.statistics import COLLAPSE_STEPS
from lightning_deepr.files.checkpoint import report_of_checkpoint
from tests.data import make as old
from tests.helpers import global_scope
from tests.helpers.optimizers import adam, sgd
from tests.helpers.oracle_turnover import alpha_after
from tests.helpers.plain import PlainDeepR as DeepR
from tests.helpers.regression import SEED, Regression, batches, loss_of, mlp, plain_mlp, train
from tests.helpers.state import all_slots, assert_equal_states, oracle_of, state_of, thetas
from tests.helpers.trainer import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
STEPS = 40
TARGET = {"start": 0.2, "interval": 4}
Make = Callable[[Any], optim.Optimizer]


class Noting(DeepR):
    """A DeepR that records each tensor's alpha, rebirths and K in every step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.alphas: list[list[float]] = []
        self.counts: list[list[tuple[int, int] | None]] = []

    def after_step(self, stepped: Any, optimizer: Any) -> Any:
        before = [item.tensor.slots.count for item in stepped]
        super().after_step(stepped, optimizer)
        self.alphas.append([item.alpha for item in stepped])
        self.counts.append(
            [(i.reborn.births + i.reborn.moved, k) if i.rewires else None for i, k in zip(stepped, before, strict=True)]
        )


def target(**options: Any) -> TurnoverTarget:
    return TurnoverTarget(**{**TARGET, **options})


# -- against the oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "every", "until", "total"),
    [
        ({}, 1, None, 50),
        ({"shape": "linear", "interval": 3, "start": 0.05}, 1, None, 30),
        ({"shape": "constant", "interval": 5, "gain": 2.0}, 2, None, None),
        ({"interval": 2}, 3, 25, 50),
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", [True, False], ids=["compiled", "PyTorch"])
def test_every_step_is_the_oracles(
    options: dict[str, Any], every: int, until: int | None, total: int | None, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle is Algorithm 1 in NumPy. It computes alpha from all counts, and the learning rate changes."""
    if not kernel:
        monkeypatch.setattr(kernels, "available", lambda: False)
    net = mlp()
    slow = oracle_of(net)
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    wanted = target(**options)
    callback = DeepR(l1=wanted, seed=SEED, rewire_every_n_steps=every, rewire_until=until, check_invariants=True)
    callback.attach(net, optimizer, total_steps=total)
    counts: list[list[tuple[int, int] | None]] = [[], []]
    values = [set(), set()]
    for step, batch in enumerate(batches(50)):
        lr = optimizer.param_groups[0]["lr"] = 0.1 / (1 + 0.05 * step)
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        for i, (tensor, theta) in enumerate(zip(slow.tensors, thetas(net), strict=True)):
            given = {**TARGET, **options}
            alpha = alpha_after(counts[i], 1e-4, total, **given)
            values[i].add(alpha)
            kind = tensor.theta.dtype.type
            tensor.theta = (theta.detach() - lr * theta.grad).numpy() - kind(lr * alpha)
        if (step + 1) % every == 0 and (until is None or step < until):
            for i, died in enumerate(slow.rewire(step)):
                counts[i].append((len(died), len(slow.tensors[i].theta)))
        else:
            slow.keep_active()
            for one in counts:
                one.append(None)
        optimizer.step()
        for tensor, theta, slots in zip(slow.tensors, thetas(net), all_slots(net), strict=True):
            assert slots.places.tolist() == tensor.places and slots.born.tolist() == tensor.born
            np.testing.assert_allclose(theta.detach().numpy(), tensor.theta, rtol=1e-6, atol=3e-7)
    for i, tensor in enumerate(callback.tracked):
        assert tensor.steering is not None
        assert tensor.steering.alpha == pytest.approx(alpha_after(counts[i], 1e-4, total, **{**TARGET, **options}), rel=1e-9)
    assert all(len(seen) > 5 for seen in values)


@pytest.mark.parametrize("rule", global_scope.RULES)
def test_layers_with_one_k_have_one_alpha(rule: str) -> None:
    """The deaths of all steered layers together steer alpha. A dict can name some of the layers."""
    for l1, together in ((target(), (0, 1, 2)), ({"0": "auto", "2": target(), "4": target()}, (1, 2))):
        net = global_scope.network()
        optimizer = optim.SGD(net.parameters(), lr=0.2, momentum=0.5)
        callback = Noting(l1=l1, scope="global", reactivation=rule, seed=SEED, check_invariants=True)
        callback.attach(net, optimizer, total_steps=STEPS)
        for batch in batches(STEPS):
            train(net, optimizer, [batch])
        sums = [(sum(c[i][0] for i in together), sum(c[i][1] for i in together)) for c in callback.counts]  # type: ignore[index]
        if len(together) == 3:
            assert {slots for _, slots in sums} == {sum(global_scope.counts(net))}
        for step, alphas in enumerate(callback.alphas):
            expected = alpha_after(sums[:step], 2e-4, STEPS, **TARGET)
            assert [alphas[i] for i in together] == pytest.approx([expected] * len(together), rel=1e-9)
        assert len({alphas[2] for alphas in callback.alphas}) > 5 and sum(reborn for reborn, _ in sums) > 20
        states = [tensor.steering for tensor in callback.tracked]
        assert len({id(states[i]) for i in together}) == 1 and (len(together) == 3) == (states[0] is states[1])


@pytest.mark.slow
def test_a_constant_target_is_met() -> None:
    """The share that is reborn per step reaches the target from a start that is far from it."""
    for start, make in ((0.02, sgd), (0.2, sgd), (0.05, adam)):
        net = sparsify(plain_mlp((30, 60, 6)), 0.2, distribution="uniform", seed=SEED)
        optimizer, callback = make(net.parameters()), Noting(l1=TurnoverTarget(start, "constant", interval=10), seed=SEED)
        callback.attach(net, optimizer)
        train(net, optimizer, batches(1200, size_in=30))
        for tensor in range(2):
            late = [counts[tensor] for counts in callback.counts[600:]]
            share = sum(reborn for reborn, _ in late) / sum(slots for _, slots in late)  # type: ignore[misc]
            assert share == pytest.approx(start, rel=0.25)


# -- what an optimizer, a parameter group and a pattern begin with ------------------------------------------------------------


def test_alpha_begins_at_what_none_takes_and_can_differ_by_tensor() -> None:
    net = global_scope.plain_mlp((12, 10, 8, 6))
    sparsify(net, 0.3, distribution="uniform", seed=SEED)
    groups = [{"params": net[0].parameters(), "momentum": 0.9}, {"params": net[2].parameters()}]
    optimizers = [optim.SGD(groups, lr=0.05, momentum=0.5), adam(net[4].parameters())]
    callback = DeepR(l1={"0": "auto", "2": 1e-2, "4": target(shape="constant")}, seed=SEED)
    for optimizer in optimizers:
        callback.attach(net, optimizer, total_steps=200)
    assert [row["l1"] for row in connectivity_report(net)] == ["turnover", 0.01, "turnover"]
    alphas = []
    for batch in batches(8):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(net, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
        alphas.append(callback.statistics())
    assert alphas[2]["deepr/0.weight/l1"] == pytest.approx(1e-3) and alphas[2]["deepr/4.weight/l1"] == 0.03
    assert "deepr/2.weight/l1" not in alphas[2]
    assert alphas[7]["deepr/0.weight/l1"] == pytest.approx(1e-3), "every 50 steps"
    assert alphas[7]["deepr/4.weight/l1"] != 0.03, "every 4 steps"
    report = str(connectivity_report(net))
    assert f"turnover {alphas[7]['deepr/4.weight/l1']:.4g}" in report and "turnover 0.001" in report


def test_each_tensor_counts_its_own_steps() -> None:
    """One tensor takes fewer steps, so its interval ends later."""
    net = mlp()
    optimizers = [sgd(net[0].parameters()), sgd(net[2].parameters())]  # type: ignore[index]
    callback = DeepR(l1=target(shape="constant", interval=3), seed=SEED)
    for optimizer in optimizers:
        callback.attach(net, optimizer)
    moved: list[list[int]] = [[], []]
    before = [2e-4, 2e-4]
    for step, batch in enumerate(batches(24)):
        loss_of(net, batch).backward()
        for i in (0, 1) if step % 2 else (1,):
            optimizers[i].step()
            alpha = callback.tracked[i].steering.alpha  # type: ignore[union-attr]
            if alpha != before[i]:
                moved[i].append(step)
                before[i] = alpha  # type: ignore[assignment]
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert set(moved[0]) <= {5, 11, 17, 23} and set(moved[1]) <= {2, 5, 8, 11, 14, 17, 20, 23}
    assert len(moved[0]) >= 3 and len(moved[1]) >= 6


def test_a_step_that_gradscaler_skips_counts_for_nothing() -> None:
    overflowing = {0, 3, 9, 10, 21}
    states = []
    for skip in (False, True):
        net = mlp()
        optimizer, callback = adam(net.parameters()), DeepR(l1=target(interval=3), seed=SEED)
        callback.attach(net, optimizer, total_steps=STEPS)
        scaler = torch.amp.GradScaler("cpu", growth_interval=5)
        for i, batch in enumerate(batches(STEPS)):
            if skip and i in overflowing:
                continue
            optimizer.zero_grad()
            scaler.scale(loss_of(net, batch) * (torch.inf if i in overflowing else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        states.append((state_of(net, optimizer), callback.state_dict()))
    assert_equal_states(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


# -- interrupted, continued, begun anew ---------------------------------------------------------------------------------------


def saved(value: Any) -> Any:
    """Return the state after a round trip through a checkpoint file."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(
    ("make", "options"),
    [(sgd, {}), (adam, {"rewire_every_n_steps": 3}), (sgd, {"rewire_until": 0.7, "temperature": 1e-5})],
    ids=["sgd", "adam, every 3 steps", "frozen late, noise"],
)
def test_a_training_resumes_exactly_in_the_middle_of_an_interval(make: Make, options: dict[str, Any], scope: str) -> None:
    data, l1 = batches(STEPS), target(interval=6, start=0.4)

    def begin() -> tuple[nn.Module, optim.Optimizer, Any]:
        net = mlp(scope=scope)
        optimizer = make(net.parameters())
        callback = DeepR(l1=l1, scope=scope, seed=SEED, check_invariants=True, **options)
        return net, optimizer, callback.attach(net, optimizer, total_steps=STEPS)

    net, optimizer, rewiring = begin()
    kept: dict[int, Any] = {}
    for step, batch in enumerate(data):
        if step in (0, 1, 5, 6, 7, 15, 29):
            kept[step] = saved([net.state_dict(), optimizer.state_dict(), rewiring.state_dict()])
        train(net, optimizer, [batch])
    assert any(entry["steering"]["exposed"] for entry in kept[15][2]["tensors"].values()), "an interval is open"
    for step, (weights, moments, state) in kept.items():
        again, again_optimizer, again_rewiring = begin()
        again.load_state_dict(weights)
        again_optimizer.load_state_dict(moments)
        again_rewiring.load_state_dict(state)
        train(again, again_optimizer, data[step:])
        assert_equal_states(state_of(again, again_optimizer), state_of(net, optimizer))
        assert again_rewiring.state_dict() == rewiring.state_dict()


def test_a_copy_goes_its_own_way() -> None:
    net = mlp()
    optimizer, callback = sgd(net.parameters()), DeepR(l1=target(), seed=SEED)
    callback.attach(net, optimizer, total_steps=STEPS)
    train(net, optimizer, batches(10))
    twin, state = copy.deepcopy(callback), callback.state_dict()
    assert twin.state_dict() == state
    train(net, optimizer, batches(10))
    assert twin.state_dict() == state != callback.state_dict()
    copied = copy.deepcopy(net)
    assert [row["l1"] for row in connectivity_report(copied)] == [row["l1"] for row in connectivity_report(net)]


def test_alpha_begins_anew_with_a_new_training_and_goes_on_with_the_same() -> None:
    module, callback = Regression(sgd, 10), Noting(0.3, l1=target(), distribution="uniform", seed=SEED)
    runner = trainer(callback)
    runner.fit(module)
    first = [alphas[:] for alphas in callback.alphas]
    last = [tensor.steering.alpha for tensor in callback.tracked]  # type: ignore[union-attr]
    assert first[0] == [2e-4, 2e-4] != first[9]
    runner.fit_loop.max_epochs = 2
    runner.fit(module)
    assert callback.alphas[10] == last
    trainer(callback).fit(module)
    assert callback.alphas[20] == [2e-4, 2e-4]

    net = mlp()
    optimizer, callback = sgd(net.parameters()), Noting(l1=target(), seed=SEED)
    for _ in range(2):
        rewiring = callback.attach(net, optimizer, total_steps=10)
        train(net, optimizer, batches(10))
        rewiring.remove()
    assert callback.alphas[10] == callback.alphas[0] == [2e-4, 2e-4] != callback.alphas[9]


# -- checkpoints of before ----------------------------------------------------------------------------------------------------


def as_before(state: dict[str, Any]) -> dict[str, Any]:
    """Return the callback's state as the version before steering wrote it."""
    state = copy.deepcopy(state)
    state["version"] = 1
    for entry in state["tensors"].values():
        entry.pop("steering", None)
    return state


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_checkpoint_of_before_goes_on_with_the_alpha_that_it_had(scope: str) -> None:
    data = batches(30)

    def begin(l1: Any) -> tuple[nn.Module, optim.Optimizer, DeepR]:
        net = mlp(scope=scope)
        optimizer, callback = adam(net.parameters()), DeepR(l1=l1, scope=scope, seed=SEED)
        callback.attach(net, optimizer, total_steps=30)
        return net, optimizer, callback

    def go_on(l1: Any, kept: list[Any], steps: slice) -> tuple[nn.Module, optim.Optimizer, DeepR]:
        net, optimizer, callback = begin(l1)
        net.load_state_dict(kept[0])
        optimizer.load_state_dict(kept[1])
        callback.load_state_dict(kept[2])
        train(net, optimizer, data[steps])
        return net, optimizer, callback

    net, optimizer, callback = begin(None)
    train(net, optimizer, data[:10])
    kept = saved([net.state_dict(), optimizer.state_dict(), as_before(callback.state_dict())])
    train(net, optimizer, data[10:])
    message = r"written before l1 was steered by the turnover: 0\.weight, 2\.weight go on with the alpha that they had"
    with pytest.warns(UserWarning, match=message):
        again, again_optimizer, again_callback = go_on(target(), kept, slice(10, 20))
    assert "deepr/0.weight/l1" not in again_callback.statistics()
    # and once more: that is no checkpoint of before, but it is of a training that is not steered
    kept = saved([again.state_dict(), again_optimizer.state_dict(), again_callback.state_dict()])
    with pytest.warns(UserWarning, match=message):
        again, again_optimizer, again_callback = go_on(target(), kept, slice(20, 30))
    assert_equal_states(state_of(again, again_optimizer), state_of(net, optimizer))
    # a new training is steered
    again_callback._stop()
    again_callback.attach(again, again_optimizer, total_steps=30)
    train(again, again_optimizer, data[:10])
    assert again_callback.statistics()["deepr/0.weight/l1"] != 0.03


def test_a_file_of_before_goes_on_as_by_the_default_then() -> None:
    path = Path(old.__file__).parent / "deepr.ckpt"
    options = {"connectivity": 0.3, "temperature": 1e-4, "seed": 5}
    ends = []
    for l1 in (None, "auto"):
        callback = lightning_deepr.DeepR(**options, l1=l1)  # its state has the name of the class
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ends.append(old.state_of(old.fit(callback, ckpt_path=path)))
        assert any("go on with the alpha that they had" in str(w.message) for w in caught) == (l1 == "auto")
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_another_l1_than_in_the_checkpoint_takes_effect() -> None:
    """This is so with every other l1: a checkpoint of this version says which alphas were steered."""
    net = mlp()
    optimizer, callback = sgd(net.parameters()), DeepR(l1=1e-3, seed=SEED)
    callback.attach(net, optimizer, total_steps=STEPS)
    train(net, optimizer, batches(6))
    state = callback.state_dict()
    callback._stop()
    steered = Noting(l1=target(), seed=SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steered.attach(net, optimizer, total_steps=STEPS).load_state_dict(state)
        train(net, optimizer, batches(12))
    assert steered.alphas[0] == [2e-4] * 2 and len({alphas[0] for alphas in steered.alphas}) > 1
    state = steered.state_dict()
    steered._stop()
    fixed = Noting(l1=1e-3, seed=SEED)
    fixed.attach(net, optimizer, total_steps=STEPS).load_state_dict(state)
    train(net, optimizer, batches(6))
    assert fixed.alphas == [[1e-3] * 2] * 6


# -- a length that is not known -----------------------------------------------------------------------------------------------


def test_without_a_known_length_the_target_stays_and_one_line_says_so() -> None:
    message = r"DeepR: the length of the training is not known, so that the share .* attach\(\.\.\., total_steps=\.\.\.\)"
    net = mlp()
    optimizer, callback = sgd(net.parameters()), DeepR(l1=target(), seed=SEED)
    callback.attach(net, optimizer)
    with pytest.warns(UserWarning, match=message) as caught:
        train(net, optimizer, batches(STEPS))
    assert len(caught) == 1
    other = mlp()
    other_optimizer = sgd(other.parameters())
    DeepR(l1=target(shape="constant"), seed=SEED).attach(other, other_optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(other, other_optimizer, batches(STEPS))
        callback._stop()
        callback.attach(net, optimizer, total_steps=STEPS)
        train(net, optimizer, batches(2))
    assert_equal_states(state_of(other), state_of(_trained(target(shape="constant"), STEPS)))


def test_a_trainer_without_an_end_is_no_error() -> None:
    class Stops(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            self.trainer.should_stop = self.trainer.global_step > 10
            return super().training_step(batch, batch_idx)

    module, callback = Stops(sgd, 5), DeepR(0.3, l1=target(), distribution="uniform", seed=SEED)
    with pytest.warns(UserWarning, match="the length of the training is not known"):
        trainer(callback, max_epochs=-1).fit(module)
    steps = callback.state_dict()["tensors"]["net.0.weight"]["step"]
    assert steps > 10
    assert_equal_states(state_of(module), state_of(_trained(target(shape="constant"), steps, batches(5) * 9)))


def _begun(l1: Any, total: int | None = None) -> tuple[nn.Module, optim.Optimizer]:
    net = mlp()
    optimizer = sgd(net.parameters())
    DeepR(l1=l1, seed=SEED).attach(net, optimizer, total_steps=total)
    return net, optimizer


def _trained(l1: Any, steps: int, data: Sequence[Any] | None = None) -> nn.Module:
    net, optimizer = _begun(l1, steps)
    train(net, optimizer, (data or batches(steps))[:steps])
    return net


# -- a collapse ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_collapse_is_told_and_undone(scope: str) -> None:
    """At this alpha, as a fixed one, no connection survives. The steered alpha falls until connections survive again."""
    data = batches(600)
    shares, losses = [], []
    for l1 in (300.0, TurnoverTarget(0.1, "constant", interval=10, within=1e6)):
        net = mlp(scope=scope)
        optimizer, callback = optim.SGD(net.parameters(), lr=0.1), Noting(l1=l1, scope=scope, seed=SEED)
        rewiring = callback.attach(net, optimizer)
        for tensor in callback.tracked:
            if tensor.steering is not None:
                tensor.steering.begin(300.0)
        with pytest.warns(UserWarning, match=r"`0\.weight` has collapsed") as caught:
            train(net, optimizer, data)
        assert any(f"{'being lowered' if l1 != 300.0 else 'Lower l1 (now 300.0)'}" in str(w.message) for w in caught)
        late = [sum(c[0] for c in counts) / sum(c[1] for c in counts) for counts in callback.counts[-50:]]  # type: ignore[index]
        early = [sum(c[0] for c in counts) / sum(c[1] for c in counts) for counts in callback.counts[:50]]  # type: ignore[index]
        assert min(early) > 0.5 and len(data) > COLLAPSE_STEPS
        shares.append(float(np.mean(late)))
        losses.append(float(np.mean([loss_of(net, batch).item() for batch in data[-50:]])))
        rewiring.remove()
    assert shares[0] > 0.9 and shares[1] < 0.2
    assert losses[1] < 0.8 * losses[0]


# -- what is shown and kept ---------------------------------------------------------------------------------------------------


def test_a_sparse_file_records_what_was_used(tmp_path: Path) -> None:
    net, optimizer = _begun(target(), STEPS)
    train(net, optimizer, batches(10))
    path = save_sparse(net, tmp_path / "net.safetensors", license="MIT")
    alpha = next(iter(all_slots(net))).l1_rule
    assert alpha is not None and alpha.startswith("TurnoverTarget(start=0.2, shape='cosine', interval=4) at 0.000")
    assert [row["l1"] for row in zoo.info(path)["connectivity"]["rows"]] == [slots.l1_rule for slots in all_slots(net)]
    assert report_of_checkpoint(path)[0]["l1"] == alpha and alpha in str(report_of_checkpoint(path))
    again = load_state_dict(plain_mlp(), path)
    assert save_sparse(again, tmp_path / "again.safetensors", license="MIT").read_bytes() == path.read_bytes()
    # a training with another l1 is what the next file is of
    DeepR(l1=1e-3).attach(again, sgd(again.parameters()))
    rows = zoo.info(save_sparse(again, tmp_path / "other.safetensors"))["connectivity"]["rows"]
    assert all("l1" not in row for row in rows)


def test_the_present_alpha_is_logged() -> None:
    logged: list[dict[str, float]] = []

    class Noted(Logger):
        name, version = "noted", 0

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            logged.append({key: value for key, value in metrics.items() if key.endswith("/l1")})

    module, callback = Regression(sgd, 12), Noting(0.3, l1=target(), log_every_n_steps=4, distribution="uniform", seed=SEED)
    callback.log_statistics = "tensors"
    trainer(callback, logger=Noted()).fit(module)
    found = [{f"deepr/net.{i}.weight/l1": callback.alphas[step][n] for n, i in enumerate((0, 2))} for step in (4, 8)]
    logged = [entry for entry in logged if entry]
    assert logged[:2] == found and len(logged) == 3


# -- bad input ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l1", ["auto", TurnoverTarget(0.1), {"0": 1e-3, "2": "auto"}], ids=str)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda l1: SoftDeepR(0.1, temperature=1e-6, l1=l1), r"SoftDeepR: l1=.* Here alpha sets theta_min .* give a number"),
        (lambda l1: L1Shrinkage(0.1, l1=l1), r"L1Shrinkage: l1=.* It has no rebirths: give a number"),
        (lambda l1: FixedRandom(0.1, l1=l1), r"FixedRandom.* unexpected keyword argument 'l1'"),
        (lambda l1: SET(0.1, l1=l1), r"SET.* unexpected keyword argument 'l1'"),
        (lambda l1: RigL(0.1, l1=l1), r"RigL.* unexpected keyword argument 'l1'"),
        (lambda l1: MagnitudePruning(0.1, l1=l1), r"MagnitudePruning.* unexpected keyword argument 'l1'"),
    ],
)
def test_methods_whose_l1_cannot_be_steered(make: Callable[[Any], Any], message: str, l1: Any) -> None:
    with pytest.raises(TypeError, match=message):
        make(l1)


def test_a_method_of_ones_own_that_drops_by_a_fraction_says_so() -> None:
    class Own(SET):
        l1 = "auto"

    with pytest.raises(TypeError, match=r"Own: l1='auto' .* drop_fraction says how many are reborn\. Leave l1 out"):
        Own(0.1)


@pytest.mark.parametrize(
    ("l1", "error", "message"),
    [
        ("Auto", TypeError, r'l1: expected a float, a dict, "auto", TurnoverTarget, .* found \'Auto\''),
        ({"0": "turnover"}, TypeError, r"l1\['0'\]: expected a float, .* found 'turnover'"),
        (["auto"], TypeError, r"l1: .* found \['auto'\]"),
    ],
    ids=str,
)
def test_other_words(l1: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DeepR(0.1, l1=l1)
