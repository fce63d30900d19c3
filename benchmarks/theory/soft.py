"""Does soft-DEEP R sample the theoretical density?

    python benchmarks/theory/soft.py
    python benchmarks/theory/soft.py --only two_paths --duration 20

512 independent chains are the rows of one ``nn.Linear`` with 1 or 2 inputs; each row has its own energy term. The wanted
connectivity is p = 40 %, and ``SoftDeepR`` computes theta_min from p, alpha and T. The script compares binned theta (24 bins in
one dimension, 10 x 10 in two, including bins below 0) with the density from quadrature. A run lasts the same time (steps *
learning rate) at every learning rate, after a start of 15 units that does not count. Everything runs through
``SoftDeepR(...).attach`` and torch's SGD. README.md describes the method.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from common import Row, axes, prepare, save  # noqa: E402
from densities import ENERGIES, Bins, Target, soft_bins  # noqa: E402
from divergence import Divergence, Histograms, divergence, extrapolated  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from lightning_deepr import SoftDeepR  # noqa: E402
from lightning_deepr.weights.find import converted_tensors  # noqa: E402

ALPHA, TEMPERATURE, WANTED = 0.8, 0.5, 0.4
THETA_MIN = -TEMPERATURE * (1 - WANTED) / (ALPHA * WANTED)
RATES = (0.025, 0.0025, 0.00025)
CHAINS, BEGINNING, BETWEEN = 512, 15.0, 0.5  # in units of time: the start that does not count, the time between snapshots
DIMENSIONS = {"flat": 1, "quadratic": 1, "double_well": 1, "correlated": 2, "two_paths": 2}


class SoftChains:
    """Chains that are the rows of one layer; each row has its own energy term."""

    def __init__(
        self, chains: int, dimensions: int, target: Target, lr: float, seed: int, theta_min: float | None = None
    ) -> None:
        torch.manual_seed(seed)  # seeds the layer's initialization
        callback = SoftDeepR(WANTED, temperature=target.temperature, l1=target.alpha, theta_min=theta_min, seed=seed)
        self.layer = callback.prepare(nn.Linear(dimensions, chains, bias=False))
        self.optimizer, self.energy = torch.optim.SGD(self.layer.parameters(), lr=lr), target.energy
        self.rewiring = callback.attach(self.layer, self.optimizer)
        converted = next(converted_tensors(self.layer))
        self.theta, self.slots = converted.theta, converted.slots
        self.signs = self.slots.signs_at(torch.arange(chains * dimensions)).view(chains, dimensions)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.energy(self.layer.weight * self.signs).sum().backward()
        self.optimizer.step()


def bins_of(target: Target, dimensions: int, theta_min: float = THETA_MIN) -> Bins:
    below, above = (8, 16) if dimensions == 1 else (4, 6)
    return soft_bins(target, theta_min, dimensions, below, above)


def run(target: Target, dimensions: int, lr: float, duration: float, seed: int, chains: int = CHAINS) -> dict[str, Any]:
    """Sample, and compare with the truth."""
    started = time.perf_counter()
    sampler, bins = SoftChains(chains, dimensions, target, lr, seed), bins_of(target, dimensions)
    for _ in range(round(BEGINNING / lr)):
        sampler.step()
    counts, numbers = Histograms(chains, bins.probabilities.numel()), torch.arange(chains)
    every = max(1, round(BETWEEN / lr))
    active = 0.0
    for _ in range(int(duration / BETWEEN)):
        for _ in range(every):
            sampler.step()
        theta = sampler.theta.detach()
        active += float((theta >= 0).double().mean()) / int(duration / BETWEEN)
        counts.add(numbers, bins.numbers(theta))
    sampler.rewiring.remove()
    sampled = counts.frequencies()
    return {
        "divergence": divergence(sampled, bins.probabilities),
        "bins": bins,
        "frequencies": sampled,
        "sampled": sampled.mean(0).view(bins.probabilities.shape),
        "error": (sampled.std(0) / chains**0.5).view(bins.probabilities.shape),
        "active": active,
        "seconds": time.perf_counter() - started,
    }


def true_share(bins: Bins, below: int) -> float:
    """Compute the theory's mean share of active connections."""
    p = bins.probabilities
    return float(sum(p.movedim(d, 0)[below:].sum() for d in range(p.dim())) / p.dim())


def row(name: str, lr: float | str, bins: Bins, d: Divergence, active: float | None) -> Row:
    dimensions = DIMENSIONS[name]
    return {
        "energy": name,
        "dimensions": dimensions,
        "learning_rate": lr,
        "KL": f"{d.found:.2e}",
        "sampling_alone": f"{d.expected:.2e}",
        "limit_95%": f"{d.limit:.2e}",
        "p": f"{d.p:.3f}",
        "bias": f"{d.bias:+.1e} ± {d.error:.1e}",
        "independent_samples": round(d.effective),
        "active": "" if active is None else f"{active:.2%}",
        "active_in_theory": f"{true_share(bins, 8 if dimensions == 1 else 4):.2%}",
        "within": "yes" if d.within else "no",
    }


def draw(results: dict[str, dict[float, dict[str, Any]]], out: Path) -> None:
    figure, panels = axes(len(results) + 1)
    for panel, (name, mine) in zip(panels, results.items(), strict=False):
        bins: Bins = next(iter(mine.values()))["bins"]
        if DIMENSIONS[name] == 1:
            edges = torch.cat([torch.tensor([THETA_MIN], dtype=torch.float64), bins.edges[0]])
            edges = torch.cat(
                [edges, 2 * edges[-1:] - edges[-2:-1]]
            )  # the last bin is open: it is drawn as wide as its neighbour
            panel.stairs(bins.probabilities / edges.diff(), edges, color="#dddddd", fill=True, label="theory")
            for lr, found in mine.items():
                panel.stairs(found["sampled"] / edges.diff(), edges, linewidth=0.9, label=f"learning rate {lr:g}")
            panel.set(xlabel="theta", ylabel="density", title=name)
        else:
            for lr, found in list(mine.items())[:: max(len(mine) - 1, 1)]:
                x: Tensor = bins.probabilities.flatten()
                panel.errorbar(
                    x, found["sampled"].flatten(), 2 * found["error"].flatten(), fmt=".", markersize=4, label=f"{lr:g}"
                )
            panel.loglog(x.sort().values, x.sort().values, color="black", linewidth=0.6)
            panel.set(xlabel="probability of a cell in theory", ylabel="sampled", title=f"{name}, 10 x 10 cells")
        panel.legend(fontsize=7)
    last = panels[-1]
    for name, mine in results.items():
        line = last.loglog(list(mine), [f["divergence"].found for f in mine.values()], "o-", markersize=4, label=name)
        last.loglog(list(mine), [f["divergence"].limit for f in mine.values()], ":", color=line[0].get_color(), linewidth=0.8)
    last.set(xlabel="learning rate", ylabel="KL distance", title="dotted: 95 % without bias")
    last.legend(fontsize=7)
    figure.savefig(out / "soft.png", dpi=110)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--duration", type=float, default=20.0, help="steps times learning rate of a chain")
    asked.add_argument("--only", default="", help="energies, separated by commas")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--out", type=Path, default=HERE)
    options = asked.parse_args()
    prepare(options)
    rows: list[Row] = []
    results: dict[str, dict[float, dict[str, Any]]] = {}
    for name in [name for name in options.only.split(",") if name] or list(ENERGIES):
        target = Target(ENERGIES[name], ALPHA, TEMPERATURE)
        for i, lr in enumerate(RATES):
            found = run(target, DIMENSIONS[name], lr, options.duration, options.seed + i)
            results.setdefault(name, {})[lr] = found
            rows.append(row(name, lr, found["bins"], found["divergence"], found["active"]))
            print(*rows[-1].values(), f"{found['seconds']:.0f} s", file=sys.stderr, flush=True)
        last = [(lr, found["frequencies"]) for lr, found in results[name].items()][-2:]
        limit = divergence(extrapolated(*last), found["bins"].probabilities)
        rows.append(row(name, "extrapolated to 0", found["bins"], limit, None))
        print(*rows[-1].values(), file=sys.stderr, flush=True)
    save(rows, options, "soft")
    draw(results, options.out)


if __name__ == "__main__":
    main()
