"""Draw the picture of docs/architecture.md. ``python docs/images/architecture.py`` writes architecture.svg beside this file.

An argument names another file to write, for example ``architecture.png``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, PALE = "#1b2838", "#5a6b7c"
COLOURS = {"state": "#fde9c8", "package": "#dcebf7", "yours": "#eeeeee", "disk": "#e0f0dc"}

# title, text, kind, x and y of the centre, width, height
BOXES = {
    "module": ("your nn.Module", "Linear, Conv, LSTM, attention, ...", "yours", 1.6, 5.95, 2.7, 0.85),
    "conversion": (
        "conversion/",
        "which tensors, how many connections each,\nwhere they start: one record per kind of layer",
        "package", 6.1, 5.95, 3.7, 0.95,
    ),
    "weights": (
        "weights/: a converted weight",
        "theta [K], the only parameter of the weight;\nplaces [K], signs [K] and born [K] beside it",
        "state", 6.1, 3.85, 3.7, 0.95,
    ),
    "compute": (
        "compute/",
        "forward and backward of a layer:\nfrom its connections, or by\na transient dense weight",
        "package", 1.6, 3.85, 2.7, 1.2,
    ),
    "optimizer": ("your optimizer", "its state has theta's shape: K", "yours", 1.6, 1.75, 2.7, 0.85),
    "training": (
        "training/ and methods/",
        "after each optimizer step: L1, noise,\nsign test, re-activation",
        "package", 6.1, 1.75, 3.7, 0.95,
    ),
    "files": ("files/", "state_dict and sparse file:\nsome 6 bytes per connection", "disk", 10.6, 3.85, 2.7, 0.95),
    "outside": ("zoo/  hub/  export/", "trained models, Hugging Face Hub,\ndense, CSR, ONNX, C", "disk", 10.6, 5.95, 2.7, 0.95),
    "bottom": (
        "algorithm/ and kernels/",
        "Algorithms 1 and 2 on plain tensors;\nthe same, compiled for CPU and GPU",
        "package", 10.6, 1.75, 2.7, 0.95,
    ),
}  # fmt: skip

# the two ends (box, side, shift as a fraction of the width or height), the text and its place
ARROWS = [
    (("module", "right", 0), ("conversion", "left", 0), "sparsify(net),\nor the callback", (3.6, 6.28)),
    (("conversion", "bottom", 0), ("weights", "top", 0), "parametrizes the weight", (7.05, 4.9)),
    (("weights", "left", 0.25), ("compute", "right", 0.2), "theta, places, signs", (3.6, 4.28)),
    (("compute", "right", -0.2), ("weights", "left", -0.25), "gradient [K]", (3.6, 3.43)),
    (("weights", "bottom", -0.42), ("optimizer", "top", 0.2), "theta and its gradient", (2.35, 2.8)),
    (("optimizer", "top", 0.4), ("weights", "bottom", -0.28), "the step", (4.55, 2.75)),
    (("optimizer", "right", 0), ("training", "left", 0), "a hook of\noptimizer.step()", (3.6, 2.08)),
    (("training", "top", 0), ("weights", "bottom", 0), "reborn slots: another place,\nits sign, theta 0", (7.2, 2.78)),
    (
        ("training", "bottom", -0.35), ("optimizer", "bottom", 0.2),
        "reborn slots: the state that the optimizer starts with", (3.4, 0.66),
    ),
    (("training", "right", 0), ("bottom", "left", 0), "one call for\nall tensors", (8.6, 2.08)),
    (("weights", "right", 0.2), ("files", "left", 0.2), "save_sparse", (8.6, 4.2)),
    (("files", "left", -0.2), ("weights", "right", -0.2), "load_state_dict", (8.6, 3.48)),
    (("files", "top", -0.15), ("outside", "bottom", -0.15), "", (0, 0)),
    (("outside", "bottom", 0.15), ("files", "top", 0.15), "", (0, 0)),
]  # fmt: skip


def end(box: str, side: str, shift: float) -> tuple[float, float]:
    _, _, _, x, y, width, height = BOXES[box]
    gap = 0.05
    return {
        "left": (x - width / 2 - gap, y + shift * height),
        "right": (x + width / 2 + gap, y + shift * height),
        "top": (x + shift * width, y + height / 2 + gap),
        "bottom": (x + shift * width, y - height / 2 - gap),
    }[side]


def draw(target: Path) -> None:
    figure = Figure(figsize=(12.2, 6.1))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, 12.2)
    axes.set_ylim(0.45, 6.55)
    axes.axis("off")
    for title, text, kind, x, y, width, height in BOXES.values():
        style = "round,pad=0,rounding_size=0.12"
        axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - height / 2), width, height, boxstyle=style, facecolor=COLOURS[kind], edgecolor=INK, lw=1
            )
        )
        axes.text(x, y + height / 2 - 0.12, title, ha="center", va="top", fontsize=10.5, weight="bold", color=INK)
        axes.text(x, y + height / 2 - 0.39, text, ha="center", va="top", fontsize=8.5, color=INK, linespacing=1.3)
    for (start, start_side, start_shift), (stop, stop_side, stop_shift), text, place in ARROWS:
        around = "arc3" if {start_side, stop_side} != {"bottom"} else "arc3,rad=-0.22"
        axes.add_patch(
            FancyArrowPatch(
                end(start, start_side, start_shift), end(stop, stop_side, stop_shift),
                arrowstyle="-|>", mutation_scale=12, color=INK, lw=1.2, connectionstyle=around,
            )
        )  # fmt: skip
        axes.text(*place, text, ha="center", va="center", fontsize=8, color=PALE, linespacing=1.25)
    matplotlib.rcParams["svg.hashsalt"] = "architecture"  # the same picture gives the same file
    figure.savefig(target, dpi=110, facecolor="white", metadata={"Date": None} if target.suffix == ".svg" else None)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
