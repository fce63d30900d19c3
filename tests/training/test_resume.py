"""A training that crashes and resumes equals one that does not. Checkpoints hold K-sized tensors, and loading checks them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

from lightning_deepr import DeepR, LinearDecay, TurnoverTarget, sparsify
from tests.helpers.crashes import Crash, Crashing
from tests.helpers.optimizers import adam, sgd
from tests.helpers.regression import SEED, Regression, batches, loss_of, mlp, plain_mlp, train
from tests.helpers.state import all_slots, assert_equal_states, state_of, thetas
from tests.helpers.trainer import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
EPOCH, EPOCHS = 10, 3
exact_resume = pytest.mark.skipif(
    tuple(map(int, pl.__version__.split(".")[:2])) < (2, 5),
    reason="Lightning 2.4 takes a step too many after a resume in the middle of an epoch, with dense layers too",
)
DATA = batches(EPOCH * EPOCHS)


class Noting(Crashing):
    """A module that records its state before every step, and crashes before a given one."""

    def __init__(self, make: Callable[[Any], optim.Optimizer], crash_at: int | None = None) -> None:
        super().__init__(make, EPOCH, crash_at, DATA)
        self.seen: dict[int, list[Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Noting:
        replica = Noting(self.make)  # an average needs no records
        replica.net = copy.deepcopy(self.net, memo)
        return replica

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        step = self.trainer.global_step
        if step != self.crash_at:
            self.seen[step] = state_of(self, self.trainer.optimizers[0])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.05 * step))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", loss_of(self.net, batch))

    def test_dataloader(self) -> Any:
        return DataLoader(DATA[:5], batch_size=None)  # type: ignore[arg-type]


def rprop(params: Any) -> optim.Optimizer:
    return optim.Rprop(params, lr=0.02)


@dataclass
class Setting:
    make: Callable[[Any], optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)
    averaged: bool = False

    def callbacks(self, folder: Path, **options: Any) -> list[pl.Callback]:
        default = {"connectivity": 0.3, "distribution": "uniform", "l1": 0.1, "seed": SEED, "check_invariants": True}
        callbacks: list[pl.Callback] = [DeepR(**{**default, **self.options, **options})]
        if self.averaged:
            if not hasattr(pl.callbacks, "EMAWeightAveraging"):
                pytest.skip("Lightning before 2.6 has no EMAWeightAveraging")
            callbacks.append(pl.callbacks.EMAWeightAveraging(decay=0.8))
        saver = ModelCheckpoint(
            folder, every_n_train_steps=2, save_top_k=-1, filename="{step:02d}", auto_insert_metric_name=False
        )
        return [*callbacks, saver]

    def fit(
        self, folder: Path, crash_at: int | None = None, ckpt_path: Any = None, **options: Any
    ) -> tuple[Noting, pl.Trainer]:
        module = Noting(self.make, crash_at)
        runner = trainer(*self.callbacks(folder, **options), max_epochs=EPOCHS, enable_checkpointing=True)
        if crash_at is None:
            runner.fit(module, ckpt_path=ckpt_path)
        else:
            with pytest.raises(Crash):
                runner.fit(module, ckpt_path=ckpt_path)
        return module, runner


def deepr_of(runner: pl.Trainer) -> DeepR:
    return next(callback for callback in runner.callbacks if isinstance(callback, DeepR))  # type: ignore[attr-defined]


def last_checkpoint(folder: Path) -> Path:
    return max(folder.glob("*.ckpt"))


SETTINGS = {
    "sgd momentum": Setting(sgd),
    "adam": Setting(adam, {"l1": 0.3}),
    "rprop": Setting(rprop),
    "sgd averaged": Setting(sgd, averaged=True),
    "adam averaged": Setting(adam, {"l1": 0.3}, averaged=True),
    "noise, l1 falling, frozen late": Setting(sgd, {"temperature": 1e-4, "l1": LinearDecay(0.3, 0.0), "rewire_until": 0.8}),
    "l1 by turnover, averaged": Setting(adam, {"l1": TurnoverTarget(0.2, interval=4)}, averaged=True),
    "every 3 steps": Setting(adam, {"l1": 0.3, "rewire_every_n_steps": 3}),
    "lr_scale": Setting(adam, {"l1": 0.3, "lr_scale": "auto"}, averaged=True),
}


@exact_resume
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.feature("Checkpoints: crash in the middle of an epoch, resumed exactly")
def test_crashing_and_resuming_changes_nothing(setting: Setting, tmp_path: Path) -> None:
    """The training crashes in the middle of an epoch, at its end, and twice in one training."""
    whole, whole_trainer = setting.fit(tmp_path / "whole")
    assert max(int(slots.born.max()) for slots in all_slots(whole)) > 20, "nothing was reborn after the crash"
    for crashes in ((7,), (10,), (3, 25)):
        folder = tmp_path / str(crashes)
        path = None
        for crash_at in (*crashes, None):
            module, runner = setting.fit(folder, crash_at, path)
            first = 0 if path is None else int(path.stem)
            assert sorted(module.seen) == list(range(first, EPOCH * EPOCHS if crash_at is None else crash_at))
            for step, state in module.seen.items():
                assert_equal_states(state, whole.seen[step])
            path = last_checkpoint(folder)
        # at the end the module has the averaged weights
        assert_equal_states(state_of(module, runner.optimizers[0]), state_of(whole, whole_trainer.optimizers[0]))
        assert deepr_of(runner).state_dict() == deepr_of(whole_trainer).state_dict()


@exact_resume
def test_a_resumed_run_keeps_its_seed(tmp_path: Path) -> None:
    setting = SETTINGS["sgd momentum"]
    whole, _ = setting.fit(tmp_path / "whole")
    setting.fit(tmp_path / "crashed", crash_at=8)
    with pytest.warns(UserWarning, match=rf"goes on with the checkpoint's seed {SEED} \(given: 99\)"):
        module, runner = setting.fit(tmp_path / "crashed", ckpt_path=last_checkpoint(tmp_path / "crashed"), seed=99)
    assert_equal_states(state_of(module), state_of(whole))
    assert deepr_of(runner).seed == SEED


# -- a second fit -------------------------------------------------------------------------------------------------------------


class Continued(Regression):
    """A module that counts its own steps: a new trainer starts at 0 again."""

    count = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.count += 1
        return loss_of(self.net, DATA[self.count - 1])


def plain_sgd(params: Any) -> optim.Optimizer:
    return optim.SGD(params, lr=0.1)  # a new optimizer loses no state


@pytest.mark.parametrize("same_trainer", [True, False], ids=["the same trainer", "a new trainer"])
@pytest.mark.feature("Loops: fit twice")
def test_a_second_fit_goes_on(same_trainer: bool) -> None:
    options = {"connectivity": 0.3, "distribution": "uniform", "l1": 0.1, "temperature": 1e-5, "seed": SEED}
    once, callback_once = Continued(plain_sgd, EPOCH), DeepR(**options)
    trainer(callback_once, max_epochs=2).fit(once)

    twice, callback = Continued(plain_sgd, EPOCH), DeepR(**options)
    runner = trainer(callback)
    runner.fit(twice)
    between = [slots.places.clone() for slots in all_slots(twice)]
    if same_trainer:
        runner.fit_loop.max_epochs = 2
    else:
        runner = trainer(callback)
    runner.fit(twice)
    assert twice.count == 2 * EPOCH
    assert_equal_states(state_of(twice), state_of(once))
    entries = callback.state_dict()["tensors"].values()
    assert [entry["step"] for entry in entries] == [2 * EPOCH] * 2
    # the progress of schedules restarts with a new trainer
    assert [entry["start"] for entry in entries] == [0 if same_trainer else EPOCH] * 2
    assert any(not torch.equal(slots.places, places) for slots, places in zip(all_slots(twice), between, strict=True))


def test_a_schedule_begins_anew_with_a_new_training() -> None:
    """l1 falls from its start to its end in each fit, and after each attach in a plain loop."""
    alphas: list[float] = []

    class Noting(DeepR):
        def after_step(self, stepped: Any, optimizer: Any) -> Any:
            alphas.append(stepped[0].alpha)
            return super().after_step(stepped, optimizer)

    expected = [0.1 * (1 - i / EPOCH) for i in range(EPOCH)] * 2
    module, callback = Continued(plain_sgd, EPOCH), Noting(0.3, l1=LinearDecay(0.1, 0.0))
    for _ in range(2):
        trainer(callback).fit(module)
    assert alphas == pytest.approx(expected)

    alphas.clear()
    net = mlp()
    optimizer, callback = plain_sgd(net.parameters()), Noting(l1=LinearDecay(0.1, 0.0))
    for _ in range(2):
        rewiring = callback.attach(net, optimizer, total_steps=EPOCH)
        train(net, optimizer, DATA[:EPOCH])
        rewiring.remove()
    assert alphas == pytest.approx(expected)


@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_a_plain_loop_resumes_its_schedule_whenever_the_state_is_loaded(when: str) -> None:
    alphas: list[float] = []

    class Noting(DeepR):
        def after_step(self, stepped: Any, optimizer: Any) -> Any:
            alphas.append(stepped[0].alpha)
            return super().after_step(stepped, optimizer)

    net = mlp()
    optimizer, first = plain_sgd(net.parameters()), Noting(l1=LinearDecay(0.1, 0.0))
    earlier = first.attach(net, optimizer, total_steps=3)
    train(net, optimizer, DATA[:3])
    earlier.remove()
    alphas.clear()  # another training, which has ended
    first.attach(net, optimizer, total_steps=20)
    train(net, optimizer, DATA[:12])
    state, weights = first.state_dict(), net.state_dict()

    again = mlp()
    again.load_state_dict(weights)
    optimizer = plain_sgd(again.parameters())
    callback = Noting(l1=LinearDecay(0.1, 0.0))
    if when == "before attach":
        callback.load_state_dict(state)
    callback.attach(again, optimizer, total_steps=20)
    if when == "after attach":
        callback.load_state_dict(state)
    train(again, optimizer, DATA[12:20])
    assert alphas == pytest.approx([0.1 * (1 - i / 20) for i in range(20)])
    assert [entry["step"] for entry in callback.state_dict()["tensors"].values()] == [23, 23]


def test_a_new_callback_takes_the_connections_of_an_earlier_fit() -> None:
    module = Continued(plain_sgd, EPOCH)
    trainer(DeepR(0.3, l1=0.1, seed=1)).fit(module)
    trained = state_of(module)
    begun: list[list[Tensor]] = []

    class Noting(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            begun.append(state_of(pl_module))

    with pytest.raises(ValueError, match=r"DeepR\(connectivity=0\.1\) asks for K = .* converted already"):
        trainer(DeepR(0.1, l1=0.1, seed=2)).fit(module)
    trainer(DeepR(l1=0.1, seed=2), Noting()).fit(module)
    assert_equal_states(begun[0], trained)


# -- what a checkpoint holds --------------------------------------------------------------------------------------------------


def tensors_in(value: Any, name: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else []
    return [found for key, entry in entries for found in tensors_in(entry, f"{name}/{key}")]


@pytest.mark.parametrize(
    "setting", [SETTINGS["adam averaged"], SETTINGS["sgd momentum"]], ids=["adam averaged", "sgd momentum"]
)
@pytest.mark.feature("Checkpoints: everything of a converted tensor has K entries")
def test_everything_of_a_converted_tensor_is_k_sized(setting: Setting, tmp_path: Path) -> None:
    module, _ = setting.fit(tmp_path, crash_at=9)
    counts = {theta.numel() for theta in thetas(module)}
    assert counts == {36, 18} and all(theta.grad.shape == theta.shape for theta in thetas(module))
    checkpoint = torch.load(last_checkpoint(tmp_path), weights_only=True)  # only built-in types and tensors
    found = tensors_in(checkpoint)
    biases = {10, 6}
    assert {tensor.numel() for _, tensor in found if tensor.dim()} <= counts | biases | {0, 2}  # 2: a recorded shape
    moments = {adam: 2, sgd: 1}[setting.make]
    states = checkpoint["optimizer_states"][0]["state"].values()
    sized = [value.numel() for state in states for value in state.values() if isinstance(value, Tensor) and value.dim()]
    assert sorted(sized) == sorted([36, 18, 10, 6] * moments)
    # in all: theta, places and births of each tensor have size K
    k_sized = [name for name, tensor in found if name.startswith("/state_dict") and tensor.numel() in counts]
    assert len(k_sized) == 2 * 3


@pytest.mark.feature("Checkpoints: save_weights_only")
def test_a_weights_only_checkpoint_is_complete(tmp_path: Path) -> None:
    module = Regression(sgd)
    runner = trainer(DeepR(0.3, l1=0.1, seed=SEED))
    runner.fit(module)
    runner.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    fresh = sparsify(Regression(sgd), 0.3, seed=99)
    fresh.load_state_dict(torch.load(tmp_path / "weights.ckpt", weights_only=True)["state_dict"])
    assert_equal_states(state_of(fresh), state_of(module))


@pytest.mark.parametrize("setting", [SETTINGS["sgd momentum"], SETTINGS["sgd averaged"]], ids=["plain", "averaged"])
@pytest.mark.feature("Checkpoints: test on a checkpoint, with the callback")
def test_a_fresh_model_is_tested_on_a_checkpoint(setting: Setting, tmp_path: Path) -> None:
    module, runner = setting.fit(tmp_path)
    (trained,) = runner.test(module, verbose=False)
    fresh = Noting(setting.make)
    other = trainer(setting.callbacks(tmp_path, seed=99)[0])
    (tested,) = other.test(fresh, ckpt_path=last_checkpoint(tmp_path), verbose=False)
    assert tested["loss"] == pytest.approx(trained["loss"], rel=1e-6)
    for one, two in zip(all_slots(fresh), all_slots(module), strict=True):
        assert torch.equal(one.places, two.places) and torch.equal(one.signs, two.signs)


# -- a checkpoint that does not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"connectivity": 0.2}, r"`net\.0\.weight`: expected K = 24 .*found 36"),
        ({"connectivity": {"net.0": 36, "net.2": 17}}, r"`net\.2\.weight`: expected K = 17 .*found 18"),
        ({"target_modules": ["net.0"]}, r"net\.2\.parametrizations\.weight\.0\.lightning_deepr\.load_state_dict"),
    ],
    ids=["another connectivity", "another K of one tensor", "other targets"],
)
@pytest.mark.feature("Checkpoints: a checkpoint with another selection of tensors", refused=True)
def test_a_checkpoint_of_another_selection_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    setting = SETTINGS["sgd momentum"]
    setting.fit(tmp_path, crash_at=5)
    with pytest.raises((RuntimeError, ValueError), match=message):
        setting.fit(tmp_path, ckpt_path=last_checkpoint(tmp_path), **options)


def test_the_state_of_another_selection_is_refused() -> None:
    net = mlp()
    state = DeepR(seed=SEED).attach(net, sgd(net.parameters())).state_dict()
    smaller = mlp(0.2)
    with pytest.raises(ValueError, match=r"`0\.weight`: expected a checkpoint with K = 24, found 36"):
        DeepR().attach(smaller, sgd(smaller.parameters())).load_state_dict(state)
    part = mlp(target_modules=["0"])
    with pytest.raises(ValueError, match=r"another model or selection.*\['0.weight'\].*\['0.weight', '2.weight'\]"):
        DeepR().attach(part, sgd(part.parameters())).load_state_dict(state)


@pytest.mark.feature("Callbacks: two callbacks in one Trainer, resumed")
def test_two_callbacks_of_one_trainer_keep_their_states_apart(tmp_path: Path) -> None:
    def both() -> list[DeepR]:
        return [DeepR(0.3, target_modules=["net.0"], l1=0.1, seed=1), DeepR(0.5, target_modules=["net.2"], l1=0.2, seed=2)]

    module, callbacks = Regression(sgd), both()
    runner = trainer(*callbacks)
    runner.fit(module)
    runner.save_checkpoint(tmp_path / "both.ckpt")
    resumed = both()
    fresh = Regression(sgd)
    other = trainer(*resumed, max_epochs=2)
    other.fit(fresh, ckpt_path=tmp_path / "both.ckpt")
    assert [list(c.state_dict()["tensors"]) for c in resumed] == [["net.0.weight"], ["net.2.weight"]]
    assert [c.seed for c in resumed] == [1, 2]
    assert [entry["step"] for c in resumed for entry in c.state_dict()["tensors"].values()] == [60, 60]


# -- the warning of a collapse -- ---------------------------------------------------------------------------------------------


def run_and_listen(
    l1: float, steps: int, connectivity: Any = 0.01, resume: Any = None, every: int = 1
) -> tuple[list[str], Any]:
    """Return the warnings of collapses, and the state from which to resume."""
    net: nn.Module = sparsify(plain_mlp((64, 48, 10)), connectivity, distribution="uniform", seed=SEED)
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    rewiring = DeepR(l1=l1, seed=SEED, rewire_every_n_steps=every).attach(net, optimizer)
    if resume is not None:
        net.load_state_dict(resume[0])
        rewiring.load_state_dict(resume[1])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(net, optimizer, batches(steps, 64, 10))
    told = [str(warning.message) for warning in caught if "collapsed" in str(warning.message)]
    return told, (net.state_dict(), rewiring.state_dict())


def test_a_collapse_is_told_once_per_tensor() -> None:
    told, state = run_and_listen(2.0, 230)
    assert [message.split("`")[1] for message in told] == ["0.weight", "2.weight"]
    for message in told:
        assert "l1 (now 2.0)" in message and "distribution" in message, "the warning does not say what to change"
    assert run_and_listen(2.0, 120, resume=state)[0] == [], "warned again after a resume"


def test_a_collapse_is_told_after_100_steps_on_end() -> None:
    collapsed = run_and_listen(2.0, 20)[1]  # by now nearly everything is reborn in every step
    collapsed[1]["tensors"] = {name: {**entry, "streak": 0} for name, entry in collapsed[1]["tensors"].items()}
    told, state = run_and_listen(2.0, 99, resume=collapsed)
    assert told == []
    assert len(run_and_listen(2.0, 1, resume=state)[0]) == 2, "the resumed run forgot the 99 steps"
    _, healthy = run_and_listen(0.0, 1, resume=state)  # nothing dies without l1 and without a gradient
    assert run_and_listen(2.0, 99, resume=healthy)[0] == [], "one healthy step did not restart the count"


def test_a_collapse_is_told_where_only_some_steps_rewire() -> None:
    told, _ = run_and_listen(2.0, 230, every=2)
    assert [message.split("`")[1] for message in told] == ["0.weight", "2.weight"]


def test_a_healthy_run_hears_nothing() -> None:
    told, _ = run_and_listen(1e-3, 150, connectivity=0.2)
    assert told == []


def test_a_new_callback_on_a_trained_network_goes_on_counting() -> None:
    """A new callback would otherwise repeat the draws of the first one."""
    torch.manual_seed(0)
    net = sparsify(torch.nn.Linear(40, 30), 0.2)
    for _ in range(2):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        rewiring = DeepR(l1=1.0).attach(net, optimizer)
        before = rewiring.state_dict()["tensors"]["weight"]["step"]
        for _ in range(5):
            optimizer.zero_grad()
            net(torch.randn(8, 40)).square().mean().backward()
            optimizer.step()
        rewiring.remove()
    assert before == 5
