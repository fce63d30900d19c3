"""The bytes of RAM of the program that trains, by network, connectivity, batch and type of theta: a table.

    python benchmarks/on_device/memory.py --out benchmarks/on_device/memory.csv

Nothing is compiled: ``tests/export`` shows that sizeof agrees with these figures.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from itertools import pairwise, product
from pathlib import Path

from torch import nn

from lightning_deepr import sparsify
from lightning_deepr.export import CTraining, to_c

NETWORKS = {"784-300-100-10": (784, 300, 100, 10), "784-100-10": (784, 100, 10), "128-64-32-8": (128, 64, 32, 8)}
COLUMNS = ("network", "connectivity", "connections", "batch", "theta", "theta_bytes", "place_bytes", "bias_bytes",
           "working_memory", "net_bytes")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("memory.csv"))
    given = parser.parse_args()
    rows = []
    for (name, sizes), connectivity in product(NETWORKS.items(), (0.005, 0.01, 0.02, 0.05, 0.1)):
        for batch, theta in ((1, "float32"), (10, "float32"), (1, "int16")):
            layers = [part for pair in pairwise(sizes) for part in (nn.Linear(*pair), nn.ReLU())][:-1]
            net = sparsify(nn.Sequential(*layers), connectivity)
            with tempfile.TemporaryDirectory() as folder:
                made = to_c(net, folder, train=True, batch=batch, theta=theta, l1=1e-4)
            assert isinstance(made, CTraining)
            parts = [made.parts[part] for part in ("theta", "places", "biases", "working memory")]
            rows.append((name, connectivity, made.connections, batch, theta, *parts, made.net_bytes))
            print(*rows[-1])
    with given.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)


if __name__ == "__main__":
    main()
