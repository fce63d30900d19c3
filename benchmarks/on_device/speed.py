"""How long does a step of the exported program take on this machine, compared with a loop in C++ written for the same network?

    python benchmarks/on_device/speed.py --root data/MNIST/raw --out benchmarks/on_device/speed.csv

LeNet-300-100 with 2,662 connections, batches of 10, alpha 2e-4, 6,000 steps, one core. The programs take turns; the ratio is
that of the medians. ``plain_loop.cpp`` keeps what it likes: a gradient and a sign per connection, a bit per place, the batch as
floats.
"""

from __future__ import annotations

import argparse
import csv
import re
import statistics
import subprocess
import tempfile
from pathlib import Path

from lightning_deepr import sparsify
from lightning_deepr.export import to_c
from lightning_deepr.models import LeNet300100

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="the folder of MNIST's four files, not compressed")
    parser.add_argument("--out", type=Path, default=HERE / "speed.csv")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    net = sparsify(LeNet300100(), 2662, distribution="deepr")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        to_c(net, folder, train=True, untrained=True, batch=10, l1=2e-4)
        defines = [f'-DDATA="{given.root.resolve()}/"', "-DSTEPS=6000"]
        ours, plain = folder / "ours", folder / "plain"
        sources = [HERE / "step_time.c", folder / "deepr_net.c"]
        subprocess.run(["cc", "-O3", "-std=c99", f"-I{folder}", *defines, "-o", ours, *sources], check=True)
        subprocess.run(["c++", "-O3", "-std=c++17", *defines, "-o", plain, HERE / "plain_loop.cpp"], check=True)
        times: dict[str, list[float]] = {"exported": [], "plain_loop": []}
        for _ in range(given.rounds):
            for which, program in (("exported", ours), ("plain_loop", plain)):
                text = subprocess.run([program], check=True, capture_output=True, text=True).stdout
                times[which].append(float(re.findall(r"[\d.]+", text)[0]))
    medians = {which: statistics.median(values) for which, values in times.items()}
    print(medians, f"ratio {medians['exported'] / medians['plain_loop']:.2f}")
    with given.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("program", "rounds", "us_per_step_median", "ratio"))
        for which, value in medians.items():
            writer.writerow((which, given.rounds, f"{value:.2f}", f"{value / medians['plain_loop']:.3f}"))


if __name__ == "__main__":
    main()
