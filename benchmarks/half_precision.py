"""Does ``compute="auto"`` lose time in bfloat16 or float16 on the CPU?

    python benchmarks/half_precision.py
    python benchmarks/half_precision.py --layers "linear 4096" --densities 0.1 --batches 128

It times forward and backward of one converted layer (gradients of the input and of all parameters) with compute="auto",
"dense" and "sparse", and of the layer without conversion, by dtype and density. The dtypes are bfloat16 and float16 weights,
float32 weights under autocast to both, and float32 for comparison. Arms take turns within each round; times are medians,
divided by that of compute="dense" in the same dtype; the last two columns have "dense" over the unconverted layer, and the
unconverted layer over the same in float32. "chose" is what "auto" has computed with.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from common import Row, calls, compare, parser, prepare, save
from torch import Tensor, nn

from lightning_deepr import connectivity_report, sparsify

Layer = tuple[Callable[[], nn.Module], tuple[int, ...]]  # with the shape of its input without the batch
LAYERS: dict[str, Layer] = {
    "linear 256": (lambda: nn.Linear(256, 256), (256,)),
    "linear 1024": (lambda: nn.Linear(1024, 1024), (1024,)),
    "linear 4096": (lambda: nn.Linear(4096, 4096), (4096,)),
    "conv 64": (lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 16, 16)),
    "LSTM 256": (lambda: nn.LSTM(256, 256, batch_first=True), (20, 256)),
}
DTYPES = ("bfloat16", "float16", "autocast bfloat16", "autocast float16")


def arm(net: nn.Module, dtype: str, x: Tensor) -> Callable[[], Any]:
    """Make a forward and backward pass in a dtype."""
    name = dtype.rpartition(" ")[2]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    if dtype.startswith("autocast"):
        within = partial(torch.autocast, "cpu", getattr(torch, name))
    else:
        net, x = net.to(getattr(torch, name)), x.to(getattr(torch, name))
    leaf = x.clone().requires_grad_()

    def run() -> None:
        leaf.grad = None
        net.zero_grad()
        with within():
            y = net(leaf)
        y = y[0] if isinstance(y, tuple) else y
        y.backward(torch.ones_like(y))

    return run


def measure(layer: str, dtype: str, density: float, batch: int, options: Any) -> Row:
    make, shape = LAYERS[layer]
    torch.manual_seed(0)
    x = torch.randn(batch, *shape)
    nets = {compute: sparsify(make(), density, compute=compute) for compute in ("auto", "dense", "sparse")}
    arms = {name: calls(arm(net, dtype, x)) for name, net in nets.items()}
    arms["layer"] = calls(arm(make(), dtype, x))
    arms["float32"] = calls(arm(make(), "float32", x))
    took = compare(arms, options.rounds, options.budget)
    return {
        "layer": layer,
        "dtype": dtype,
        "density": density,
        "batch": batch,
        "chose": " ".join(sorted({row["compute"] for row in connectivity_report(nets["auto"])})),
        "auto / dense": round(took["auto"] / took["dense"], 2),
        "sparse / dense": round(took["sparse"] / took["dense"], 2),
        "dense / unconverted": round(took["dense"] / took["layer"], 2),
        "unconverted / its float32": round(took["layer"] / took["float32"], 2),
        "dense ms": round(1e3 * took["dense"], 3),
    }


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--layers", default=",".join(LAYERS))
    asked.add_argument("--dtypes", default=",".join(DTYPES))
    asked.add_argument("--densities", default="0.01,0.1")
    asked.add_argument("--batches", default="16,128")
    asked.add_argument("--budget", type=float, default=0.05, help="seconds per arm and round")
    options = asked.parse_args()
    prepare(options)
    rows = []
    for layer in options.layers.split(","):
        for dtype in options.dtypes.split(","):
            for density in map(float, options.densities.split(",")):
                for batch in map(int, options.batches.split(",")):
                    rows.append(measure(layer, dtype, density, batch, options))
                    print(rows[-1], flush=True)
    save(rows, options, "half_precision")


if __name__ == "__main__":
    main()
