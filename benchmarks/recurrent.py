"""How long do forward and backward of an LSTM or GRU layer over a sequence take, by hidden size and density?

    python benchmarks/recurrent.py
    python benchmarks/recurrent.py --layers GRU --inputs 256 --hidden 400 --densities 0.01,0.05,0.1,0.2 --batches 1,8,32,128
    python benchmarks/recurrent.py --hidden 32,100,200,400,800 --densities 0.02,0.1,0.3 --batches 1,8,32,128 --fit

float32, 50 steps; gradients of both weights, the biases and the input; no optimizer, no rewiring. All arms have the same
connections:

- dense: ``nn.LSTM``, which PyTorch computes with oneDNN, or ``nn.GRU``, which it computes with its own code;
- dense, no oneDNN: PyTorch's own LSTM (``torch.backends.mkldnn.flags(enabled=False)``);
- converted, dense: ``sparsify(layer, compute="dense")``, which builds its weights once per forward;
- converted, sparse: ``compute="sparse"``.

``auto`` is the choice of ``compute="auto"``. Arms take turns within each round; times are medians, given as ratios to dense.
The script compares outputs and gradients before it times anything. ``--fit`` prints the constants of the rule behind ``auto``,
fitted to this run.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from common import Row, axes, calls, compare, parser, prepare, save
from torch import Tensor, nn

from lightning_deepr import connections, sparsify
from lightning_deepr.compute import recurrent

STEPS = 50
KINDS: dict[str, type[nn.RNNBase]] = {"LSTM": nn.LSTM, "GRU": nn.GRU}


def layers(kind: str, columns: int, hidden: int, density: float) -> dict[str, nn.RNNBase]:
    torch.manual_seed(0)
    found: dict[str, Any] = {"dense": KINDS[kind](columns, hidden)}
    start = found["dense"].state_dict()
    for name in ("dense", "sparse"):
        layer = KINDS[kind](columns, hidden)
        layer.load_state_dict(start)
        found[f"converted, {name}"] = sparsify(layer, density, compute=name)
    with torch.no_grad():
        for name, (_, places, values) in connections(found["converted, dense"]).items():
            getattr(found["dense"], name).zero_().view(-1)[places] = values
    found["dense, no oneDNN"] = found["dense"]
    arms = ("dense", "dense, no oneDNN", "converted, dense", "converted, sparse")
    return {name: found[name] for name in arms if kind == "LSTM" or name != "dense, no oneDNN"}


def training_pass(name: str, layer: nn.RNNBase, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
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
    """Check that all arms compute the same."""
    expected, gradient = passes["dense"](), x.grad
    for name, run in passes.items():
        torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(x.grad, gradient, rtol=1e-3, atol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def measure(kind: str, columns: int, hidden: int, density: float, batch: int, rounds: int, budget: float) -> list[Row]:
    x, dy = torch.randn(STEPS, batch, columns, requires_grad=True), torch.randn(STEPS, batch, hidden)
    found = layers(kind, columns, hidden, density)
    passes = {name: training_pass(name, layer, x, dy) for name, layer in found.items()}
    check(passes, x)
    took = compare({name: calls(run) for name, run in passes.items()}, rounds, budget)
    count = sum(len(places) for _, places, _ in connections(found["converted, sparse"]).values())
    auto = "sparse" if recurrent.prefers_sparse(kind, batch, columns, hidden, count) else "dense"
    return [
        {
            "layer": kind,
            "batch": batch,
            "input": columns,
            "hidden": hidden,
            "density": f"{density:.0%}",
            "connections": count,
            "arm": name,
            "us_per_step": f"{took[name] / STEPS * 1e6:.4g}",
            "over_dense": f"{took[name] / took['dense']:.3g}",
            "auto": auto,
        }
        for name in found
    ]


def judge(rows: list[Row], kind: str) -> str:
    """Judge the choice between the two ways to compute a converted layer."""
    pairs = list(by_setting(rows, kind))
    lost = [sparse / dense if row["auto"] == "sparse" else dense / sparse for row, sparse, dense in pairs]
    return (
        f"{kind}: auto picks the faster compute in {sum(one <= 1 for one in lost)} of {len(lost)}; "
        f"at worst {max(lost):.2f} times the other."
    )


def by_setting(rows: list[Row], kind: str) -> Iterator[tuple[Row, float, float]]:
    """Iterate over the settings, with the microseconds per step of a converted layer, sparse and dense."""
    taken = {
        (row["batch"], row["input"], row["hidden"], row["density"], row["arm"]): row for row in rows if row["layer"] == kind
    }
    for (*setting, arm), row in taken.items():
        if arm == "converted, sparse":
            yield row, float(row["us_per_step"]), float(taken[(*setting, "converted, dense")]["us_per_step"])


def fit(rows: list[Row], kind: str) -> str:
    """Fit the constants of the rule by least squares of log time."""
    from scipy.optimize import least_squares

    found = list(by_setting(rows, kind))
    settings = [tuple(row[key] for key in ("batch", "input", "hidden", "connections")) for row, _, _ in found]
    lines = []
    for name, work, times in (
        ("SPARSE", [recurrent.sparse_terms(*setting) for setting in settings], [sparse for _, sparse, _ in found]),
        ("DENSE", [recurrent.dense_terms(kind, *setting[:3]) for setting in settings], [dense for _, _, dense in found]),
    ):
        terms, target = np.array(work), np.log(times)
        start = np.log(np.exp(target).mean() / terms.mean(0) / terms.shape[1])

        def error(exponents: Any, terms: Any = terms, target: Any = target) -> Any:
            return np.log(terms @ np.exp(exponents)) - target

        best = least_squares(error, start, loss="soft_l1", f_scale=0.2).x
        lines.append(f"{name}[{kind!r}] = ({', '.join(f'{value:.3g}' for value in np.exp(best))})")
    return "\n".join(lines)


def main() -> None:
    asked = parser(__doc__, rounds=7)
    asked.add_argument("--layers", default="LSTM,GRU")
    asked.add_argument("--fit", action="store_true", help="print constants for lightning_deepr/compute/recurrent.py")
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
    kinds = options.layers.split(",")
    densities = [float(one) for one in options.densities.split(",")]
    for setting in product(kinds, inputs, sizes, densities, batches):
        rows += measure(*setting, options.rounds, options.budget)
    save(rows, options, "recurrent")
    for kind in kinds:
        print("\n" + judge(rows, kind))
        if options.fit:
            print(fit(rows, kind))
    draw(rows, options)


def draw(rows: list[Row], options: argparse.Namespace) -> None:
    shown = list(dict.fromkeys((row["layer"], row["batch"], row["input"]) for row in rows))
    figure, panels = axes(len(shown), columns=2 if len(shown) == 4 else 3)
    for axis, (kind, batch, columns) in zip(panels, shown, strict=True):
        mine = [row for row in rows if (row["layer"], row["batch"], row["input"]) == (kind, batch, columns)]
        lines = dict.fromkeys((row["arm"], row["density"]) for row in mine if row["arm"].startswith("converted"))
        for arm, density in lines:
            line = [row for row in mine if (row["arm"], row["density"]) == (arm, density)]
            style = "o-" if arm == "converted, sparse" else "o:"
            values = [float(row["over_dense"]) for row in line]
            axis.plot([row["hidden"] for row in line], values, style, label=f"{arm}, {density}", markersize=4)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(f"{kind}, input {columns}, batch {batch}, {STEPS} steps", fontsize=10)
        axis.set_xlabel("hidden size")
        axis.set_ylabel("forward + backward / dense")
        axis.legend(fontsize=7)
    figure.savefig(options.out / "recurrent.png", dpi=130)


if __name__ == "__main__":
    main()
