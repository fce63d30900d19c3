"""How long does a sparse model take to load, and how large is its file, compared with torch.load of the dense state_dict?

    python -m benchmarks.zoo_loading [NAME_OR_PATH ...]

Without names it measures the zoo's models or, if the zoo has none, untrained networks of its architectures. Times are
milliseconds, the median of 15 loads after three warm-up loads, with one thread and files in the page cache. "net" is the dense
counterpart of zoo.load: torch.load, building the network and ``load_state_dict``.
"""

from __future__ import annotations

import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_deepr import sparsify, zoo
from lightning_deepr.files.architectures import ARCHITECTURES

UNTRAINED = {"lenet300_100": (0.01, 0.05, 0.2), "cifar10_cnn": (0.02, 0.05, 0.2), "timit_blstm": (0.01, 0.1)}
ROW = "{:28s} {:>11s} {:>9s} {:>8s} {:>6s} {:>9s} {:>9s} {:>9s} {:>9s} {:>6s}"


def milliseconds(work: Callable[[], Any], repeats: int = 15) -> float:
    taken = []
    for _ in range(repeats + 3):
        begin = time.perf_counter()
        work()
        taken.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(taken[3:])


def row(model: str | Path, folder: Path) -> str:
    info = zoo.info(model)
    with open(zoo.path_of(model), "rb") as file:
        header = 8 + struct.unpack("<Q", file.read(8))[0]
    dense = folder / "dense.pt"
    torch.save(zoo.load(model, dense=True).state_dict(), dense)

    def build() -> None:
        net = ARCHITECTURES[info["architecture"]].kind()(**info["arguments"])
        net.load_state_dict(torch.load(dense, weights_only=True))

    sparse_ms = milliseconds(lambda: zoo.load(model))
    plain_ms, net_ms = milliseconds(lambda: torch.load(dense, weights_only=True)), milliseconds(build)
    count = info["connectivity"]["active"]
    return ROW.format(
        info["name"],
        f"{count:,}",
        f"{info['bytes']:,}",
        f"{header:,}",
        f"{info['bytes'] / count:.2f}",
        f"{dense.stat().st_size:,}",
        f"{sparse_ms:.1f}",
        f"{plain_ms:.1f}",
        f"{net_ms:.1f}",
        f"{sparse_ms / plain_ms:.1f}",
    )


def main(models: list[str]) -> None:
    torch.set_num_threads(1)
    print(ROW.format("model", "connections", "bytes", "header", "per K", "dense", "load ms", "torch ms", "net ms", "ratio"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen: list[str | Path] = [*models] or [*zoo.list_models()]
        if not chosen:
            for architecture, densities in UNTRAINED.items():
                for density in densities:
                    net = sparsify(ARCHITECTURES[architecture].kind()(), density)
                    chosen.append(zoo.save(net, folder / f"{architecture}.untrained_{density:.0%}.safetensors"))
        for model in chosen:
            print(row(model, folder))


if __name__ == "__main__":
    main(sys.argv[1:])
