"""Draw step.png: one step of DEEP R on a small weight, by the package's own functions.

python docs/images/step.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
from torch import nn

from lightning_deepr import sparsify
from lightning_deepr.algorithm import rewiring

ROWS, COLUMNS, COUNT = 7, 11, 18


def main() -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    torch.manual_seed(4)
    layer = sparsify(nn.Linear(COLUMNS, ROWS, bias=False), COUNT, seed=3)
    parametrization = layer.parametrizations.weight
    slots, theta = parametrization[0], parametrization.original.detach()
    theta.copy_(torch.rand(COUNT) * 0.45)
    panels = []

    def keep(title: str, marked: torch.Tensor, color: str) -> None:
        values = (theta.clamp(min=-1) * slots.signs).clone()
        panels.append((title, slots.places.clone(), values, theta.clone(), marked.clone(), color))

    keep("1. K connections", slots.places[:0], "")
    theta.sub_(0.18 * torch.randn(COUNT).abs())  # stands for the optimizer's step
    rewiring.shrink([theta], [0.03])
    dormant = rewiring.dormant_slots([theta])[0]
    keep("2. optimizer, L1, noise: theta < 0 goes dormant", slots.places[dormant], "#d1495b")
    rewiring.reactivate([theta], [slots], [dormant], seed=3, step=1)
    keep("3. as many dormant places become active, at 0", slots.places[dormant], "#6a994e")

    figure, axes = plt.subplots(1, 3, figsize=(11.6, 2.9), layout="constrained")
    for axis, (title, places, values, theta_now, marked, color) in zip(axes, panels, strict=True):
        image = torch.full((ROWS * COLUMNS,), float("nan"))
        image[places] = torch.where(theta_now >= 0, values, torch.nan)
        axis.imshow(image.view(ROWS, COLUMNS), cmap="RdBu_r", vmin=-0.5, vmax=0.5)
        axis.set_xticks([x - 0.5 for x in range(COLUMNS + 1)], minor=True)
        axis.set_yticks([y - 0.5 for y in range(ROWS + 1)], minor=True)
        axis.grid(which="minor", color="#ddd", lw=0.8)
        axis.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
        for place in marked.tolist():
            corner = place % COLUMNS - 0.5, place // COLUMNS - 0.5
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, ec=color, lw=2.6))
        axis.set_title(title, fontsize=10.5)
        axis.set_xlabel(f"{int((theta_now >= 0).sum())} active of {ROWS * COLUMNS}", fontsize=10)
    figure.savefig(Path(__file__).with_name("step.png"), dpi=110)


if __name__ == "__main__":
    main()
