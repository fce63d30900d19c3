"""How long is a whole training step of LeNet-300-100 at 1 %?

    python benchmarks/step_time.py                      # table, step_time.csv and step_time.png beside this file
    python benchmarks/step_time.py --rounds 3 --steps 100

Forward, backward, optimizer step (SGD .05) and, for DEEP R, rewiring, on random data, at batch 10 and 128:

- dense: the network as it is, in a plain loop;
- masked dense: a dense weight times a dense 0/1 mask in each forward, no rewiring (what mask libraries compute);
- deep_rewire: the PyPI package of that name, DEEP R on dense tensors (``pip install deep_rewire``);
- DeepR, plain loop, and DeepR, Trainer, beside the same dense network under the Trainer.

Arms take turns within each round, so that a slow minute of the machine meets all of them; a figure is the median over all steps
and only ratios within one run are meant. L1 is set so high (2e-3) that at least 10 % of the slots are reborn in each step, as in the
paper's setting; the share that was reached is printed beside the time.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader

from lightning_deepr import DeepR, sparsify
from lightning_deepr.models import LeNet300100

HERE = Path(__file__).parent
LR, L1, CONNECTIONS = 0.05, 2e-3, 2662
Block = Callable[[int], list[float]]


def batches(batch_size: int, count: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Random images from ten noisy prototypes: something to learn, so that rewiring has something to decide."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(10, 784, generator=generator)
    found = []
    for _ in range(count):
        labels = torch.randint(0, 10, (batch_size,), generator=generator)
        images = prototypes[labels] * (torch.rand(batch_size, 784, generator=generator) < 0.3)
        found.append((images, labels))
    return found


class Mask(nn.Module):
    """A dense weight times a dense mask."""

    def __init__(self, weight: Tensor, connectivity: float) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.rand_like(weight) < connectivity).to(weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def plain(net: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[Tensor, Tensor]]) -> Block:
    def block(steps: int) -> list[float]:
        seconds = []
        for i in range(steps):
            images, labels = data[i % len(data)]
            started = time.perf_counter()
            optimizer.zero_grad()
            cross_entropy(net(images), labels).backward()
            optimizer.step()
            seconds.append(time.perf_counter() - started)
        return seconds

    return block


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


def under_trainer(callback: DeepR | None, data: list[tuple[Tensor, Tensor]]) -> Block:
    model = Classifier(LeNet300100())

    def block(steps: int) -> list[float]:
        clock = Clock()
        trainer = Trainer(
            max_steps=steps,
            callbacks=[clock] if callback is None else [callback, clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
        )
        trainer.fit(model, DataLoader([data[i % len(data)] for i in range(steps)], batch_size=None))  # type: ignore[arg-type]
        return clock.seconds

    return block


def deep_rewire(data: list[tuple[Tensor, Tensor]]) -> Block | str:
    try:
        from deep_rewire import DEEPR, convert
    except ImportError as error:
        return f"not run: {error}"
    net = LeNet300100()
    sparse, rest = convert(net, handle_biases="ignore")
    optimizers = [DEEPR(sparse, nc=CONNECTIONS, lr=LR, l1=L1), torch.optim.SGD(rest, lr=LR)]

    class Both:
        def zero_grad(self) -> None:
            for optimizer in optimizers:
                optimizer.zero_grad()

        def step(self) -> None:
            for optimizer in optimizers:
                optimizer.step()

    return plain(net, Both(), data)  # type: ignore[arg-type]


def measure(batch_size: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    data = batches(batch_size)
    dense = LeNet300100()
    masked = LeNet300100()
    for layer in (masked.fc1, masked.fc2, masked.fc3):
        parametrize.register_parametrization(layer, "weight", Mask(layer.weight, 0.01))
    sparse = sparsify(LeNet300100(), CONNECTIONS)
    optimizer = torch.optim.SGD(sparse.parameters(), lr=LR)
    loop, callback = DeepR(l1=L1), DeepR(CONNECTIONS, l1=L1)
    loop.attach(sparse, optimizer)
    arms: dict[str, Block | str] = {
        "dense": plain(dense, torch.optim.SGD(dense.parameters(), lr=LR), data),
        "masked dense": plain(masked, torch.optim.SGD(masked.parameters(), lr=LR), data),
        "DeepR, plain loop": plain(sparse, optimizer, data),
        "deep_rewire": deep_rewire(data),
        "dense, Trainer": under_trainer(None, data),
        "DeepR, Trainer": under_trainer(callback, data),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            if not isinstance(arm, str):
                found = arm(steps)
                if turn:  # the first round warms up
                    seconds[name] += found
    medians = {name: statistics.median(found) for name, found in seconds.items() if found}
    reborn = {"DeepR, plain loop": loop.statistics(), "DeepR, Trainer": callback.statistics()}
    rows = []
    for name, arm in arms.items():
        row: dict[str, Any] = {"batch": batch_size, "arm": name}
        if isinstance(arm, str):
            row |= {"over_dense": "", "over_dense_trainer": "", "reborn_per_step": arm}
        else:
            share = ""
            if name in reborn:
                per_step = [value for key, value in reborn[name].items() if key.endswith("_deaths")]
                share = f"{sum(per_step) / CONNECTIONS:.1%}"
            row |= {
                "over_dense": round(medians[name] / medians["dense"], 2),
                "over_dense_trainer": round(medians[name] / medians["dense, Trainer"], 2),
                "reborn_per_step": share,
            }
        rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    sizes = sorted({row["batch"] for row in rows})
    for axis, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        mine = [row for row in rows if row["batch"] == size and row["over_dense"] != ""][::-1]
        bars = axis.barh([row["arm"] for row in mine], [row["over_dense"] for row in mine], color="#4477aa")
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(f"batch {size}", fontsize=10)
        axis.set_xlabel("step time / dense, plain loop")
        axis.margins(x=0.15)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="per arm and round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of step_time.csv and step_time.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = [row for size in (10, 128) for row in measure(size, options.rounds, options.steps)]
    with (options.out / "step_time.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, options.out / "step_time.png")
    print("| batch | arm | time / dense | time / dense under the Trainer | reborn per step |\n|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


if __name__ == "__main__":
    main()
