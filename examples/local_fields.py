"""Digits, with a locally connected first layer: each hidden unit sees a disc of the image.

The first layer has two maps of 14 x 14 units. A unit may be connected to the pixels within 4 pixels of its own spot, and a
quarter of these connections exist at any moment; DEEP R moves them. Beside it, the same network with connections anywhere.

    python examples/local_fields.py                     # about a minute on a CPU; writes local_fields.png
    python examples/local_fields.py --steps 20 --out "" # a short form, without the picture
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deepr import DeepR, Local, connectivity_report, sparsify
from lightning_deepr.recipes.digits import embedded_digits

SIDE, UNITS, MAPS, RADIUS = 28, 14, 2, 4
CONNECTIONS = 4000


def network(local: bool, seed: int) -> nn.Module:
    """Make a network whose first layer is locally connected, or may be connected anywhere."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(SIDE * SIDE, MAPS * UNITS * UNITS), nn.ReLU(), nn.Linear(MAPS * UNITS * UNITS, 10)
    )
    near = Local((SIDE, SIDE), RADIUS, outputs=(UNITS, UNITS))
    return sparsify(net, {"1": CONNECTIONS, "3": 0.2}, candidates={"1": near} if local else None, seed=seed)


def train(net: nn.Module, images: Tensor, labels: Tensor, steps: int, seed: int) -> nn.Module:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    DeepR(seed=seed).attach(net, optimizer, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (64,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    return net


@torch.no_grad()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((net(images).argmax(1) == labels).float().mean())


def furthest(net: nn.Module) -> float:
    """Return the largest distance between a unit and a pixel to which it is connected."""
    unit, pixel = (net[1].weight.detach() + 0).nonzero().unbind(1)  # type: ignore[index, union-attr, operator]
    scale = SIDE // UNITS
    down = pixel // SIDE - (unit % UNITS**2 // UNITS * scale + scale // 2)
    across = pixel % SIDE - (unit % UNITS * scale + scale // 2)
    return float((down**2 + across**2).max()) ** 0.5


def draw(nets: dict[str, nn.Module], path: Path) -> None:
    """Draw the fields of some units, and how often each pixel is used."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    spots = [3 * UNITS + 3, 3 * UNITS + 10, 7 * UNITS + 7, 10 * UNITS + 4, 10 * UNITS + 10]
    figure = Figure(figsize=(2.1 * (len(spots) + 1), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(2, len(spots) + 1)
    for row, (name, net) in zip(panels, nets.items(), strict=True):
        weight = (net[1].weight.detach() + 0).view(MAPS, UNITS * UNITS, SIDE, SIDE)  # type: ignore[index, union-attr, operator]
        bound = float(weight.abs().max()) / 2
        for panel, spot in zip(row, spots, strict=False):
            panel.imshow(weight[0, spot], cmap="RdBu_r", vmin=-bound, vmax=bound)
            panel.set_title(f"unit {spot // UNITS}, {spot % UNITS}", fontsize=9)
        row[-1].imshow((weight != 0).sum((0, 1)), cmap="viridis")
        row[-1].set_title("connections per pixel", fontsize=9)
        row[0].set_ylabel(name)
        for panel in row:
            panel.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(Path(__file__).parent / "local_fields.png"), help='the picture; "": none')
    options = parser.parse_args(arguments)
    images, labels, test_images, test_labels = embedded_digits()
    images, test_images = images.float() / 255, test_images.float() / 255
    nets, found = {}, {}
    for name, local in (("local", True), ("anywhere", False)):
        net = train(network(local, options.seed), images, labels, options.steps, options.seed)
        nets[name], found[name] = net, accuracy(net, test_images, test_labels)
        print(f"{name}: {found[name]:.2%} of the test digits; the furthest connection spans {furthest(net):.1f} pixels")
    assert furthest(nets["local"]) <= RADIUS
    print(connectivity_report(nets["local"]))
    if options.out:
        draw(nets, Path(options.out))
    return found


if __name__ == "__main__":
    main()
