"""Helpers for the tests of the callbacks with a theta for every potential connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn, optim

from lightning_deepr.weights.find import converted_tensors
from tests.helpers.optimizers import adam
from tests.helpers.regression import Regression, batches, loss_of, plain_mlp, train
from tests.helpers.trainer import trainer

STEPS = 24
Make = Callable[[Any], optim.Optimizer]


def sgd(params: Any) -> optim.Optimizer:
    return optim.SGD(params, lr=0.1, momentum=0.5, weight_decay=0.05)


def adamw(params: Any) -> optim.Optimizer:
    return optim.AdamW(params, lr=0.02, weight_decay=0.5)


def adagrad(params: Any) -> optim.Optimizer:
    return optim.Adagrad(params, lr=0.05, initial_accumulator_value=0.3)


def rprop(params: Any) -> optim.Optimizer:
    return optim.Rprop(params, lr=0.01)


OPTIMIZERS = {"sgd": sgd, "adam": adam, "adamw": adamw, "adagrad": adagrad, "rprop": rprop}


def network(callback: Any, make: Make = sgd, total_steps: int | None = STEPS) -> tuple[nn.Module, optim.Optimizer]:
    """Make a network that the callback has converted and rewires."""
    net = callback.prepare(plain_mlp())
    optimizer = make(net.parameters())
    callback.attach(net, optimizer, total_steps=total_steps)
    return net, optimizer


def full_state(net: nn.Module, optimizer: optim.Optimizer | None = None) -> list[Tensor]:
    """Return everything that a training determines, without names."""
    values = [value.detach().clone() for value in net.state_dict().values()]
    if optimizer is not None:
        for parameter in net.parameters():
            state = optimizer.state.get(parameter, {})
            values += [value.clone() for _, value in sorted(state.items()) if isinstance(value, Tensor)]
    return values


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    """Compare two states bit for bit (nan equals nan)."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def weights(net: nn.Module) -> dict[str, Tensor]:
    """Return the dense-shaped weight of every converted tensor."""
    return {c.name: getattr(c.module, c.tensor_name).detach().clone() for c in converted_tensors(net)}


def kinds(net: nn.Module) -> dict[str, Any]:
    return {c.name: c.slots for c in converted_tensors(net)}


def by_plain_loop(callback: Any, make: Make, accumulate: int = 1) -> tuple[nn.Module, optim.Optimizer]:
    net = callback.prepare(plain_mlp())
    optimizer = make(net.parameters())
    callback.attach(net, optimizer, total_steps=STEPS // accumulate)
    for i, batch in enumerate(batches(STEPS), start=1):
        (loss_of(net, batch) / accumulate).backward()
        if i % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return net, optimizer


def by_trainer(callback: Any, make: Make, accumulate: int = 1) -> tuple[nn.Module, optim.Optimizer]:
    module = Regression(make, STEPS)
    runner = trainer(callback, accumulate_grad_batches=accumulate)
    runner.fit(module)
    return module, runner.optimizers[0]


def by_fabric(callback: Any, make: Make, accumulate: int = 1, attach: bool = False) -> tuple[nn.Module, optim.Optimizer]:
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[] if attach else [callback])
    net = callback.prepare(plain_mlp())
    optimizer = make(net.parameters())
    if attach:
        callback.attach(net, optimizer, total_steps=STEPS // accumulate)
    wrapped, wrapped_optimizer = fabric.setup(net, optimizer)
    for i, batch in enumerate(batches(STEPS), start=1):
        fabric.backward(loss_of(wrapped, batch) / accumulate)
        if i % accumulate == 0:
            wrapped_optimizer.step()
            wrapped_optimizer.zero_grad()
    return net, optimizer


def resumed(make_callback: Callable[[], Any], make: Make, at: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the final states of an uninterrupted plain loop and of one that new objects continue from a given step."""
    data = batches(STEPS)
    callback = make_callback()
    net = callback.prepare(plain_mlp())
    optimizer = make(net.parameters())
    rewiring = callback.attach(net, optimizer, total_steps=STEPS)
    train(net, optimizer, data[:at])
    saved = [
        {name: value.clone() for name, value in net.state_dict().items()},
        _copied(optimizer.state_dict()),
        _copied(rewiring.state_dict()),
    ]
    train(net, optimizer, data[at:])

    again_callback = make_callback()
    again = again_callback.prepare(plain_mlp())
    again.load_state_dict(saved[0])
    again_optimizer = make(again.parameters())
    again_optimizer.load_state_dict(saved[1])
    again_callback.attach(again, again_optimizer, total_steps=STEPS).load_state_dict(saved[2])
    train(again, again_optimizer, data[at:])
    return full_state(net, optimizer), full_state(again, again_optimizer)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_copied(entry) for entry in value]
    return value.clone() if isinstance(value, Tensor) else value


class Seen(pl.Callback):
    """A callback that records the network's state before each training batch."""

    def __init__(self) -> None:
        self.states: dict[int, list[Tensor]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.states[trainer.global_step] = full_state(pl_module, trainer.optimizers[0])
