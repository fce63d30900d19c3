"""Train LeNet-300-100 on MNIST by the exported C program itself, on this machine, and test it once.

    python benchmarks/on_device/accuracy.py --root data/MNIST/raw --seeds 3 --out benchmarks/on_device/accuracy.csv
    python benchmarks/on_device/accuracy.py --root data/MNIST/raw --seeds 1 --epochs 1 --sanitize --out sanitized.csv

With ``--sanitize`` the program runs under the compiler's address and undefined behaviour sanitizers and checks its connections
in each step; anything that these find ends it with an error.

The program is that of ``examples/c/training``: it reads the digits one batch at a time from MNIST's files, each once per epoch,
and starts from its seed. ``tests/export`` shows that Cortex-M4F and this machine compute the same bits. Runs that the file has
are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from lightning_deepr import LinearDecay, sparsify
from lightning_deepr.export import CTraining, to_c
from lightning_deepr.models import LeNet300100

EXAMPLE = Path(__file__).parents[2] / "examples" / "c" / "training"


class Setting(NamedTuple):
    connections: int
    batch: int
    lr: float
    theta: str = "float32"
    l1: Any = LinearDecay(2e-4)
    shifts: int = 1


SETTINGS = {
    "1pct": Setting(2662, 1, 0.05),
    "1pct_batch_10": Setting(2662, 10, 0.4),
    "1pct_int16": Setting(2662, 1, 0.05, theta="int16"),
    "0p5pct": Setting(1331, 1, 0.05),
    "1pct_no_shifts": Setting(2662, 1, 0.05, shifts=0),
    "1pct_by_turnover": Setting(2662, 1, 0.05, l1="auto"),
}
COLUMNS = (
    "setting", "connections", "batch", "theta", "l1", "lr", "shifts", "epochs", "seed", "accuracy", "net_bytes", "static_bytes",
    "seconds",
)  # fmt: skip


SANITIZED = ("-O1", "-g", "-DDEEPR_CHECK", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def build(setting: Setting, folder: Path, root: Path, seed: int, epochs: int, sanitize: bool) -> tuple[CTraining, Path]:
    """Export and compile."""
    net = sparsify(LeNet300100(), setting.connections, distribution="deepr", seed=seed)
    made = to_c(net, folder, train=True, untrained=True, batch=setting.batch, theta=setting.theta, l1=setting.l1)
    assert isinstance(made, CTraining)
    settings = {"EPOCHS": epochs, "LR": f"{setting.lr}f", "SHIFTS": setting.shifts, "SEED": seed, "DATA": f'"{root}/"'}
    defines = [f"-D{name}={value}" for name, value in settings.items()]
    sources = [EXAMPLE / "train.c", EXAMPLE / "port_host.c", made.source]
    options = SANITIZED if sanitize else ("-O3",)
    command = ["cc", *options, "-std=c99", f"-I{folder}", f"-I{EXAMPLE}", *defines, "-o", folder / "train", *sources]
    subprocess.run(command, check=True)
    return made, folder / "train"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="the folder of MNIST's four files, not compressed")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("accuracy.csv"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    given = parser.parse_args()
    rows: list[dict[str, str]] = []
    if given.out.exists():
        with given.out.open() as file:
            rows = list(csv.DictReader(file))
    done = {(row["setting"], row["seed"]) for row in rows}
    for seed in range(given.seeds):
        for name in given.only:
            setting = SETTINGS[name]
            if (name, str(seed)) in done:
                continue
            with tempfile.TemporaryDirectory() as folder:
                made, program = build(setting, Path(folder), given.root.resolve(), seed, given.epochs, given.sanitize)
                begin = time.perf_counter()
                text = subprocess.run([program], check=True, capture_output=True, text=True).stdout
                seconds = time.perf_counter() - begin
            accuracy = float(re.findall(r"test accuracy ([\d.]+)", text)[-1])
            static = int(re.findall(r"static bytes: (\d+)", text)[0])
            values = [name, setting.connections, setting.batch, setting.theta, setting.l1, setting.lr, setting.shifts]
            values += [given.epochs, seed, accuracy, made.net_bytes, static, f"{seconds:.1f}"]
            rows.append(dict(zip(COLUMNS, map(str, values), strict=True)))
            print(rows[-1], flush=True)
            with given.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(sorted(rows, key=lambda row: (list(SETTINGS).index(row["setting"]), int(row["seed"]))))


if __name__ == "__main__":
    main()
