"""Count the instructions of a training step on emulated Cortex-M4F and Cortex-M0+: forward, backward, rewiring.

    python benchmarks/on_device/instructions.py --root data/MNIST/raw --out benchmarks/on_device/instructions.csv

It needs make, arm-none-eabi-gcc with newlib, and qemu-system-arm. QEMU runs with ``-icount shift=0``: an instruction takes 1 ns
of the board's time, and the program of ``examples/c/training`` reads a counter of 25 MHz between the phases.

The network is LeNet-300-100 at 1 % from scratch; the first steps rewire the most. RAM is .data and .bss by the linker, and the
stack that was used.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from lightning_deepr import LinearDecay, sparsify
from lightning_deepr.export import to_c
from lightning_deepr.models import LeNet300100

EXAMPLE = Path(__file__).parents[2] / "examples" / "c" / "training"
NETWORKS: dict[str, dict[str, Any]] = {
    "1pct": {},
    "1pct_by_turnover": {"l1": "auto"},
    "1pct_int16": {"theta": "int16"},
    "0p5pct": {"connections": 1331},
    "1pct_batch_10": {"batch": 10},
}
BOARDS = {"cortex_m4f": "m4", "cortex_m0plus": "m0plus"}
COLUMNS = ("board", "network", "batch", "digits", "forward", "backward", "rewiring", "step", "data_and_bss", "stack", "flash")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="the folder of MNIST's four files, not compressed")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("instructions.csv"))
    parser.add_argument("--digits", type=int, default=2000)
    given = parser.parse_args()
    rows = []
    for board, target in BOARDS.items():
        for network, options in NETWORKS.items():
            options = {"l1": LinearDecay(2e-4), "batch": 1, **options}
            net = sparsify(LeNet300100(), options.pop("connections", 2662), distribution="deepr")
            with tempfile.TemporaryDirectory() as folder:
                to_c(net, folder, train=True, untrained=True, **options)
                settings = {"NET": folder, "DATA": given.root.resolve(), "TRAIN": given.digits, "TEST": 1, "RAM": 65536}
                settings["LR"] = "0.05f" if options["batch"] == 1 else "0.4f"
                command = [
                    "make",
                    "-s",
                    "-f",
                    EXAMPLE / "Makefile",
                    f"run-{target}",
                    *(f"{k}={v}" for k, v in settings.items()),
                ]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                text = done.stdout
            text_size, data, bss = map(int, re.findall(r"^\s*(\d+)\t\s*(\d+)\t\s*(\d+)", text, re.MULTILINE)[0])
            phases = [int(count) for count in re.findall(r"forward (\d+), backward (\d+), rewiring (\d+)", text)[0]]
            stack = int(re.findall(r"most stack: (\d+)", text)[0])
            values = (board, network, options["batch"], given.digits, *phases, sum(phases), data + bss, stack, text_size + data)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
            print(rows[-1], flush=True)
    with given.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
