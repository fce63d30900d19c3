"""How long are forward and backward of an LSTM layer over a sequence, by hidden size and density?

    python benchmarks/recurrent.py
    python benchmarks/recurrent.py --inputs 256 --hidden 400 --densities 0.01,0.05,0.1,0.2 --batches 1,8,32,128

float32, 50 steps; gradients of both weights, the biases and the input; no optimizer, no rewiring. Arms, all with the same connections:

- dense: ``nn.LSTM``, for which PyTorch takes oneDNN;
- dense, no oneDNN: the same with PyTorch's own LSTM (``torch.backends.mkldnn.flags(enabled=False)``);
- converted, dense: ``sparsify(nn.LSTM(...), compute="dense")``, whose weights are built once per forward;
- converted, sparse: ``compute="sparse"``.

``auto`` is what ``compute="auto"`` picks. Arms take turns within each round; medians, as ratios to dense. Before anything is timed,
outputs and gradients are compared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from common import Row, axes, calls, compare, parser, prepare, save
from torch import Tensor, nn

from lightning_deepr import connections, sparsify
from lightning_deepr.compute.recurrent import prefers_sparse

STEPS = 50


def layers(columns: int, hidden: int, density: float) -> dict[str, nn.LSTM]:
    torch.manual_seed(0)
    found: dict[str, Any] = {"dense": nn.LSTM(columns, hidden)}
    start = found["dense"].state_dict()
    for name in ("dense", "sparse"):
        layer = nn.LSTM(columns, hidden)
        layer.load_state_dict(start)
        found[f"converted, {name}"] = sparsify(layer, density, compute=name)
    with torch.no_grad():
        for name, (_, places, values) in connections(found["converted, dense"]).items():
            getattr(found["dense"], name).zero_().view(-1)[places] = values
    found["dense, no oneDNN"] = found["dense"]
    return {name: found[name] for name in ("dense", "dense, no oneDNN", "converted, dense", "converted, sparse")}


def training_pass(name: str, layer: nn.LSTM, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    parameters = list(layer.parameters())

    def run() -> Tensor:
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        own = torch.backends.mkldnn.flags(enabled=False) if name == "dense, no oneDNN" else contextlib.nullcontext()
        with own:
            y, _ = layer(x)
            y.backward(dy)
        return y

    return run


def check(passes: dict[str, Callable[[], Tensor]], x: Tensor) -> None:
    """The arms compute the same."""
    expected, gradient = passes["dense"](), x.grad
    for name, run in passes.items():
        torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(x.grad, gradient, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def measure(columns: int, hidden: int, density: float, batch: int, rounds: int, budget: float) -> list[Row]:
    x, dy = torch.randn(STEPS, batch, columns, requires_grad=True), torch.randn(STEPS, batch, hidden)
    found = layers(columns, hidden, density)
    passes = {name: training_pass(name, layer, x, dy) for name, layer in found.items()}
    check(passes, x)
    took = compare({name: calls(run) for name, run in passes.items()}, rounds, budget)
    count = sum(len(places) for _, places, _ in connections(found["converted, sparse"]).values())
    auto = "sparse" if prefers_sparse(batch, columns, hidden, count) else "dense"
    return [
        {
            "batch": batch,
            "input": columns,
            "hidden": hidden,
            "density": f"{density:.0%}",
            "arm": name,
            "over_dense": f"{took[name] / took['dense']:.3g}",
            "auto": auto,
        }
        for name in found
    ]


def main() -> None:
    asked = parser(__doc__, rounds=7)
    asked.add_argument("--inputs", default="39,256")
    asked.add_argument("--hidden", default="100,200,400,800,1024")
    asked.add_argument("--densities", default="0.01,0.05,0.2")
    asked.add_argument("--batches", default="32")
    asked.add_argument("--budget", type=float, default=0.1, help="seconds per arm and round")
    options = asked.parse_args()
    prepare(options)
    inputs, sizes, batches = (
        [int(one) for one in text.split(",")] for text in (options.inputs, options.hidden, options.batches)
    )
    rows = []
    for batch in batches:
        for columns in inputs:
            for density in map(float, options.densities.split(",")):
                for hidden in sizes:
                    rows += measure(columns, hidden, density, batch, options.rounds, options.budget)
    save(rows, options, "recurrent")

    shown = [(batch, columns) for batch in batches for columns in inputs]
    figure, panels = axes(len(shown))
    for axis, (batch, columns) in zip(panels, shown, strict=True):
        mine = [row for row in rows if row["batch"] == batch and row["input"] == columns]
        kinds = dict.fromkeys((row["arm"], row["density"]) for row in mine if row["arm"].startswith("converted"))
        for arm, density in kinds:
            line = [row for row in mine if (row["arm"], row["density"]) == (arm, density)]
            style = "o-" if arm == "converted, sparse" else "o:"
            values = [float(row["over_dense"]) for row in line]
            axis.plot([row["hidden"] for row in line], values, style, label=f"{arm}, {density}", markersize=4)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(f"input {columns}, batch {batch}, {STEPS} steps", fontsize=10)
        axis.set_xlabel("hidden size")
        axis.set_ylabel("forward + backward / dense")
        axis.legend(fontsize=7)
    figure.savefig(options.out / "recurrent.png", dpi=130)


if __name__ == "__main__":
    main()
