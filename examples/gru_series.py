"""A GRU on a series: the next value of a chaotic one (Mackey and Glass), with 5 % of the connections.

On the CPU a converted GRU is computed from its connections alone where that is faster: the weights are never dense.

    python examples/gru_series.py            # some minutes on a CPU
    python examples/gru_series.py --short    # a few seconds
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_deepr import DeepR, connectivity_report

WINDOW, AHEAD = 50, 6  # values that the network sees, and how far ahead it predicts


def mackey_glass(count: int, delay: int = 17, warm_up: int = 500) -> Tensor:
    """Return a series [count] of the Mackey-Glass equation, one value per unit of time, with mean 0 and deviation 1."""
    history, x, found = [1.2] * (10 * delay), 1.2, []
    for step in range(10 * (warm_up + count)):  # Euler's method with steps of .1
        x += 0.1 * (0.2 * history[0] / (1 + history[0] ** 10) - 0.1 * x)
        history = [*history[1:], x]
        if step % 10 == 9:
            found.append(x)
    series = torch.tensor(found[warm_up:])
    return (series - series.mean()) / series.std()


def windows(series: Tensor) -> TensorDataset:
    """Cut a series into inputs [windows, WINDOW, 1] and the values AHEAD of their ends [windows]."""
    x = series.unfold(0, WINDOW, 1)[:-AHEAD]
    return TensorDataset(x[..., None], series[WINDOW + AHEAD - 1 :])


class Forecast(lightning.LightningModule):
    """A GRU, and a readout of its last state."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.gru = nn.GRU(1, units, batch_first=True)
        self.head = nn.Linear(units, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])[:, 0]

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="32 units, 4 epochs")
    given = parser.parse_args(arguments)
    units, epochs = (32, 4) if given.short else (given.units, given.epochs)
    lightning.seed_everything(given.seed, verbose=False)
    series = mackey_glass(3000)
    module = Forecast(units)
    # Input weights and readout are small and stay dense: only the recurrent weights are chosen.
    rewiring = DeepR(0.05 if units > 100 else 0.2, target_modules=["gru.weight_hh*"])
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[rewiring],
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(windows(series[:2000]), batch_size=50, shuffle=True))
    x, y = windows(series[2000:]).tensors
    with torch.no_grad():
        error = float((module.eval()(x) - y).pow(2).mean().sqrt())
    found = {"error": error, "last_value": float((x[:, -1, 0] - y).pow(2).mean().sqrt())}
    print(connectivity_report(module))
    print(
        f"error on the rest of the series: {error:.3f} standard deviations; repeating the last value: {found['last_value']:.3f}"
    )
    return found


if __name__ == "__main__":
    main()
