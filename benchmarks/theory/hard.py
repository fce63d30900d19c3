"""Does DEEP R sample connectivities and weights from the theoretical distribution?

    python benchmarks/theory/hard.py
    python benchmarks/theory/hard.py --only correlated --duration 60

"chains" has 64 tensors of N = 4 weights with exactly K active ones, all stepped together. It compares the distribution over the
connectivities (6 at K = 2), and the joint distribution over them and the thirds of both active theta (54 cells). "layer" has 32
tensors of 128 x 4 weights with 256 connections each; each row of 4 has its own energy term, and the rows compete for
connections. It compares the distribution over the 16 subsets of a row. It is 80 times cheaper per row, so that it detects a
smaller bias.

A run lasts the same time (steps * learning rate) at every learning rate, after a start of 10 units that does not count.
Everything runs through ``sparsify``, ``DeepR(...).attach`` and a torch optimizer. README.md describes the method.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from chains import Chains  # noqa: E402
from common import Row, axes, prepare, save  # noqa: E402
from densities import (  # noqa: E402
    ENERGIES,
    Target,
    closed_form,
    connectivities,
    group_connectivities,
    pair_bins,
    subsets,
)
from divergence import Divergence, Histograms, divergence  # noqa: E402

N, ALPHA, TEMPERATURE = 4, 0.8, 0.5
RATES = {"chains": (0.1, 0.01, 0.00125), "layer": (0.1, 0.02, 0.0025)}
SHAPES = {"chains": (64, 1), "layer": (32, 128)}
BEGINNING, BETWEEN = 10.0, 0.4  # in units of time: the start that does not count, and the time between snapshots
CHAINS = ("flat", "quadratic", "correlated", "two_paths")
LAYER = ("quadratic", "correlated", "two_paths")
SEPARABLE = ("flat", "quadratic")
SETTINGS = (
    [("chains", name, 2) for name in ("flat", "quadratic", "correlated", "two_paths")]
    + [("chains", "quadratic", 3)]
    + [("layer", name, 2) for name in ("quadratic", "correlated", "two_paths")]
)
MOMENTUM = 0.9
Key = tuple[str, str, int, float]  # layout, energy, K, learning rate


def optimizer_of(kind: str, lr: float) -> tuple[Any, float]:
    """Return a function that makes the optimizer, and the factor of alpha and T that keeps the stationary distribution.

    Under momentum m the effective learning rate of the gradient is lr / (1 - m), while L1 and noise act with the plain lr.
    Therefore lr * (1 - m), alpha / (1 - m) and T / (1 - m) give the same dynamics as lr, alpha, T without momentum.
    """
    if kind == "SGD":
        return lambda p: torch.optim.SGD(p, lr=lr), 1.0
    if kind == "momentum":
        return lambda p: torch.optim.SGD(p, lr=lr * (1 - MOMENTUM), momentum=MOMENTUM), 1 / (1 - MOMENTUM)
    return lambda p: torch.optim.Adam(p, lr=lr), 1.0


def run(
    shape: tuple[int, int],
    target: Target,
    k: int,
    lr: float,
    duration: float,
    seed: int,
    kind: str = "SGD",
    beginning: float = BEGINNING,
) -> dict[str, Any]:
    """Sample, and compare with the truth.

    Args:
        shape: number of tensors and rows of each; one row makes chains.
        target: energy, alpha and T.
        k: active weights of the N in a row (with several rows: on average).
        lr: learning rate.
        duration, beginning: counted and uncounted time in steps * learning rate.
        seed: seed of the start and of all draws.
        kind: name of the optimizer: "SGD" | "momentum" | "Adam".

    Returns:
        the divergence of the connectivities as "c" and, for chains with K = 2, of connectivities and active theta as "c,
        theta"; the frequencies as "sampled"; "truth" and "seconds".
    """
    started = time.perf_counter()
    tensors, groups = shape
    make, factor = optimizer_of(kind, lr)
    chains = Chains(
        tensors,
        groups,
        N,
        k,
        target.energy,
        make,
        alpha=target.alpha * factor,
        temperature=target.temperature * factor,
        seed=seed,
    )
    if groups > 1:
        truth = {"c": group_connectivities(target, N, groups, groups * k)}
        number_of = torch.arange(1 << N)
    else:
        truth = {"c": connectivities(target, N, k)}
        number_of = torch.full((1 << N,), -1)
        for i, c in enumerate(subsets(N, k)):
            number_of[sum(1 << j for j in c)] = i
    pairs = pair_bins(target, N) if groups == 1 and k == 2 else None
    if pairs is not None:
        truth["c, theta"] = pairs.probabilities.flatten()
    counts = {what: Histograms(tensors, true.numel()) for what, true in truth.items()}
    for _ in range(round(beginning / lr)):
        chains.step()
    snapshots, every = int(duration / BETWEEN), max(1, round(BETWEEN / lr))
    bits = 1 << torch.arange(N)
    for _ in range(snapshots):
        for _ in range(every):
            chains.step()
        active, u = chains.state()
        subset = number_of[(active * bits).sum(1)]
        counts["c"].add(chains.tensor_of_row, subset)
        if pairs is not None:
            counts["c, theta"].add(chains.tensor_of_row, pairs.numbers(subset, u))
    chains.close()
    found: dict[str, Any] = {what: divergence(counts[what].frequencies(), true) for what, true in truth.items()}
    found["sampled"] = {what: counts[what].frequencies() for what in truth}
    found["truth"], found["seconds"] = truth, time.perf_counter() - started
    return found


def row(layout: str, name: str, k: int, kind: str, lr: float, what: str, found: Divergence) -> Row:
    return {
        "layout": layout,
        "energy": name,
        "K": f"{k} of {N}",
        "optimizer": kind,
        "learning_rate": lr,
        "distribution_of": what,
        "KL": f"{found.found:.2e}",
        "sampling_alone": f"{found.expected:.2e}",
        "limit_95%": f"{found.limit:.2e}",
        "p": f"{found.p:.3f}",
        "bias": f"{found.bias:+.1e} ± {found.error:.1e}",
        "independent_samples": round(found.effective),
        "within": "yes" if found.within else "no",
    }


def draw(results: dict[Key, dict[str, Any]], to: Path) -> None:
    shown = [setting for setting in SETTINGS if any(key[:3] == setting for key in results)]
    figure, panels = axes(len(shown) + 1)
    for panel, setting in zip(panels, shown, strict=False):
        layout, name, k = setting
        mine = {key[3]: found for key, found in results.items() if key[:3] == setting}
        truth: Tensor = next(iter(mine.values()))["truth"]["c"]
        place = torch.arange(truth.numel())
        panel.bar(place, truth, width=0.9, color="#dddddd", label="theory")
        for i, (lr, found) in enumerate(mine.items()):
            units = found["sampled"]["c"]
            error = units.std(0) / len(units) ** 0.5
            shift = (i - (len(mine) - 1) / 2) * 0.2
            panel.errorbar(place + shift, units.mean(0), 2 * error, fmt=".", markersize=4, label=f"learning rate {lr:g}")
        panel.set(title=f"{name}, {layout}, K = {k}", ylim=(0, None))
        if layout == "chains":
            panel.set_xticks(place, ["".join(str(i + 1) for i in c) for c in subsets(N, k)])
        panel.set_xlabel("connectivity" if layout == "chains" else "subset of a row, as a bit pattern")
        panel.legend(fontsize=7)
    last = panels[-1]
    for layout, name, k in shown:
        distances: dict[float, Divergence] = {
            key[3]: found["c"] for key, found in results.items() if key[:3] == (layout, name, k)
        }
        line = last.loglog(
            list(distances), [d.found for d in distances.values()], "o-" if layout == "chains" else "s--", markersize=4
        )
        label = f"{name}, {layout}, K = {k}"
        last.loglog(list(distances), [d.limit for d in distances.values()], ":", color=line[0].get_color(), linewidth=0.8)
        line[0].set_label(label)
    last.set(xlabel="learning rate", ylabel="KL distance", title="connectivities (dotted: 95 % without bias)")
    last.legend(fontsize=6)
    figure.savefig(to, dpi=110)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--duration", type=float, default=25.0, help="steps times learning rate of a chain (a layer: half)")
    asked.add_argument("--only", default="", help="energies, separated by commas")
    asked.add_argument("--layouts", default="chains,layer")
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--threads", type=int, default=1)
    asked.add_argument("--out", type=Path, default=HERE)
    options = asked.parse_args()
    prepare(options)
    names = [name for name in options.only.split(",") if name] or list(ENERGIES)
    for layout in options.layouts.split(","):
        rows: list[Row] = []
        results: dict[Key, dict[str, Any]] = {}
        for _, name, k in [setting for setting in SETTINGS if setting[0] == layout and setting[1] in names]:
            target = Target(ENERGIES[name], ALPHA, TEMPERATURE)
            if name in SEPARABLE:
                torch.testing.assert_close(closed_form(target, N, k), connectivities(target, N, k), rtol=1e-6, atol=1e-9)
            duration = options.duration if layout == "chains" else options.duration / 2
            for kind in ["SGD"] + (["momentum", "Adam"] if (layout, name) == ("layer", "correlated") else []):
                for i, lr in enumerate(RATES[layout]):
                    found = run(SHAPES[layout], target, k, lr, duration, options.seed + i, kind)
                    if kind == "SGD":
                        results[layout, name, k, lr] = found
                    for what in found["truth"]:
                        rows.append(row(layout, name, k, kind, lr, what, found[what]))
                        print(*rows[-1].values(), f"{found['seconds']:.0f} s", file=sys.stderr, flush=True)
        if rows:
            save(rows, options, f"hard_{layout}")
            draw(results, options.out / f"hard_{layout}.png")


if __name__ == "__main__":
    main()
