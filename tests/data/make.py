"""Write checkpoints that every later version of the package must load, and the results that it must compute from them.

    python make.py FOLDER

runs with the installed version. It writes a file of each kind in the middle of a training. Beside them it writes
``expected.pt``: the output of the network when it was saved, and the state at the end of the training. Version 0.1.0 wrote the
files here when all of its modules lay in one folder. If a later version has another default, give the old one here by name.

Everything is in double precision: a CPU that adds in another order changes only the last bits of a sum, and no result depends
on them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_deepr import SET, DeepR, LinearDecay, RigL, SoftDeepR, connections, load_state_dict, save_sparse, sparsify

SAVED, END = 8, 16  # steps
Batch = tuple[Tensor, Tensor]


class Mixed(nn.Module):
    """A convolution, an LSTM and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.lstm = nn.LSTM(16, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.conv(x.view(-1, 1, 6, 6)).relu().transpose(1, 2).flatten(2)
        return self.head(self.lstm(rows)[0][:, -1])


def mixed() -> nn.Module:
    torch.manual_seed(1)
    return Mixed().double()


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(36, 10), nn.ReLU(), nn.Linear(10, 3)).double()


def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    # uniform numbers are the same on every CPU; normal ones need not be
    numbers = 4 * torch.rand(END, 8, 39, generator=generator, dtype=torch.float64) - 2
    return [(part[:, :36], part[:, 36:]) for part in numbers]


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    return (net(batch[0]) - batch[1]).square().mean()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, data: list[Batch]) -> None:
    for batch in data:
        optimizer.zero_grad()
        loss_of(net, batch).backward()
        optimizer.step()


def output_of(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net(batches()[0][0])


def places_of(net: nn.Module) -> Tensor:
    """Return all places, in the order of the tensors and of their slots.

    (A sparse file puts the slots in the order of their places.)
    """
    return torch.cat([places.int() for _, places, _ in connections(net).values()])


def state_of(net: nn.Module) -> dict[str, Tensor]:
    """Return the output, the places and all parameters, one after the other."""
    parameters = torch.cat([value.detach().reshape(-1) for value in net.parameters()])
    return {"output": output_of(net), "places": places_of(net), "parameters": parameters}


# -- by the Trainer, as a Lightning checkpoint --------------------------------------------------------------------------------


class Regression(pl.LightningModule):
    """A module whose batches follow the step: a plain data loader does not remember its position."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.net, batches()[self.trainer.global_step])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)

    def train_dataloader(self) -> Any:
        return DataLoader(range(END), batch_size=None)  # type: ignore[arg-type]


class Saver(pl.Callback):
    """A callback that saves in the middle of the training. (A ModelCheckpoint would also record the folder.)"""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.output = torch.empty(0)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == SAVED:
            trainer.save_checkpoint(self.path)
            self.output = output_of(pl_module.net)  # type: ignore[arg-type]


# the defaults of the version that wrote the files
OLD: dict[str, Any] = {"lr_scale": 1.0, "newborn": "start"}
CALLBACKS: dict[str, Callable[[], Any]] = {
    "deepr": lambda: DeepR(0.3, l1=0.5, seed=3, **OLD),
    "schedules": lambda: DeepR({"0": 0.3, "2": 12}, l1=LinearDecay(0.5, 0.1), temperature=1e-6, init="largest", seed=3, **OLD),
    "soft": lambda: SoftDeepR(0.3, temperature=0.04, l1=0.1, seed=3),
    "set": lambda: SET(0.3, rewire_every_n_steps=3, rewire_until=None, seed=3, **OLD),
    "rigl": lambda: RigL(0.3, rewire_every_n_steps=3, rewire_until=0.9, seed=3, **OLD),
}  # fmt: skip


def fit(callback: Any, *others: pl.Callback, ckpt_path: Path | None = None) -> nn.Module:
    module = Regression()
    runner = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, callbacks=[callback, *others], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    runner.fit(module, ckpt_path=ckpt_path)
    return module.net


# -- by a plain loop, as a state_dict or a sparse file ------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """A training by a plain loop: the network, its conversion and the suffix of its file."""

    make: Callable[[], nn.Module]
    suffix: str
    options: dict[str, Any]
    scope: str = "layer"

    def attach(self, net: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        DeepR(l1=0.5, scope=self.scope, seed=3, **OLD).attach(net, optimizer)
        return optimizer

    def write(self, path: Path) -> Tensor:
        """Train the first half, save the network and return its output."""
        net = sparsify(self.make(), 0.3, seed=3, scope=self.scope, **self.options)
        train(net, self.attach(net), batches()[:SAVED])
        if self.suffix == "safetensors":
            save_sparse(net, path, license="MIT")
        else:
            torch.save(net.state_dict(), path)
        return output_of(net)

    def load_and_train(self, path: Path) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output of the network after loading, and the state at the end of a new training from there."""
        net = load_state_dict(self.make(), path)
        loaded = output_of(net)
        train(net, self.attach(net), batches()[SAVED:])
        return loaded, state_of(net)


PLAIN = {
    "state_dict": Plain(mixed, "pt", {"init": "largest"}),
    "sparse_file": Plain(mixed, "safetensors", {"init": "largest"}),
    "global_scope": Plain(mlp, "pt", {}, scope="global"),
}


def main(folder: Path) -> None:
    expected: dict[str, Any] = {}
    for name, make in CALLBACKS.items():
        saver = Saver(folder / f"{name}.ckpt")
        end = fit(make(), saver)
        expected[name] = {"saved": saver.output, **state_of(end)}
    for name, plain in PLAIN.items():
        path = folder / f"{name}.{plain.suffix}"
        saved = plain.write(path)
        expected[name] = {"saved": saved, **plain.load_and_train(path)[1]}
    torch.save(expected, folder / "expected.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
