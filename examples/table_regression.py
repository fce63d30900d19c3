"""A regression on a table: which columns matter?

A table of 100 columns, of which 5 decide the target (Friedman's first function, a standard test of regression); the other 95
are noise. A dense network fits the noise. A sparse one has few connections and moves them to the columns that help.

    python examples/table_regression.py            # half a minute on a CPU
    python examples/table_regression.py --short    # a few seconds
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_deepr import DeepR

COLUMNS, RELEVANT, ROWS = 100, 5, 1000


def table(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Make a table [rows, columns] of numbers in 0 ... 1, and its target [rows] with noise of standard deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, COLUMNS, generator=generator)
    a, b, c, d, e = x[:, :RELEVANT].unbind(1)
    y = 10 * torch.sin(torch.pi * a * b) + 20 * (c - 0.5) ** 2 + 10 * d + 5 * e
    return x, y + torch.randn(rows, generator=generator)


class Regression(lightning.LightningModule):
    """Two hidden layers. Nothing here knows about sparsity."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(COLUMNS, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 1))
        self.mean, self.std = mean, std  # of the training targets

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - 0.5)[:, 0] * self.std + self.mean

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1]) / self.std**2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def train(connectivity: float | None, epochs: int, seed: int) -> Regression:
    """Train with a connectivity; None: dense."""
    lightning.seed_everything(seed, verbose=False)
    x, y = table(ROWS, seed)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[] if connectivity is None else [DeepR(connectivity)],  # the only line that differs
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Regression(float(y.mean()), float(y.std()))
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=50, shuffle=True))
    return module.eval()


@torch.no_grad()
def r2(module: Regression, seed: int = 10_000) -> float:
    """Return the explained share of the variance on 5,000 new rows. The noise alone leaves about .96 at best."""
    x, y = table(5000, seed)
    return float(1 - ((module(x) - y) ** 2).mean() / y.var())


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--connectivity", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="15 epochs")
    given = parser.parse_args(arguments)
    epochs = 15 if given.short else given.epochs
    dense, sparse = (train(connectivity, epochs, given.seed) for connectivity in (None, given.connectivity))
    first = (sparse.net[0].weight.detach() + 0).abs()  # [outputs, columns], 0 where there is no connection
    found = {"dense": r2(dense), "sparse": r2(sparse), "relevant": float(first[:, :RELEVANT].sum() / first.sum())}
    print(f"explained variance on new rows: dense {found['dense']:.3f}, {given.connectivity:.0%} {found['sparse']:.3f}")
    print(f"{found['relevant']:.0%} of the first layer's weight is at the {RELEVANT} columns that matter (by chance: 5 %)")
    return found


if __name__ == "__main__":
    main()
