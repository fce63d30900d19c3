"""How much memory does each rank need for a layer whose rows are shared out over ranks?

    python benchmarks/row_blocks.py
    python benchmarks/row_blocks.py --size 100000 --connections 1000000 --ranks 2

One linear layer of 1,000,000 x 1,000,000 places (dense: 4 TB) with 8,000,000 connections in 8 blocks
(`lightning_deepr.conversion.row_blocks.RowBlocks`), Adam, batch 4, DeepR with an alpha that rewires in every step, gloo. The
same training runs in one process with all blocks and on several ranks.

"peak MB" is the peak resident memory of the largest process above its memory after the imports. Outputs of every step and the
places at the end are hashed, per block: they have to be those of one process, bit for bit (the layer's input needs no gradient,
so that no sum is taken in another order).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict  # noqa: F401  (its imports count as imports)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from lightning_deepr import DeepR
from lightning_deepr.conversion.row_blocks import RowBlocks
from lightning_deepr.weights.find import converted_tensors

HERE = Path(__file__).parent


def peak() -> float:
    """Return the peak resident memory of this process in MB."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found / (1e6 if sys.platform == "darwin" else 1e3)


def hashed(value: torch.Tensor) -> str:
    return hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()[:16]


def train(rank: int, ranks: int, options: Any, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    before, start = peak(), time.perf_counter()
    layer: nn.Module = nn.Linear(options.size, options.size, device="meta")
    plan = RowBlocks(options.connections, blocks=options.blocks)
    layer = parallelize_module(layer, init_device_mesh("cpu", (ranks,)), plan)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    callback = DeepR(l1=0.05, lr_scale=1, newborn="start")
    callback.attach(layer, optimizer)
    outputs = []
    for step in range(options.steps):
        x = torch.randn(4, options.size, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        y = layer(x)
        outputs.append(hashed(y))
        (y - 1).square().mean().backward()
        del y
        optimizer.step()
    reborn = sum(tensor.turnover.reborn for tensor in callback.tracked)
    row = {
        "peak": peak() - before,
        "seconds": time.perf_counter() - start,
        "outputs": outputs,
        "places": {one.slots.index: hashed(one.slots.places) for one in converted_tensors(layer)},  # type: ignore[union-attr]
        "theta": {one.slots.index: hashed(one.theta) for one in converted_tensors(layer)},
        "reborn": reborn,
        "connections": sum(one.slots.count for one in converted_tensors(layer)),
    }
    torch.save(row, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--connections", type=int, default=8_000_000)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    rows, reference = [], None
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(train, args=(ranks, options, folder), nprocs=ranks)
            found = [torch.load(f"{folder}/{rank}.pt") for rank in range(ranks)]
        state = {
            "outputs": found[0]["outputs"],
            "places": {key: value for one in found for key, value in one["places"].items()},
            "theta": {key: value for one in found for key, value in one["theta"].items()},
        }
        reference = reference or state
        rows.append(
            {
                "size": options.size,
                "connections": options.connections,
                "blocks": options.blocks,
                "ranks": ranks,
                "connections per rank": max(one["connections"] for one in found),
                "peak MB per rank": round(max(one["peak"] for one in found)),
                "outputs equal": all(one["outputs"] == reference["outputs"] for one in found),
                "places equal": state["places"] == reference["places"],
                "theta equal": state["theta"] == reference["theta"],
                "reborn": sum(one["reborn"] for one in found),
                "seconds": round(max(one["seconds"] for one in found), 1),
            }
        )
        print(rows[-1], flush=True)
    with open(options.out / "row_blocks.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    if not all(row["outputs equal"] and row["places equal"] for row in rows):
        sys.exit("The ranks differ from one process.")


if __name__ == "__main__":
    main()
