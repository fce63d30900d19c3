"""Fixed random connectivity, SET and RigL in the same settings as DEEP R: Trainer, Fabric, plain loop, resume, bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

import lightning_deepr
from lightning_deepr import SET, DeepR, FixedRandom, RigL, SparseTraining, densify, sparsify
from lightning_deepr.training.tracked import Stepped
from tests.helpers.comparisons import ALWAYS, EVERY_OTHER
from tests.helpers.optimizers import adam, sgd
from tests.helpers.regression import SEED, Regression, batches, loss_of, mlp, plain_mlp, train
from tests.helpers.state import all_slots, assert_equal_states, state_of, thetas
from tests.helpers.trainer import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


# -- Trainer, Fabric, plain loop; resume --------------------------------------------------------------------------------------


KINDS: dict[str, Callable[..., SparseTraining]] = {
    "fixed": lambda *args, **options: FixedRandom(*args, **options),
    "free": lambda *args, **options: FixedRandom(*args, signs="free", **options),
    "set": lambda *args, **options: SET(*args, **{**EVERY_OTHER, "rewire_every_n_steps": 3, "rewire_until": 0.6}, **options),
    "rigl": lambda *args, **options: RigL(*args, **{**EVERY_OTHER, "rewire_every_n_steps": 3, "rewire_until": 0.6}, **options),
}
SETTING: dict[str, Any] = {"distribution": "uniform", "seed": SEED, "check_invariants": True}


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("kind", KINDS)
def test_trainer_fabric_and_plain_loop_are_equal(kind: str, make: Callable[[Any], optim.Optimizer]) -> None:
    steps, found = 20, []
    module = Regression(make, steps)
    runner = trainer(KINDS[kind](0.3, **SETTING))
    runner.fit(module)
    found.append(state_of(module, runner.optimizers[0]))

    callback = KINDS[kind](0.3, **SETTING)
    net = callback.prepare(plain_mlp())
    optimizer = make(net.parameters())
    callback.attach(net, optimizer, total_steps=steps)
    train(net, optimizer, batches(steps))
    found.append(state_of(net, optimizer))

    callback = KINDS[kind](0.3, **SETTING)
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
    net = callback.prepare(plain_mlp())
    optimizer = make(net.parameters())
    callback.attach(net, optimizer, total_steps=steps)
    wrapped, wrapped_optimizer = fabric.setup(net, optimizer)
    for batch in batches(steps):
        wrapped_optimizer.zero_grad()
        fabric.backward(loss_of(wrapped, batch))
        wrapped_optimizer.step()
    found.append(state_of(net, optimizer))
    for other in found[1:]:
        assert_equal_states(found[0], other)
    births = {birth for slots in all_slots(net) for birth in slots.born.tolist()}
    assert max(births) == {"set": 11, "rigl": 8}.get(kind, -1)  # RigL's cosine has fallen below one connection


class ByStep(Regression):
    """Choose the batch by the step: a plain data loader does not remember its position."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.net, batches(30)[self.trainer.global_step])

    def train_dataloader(self) -> Any:
        return DataLoader(batches(10), batch_size=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_runs_go_on_exactly(kind: str, tmp_path: Path) -> None:
    def fit(folder: str, ckpt_path: Any = None) -> list[Tensor]:
        module = ByStep(adam)
        saver = ModelCheckpoint(
            tmp_path / folder, every_n_train_steps=1, save_top_k=-1, filename="{step:02d}", auto_insert_metric_name=False
        )
        callbacks = [KINDS[kind](0.3, **SETTING), *([saver] if ckpt_path is None else [])]
        runner = trainer(*callbacks, max_epochs=3, enable_checkpointing=ckpt_path is None)
        runner.fit(module, ckpt_path=ckpt_path)
        return state_of(module, runner.optimizers[0])

    whole = fit("whole")
    # 8: the next step is an update; 13: between updates; 24: frozen since step 18
    for step in (8, 13, 24):
        assert_equal_states(whole, fit(f"from_{step}", tmp_path / "whole" / f"{step:02d}.ckpt"))
    last = torch.load(tmp_path / "whole" / "24.ckpt", weights_only=False)["state_dict"]
    end = torch.load(tmp_path / "whole" / "30.ckpt", weights_only=False)["state_dict"]
    for name, value in last.items():
        if name.endswith((".places", ".born")):
            assert torch.equal(value, end[name])  # frozen
            assert int(end[name.replace(".places", ".born")].max()) == {"set": 17, "rigl": 14}.get(kind, -1)


@pytest.mark.parametrize("at", [8, 12, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_loop_resumes_exactly(kind: str, at: int) -> None:
    data = batches(30)

    def start() -> tuple[nn.Module, optim.Optimizer, Any]:
        callback = KINDS[kind](0.3, **SETTING)
        net = callback.prepare(plain_mlp())
        optimizer = adam(net.parameters())
        return net, optimizer, callback.attach(net, optimizer, total_steps=30)

    net, optimizer, rewiring = start()
    train(net, optimizer, data[:at])
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), rewiring.state_dict()))
    train(net, optimizer, data[at:])
    again, second, handle = start()
    train(
        again, second, data[:1]
    )  # the loop is running: its planned dense gradients do not match the steps of the loaded state
    for part, state in zip((again, second, handle), saved, strict=True):
        part.load_state_dict(state)
    train(again, second, data[at:])
    assert_equal_states(state_of(net, optimizer), state_of(again, second))


def test_a_state_is_loaded_under_fabric() -> None:
    def start() -> tuple[Any, Any, RigL]:
        callback = RigL(**{**EVERY_OTHER, "rewire_every_n_steps": 3}, seed=SEED)
        fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
        net = mlp()
        return *fabric.setup(net, sgd(net.parameters())), callback

    net, optimizer, callback = start()
    train(net, optimizer, batches(2))
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), callback.state_dict()))
    train(net, optimizer, batches(3))
    again, second, other = start()
    for part, state in zip((again, second, other), saved, strict=True):
        part.load_state_dict(state)
    train(again, second, batches(3))
    assert_equal_states(state_of(net), state_of(again))


def test_the_checkpoint_of_another_method(tmp_path: Path) -> None:
    first = trainer(DeepR(0.3, l1=0.1, **SETTING))
    first.fit(Regression(sgd, 10))
    first.save_checkpoint(tmp_path / "deepr.ckpt")
    callback, module = SET(0.3, **EVERY_OTHER, **SETTING), Regression(sgd, 10)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        trainer(callback, max_epochs=2).fit(module, ckpt_path=tmp_path / "deepr.ckpt")
    recorded = torch.load(tmp_path / "deepr.ckpt", weights_only=False)["state_dict"]
    last = max(int(value.max()) for name, value in recorded.items() if name.endswith(".born"))
    assert last >= 8
    assert all(tensor.step == last + 11 for tensor in callback.tracked)  # the second callback repeats no draw
    assert min(slots.last_birth() for slots in all_slots(module)) > last


@pytest.mark.parametrize("method", [DeepR, FixedRandom])
def test_constant_signs_after_free_ones(method: type[SparseTraining]) -> None:
    net = mlp()
    optimizer = sgd(net.parameters())
    rewiring = SET(**EVERY_OTHER, seed=SEED).attach(net, optimizer)
    train(net, optimizer, batches(20))
    rewiring.remove()
    below = int((thetas(net)[0] < 0).sum())
    assert below > 2
    with pytest.warns(UserWarning, match=rf"{method.__name__}: theta < 0 in `0\.weight` \({below} of 36\).*init=\"largest\""):
        method().attach(net, optimizer)
    # the advice in the warning keeps the connections
    values = {name: (p, v) for name, (_, p, v) in lightning_deepr.connections(net).items()}
    again = sparsify(densify(net), {"0": 36, "2": 18}, init="largest")
    for name, (_, places, weights) in lightning_deepr.connections(again).items():
        old = {p: v for p, v in zip(*(part.tolist() for part in values[name]), strict=True) if v}
        new = {p: v for p, v in zip(places.tolist(), weights.tolist(), strict=True) if v}
        assert old == new
    assert all(bool((theta >= 0).all()) for theta in thetas(again))


@pytest.mark.parametrize("method", [SET, RigL])
def test_an_average_follows(method: type[SparseTraining]) -> None:
    net = mlp()
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = sgd(net.parameters())
    method(**EVERY_OTHER).attach(net, optimizer, total_steps=100)
    for step, batch in enumerate(batches(6)):
        train(net, optimizer, [batch])
        for slots, mine, theta in zip(all_slots(net), all_slots(average.module), thetas(average.module), strict=True):
            assert torch.equal(slots.places, mine.places) and torch.equal(slots.signs, mine.signs)
            if step % 2:
                assert not theta[slots.born == step].any() and (slots.born == step).any()
        average.update_parameters(net)


def test_sparsify_of_a_callback_is_sparsify() -> None:
    options: dict[str, Any] = {
        "distribution": "uniform",
        "seed": SEED,
        "init": "deepr",
        "target_modules": ["0"],
        "compute": "dense",
    }
    assert_equal_states(state_of(SET(0.3, **options).prepare(plain_mlp())), state_of(sparsify(plain_mlp(), 0.3, **options)))
    with pytest.raises(ValueError, match="expects a converted module"):
        SET().prepare(plain_mlp())


def test_statistics_tell_newborns_from_mature_connections() -> None:
    net = sparsify(nn.Linear(20, 20, bias=False), 40, seed=SEED)
    (theta,) = thetas(net)
    optimizer = optim.SGD([theta], lr=0.1)
    callback = SET(drop_fraction=0.25, rewire_every_n_steps=2, rewire_until=None)
    callback.attach(net, optimizer)
    for _ in range(4):  # the second update drops the connections that the first has grown: they are still 0
        theta.grad = torch.zeros_like(theta)
        optimizer.step()
    found = callback.statistics()
    assert {key: value for key, value in found.items() if key.startswith("set/weight/")} == {
        "set/weight/turnover": 20 / 4 / 40, "set/weight/newborn_deaths": 10 / 4, "set/weight/mature_deaths": 10 / 4
    }  # fmt: skip
    assert found["set/turnover"] == 20 / 4 / 40 and not any(key.startswith("deepr/") for key in found)


class Doubling(SET):
    """A broken method: it puts two slots at one place."""

    def grow(self, items: Sequence[Stepped], weakest: Sequence[Tensor]) -> None:
        super().grow(items, weakest)
        items[0].tensor.slots.places[0] = items[0].tensor.slots.places[1]
        items[0].tensor.slots.signs[0] = items[0].tensor.slots.signs[1]


def test_check_invariants_finds_what_is_broken() -> None:
    net = mlp()
    optimizer = sgd(net.parameters())
    Doubling(**ALWAYS, check_invariants=True).attach(net, optimizer)
    with pytest.raises(RuntimeError, match=r"`0\.weight`, step 0: two slots are at one place"):
        train(net, optimizer, batches(1))


# -- bad input ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: FixedRandom(signs="none"), ValueError, 'signs: expected "fixed" or "free"'),
        (lambda: SET(drop_fraction=1.0), ValueError, "drop_fraction"),
        (lambda: RigL(drop_fraction=-0.1), ValueError, "drop_fraction"),
        (lambda: RigL(drop_fraction=math.nan), ValueError, "drop_fraction"),
        (lambda: SET(drop_fraction=True), TypeError, "drop_fraction"),  # type: ignore[arg-type]
        (lambda: SET(rewire_every_n_steps=0), ValueError, "rewire_every_n_steps"),
        (lambda: RigL(rewire_until=1.5), ValueError, "rewire_until"),
        (lambda: FixedRandom(0.1, distribution="erdos"), ValueError, "distribution"),
        (lambda: lightning_deepr.Nope, AttributeError, "no attribute 'Nope'; it has .*DeepR, FixedRandom"),
    ],
)
def test_unknown_methods_and_values(make: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("method", [SET, RigL])
def test_a_fraction_of_a_training_of_unknown_length(method: type[SparseTraining]) -> None:
    net = mlp()
    with pytest.raises(ValueError, match=r"rewire_until is a fraction.*total_steps"):
        method().attach(net, sgd(net.parameters()))
