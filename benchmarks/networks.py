"""Does a public architecture train faster, and in less memory, with a sparse weight in each layer?

    python benchmarks/networks.py                         # everything that has no line in networks.csv yet
    python benchmarks/networks.py --only 'resnet,Bert'    # only these; --again measures lines that are there anew
    python benchmarks/networks.py --table                 # the recorded lines, as a markdown table

It trains some twenty architectures of torchvision, timm and transformers (random weights, nothing is downloaded) with AdamW, on
random inputs: dense, converted by ``sparsify`` at 1, 5, 10 and 30 % with ``DeepR()`` rewiring in every step, and, as mask
libraries do it, with a dense mask on each linear and convolutional weight. ``sparselab`` replaces the linear layers where it is
installed. A step is forward, backward, ``optimizer.step()`` with its hooks.

- time: arms take turns within each round; medians of the CPU time of the thread, over that of the dense network;
- peak: the largest resident memory of some steps, in a process of its own, above that before the network was built, after a
  small network has loaded the kernels (Linux only);
- state: bytes of the tensors in the optimizer's state.

Each architecture is measured in forked processes, which have all imports already.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import importlib
import importlib.util
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from arms import masked
from common import Block, Row, medians, parser, prepare, take_turns, why_not
from networks import public
from networks.case import Case
from networks.values import loss_of

from lightning_deepr import DeepR, connectivity_report, sparsify

DENSITIES = (0.01, 0.05, 0.1, 0.3)
MASKED_AT = 0.1
COLUMNS = ("architecture", "arm", "step_over_dense", "dense_ms", "peak_MB", "state_MB", "chose", "package", "torch")
LR = 1e-4


def arms_of() -> Iterator[str]:
    """List the arms' names."""
    yield "dense"
    yield f"masked {MASKED_AT:.0%}"
    yield from (f"DeepR {density:.0%}" for density in DENSITIES)
    yield f"sparselab {MASKED_AT:.0%}"


def network(case: Case, arm: str) -> nn.Module | str:
    """Build the network of an arm; a text says why it can't run."""
    net: nn.Module = case.network()
    kind, *density = arm.split()
    if kind == "dense":
        return net
    connectivity = float(density[0].rstrip("%")) / 100
    if kind == "DeepR":
        return sparsify(net, connectivity, target_modules=case.targets)
    if kind == "sparselab":
        return _sparselab(net, connectivity)
    return masked(net, connectivity)


def _sparselab(net: nn.Module, connectivity: float) -> nn.Module | str:
    try:
        from sparselab import SparseLinear

        layers = [(name, layer) for name, layer in net.named_modules() if type(layer) is nn.Linear]
        if not layers:
            return "not run: no linear layer"
        for name, layer in layers:
            holder = net.get_submodule(name.rpartition(".")[0])
            bias = layer.bias is not None
            own = SparseLinear(layer.in_features, layer.out_features, sparsity=1 - connectivity, bias=bias)
            setattr(holder, name.rpartition(".")[2], own)
    except Exception as error:  # a peer may fail for any reason
        return why_not(error)
    return net


def training(case: Case, arm: str, now: Callable[[], float] = time.thread_time) -> tuple[Block, nn.Module, Any] | str:
    """Make the training of an arm: a block of steps, its network, its optimizer."""
    net = network(case, arm)
    if isinstance(net, str):
        return net
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
    if arm.startswith("DeepR"):
        DeepR(seed=0).attach(net, optimizer)
    feed = case.inputs(True)

    def block(steps: int) -> list[float]:
        seconds = []
        for _ in range(steps):
            started = now()
            optimizer.zero_grad()
            loss_of(net(*feed.args, **feed.kwargs)).backward()
            optimizer.step()
            seconds.append(now() - started)
        return seconds

    return block, net, optimizer


def chose(net: nn.Module) -> str:
    """Count the tensors that compute sparsely."""
    rows = [row["compute"] for row in connectivity_report(net)]
    return f"{sum(one == 'sparse' for one in rows)} of {len(rows)} sparse"


def times(case: Case, options: argparse.Namespace, results: Connection) -> None:
    """Time all arms of an architecture."""
    _quiet(options)
    blocks: dict[str, Block] = {}
    found: dict[str, Row] = {}
    nets: dict[str, nn.Module] = {}
    for arm in options.arms:
        made = training(case, arm)
        if not isinstance(made, str):
            try:
                made[0](2)  # compiles, allocates
            except Exception as error:
                made = why_not(error)
        if isinstance(made, str):
            found[arm] = {"chose": made}
            continue
        blocks[arm], nets[arm], optimizer = made
        state = sum(value.nbytes for one in optimizer.state.values() for value in one.values() if isinstance(value, Tensor))
        found[arm] = {"state_MB": f"{state / 1e6:.3g}"}
    once = blocks["dense"](1)[0]
    steps = max(1, min(20, int(options.budget / once)))
    took = medians(take_turns(blocks, options.rounds, steps))
    for arm, seconds in took.items():
        found[arm] |= {"step_over_dense": f"{seconds / took['dense']:.3f}", "dense_ms": f"{1e3 * took['dense']:.1f}"}
        if arm.startswith("DeepR"):
            found[arm]["chose"] = chose(nets[arm])
    results.send(found)


def peak(case: Case, arm: str, options: argparse.Namespace, results: Connection) -> None:
    """Measure the peak of some training steps above the memory before."""
    _quiet(options)
    tiny = sparsify(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 10)), 0.1)
    optimizer = torch.optim.AdamW(tiny.parameters())
    DeepR(seed=0).attach(tiny, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        tiny(torch.randn(4, 64)).sum().backward()
        optimizer.step()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    made = training(case, arm)
    if not isinstance(made, str):
        made[0](4)
    results.send((_resident("VmHWM") - before) / 1e6)


def _resident(what: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return 1024 * int(line.split()[1])


def _quiet(options: argparse.Namespace) -> None:
    prepare(options)


def apart(work: Callable[..., None], *arguments: Any, limit: float) -> Any:
    """Run in a forked process; return what it sends, or a text that says why it sent nothing."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(*arguments, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(limit):
            return receiver.recv()
        process.kill()
        return f"not run: more than {limit:g} s"
    except EOFError:
        process.join()
        return f"not run: exit code {process.exitcode}"
    finally:
        process.join()


def measure(case: Case, options: argparse.Namespace) -> list[Row]:
    found = apart(times, case, options, limit=options.limit)
    if isinstance(found, str):
        found = {arm: {"chose": found} for arm in options.arms}
    rows = []
    for arm in options.arms:
        row = dict.fromkeys(COLUMNS, "") | {"architecture": case.name, "arm": arm} | found[arm]
        if row["step_over_dense"] and options.memory and os.path.exists("/proc/self/clear_refs"):
            used = apart(peak, case, arm, options, limit=options.limit)
            row["peak_MB"] = used if isinstance(used, str) else f"{used:.0f}"
        rows.append(row | {"package": f"{case.package} {version(case.package)}", "torch": version("torch").split("+")[0]})
    return rows


def read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [dict(row) for row in csv.DictReader(file)]


def write(path: Path, rows: Sequence[Row]) -> None:
    new = path.with_suffix(".new")
    with new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    new.replace(path)


def table(rows: Sequence[Row]) -> str:
    """Format the lines: one per architecture, and those of the minimum, the median and the maximum."""
    arms = [arm for arm in arms_of() if any(row["arm"] == arm and row["step_over_dense"] for row in rows) and arm != "dense"]
    lines = ["| architecture | dense ms | " + " | ".join(arms) + " | MB dense, 10 %, 1 % | state MB dense, 10 % |"]
    lines.append("|---" * (len(arms) + 4) + "|")
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_name.setdefault(row["architecture"], {})[row["arm"]] = row
    empty = dict.fromkeys(COLUMNS, "")
    for name, mine in by_name.items():
        dense, ten, one = (mine.get(arm, empty) for arm in ("dense", "DeepR 10%", "DeepR 1%"))
        cells = [name, dense["dense_ms"], *(_short(mine.get(arm, empty)["step_over_dense"]) for arm in arms)]
        cells += [", ".join(row["peak_MB"] for row in (dense, ten, one)), ", ".join(row["state_MB"] for row in (dense, ten))]
        lines.append("| " + " | ".join(cells) + " |")
    for what, of in (("minimum", min), ("median", statistics.median), ("maximum", max)):
        cells = [
            f"{of([float(row['step_over_dense']) for row in rows if row['arm'] == arm and row['step_over_dense']]):.2f}"  # type: ignore[operator]
            for arm in arms
        ]
        lines.append(f"| **{what}** |  | " + " | ".join(cells) + " |  |  |")
    return "\n".join(lines)


def _short(value: str) -> str:
    return value and f"{float(value):.2f}"


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--only", default="*", help="names (fnmatch) or parts of them, separated by commas")
    asked.add_argument("--again", action="store_true", help="measure lines that are there anew")
    asked.add_argument("--table", action="store_true", help="print the recorded lines, and run nothing")
    asked.add_argument("--arms", default=",".join(arms_of()), help="arms to run; dense is needed")
    asked.add_argument("--budget", type=float, default=0.5, help="seconds per arm and round")
    asked.add_argument("--limit", type=float, default=600, help="seconds per process")
    asked.add_argument("--no-memory", dest="memory", action="store_false")
    asked.set_defaults(threads=1)
    options = asked.parse_args()
    options.arms = options.arms.split(",")
    prepare(options)
    path = options.out / "networks.csv"
    rows = read(path)
    if not options.table:
        for package in ("torchvision", "timm", "transformers"):
            if importlib.util.find_spec(package) is not None:
                importlib.import_module(package)
        for case in public.cases():
            wanted = any(fnmatch.fnmatchcase(case.name, part) or part in case.name for part in options.only.split(","))
            known = any(row["architecture"] == case.name for row in rows)
            if not wanted or (known and not options.again):
                continue
            found = measure(case, options)
            rows = [row for row in rows if row["architecture"] != case.name] + found
            write(path, rows)
            for row in found:
                print(row["architecture"], row["arm"], row["step_over_dense"], row["peak_MB"], row["chose"], flush=True)
    if rows:
        print(table(rows))


if __name__ == "__main__":
    main()
