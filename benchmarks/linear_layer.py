"""How long do forward and backward of one linear layer take, by size and density?

    python benchmarks/linear_layer.py
    python benchmarks/linear_layer.py --only 4096x4096 --densities 0.01 --rounds 20

Batch 128, float32, with a bias; gradients of the input, the weight and the bias; no optimizer, no rewiring. All arms have the
same connections:

- dense: ``nn.Linear``;
- ours: ``sparsify(nn.Linear(...), compute="sparse")``;
- SparseProp: the PyPI package ``sparseprop`` (fixed connections, C++ with AVX2);
- CSR: PyTorch's sparse tensors with fixed connections: the product with a CSR tensor, a second CSR tensor of the transpose for
the
  input gradient, and ``torch.sparse.sampled_addmm`` for the weight gradient.

Arms take turns within each round; times are medians, given as ratios to dense. The script compares outputs and gradients before
it times anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import Row, axes, calls, compare, parser, prepare, save, training_pass, why_not
from torch import Tensor, nn

from lightning_deepr import connections, sparsify

SIZES = ("300x784", "1024x1024", "4096x4096")
BATCH = 128


class CSR(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor, layer: CSRLinear) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, values)
        ctx.layer = layer
        return (layer.by_row(values) @ x.t()).t() + bias

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:  # type: ignore[override]
        (x, values), layer = ctx.saved_tensors, ctx.layer
        dx = (layer.by_column(values) @ dy.t()).t()
        dvalues = torch.sparse.sampled_addmm(layer.pattern, dy.t(), x, beta=0.0).values()
        return dx, dvalues, dy.sum(0), None


class CSRLinear(nn.Module):
    """A linear layer with CSR tensors: values in the order of the rows, and a permutation for the transpose's order."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        pattern, self.shape = weight.to_sparse_csr(), weight.shape
        rows, columns = weight.nonzero(as_tuple=True)
        self.permutation = torch.argsort(columns, stable=True)
        starts = torch.cat((torch.zeros(1, dtype=torch.int64), torch.bincount(columns, minlength=weight.shape[1]).cumsum(0)))
        self.row_index = pattern.crow_indices().int(), pattern.col_indices().int()
        self.column_index = starts.int(), rows[self.permutation].int()
        self.values, self.bias = nn.Parameter(pattern.values().clone()), nn.Parameter(bias.clone())
        self.pattern = self.by_row(torch.zeros_like(self.values))

    def by_row(self, values: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(*self.row_index, values.detach(), self.shape, check_invariants=False)

    def by_column(self, values: Tensor) -> Tensor:
        permuted = values.detach()[self.permutation]
        return torch.sparse_csr_tensor(*self.column_index, permuted, self.shape[::-1], check_invariants=False)

    def forward(self, x: Tensor) -> Tensor:
        return CSR.apply(x, self.values, self.bias, self)  # type: ignore[no-any-return, no-untyped-call]


def layers(rows: int, columns: int, density: float) -> dict[str, nn.Module | str]:
    torch.manual_seed(0)
    ours = sparsify(nn.Linear(columns, rows), density, compute="sparse")
    _, places, values = connections(ours)["weight"]
    dense = nn.Linear(columns, rows)
    with torch.no_grad():
        dense.weight.zero_().view(-1)[places] = values
        dense.bias.copy_(ours.bias)
    found: dict[str, nn.Module | str] = {"dense": dense, "ours": ours}
    try:
        from sparseprop.modules import SparseLinear

        found["SparseProp"] = SparseLinear.from_dense(dense)
    except Exception as error:  # a peer may fail to build or import for any reason
        found["SparseProp"] = why_not(error)
    found["CSR"] = CSRLinear(dense.weight.detach(), dense.bias.detach())
    return found


def check(passes: dict[str, Callable[[], None]], modules: dict[str, nn.Module], x: Tensor) -> None:
    """Check that all arms compute the same."""
    expected = modules["dense"](x)
    passes["dense"]()
    gradient = x.grad
    for name, module in modules.items():
        torch.testing.assert_close(module(x), expected, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        passes[name]()
        torch.testing.assert_close(x.grad, gradient, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def measure(size: str, density: float, rounds: int, budget: float) -> list[Row]:
    rows, columns = map(int, size.split("x"))
    found = layers(rows, columns, density)
    modules = {name: layer for name, layer in found.items() if not isinstance(layer, str)}
    x, dy = torch.randn(BATCH, columns, requires_grad=True), torch.randn(BATCH, rows)
    passes = {name: training_pass(layer, x, dy) for name, layer in modules.items()}
    check(passes, modules, x)
    took = compare({name: calls(one) for name, one in passes.items()}, rounds, budget)
    table = []
    for name, layer in found.items():
        row: Row = {
            "layer": size,
            "density": f"{density:.0%}",
            "arm": name,
            "ran": "no",
            "over_dense": layer,
            "over_SparseProp": "",
        }
        if name in took:
            row["ran"] = "yes"
            row["over_dense"] = f"{took[name] / took['dense']:.3g}"
            if "SparseProp" in took:
                row["over_SparseProp"] = f"{took[name] / took['SparseProp']:.3g}"
        table.append(row)
    return table


def main() -> None:
    asked = parser(__doc__, rounds=10)
    asked.add_argument("--only", default=",".join(SIZES), help="layers to measure, as rows x columns")
    asked.add_argument("--densities", default="0.01,0.05,0.1,0.2")
    asked.add_argument("--budget", type=float, default=0.1, help="seconds per arm and round")
    options = asked.parse_args()
    prepare(options)
    densities = [float(one) for one in options.densities.split(",")]
    rows = []
    for size in options.only.split(","):
        for density in densities:
            rows += measure(size, density, options.rounds, options.budget)
    save(rows, options, "linear_layer")

    sizes = options.only.split(",")
    figure, panels = axes(len(sizes))
    for axis, size in zip(panels, sizes, strict=True):
        for name in dict.fromkeys(row["arm"] for row in rows):
            mine = [row for row in rows if row["layer"] == size and row["arm"] == name and row["ran"] == "yes"]
            axis.plot(
                [row["density"] for row in mine], [float(row["over_dense"]) for row in mine], "o-", label=name, markersize=4
            )
        axis.set_yscale("log")
        axis.set_title(f"{size}, batch {BATCH}", fontsize=10)
        axis.set_xlabel("density")
        axis.set_ylabel("forward + backward / dense")
        axis.legend(fontsize=8)
    figure.savefig(options.out / "linear_layer.png", dpi=130)


if __name__ == "__main__":
    main()
