"""How much longer does a training step take if connections may not be everywhere?

Arms that take turns: the same network with the same K, unrestricted, with a band, with a mask that allows 10 %, with NoSelf
(where the matrix is square) and with Dale's law. Then the memory of a band of 100 in a million by a million.

    python benchmarks/own_connectivity.py               # both networks
    python benchmarks/own_connectivity.py --only lenet
"""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import Block, axes, bars, calls, medians, parser, prepare, save, take_turns
from lightning_deepr import Band, Dale, DeepR, NoSelf, sparsify
from lightning_deepr.models import LeNet300100
from lightning_deepr.weights.find import converted_tensors


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, str, tuple[str, ...]]] = {
    # the network, its inputs, the layers that are restricted, and the arms
    "lenet": (LeNet300100, 784, "fc1", ("unrestricted", "Band", "mask 10 %", "Dale")),
    "4096x4096": (wide, 4096, "0", ("unrestricted", "NoSelf", "Band", "mask 10 %", "Dale")),
}


def arm(name: str, make: Callable[[], nn.Module], inputs: int, layer: str, batch: int) -> tuple[Block, nn.Module]:
    """Make a block of training steps at 1 %, with a constant alpha under which some percent of the slots are reborn."""
    torch.manual_seed(0)
    net = make()
    shape = tuple(net.get_submodule(layer).weight.shape)  # type: ignore[arg-type, union-attr]
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.1
    candidates: dict[str, Any] = {"NoSelf": NoSelf(), "Band": Band(shape[1] // 16), "mask 10 %": mask}
    restriction = {layer: candidates[name]} if name in candidates else None
    signs = {layer: Dale(0.8)} if name == "Dale" else "place"
    sparsify(net, 0.01, distribution="uniform", candidates=restriction, signs=signs)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    DeepR(l1=1e-3, lr_scale=1.0).attach(net, optimizer)
    x, label = torch.randn(batch, inputs), torch.randint(10, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), label).backward()
        optimizer.step()

    for _ in range(5):
        step()
    return calls(step), net


def memory_of_a_band() -> tuple[int, int]:
    """Return the bytes that the candidates of a band of 100 in a million by a million keep, and those of K = 10,000 slots."""
    with torch.device("meta"):
        net = nn.Linear(10**6, 10**6, bias=False)
    tracemalloc.start()
    sparsify(net, 10_000, candidates=Band(100), init="deepr", device="cpu")
    slots: Any = next(iter(converted_tensors(net))).slots
    tracemalloc.stop()
    kept = slots.allowed.items.numel() * 8
    own = sum(value.numel() * value.element_size() for value in (slots.places, slots.born, slots.signs))
    return kept, own


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--only", default=",".join(NETWORKS))
    found = options.parse_args()
    prepare(found)
    rows = []
    figure, panels = axes(len(NETWORKS), columns=2)
    for panel, (network, (make, inputs, layer, arms)) in zip(panels, NETWORKS.items(), strict=True):
        if network not in found.only.split(","):
            continue
        made = {name: arm(name, make, inputs, layer, found.batch) for name in arms}
        seconds = medians(take_turns({name: block for name, (block, _) in made.items()}, found.rounds, found.steps))
        for name, (_, net) in made.items():
            born = sum(int((one.slots.born >= 0).sum()) for one in converted_tensors(net))
            rows.append(
                {
                    "network": network,
                    "arm": name,
                    "ms": f"{1000 * seconds[name]:.3f}",
                    "ratio": f"{seconds[name] / seconds['unrestricted']:.3f}",
                    "slots_reborn_so_far": born,
                }
            )
        bars(panel, {name: seconds[name] / seconds["unrestricted"] for name in arms}, network, "time / unrestricted", 1.1)
    save(rows, found, "own_connectivity")
    figure.savefig(found.out / "own_connectivity.png", dpi=110)
    kept, own = memory_of_a_band()
    print(f"\nA band of 100 in a million by a million: the candidates keep {kept} bytes, 10,000 slots {own} bytes.")


if __name__ == "__main__":
    main()
