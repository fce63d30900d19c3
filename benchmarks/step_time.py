"""How long does a whole training step take, compared with dense layers and with peer packages?

    python benchmarks/step_time.py                                   # all three networks, step_time.csv, step_time.png
    python benchmarks/step_time.py --only lenet --rounds 3 --steps 100

A step is forward, backward, optimizer step (SGD .05) and, for DEEP R, rewiring, on random data. The networks are:

- lenet: LeNet-300-100 at 1 %, batch 10 and 128, in a plain loop and under the Trainer;
- mlp: 784-4096-4096-10 at 1 %, batch 128;
- cifar: the CNN of the TensorFlow tutorial on 24 x 24 crops (two 5 x 5 convolutions, three linear layers) at 5 %, batch 128.

The arms are the dense network; masked dense (a dense weight times a dense 0/1 mask in each forward, without rewiring: the least
that mask libraries compute); DeepR with each ``compute``; and the PyPI packages ``deep_rewire`` (DEEP R on dense tensors),
``rigl-torch`` and ``sparsimony`` (RigL on masked dense weights, one update in 100 steps; ``sparsimony`` also with an update in
every step).

Arms take turns within each round, so that a slow minute of the machine affects all of them. Times are medians over all steps;
compare only ratios within one run. L1 is so high that at least 10 % of the slots are reborn in each step, as in the paper's
MNIST setting: most newborns don't survive their first step. This turnover builds up over hundreds of steps. Here a share of the
slots starts at theta = 0, like newborns, so that short runs have the same load. The table also has the turnover.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from arms import LR, Batches, batches, deep_rewire, masked, mlp, plain, rigl_torch, sgd, sparsimony, start_newborn
from common import Block, Row, axes, bars, medians, parser, prepare, save, take_turns
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_deepr import DeepR, connections, sparsify
from lightning_deepr.models import LeNet300100


@dataclass
class Network:
    """A network and the settings of its measurement."""

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # shape of one image
    connectivity: float
    l1: float
    newborn: float  # share of the slots that start at 0
    batch_sizes: tuple[int, ...]
    fraction: int  # divides --steps, for networks with longer steps


def cifar_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.LocalResponseNorm(9, 9e-3, 0.75, 1.0),
        nn.Conv2d(64, 64, 5, padding=2), nn.ReLU(), nn.LocalResponseNorm(9, 9e-3, 0.75, 1.0), nn.MaxPool2d(3, 2, 1),
        nn.Flatten(), nn.Linear(2304, 384), nn.ReLU(), nn.Linear(384, 192), nn.ReLU(), nn.Linear(192, 10),
    )  # fmt: skip


NETWORKS = {
    "lenet": Network("LeNet-300-100, 1 %", LeNet300100, (784,), 0.01, 1e-3, 0.15, (10, 128), 1),
    "mlp": Network("784-4096-4096-10, 1 %", mlp, (784,), 0.01, 5e-4, 0.15, (128,), 10),
    "cifar": Network("CIFAR-10 CNN, 5 %", cifar_cnn, (3, 24, 24), 0.05, 1e-3, 0.15, (128,), 20),
}


class Clock(Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = None

    def on_train_batch_end(self, *_: Any) -> None:
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
        self._last = now


class Classifier(LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


def under_trainer(net: nn.Module, callback: DeepR | None, data: Batches) -> Block:
    model = Classifier(net)

    def block(steps: int) -> list[float]:
        clock = Clock()
        trainer = Trainer(
            max_steps=steps + 1,  # the first step has no start time
            callbacks=[clock] if callback is None else [callback, clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )
        trainer.fit(model, DataLoader([data[i % len(data)] for i in range(steps + 1)], batch_size=None))  # type: ignore[arg-type]
        return clock.seconds

    return block


class Arms:
    """The arms of one network at one batch size, with the turnover of those that rewire."""

    def __init__(self, network: Network, batch_size: int) -> None:
        self.network, self.data = network, batches(batch_size, network.shape)
        self.found: dict[str, Block | str] = {}
        self.rewiring: dict[str, tuple[DeepR, nn.Module]] = {}

    def dense(self) -> None:
        net = self.network.build()
        self.found["dense"] = plain(net, sgd(net), self.data)

    def masked_dense(self) -> None:
        net = masked(self.network.build(), self.network.connectivity)
        self.found["masked dense"] = plain(net, sgd(net), self.data)

    def deepr(self, compute: str) -> None:
        name = f"DeepR, {compute}"
        net = sparsify(self.network.build(), self.network.connectivity, compute=compute)
        start_newborn(net, self.network.newborn)
        optimizer, loop = sgd(net), DeepR(l1=self.network.l1, lr_scale=1.0)
        loop.attach(net, optimizer)
        self.rewiring[name] = loop, net
        self.found[name] = plain(net, optimizer, self.data)

    def peers(self, every_step: bool) -> None:
        build, connectivity = self.network.build, self.network.connectivity
        self.found["deep_rewire"] = deep_rewire(build(), connectivity, self.network.l1, self.data)
        self.found["rigl-torch"] = rigl_torch(build(), connectivity, self.data)
        self.found["sparsimony"] = sparsimony(build(), connectivity, 100, self.data)
        if every_step:
            self.found["sparsimony, every step"] = sparsimony(build(), connectivity, 1, self.data)

    def trainer(self) -> None:
        net, callback = sparsify(self.network.build(), self.network.connectivity), DeepR(l1=self.network.l1, lr_scale=1.0)
        start_newborn(net, self.network.newborn)
        self.found["dense, Trainer"] = under_trainer(self.network.build(), None, self.data)
        self.found["DeepR, Trainer"] = under_trainer(net, callback, self.data)
        self.rewiring["DeepR, Trainer"] = callback, net

    def reborn(self) -> dict[str, float]:
        """Return the share of all slots reborn per step since the last call."""
        found = {}
        for name, (callback, net) in self.rewiring.items():
            deaths = sum(value for key, value in callback.statistics().items() if key.endswith("_deaths"))
            found[name] = deaths / sum(places.numel() for _, places, _ in connections(net).values())
        return found


def arms_of(key: str, batch_size: int) -> Arms:
    arms = Arms(NETWORKS[key], batch_size)
    arms.dense()
    if key != "cifar":
        arms.masked_dense()
    for compute in {"lenet": ("auto", "dense", "sparse"), "mlp": ("auto",), "cifar": ("auto", "dense")}[key]:
        arms.deepr(compute)
    if key != "cifar":
        arms.peers(every_step=key == "lenet")
    if key == "lenet":
        arms.trainer()
    return arms


def measure(key: str, batch_size: int, rounds: int, steps: int) -> list[Row]:
    torch.manual_seed(0)
    arms, network = arms_of(key, batch_size), NETWORKS[key]
    blocks = {name: arm for name, arm in arms.found.items() if not isinstance(arm, str)}
    per_round = {name: max(1, steps // network.fraction) for name in blocks}
    if key == "mlp" and "deep_rewire" in blocks:  # much slower than the other arms
        per_round["deep_rewire"] = max(1, steps // (10 * network.fraction))
    take_turns(blocks, 1, per_round)  # warms up
    arms.reborn()
    took = medians(take_turns(blocks, rounds, per_round))
    reborn = arms.reborn()
    rows = []
    for name, arm in arms.found.items():
        row: Row = {
            "network": network.title,
            "batch": batch_size,
            "arm": name,
            "ran": "no",
            "over_dense": "",
            "over_dense_trainer": "",
        }
        if isinstance(arm, str):
            row["over_dense"] = arm
        else:
            row["ran"] = "yes"
            row["over_dense"] = f"{took[name] / took['dense']:.3g}"
            if "dense, Trainer" in took:
                row["over_dense_trainer"] = f"{took[name] / took['dense, Trainer']:.3g}"
        row["reborn_per_step"] = f"{reborn[name]:.1%}" if name in reborn else ""
        rows.append(row)
    return rows


def draw(rows: list[Row], options: argparse.Namespace) -> None:
    settings = list(dict.fromkeys((row["network"], row["batch"]) for row in rows))
    figure, panels = axes(len(settings), columns=2, width=5.5)
    for axis, setting in zip(panels, settings, strict=True):
        ran = {
            row["arm"]: float(row["over_dense"])
            for row in rows
            if (row["network"], row["batch"]) == setting and row["ran"] == "yes"
        }
        bars(axis, ran, f"{setting[0]}, batch {setting[1]}", "step time / dense, plain loop", 1.0)
    figure.savefig(options.out / "step_time.png", dpi=130)


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument(
        "--steps", type=int, default=200, help="steps per arm and round on LeNet; the MLP runs a tenth, the CNN a twentieth"
    )
    asked.add_argument("--only", default=",".join(NETWORKS), help="networks to measure, out of lenet,mlp,cifar")
    options = asked.parse_args()
    prepare(options)
    rows = []
    for key in options.only.split(","):
        for batch_size in NETWORKS[key].batch_sizes:
            rows += measure(key, batch_size, options.rounds, options.steps)
    save(rows, options, "step_time")
    draw(rows, options)


if __name__ == "__main__":
    main()
