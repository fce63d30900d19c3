"""Draw front.png, the picture of the front page, from files of the repository: nothing is trained.

    python docs/images/front.py

Left: connections per input pixel of LeNet-300-100 at 1 %, at the start of a training and in the zoo's trained file. Right: test
accuracy over connectivity of all methods, each tuned with the same budget, from ``benchmarks/comparison/results.csv``.
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from pathlib import Path

import matplotlib as mpl
import torch

from lightning_deepr import connections, sparsify, zoo
from lightning_deepr.models import LeNet300100

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "comparison" / "results.csv"
MODEL = "lenet300_100.deepr_1pct_mnist"
ARMS = {
    "deepr": ("DeepR", "#d1495b", 2.6),
    "rigl": ("RigL", "#2e6f95", 1.5),
    "set": ("SET", "#6a994e", 1.5),
    "fixed_random_free_signs": ("fixed random places", "#8d99ae", 1.5),
}


def per_pixel(net: torch.nn.Module) -> torch.Tensor:
    """Count the connections of each input of fc1."""
    shape, places, _ = connections(net)["fc1.weight"]
    return torch.bincount(places % shape[1], minlength=shape[1]).view(28, 28)


def accuracies() -> dict[str, dict[float, list[float]]]:
    """Read {arm: {connectivity: test accuracies}} of the tuned methods."""
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    with RESULTS.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["part"] == "tuned" and row["split"] == "test":
                found[row["arm"]][float(row["connectivity"])].append(float(row["accuracy"]))
    return found


def main() -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    trained = zoo.load(MODEL)
    count = {name: len(places) for name, (_, places, _) in connections(trained).items()}
    start, end = per_pixel(sparsify(LeNet300100(), count, seed=0)), per_pixel(trained)

    figure, axes = plt.subplots(1, 3, figsize=(11.6, 3.7), gridspec_kw={"width_ratios": [1, 1, 1.35]}, layout="constrained")
    top = int(end.max())
    for axis, image, title in zip(axes, (start, end), ("connections per pixel, before", "… and after training"), strict=False):
        axis.imshow(image, cmap="magma", vmin=0, vmax=top)
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([])
    axis, found = axes[2], accuracies()
    dense = statistics.mean(found["dense"][1.0])
    axis.axhline(dense, color="#444", lw=1, ls=":")
    axis.annotate("dense, 266,200 weights", (20, dense), ha="right", va="bottom", fontsize=9, color="#444")
    for arm, (label, color, width) in ARMS.items():
        points = sorted(found[arm].items())
        means = [statistics.mean(values) for _, values in points]
        axis.plot([100 * c for c, _ in points], means, "o-", color=color, lw=width, ms=width * 2, label=label)
    axis.set_xscale("log")
    axis.set_xticks([1, 2, 5, 10, 20], ["1 %", "2 %", "5 %", "10 %", "20 %"])
    axis.minorticks_off()
    axis.set_title("MNIST test accuracy, %, sparse throughout")
    axis.set_xlabel("connections, LeNet-300-100")
    axis.legend(frameon=False, loc="lower right", fontsize=9.5)
    figure.savefig(HERE / "front.png", dpi=110)


if __name__ == "__main__":
    main()
