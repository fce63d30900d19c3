"""Do the ranks of a long distributed training stay equal, and how much do they send?

    python benchmarks/ranks.py
    python benchmarks/ranks.py --steps 500 --ranks 2

LeNet-300-100 with 1 % of its connections, Adam, DistributedDataParallel over gloo on one machine; each rank has its own data.
After the last step every rank hashes theta and places of all layers. Three arms: DeepR (``check_ranks_every_n_steps=None``),
DeepR with a check every 100 steps, and the dense network.

"gradient bytes per step" counts the buckets that DDP all-reduces, "extra bytes per step" all other collectives between the
first and the last step, with the payload of one rank.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from lightning_deepr import DeepR, sparsify
from lightning_deepr.models import LeNet300100
from lightning_deepr.weights.find import converted_tensors

HERE = Path(__file__).parent
ARMS: dict[str, dict[str, Any] | None] = {
    "DeepR": {},
    "DeepR, check every 100 steps": {"check_ranks_every_n_steps": 100},
    "dense": None,
}
COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "all_gather_object", "broadcast_object_list", "reduce", "gather")


def digest(net: nn.Module) -> str:
    found = hashlib.sha256()
    for parameter in net.parameters():
        found.update(parameter.detach().numpy().tobytes())
    for one in converted_tensors(net):
        found.update(one.slots.places.numpy().tobytes())  # type: ignore[union-attr]
    return found.hexdigest()[:16]


def train(rank: int, ranks: int, arm: str, steps: int, folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    net: nn.Module = LeNet300100()
    options = ARMS[arm]
    if options is not None:
        sparsify(net, 0.01)
    ddp, sent = DistributedDataParallel(net), {"gradients": 0, "extra": 0}

    def counted(state, bucket):  # type: ignore[no-untyped-def]  # (DDP refuses annotations that are strings)
        sent["gradients"] += bucket.buffer().nbytes
        return allreduce_hook(state, bucket)

    ddp.register_comm_hook(None, counted)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    if options is not None:
        DeepR(**options).attach(net, optimizer, total_steps=steps)
    for name in COLLECTIVES:  # what anybody else calls from now on
        function = getattr(dist, name)

        def noted(first: Any, *args: Any, function: Any = function, **kwargs: Any) -> Any:
            sent["extra"] += first.nbytes if isinstance(first, torch.Tensor) else 1
            return function(first, *args, **kwargs)

        setattr(dist, name, noted)
    start = time.perf_counter()
    for step in range(steps):
        x = torch.randn(16, 784, generator=torch.Generator().manual_seed(step * ranks + rank))
        optimizer.zero_grad()
        nn.functional.cross_entropy(ddp(x), x[:, :10].argmax(1)).backward()
        optimizer.step()
    sent["extra"] -= sent["gradients"]  # DDP's hook calls `all_reduce`, too
    row = {"hash": digest(net), "seconds": time.perf_counter() - start, **sent}
    torch.save(row, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    rows = []
    for ranks in options.ranks:
        for arm in ARMS:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(train, args=(ranks, arm, options.steps, folder), nprocs=ranks)
                found = [torch.load(f"{folder}/{rank}.pt") for rank in range(ranks)]
            rows.append(
                {
                    "arm": arm,
                    "ranks": ranks,
                    "steps": options.steps,
                    "equal hashes": len({one["hash"] for one in found}) == 1,
                    "hash": found[0]["hash"],
                    "gradient bytes per step": round(found[0]["gradients"] / options.steps),
                    "extra bytes per step": found[0]["extra"] / options.steps,
                    "seconds": round(max(one["seconds"] for one in found), 1),
                }
            )
            print(rows[-1], flush=True)
    with open(options.out / "ranks.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    if not all(row["equal hashes"] for row in rows):
        sys.exit("The ranks differ.")


if __name__ == "__main__":
    main()
