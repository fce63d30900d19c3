"""One training in a plain loop, under the Trainer and with Fabric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric import Fabric
from torch import Tensor, nn, optim

from lightning_deepr import DeepR
from tests.helpers.optimizers import sgd
from tests.helpers.regression import SEED, Regression, batches, loss_of, mlp
from tests.helpers.state import state_of
from tests.helpers.trainer import trainer

STEPS = 30


@dataclass
class Run:
    """A finished training."""

    net: nn.Module
    optimizer: optim.Optimizer
    callback: DeepR

    @property
    def state(self) -> list[Tensor]:
        return state_of(self.net, self.optimizer)

    @property
    def steps(self) -> list[int]:
        return [tensor["step"] for tensor in self.callback.state_dict()["tensors"].values()]


@dataclass
class Setting:
    make: Callable[[Any], optim.Optimizer] = sgd
    options: dict[str, Any] = field(default_factory=dict)
    accumulate: int = 1
    scheduled: bool = False

    def callback(self, **options: Any) -> DeepR:
        l1 = 0.05 if self.make is sgd else 0.2
        return DeepR(**{"seed": SEED, "l1": l1, "check_invariants": True, **self.options, **options})

    def scheduler(self, optimizer: optim.Optimizer) -> Any:
        return optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step)) if self.scheduled else None


def by_plain_loop(setting: Setting) -> Run:
    net = mlp()
    optimizer, callback = setting.make(net.parameters()), setting.callback()
    scheduler = setting.scheduler(optimizer)
    callback.attach(net, optimizer, total_steps=STEPS // setting.accumulate)
    for i, batch in enumerate(batches(STEPS), start=1):
        (loss_of(net, batch) / setting.accumulate).backward()
        if i % setting.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
    return Run(net, optimizer, callback)


def by_trainer(setting: Setting) -> Run:
    class Scheduled(Regression):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = setting.scheduler(optimizer)
            return optimizer if scheduler is None else ([optimizer], [{"scheduler": scheduler, "interval": "step"}])

    module = Scheduled(setting.make, STEPS)
    callback = setting.callback(connectivity=0.3, distribution="uniform")
    runner = trainer(callback, accumulate_grad_batches=setting.accumulate)
    runner.fit(module)
    return Run(module, runner.optimizers[0], callback)


def by_fabric(setting: Setting, attached: str = "no") -> Run:
    """Train with Fabric. ``attached``: whether the callback is also attached, before Fabric's setup or to its result."""
    callback = setting.callback()
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
    net = mlp()
    optimizer = setting.make(net.parameters())
    scheduler, total = setting.scheduler(optimizer), STEPS // setting.accumulate
    if attached == "before":
        callback.attach(net, optimizer, total_steps=total)
    wrapped, wrapped_optimizer = fabric.setup(net, optimizer)
    if attached == "after":
        callback.attach(wrapped, wrapped_optimizer, total_steps=total)
    for i, batch in enumerate(batches(STEPS), start=1):
        fabric.backward(loss_of(wrapped, batch) / setting.accumulate)
        if i % setting.accumulate == 0:
            wrapped_optimizer.step()
            wrapped_optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
    return Run(net, optimizer, callback)
