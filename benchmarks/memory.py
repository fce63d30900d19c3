"""How much memory does training take?

    python benchmarks/memory.py
    python benchmarks/memory.py --only million --steps 5

It measures the peak resident memory of some training steps above the memory after the imports. A step is forward, backward,
optimizer and, for DEEP R, rewiring with at least 10 % of the slots reborn. Each arm runs in its own process; figures are
medians of the rounds:

- million: one linear layer of 1,000,000 x 1,000,000 places (dense: 4 TB), K = 1,000,000, Adam, batch 8;
- hundred: one of 100,000 x 100,000 places (dense: 40 GB), K = 10,000,000, Adam, batch 8;
- mlp: 784-4096-4096-10 with Adam, batch 128: dense, masked dense (a dense weight times a dense mask) and DeepR at 1 %.

The imports are torch, lightning_deepr with its kernels, and the modules that PyTorch imports when the first optimizer is made
and steps. The kernels' machine code is loaded at their first call and counts as training. "least" is the memory of theta, its
gradient, Adam's two moments (float32) and the places (int64).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from common import Row, axes, bars, parser, prepare, save
from torch import nn

MB = 1e6
ARMS = {
    "million": ["1,000,000 x 1,000,000, K = 1,000,000"],
    "hundred": ["100,000 x 100,000, K = 10,000,000"],
    "mlp": ["MLP, dense", "MLP, masked dense", "MLP, DeepR"],
}
BOUND_MB = {ARMS["million"][0]: 600, ARMS["hundred"][0]: 1500}
L1 = {
    ARMS["million"][0]: 30.0,
    ARMS["hundred"][0]: 4.0,
    "MLP, DeepR": 4.0,
}  # so large that a newborn loses more per step than Adam can add


def peak() -> int:
    """Return the peak resident bytes of this process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def imports() -> None:
    """Import and compile everything that any training does: a small sparse one runs, and it is not counted."""
    from lightning_deepr import DeepR, sparsify

    tiny = sparsify(nn.Linear(64, 64), 100, compute="sparse")
    optimizer = torch.optim.Adam(tiny.parameters())
    DeepR(l1=4.0, lr_scale=1.0).attach(tiny, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        tiny(torch.randn(8, 64)).sum().backward()
        optimizer.step()


def train(arm: str, steps: int) -> dict[str, float]:
    """Train one arm in this process, and return its figures."""
    from arms import masked, mlp

    from lightning_deepr import DeepR, connections, sparsify

    imports()
    before = peak()
    size, batch = 784, 128
    if arm in BOUND_MB:
        size, batch, count = (1_000_000, 8, 1_000_000) if arm in ARMS["million"] else (100_000, 8, 10_000_000)
        net: nn.Module = sparsify(nn.Linear(size, size, device="meta"), count, compute="sparse", device="cpu")
    else:
        net = mlp()
        if arm == "MLP, masked dense":
            masked(net, 0.01)
        elif arm == "MLP, DeepR":
            sparsify(net, 0.01)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    callback = DeepR(l1=L1[arm], lr_scale=1.0) if arm in L1 else None
    if callback is not None:
        callback.attach(net, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(batch, size)).square().mean().backward()
        optimizer.step()
    above = peak() - before
    found = {"mb": above / MB, "imports_mb": before / MB, "parameters": float(sum(p.numel() for p in net.parameters()))}
    if callback is not None:
        count = sum(places.numel() for _, places, _ in connections(net).values())
        deaths = sum(value for key, value in callback.statistics().items() if key.endswith("_deaths"))
        found |= {"reborn": deaths / count, "least_mb": count * (4 * 4 + 8) / MB}
    return found


def in_a_process(arm: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).resolve()), "--arm", arm, "--steps", str(options.steps)]
    done = subprocess.run(
        [*command, "--threads", str(options.threads), "--out", str(options.out)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{arm}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    asked = parser(__doc__, rounds=3)
    asked.add_argument("--steps", type=int, default=20)
    asked.add_argument("--only", default=",".join(ARMS), help="groups of arms, out of million,hundred,mlp")
    asked.add_argument("--arm", help="train one arm in this process and print its figures")
    options = asked.parse_args()
    prepare(options)
    if options.arm:
        print(json.dumps(train(options.arm, options.steps)))
        return
    names = [arm for key in options.only.split(",") for arm in ARMS[key]]
    for name in names:
        if name in L1:  # compiles the kernels, which stay in the cache
            in_a_process(name, argparse.Namespace(**{**vars(options), "steps": 2}))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            found[name].append(in_a_process(name, options))
    rows: list[Row] = []
    for name, taken in found.items():
        typical = {key: statistics.median(one[key] for one in taken) for key in taken[0]}
        rows.append(
            {
                "training": name,
                "peak_MB_above_imports": f"{typical['mb']:.0f}",
                "bound_MB": BOUND_MB.get(name, ""),
                "least_MB": f"{typical['least_mb']:.0f}" if "least_mb" in typical else "",
                "imports_MB": f"{typical['imports_mb']:.0f}",
                "reborn_per_step": f"{typical['reborn']:.1%}" if "reborn" in typical else "",
            }
        )
    save(rows, options, "memory")
    figure, (axis,) = axes(1, width=7.5, height=2.8)
    bars(
        axis,
        {row["training"]: float(row["peak_MB_above_imports"]) for row in rows},
        "peak resident memory of training",
        "MB above the imports",
    )
    figure.savefig(options.out / "memory.png", dpi=130)


if __name__ == "__main__":
    main()
