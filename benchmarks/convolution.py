"""From which connectivity on is a sparse 2-d convolution faster than a dense one, on the CPU?

    python benchmarks/convolution.py                     # table, convolution.csv and convolution.png beside this file
    python benchmarks/convolution.py --batches 128 --connectivities 0.05

It times forward and backward of one layer at 1 to 20 % connectivity. The arms are:

- dense: ``nn.Conv2d``;
- transient weight: the same layer converted with ``compute="dense"``, which builds its weight from the K connections in each
  forward;
- sparse: the same layer computed from the K connections alone.

The layers are both convolutions of the CIFAR-10 tutorial CNN (the first has no input gradient) and a 3x3 convolution as in the
third stage of a ResNet. Arms take turns within each round. Times are medians over all passes; compare only ratios within one
run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from common import Row, axes, calls, compare, parser, prepare, save
from torch import Tensor, nn

from lightning_deepr import sparsify
from lightning_deepr.compute.conv import conv2d
from lightning_deepr.weights.find import slots_of


class Layer(NamedTuple):
    title: str
    inputs: int
    outputs: int
    kernel: int
    pixels: int
    first: bool = False  # whether it is its network's first layer, whose input needs no gradient


LAYERS = {
    "first": Layer("CIFAR CNN, first: 5x5, 3 to 64, 24x24", 3, 64, 5, 24, True),
    "second": Layer("CIFAR CNN, second: 5x5, 64 to 64, 12x12", 64, 64, 5, 12),
    "resnet": Layer("ResNet: 3x3, 256 to 256, 8x8", 256, 256, 3, 8),
}


class Sparse(nn.Module):
    """A converted ``nn.Conv2d`` that computes from its connections."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer, self.slots = layer, slots_of(layer, "weight")

    def forward(self, x: Tensor) -> Tensor:
        theta = self.layer.parametrizations["weight"].original  # type: ignore[index, union-attr]
        how = self.layer.stride, self.layer.padding, self.layer.dilation
        return conv2d(x, theta, self.layer.bias, self.slots, *how)


def measure(layer: Layer, batch: int, connectivities: list[float], rounds: int, budget: float) -> list[Row]:
    def new() -> nn.Conv2d:
        return nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, padding=layer.kernel // 2)

    dense = new()
    x = torch.randn(batch, layer.inputs, layer.pixels, layer.pixels, requires_grad=not layer.first)
    dy = torch.randn_like(dense(x)).detach()
    arms: dict[tuple[str, float], nn.Module] = {("dense", 1.0): dense}
    for connectivity in connectivities:
        arms["transient weight", connectivity] = sparsify(new(), connectivity, compute="dense")
        arms["sparse", connectivity] = Sparse(sparsify(new(), connectivity, compute="dense"))

    def passes(module: nn.Module) -> None:
        module(x).backward(dy)

    def clear() -> None:
        x.grad = None
        for module in arms.values():
            module.zero_grad()

    blocks = {
        f"{name} {connectivity}": calls(lambda m=module: passes(m), clear) for (name, connectivity), module in arms.items()
    }  # type: ignore[misc]
    took = compare(blocks, rounds, budget)
    rows = []
    for name, connectivity in arms:
        seconds = took[f"{name} {connectivity}"]
        row: Row = {
            "layer": layer.title,
            "batch": batch,
            "arm": name,
            "connectivity": f"{connectivity:.0%}",
        }
        row["over_dense"] = f"{seconds / took['dense 1.0']:.3g}"
        rows.append(row)
    return rows


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--connectivities", default="0.01,0.02,0.05,0.1,0.2")
    asked.add_argument("--batches", default="128,16")
    asked.add_argument("--only", default=",".join(LAYERS), help="layers to measure, out of first,second,resnet")
    asked.add_argument("--budget", type=float, default=0.25, help="seconds per arm and round")
    options = asked.parse_args()
    prepare(options)
    connectivities = [float(value) for value in options.connectivities.split(",")]
    settings = [(LAYERS[key], int(batch)) for batch in options.batches.split(",") for key in options.only.split(",")]
    rows = [row for layer, batch in settings for row in measure(layer, batch, connectivities, options.rounds, options.budget)]
    save(rows, options, "convolution")

    figure, panels = axes(len(settings))
    for axis, (layer, batch) in zip(panels, settings, strict=True):
        mine = [row for row in rows if row["layer"] == layer.title and row["batch"] == batch]
        for name, color in (("transient weight", "#ee7733"), ("sparse", "#4477aa")):
            points = [row for row in mine if row["arm"] == name]
            percent = [float(row["connectivity"].rstrip("%")) for row in points]
            axis.plot(percent, [float(row["over_dense"]) for row in points], "o-", color=color, label=name)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set(
            title=f"{layer.title}\nbatch {batch}", xlabel="connectivity in %", ylabel="forward + backward / dense", xscale="log"
        )
        axis.set_xticks(percent, labels=[f"{value:g}" for value in percent])
        axis.minorticks_off()
        axis.title.set_fontsize(9)
        axis.set_ylim(bottom=0)
    panels[0].legend(fontsize=8)
    figure.savefig(options.out / "convolution.png", dpi=130)


if __name__ == "__main__":
    main()
