"""``seed_everything`` in Python changes the connectivity, as the command line's does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import seed_everything
from torch import nn

from lightning_deepr import DeepR, SoftDeepR, connections, sparsify
from lightning_deepr.recipes.running import train
from tests.helpers.classifier import Net, batches
from tests.helpers.optional import needs
from tests.helpers.trainer import trainer


def places(net: nn.Module) -> list[list[int]]:
    return [found.tolist() for _, found, _ in connections(net).values()]


def under_trainer(**options: Any) -> nn.Module:
    net = Net()
    trainer(DeepR(0.2, **options), max_steps=1).fit(net, batches())
    return net


WAYS = {
    "trainer": under_trainer,
    "sparsify": lambda **options: sparsify(Net(), 0.2, **options),
    "prepare": lambda **options: DeepR(0.2, **options).prepare(Net()),
}


@pytest.mark.feature("Callbacks: seed_everything seeds the connectivity; an explicit seed wins")
@pytest.mark.parametrize("way", WAYS)
def test_seed_everything_seeds_the_connectivity(way: str) -> None:
    make = WAYS[way]
    unseeded = places(make())
    assert unseeded == places(make(seed=0))
    seed_everything(5, verbose=False)
    seeded = places(make())
    assert seeded == places(make(seed=5)) != unseeded
    assert places(make(seed=0)) == unseeded


def test_the_seed_is_that_of_the_conversion() -> None:
    callback = DeepR(0.2)
    assert callback.seed is None
    seed_everything(7, verbose=False)
    trainer(callback, max_steps=1).fit(Net(), batches())
    assert callback.seed == callback.state_dict()["seed"] == 7
    seed_everything(8, verbose=False)
    trainer(callback, max_steps=1).fit(Net(), batches())
    assert callback.seed == 7  # a second fit goes on


def test_a_resume_keeps_the_seed(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    seed_everything(3, verbose=False)
    loop = trainer(DeepR(0.2), max_steps=3)
    loop.fit(Net(), batches())
    loop.save_checkpoint(tmp_path / "one.ckpt")
    seed_everything(4, verbose=False)
    callback = DeepR(0.2)
    trainer(callback, max_steps=5).fit(Net(), batches(), ckpt_path=tmp_path / "one.ckpt")
    assert callback.seed == 3
    assert not [one for one in recwarn if "checkpoint's seed" in str(one.message)]
    given = DeepR(0.2, seed=4)
    with pytest.warns(UserWarning, match="goes on with the checkpoint's seed 3 .given: 4."):
        trainer(given, max_steps=5).fit(Net(), batches(), ckpt_path=tmp_path / "one.ckpt")


@pytest.mark.parametrize("make", [DeepR, lambda *a, **o: SoftDeepR(*a, temperature=0.0, **o)])
def test_what_is_no_seed(make: Any) -> None:
    with pytest.raises(TypeError, match="seed: expected an int, found '5'"):
        make(0.2, seed="5")


@needs("jsonargparse")
@pytest.mark.parametrize(("arguments", "seed"), [([], 0), (["--seed_everything=6"], 6), (["--sparsity.seed=9"], 9)])
def test_the_command_lines_seed(arguments: list[str], seed: int) -> None:
    given = ["--sparsity.connectivity=0.1", "--sparsity.distribution=uniform", "--trainer.logger=false", *arguments]
    made = train(["--config", "mnist_quickstart", *given], run=False)
    callback = next(one for one in made.trainer.callbacks if isinstance(one, DeepR))
    net = callback.prepare(nn.Linear(30, 20))
    assert callback.seed == seed
    assert places(net) == places(sparsify(nn.Linear(30, 20), 0.1, seed=seed))
