"""How do the distributions share out the connections of well known networks?

    python benchmarks/distributions.py

Nothing is trained: K of each tensor is computed for a network on the meta device. The table has, for each network, connectivity
and distribution, the density of the first and of the last tensor, the least density of all tensors, how many tensors are full,
and the share of all connections that the first tensor takes. GPT-2's layers are linear layers of its sizes.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from torch import nn

from lightning_deepr.conversion.allocation import allocate
from lightning_deepr.conversion.selection import candidates as candidates_of
from lightning_deepr.conversion.selection import select
from lightning_deepr.models import CIFAR10CNN, LeNet300100

HERE = Path(__file__).parent
DISTRIBUTIONS = ("uniform", "erdos_renyi", "erk")
CONNECTIVITIES = (0.01, 0.05, 0.1, 0.2)


def gpt2() -> nn.Module:
    """Build the linear layers of GPT-2 (124M) in their order (its output layer is tied to the embedding)."""
    layers: list[nn.Module] = []
    for _ in range(12):
        layers += [nn.Linear(768, 2304), nn.Linear(768, 768), nn.Linear(768, 3072), nn.Linear(3072, 768)]
    return nn.Sequential(*layers)


def networks() -> dict[str, nn.Module]:
    from torchvision.models import resnet18, vit_b_16

    with torch.device("meta"):
        return {
            "LeNet-300-100": LeNet300100(),
            "CIFAR-10 CNN": CIFAR10CNN(),
            "ResNet-18": resnet18(),
            "ViT-B/16": vit_b_16(),
            "GPT-2's blocks": gpt2(),
        }


def rows() -> list[dict[str, object]]:
    found = []
    for name, network in networks().items():
        chosen = select(candidates_of(network), "all", (), 0.1)
        for connectivity in CONNECTIVITIES:
            for distribution in DISTRIBUTIONS:
                counts = allocate(chosen, connectivity, distribution)
                densities = {c.name: counts[c.name] / c.total for c in chosen}
                least = min(densities, key=lambda one: densities[one])
                found.append(
                    {
                        "network": name,
                        "connectivity": f"{connectivity:.0%}",
                        "distribution": distribution,
                        "tensors": len(chosen),
                        "first": f"{densities[chosen[0].name]:.3%}",
                        "last": f"{densities[chosen[-1].name]:.3%}",
                        "least": f"{densities[least]:.3%}",
                        "least_in": least,
                        "full": sum(density == 1 for density in densities.values()),
                        "connections_in_first": f"{counts[chosen[0].name] / sum(counts.values()):.1%}",
                    }
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the table (default: the script's)")
    out = parser.parse_args().out
    found = rows()
    with (out / "distributions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    print("| " + " | ".join(found[0]) + " |\n|" + "---|" * len(found[0]))
    print("\n".join("| " + " | ".join(map(str, row.values())) + " |" for row in found))


if __name__ == "__main__":
    main()
