"""A recurrent network of excitatory and inhibitory cells, without self-connections, that remembers.

The task: a flash at one of four inputs, then a delay full of noise, then the network is asked which input it was. 80 % of the
cells are excitatory (Dale's law: all connections from a cell have one sign), no cell is connected to itself, and 10 % of the
recurrent connections exist at any moment. DEEP R looks for the good ones.

    python examples/dales_law.py                        # less than a minute on a CPU; writes dales_law.png
    python examples/dales_law.py --steps 20 --out ""    # a short form, without the picture
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deepr import Dale, DeepR, NoSelf, connectivity_report, sparsify

CELLS, INPUTS, FLASH, DELAY = 128, 4, 3, 8
RECURRENT, READOUT = "cells.weight_hh_l0", "readout.weight"


class Memory(nn.Module):
    """A recurrent network of rates and a readout of its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.RNN(INPUTS + 1, CELLS, nonlinearity="relu", batch_first=True)
        self.readout = nn.Linear(CELLS, INPUTS)
        nn.init.normal_(self.cells.weight_hh_l0, std=(2 / CELLS) ** 0.5)  # activity neither grows nor fades

    def forward(self, x: Tensor) -> Tensor:
        rates, _ = self.cells(x)
        return self.readout(rates[:, -1])


def trials(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Make inputs [count, time, inputs + 1] (the last one asks) and the numbers of the inputs that flashed."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(INPUTS, (count,), generator=generator)
    x = 0.1 * torch.randn(count, FLASH + DELAY + 1, INPUTS + 1, generator=generator)
    x[torch.arange(count)[:, None], torch.arange(FLASH)[None, :], label[:, None]] += 1
    x[:, -1, -1] += 1
    return x, label


def train(steps: int, seed: int = 0) -> tuple[Memory, list[float], Tensor]:
    """Train, and return the network, its losses and its recurrent weights at the start."""
    torch.manual_seed(seed)
    net = Memory()
    cells = Dale(excitatory=0.8, seed=seed)  # one seed: the readout knows the cells that the recurrent weights have
    sparsify(
        net,
        {RECURRENT: 0.1, READOUT: 0.5},
        candidates={RECURRENT: NoSelf()},
        signs={RECURRENT: cells, READOUT: cells},
        seed=seed,
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    DeepR(lr_scale=1.0, seed=seed).attach(net, optimizer, total_steps=steps)
    start, losses = net.cells.weight_hh_l0.detach().clone(), []
    for step in range(steps):
        x, label = trials(64, seed=step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), label)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return net, losses, start


@torch.no_grad()
def accuracy(net: Memory) -> float:
    """Return the share of 2,000 new trials that the network remembers."""
    x, label = trials(2000, seed=10**6)
    return float((net(x).argmax(1) == label).float().mean())


def excitatory(weight: Tensor) -> Tensor:
    """Return the cells whose connections are excitatory; an error if a cell has both signs or is connected to itself."""
    positive, negative = (weight > 0).any(0), (weight < 0).any(0)
    assert not bool((positive & negative).any()), "a cell with connections of both signs"
    assert not bool(weight.diagonal().any()), "a cell that is connected to itself"
    return positive


def draw(net: Memory, losses: list[float], start: Tensor, path: Path) -> None:
    """Draw the recurrent weights before and after the training, cells sorted by their sign, and the loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    after = net.cells.weight_hh_l0.detach() + 0
    order = excitatory(after).to(torch.int8).argsort(descending=True, stable=True)
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 3)
    for panel, weight, title in zip(panels, (start, after), ("at the start", "after the training"), strict=False):
        shown = weight[order][:, order]
        bound = float(after.abs().quantile(0.995))
        panel.imshow(shown, cmap="RdBu_r", vmin=-bound, vmax=bound, interpolation="nearest")
        panel.set(title=f"recurrent weights {title}", xlabel="from cell (excitatory first)", ylabel="to cell")
    panels[2].plot(losses, linewidth=0.8, color="#4477aa")
    panels[2].set(title="loss", xlabel="step", yscale="log")
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(Path(__file__).parent / "dales_law.png"), help='the picture; "": none')
    options = parser.parse_args(arguments)
    net, losses, start = train(options.steps, options.seed)
    print(connectivity_report(net))
    cells = excitatory(net.cells.weight_hh_l0.detach() + 0)
    print(f"{int(cells.sum())} of {CELLS} cells are excitatory; {accuracy(net):.1%} of the flashes are remembered")
    if options.out:
        draw(net, losses, start, Path(options.out))
    return accuracy(net)


if __name__ == "__main__":
    main()
