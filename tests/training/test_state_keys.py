"""A callback finds its state again by its tensors, however they are named."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_deepr import SET, DeepR
from tests.helpers.classifier import Net, batches
from tests.helpers.trainer import trainer

OPTIONS = {"l1": 0.05, "temperature": 1e-6, "rewire_every_n_steps": 5}


def first_layer(name: str, module: nn.Module, wanted: str = "fc1") -> bool:
    return name == wanted


# (a choice of tensors, another one of the same tensors)
SAME: dict[str, tuple[Callable[[], DeepR], Callable[[], DeepR]]] = {
    "order of a dict": (
        lambda: DeepR({"fc1": 0.2, "fc2": 0.3}, **OPTIONS),
        lambda: DeepR({"fc2": 0.3, "fc1": 0.2}, **OPTIONS),
    ),
    "order of a list": (
        lambda: DeepR(0.3, target_modules=["fc1", "fc2"], **OPTIONS),
        lambda: DeepR(0.3, target_modules=["fc2", "fc1"], **OPTIONS),
    ),
    "another lambda": (
        lambda: DeepR(0.3, target_modules=lambda name, module: name == "fc1", **OPTIONS),
        lambda: DeepR(0.3, target_modules=lambda n, m: n.endswith("1"), **OPTIONS),
    ),
    "a partial": (
        lambda: DeepR(0.3, target_modules=functools.partial(first_layer, wanted="fc1"), **OPTIONS),
        lambda: DeepR(0.3, target_modules=["fc1"], **OPTIONS),
    ),
    "a pattern for all": (lambda: DeepR(0.3, **OPTIONS), lambda: DeepR(0.3, target_modules="fc.", **OPTIONS)),
    "what is left out": (
        lambda: DeepR(0.3, exclude_modules=["fc2"], **OPTIONS),
        lambda: DeepR(0.3, target_modules=["fc1.weight"], **OPTIONS),
    ),
    "a subclass": (lambda: DeepR(0.3, **OPTIONS), lambda: Derived(0.3, **OPTIONS)),
}


class Derived(DeepR):
    pass


def saved(folder: Path, *callbacks: Any) -> Net:
    net = Net()
    save = ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    trainer(*callbacks, save, max_epochs=2, enable_checkpointing=True).fit(net, batches())
    return net


@pytest.mark.feature("Checkpoints: state found by its tensors (order of a dict, another predicate or pattern)")
@pytest.mark.parametrize("name", SAME)
def test_the_same_tensors_are_the_same_state(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    make, again = SAME[name]
    whole = saved(tmp_path, make())
    net, callback = Net(), again()
    trainer(callback, max_epochs=2).fit(net, batches(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert {entry["step"] for entry in callback.state_dict()["tensors"].values()} == {24}
    expected, found = whole.state_dict(), net.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    if name != "a subclass":
        assert not [one for one in recwarn if "add the following callbacks" in str(one.message) and "DeepR" in str(one.message)]


def test_keys_before_the_network_is_there() -> None:
    one, other = DeepR({"a": 0.1, "b": 0.3}), DeepR({"b": 0.3, "a": 0.1})
    assert one.state_key == other.state_key
    assert "'a'" in one.state_key
    keys = {DeepR(0.1, target_modules=lambda n, m, x=x: n == x).state_key for x in "ab"}
    keys |= {DeepR(0.1, target_modules=functools.partial(first_layer, wanted=x)).state_key for x in "ab"}
    keys |= {DeepR(0.1, target_modules=[x]).state_key for x in "ab"}
    assert len(keys) == 6


def test_a_key_of_many_tensors_is_short() -> None:
    callback = DeepR(0.5)
    net = nn.ModuleList(nn.Linear(3, 3) for _ in range(40))
    callback.attach(DeepR(0.5).prepare(net), torch.optim.SGD(net.parameters(), lr=0.1))
    assert len(callback.state_key) < 200
    assert "'count': 40" in callback.state_key


# (what wrote the checkpoint, what resumes it)
NOBODYS: dict[str, tuple[Callable[[], list[Any]], Callable[[], list[Any]]]] = {
    "fewer tensors": (lambda: [DeepR(0.3)], lambda: [DeepR(0.3, target_modules=["fc1"])]),
    "two callbacks, one": (
        lambda: [DeepR(0.3, target_modules=["fc1"]), DeepR(0.3, target_modules=["fc2"])],
        lambda: [DeepR(0.3, distribution="uniform")],
    ),
}


@pytest.mark.feature("Checkpoints: a callback's state that nobody takes", refused=True)
@pytest.mark.parametrize("name", NOBODYS)
def test_a_state_that_nobody_takes(name: str, tmp_path: Path) -> None:
    write, read = NOBODYS[name]
    saved(tmp_path, *write())
    net = Net()
    with pytest.raises(Exception, match=r"(?s)of another model or selection|Error\(s\) in loading state_dict"):
        trainer(*read(), max_epochs=2).fit(net, batches(), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_the_message_names_both(tmp_path: Path) -> None:
    saved(tmp_path, DeepR(0.3, target_modules=["fc1"]), DeepR(0.3, target_modules=["fc2"]))
    with pytest.raises(ValueError, match=r"the state of DeepR for `fc1.weight`, which no callback takes; found DeepR for `fc1"):
        trainer(DeepR({"fc1": 0.3, "fc2": 0.3}), max_epochs=2).fit(Net(), batches(), ckpt_path=tmp_path / "epoch=0.ckpt")


@pytest.mark.feature("Checkpoints: resumed with another method (said)")
def test_another_method_is_told(tmp_path: Path) -> None:
    saved(tmp_path, DeepR(0.3))
    with pytest.warns(UserWarning, match=r"the state of DeepR for `fc1.weight`, `fc2.weight`, which is not used.*SET"):
        trainer(SET(0.3), max_epochs=2).fit(Net(), batches(), ckpt_path=tmp_path / "epoch=0.ckpt")


@pytest.mark.feature("Checkpoints: a checkpoint that is cut off", refused=True)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_checkpoint_that_is_cut_off(share: float, tmp_path: Path) -> None:
    saved(tmp_path, DeepR(0.3))
    file = tmp_path / "epoch=0.ckpt"
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    net = Net()
    with pytest.raises((RuntimeError, EOFError, OSError)):
        trainer(DeepR(0.3), max_epochs=2).fit(net, batches(), ckpt_path=file)
    assert not net.losses  # no step was taken
