"""kill -9 at random moments, also while a checkpoint is written: does every resumed training equal the uninterrupted one?

For each method and precision one training runs uninterrupted, and notes a hash of all that it determines (parameters,
connections, the optimizer's state) before every step. The same training then runs in processes that are killed by SIGKILL at a
random moment, and goes on from the newest checkpoint that can be read. Every hash of every process has to be the one that was
noted, and so has the end. Half of the kills wait until a checkpoint is being written.

    python benchmarks/kill_and_resume.py --kills 20 --out /tmp/kills

It prints a table and writes ``kill_and_resume.csv``. Processes are forked from one that has imported everything, so that a kill
costs no imports; ``--fresh`` starts each by the interpreter instead.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_deepr import SET, DeepR, FixedRandom, LinearDecay, MagnitudePruning, RigL, SoftDeepR
from lightning_deepr.weights.find import converted_tensors

BATCH, SIZES, EVERY = 16, (64, 96, 48, 10), 3  # a checkpoint every 3 steps
LINE = 84  # bytes of a line of the log, about
MARK = "writing"  # this file is there while a checkpoint is being written

METHODS: dict[str, Callable[[], pl.Callback]] = {
    "DeepR": lambda: DeepR(0.1, temperature=1e-6, seed=3),
    "SoftDeepR": lambda: SoftDeepR(0.1, l1=LinearDecay(0.05), temperature=1e-6, seed=3),
    "SET": lambda: SET(0.1, rewire_every_n_steps=4, seed=3),
    "RigL": lambda: RigL(0.1, rewire_every_n_steps=4, seed=3),
    "MagnitudePruning": lambda: MagnitudePruning(0.1, prune_from=0.1, prune_until=0.9, prunings=9, seed=3),
    "FixedRandom": lambda: FixedRandom(0.1, seed=3),
}
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "bf16-true")


class Noted(pl.LightningModule):
    """A classifier whose batches follow from the number of the step. It appends a hash of its state to a file before each."""

    def __init__(self, steps: int, log: Path) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for size_in, size_out in itertools.pairwise(SIZES):
            layers += [nn.Linear(size_in, size_out), nn.ReLU()]
        self.net, self.steps, self.log_file = nn.Sequential(*layers[:-1]), steps, log

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        step = self.trainer.global_step
        self.note(step)
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, SIZES[0], generator=generator)
        y = torch.randint(SIZES[-1], (BATCH,), generator=generator)
        dtype = next(p for name, p in self.named_parameters() if name.endswith("bias")).dtype
        return nn.functional.cross_entropy(self.net(x.to(dtype)).float(), y)

    def note(self, step: int) -> None:
        with self.log_file.open("a") as file:
            file.write(json.dumps({"step": step, "hash": digest(self, self.trainer.optimizers[0])}) + "\n")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.02 * step))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def train_dataloader(self) -> Any:
        return DataLoader(range(self.steps), batch_size=None)  # type: ignore[arg-type]


class Marking(ModelCheckpoint):
    """A saver that says when it writes."""

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        mark = Path(filepath).parent / MARK
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
        super()._save_checkpoint(trainer, filepath)
        mark.unlink()


def digest(module: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """Hash everything that a training determines."""
    found = hashlib.sha256()
    values = [p.detach() for p in module.parameters()]
    for converted in converted_tensors(module):
        values += [getattr(converted.slots, name) for name in converted.slots.tensors]
        born = getattr(converted.slots, "born", None)
        values += [] if born is None else [born]
    for p in module.parameters():
        values += [value for _, value in sorted(optimizer.state.get(p, {}).items()) if isinstance(value, Tensor)]
    for value in values:
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return found.hexdigest()


def newest(folder: Path) -> tuple[Path | None, int]:
    """Return the newest checkpoint that can be read, and how many could not be."""
    damaged = 0
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem), reverse=True):
        try:
            torch.load(path, weights_only=True)
        except Exception:
            damaged += 1
        else:
            return path, damaged
    return None, damaged


def work(method: str, precision: str, steps: int, folder: Path, log: Path) -> None:
    """Train from the newest checkpoint to the end. The last line of the log has the hash of the end."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    saver = Marking(folder, every_n_train_steps=EVERY, save_top_k=-1, filename="{step:05d}", auto_insert_metric_name=False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, precision=precision, max_steps=steps, max_epochs=-1, logger=False,  # type: ignore[arg-type]
        enable_progress_bar=False, enable_model_summary=False, callbacks=[METHODS[method](), saver],
    )  # fmt: skip
    module = Noted(steps, log)
    path, damaged = newest(folder) if folder.exists() else (None, 0)
    with log.open("a") as file:
        file.write(json.dumps({"from": None if path is None else path.name, "damaged": damaged}) + "\n")
    trainer.fit(module, ckpt_path=path, weights_only=True)
    module.note(trainer.global_step)
    with log.open("a") as file:
        file.write(json.dumps({"done": True}) + "\n")


def warm_up() -> None:
    """Load the compiled kernels before the first fork. No backward pass: a child of a process that had one can't have any."""
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.float64):
        for make in METHODS.values():
            method: Any = make()
            net = method.prepare(nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(SIZES)))).to(dtype)
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
            method.connectivity = None
            method.attach(net, optimizer, total_steps=100)
            for p in net.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
            x = torch.randn(BATCH, SIZES[0], dtype=dtype)
            with torch.no_grad():
                net(x)
                for one in converted_tensors(net):
                    order: Any = getattr(one.slots, "order", None)
                    if order is not None:
                        rows, columns = one.slots.rows, one.slots.columns
                        x, dy = torch.randn(BATCH, columns, dtype=dtype), torch.randn(BATCH, rows, dtype=dtype)
                        torch.ops.lightning_deepr.linear_backward(
                            dy, x, one.theta.detach(), order.buffer, rows, columns, True, True, True
                        )


class Process:
    """A training in a process of its own."""

    def __init__(self, arguments: tuple[Any, ...], fresh: bool) -> None:
        if fresh:
            command = [sys.executable, __file__, "--worker", *map(str, arguments)]
            self.child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.pid = self.child.pid
            return
        self.child = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
                work(*arguments)
                status = 0
            except BaseException:
                (arguments[-1].parent / "error.txt").write_text(traceback.format_exc())
            finally:
                os._exit(status)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end, and return the exit status; None: it has not ended yet."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if end is not None and time.monotonic() >= end:
                return None
            time.sleep(0.0005)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def read(log: Path) -> list[dict[str, Any]]:
    """Read the lines of a log. A kill may have cut the last one off."""
    found = []
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def trial(method: str, precision: str, options: argparse.Namespace, draw: random.Random) -> dict[str, Any]:
    """Train once without and ``kills`` times with kills, and compare."""
    folder = options.out / f"{method}-{precision}"
    folder.mkdir(parents=True)
    whole = folder / "whole.jsonl"
    if Process((method, precision, options.steps, folder / "whole", whole), options.fresh).wait() != 0:
        raise RuntimeError(f"{method}, {precision}: the training fails: {(folder / 'error.txt').read_text()[-1500:]}")
    expected = {line["step"]: line["hash"] for line in read(whole) if "step" in line}
    assert len(expected) == options.steps + 1
    differing, kills, in_writing, damaged, compared, attempt = [], 0, 0, 0, 0, 0
    while kills < options.kills:
        attempt += 1
        where, log = folder / f"killed{attempt}", folder / f"killed{attempt}.jsonl"
        while True:  # one training, killed until it has come to its end or the kills are used up
            process = Process((method, precision, options.steps, where, log), options.fresh)
            status = None
            if kills < options.kills:
                # some steps after the start, and a random moment of the next two: in a step, or while a checkpoint is written
                size = log.stat().st_size if log.exists() else 0
                goal = size + LINE * draw.randint(1, 15)
                while status is None and (log.stat().st_size if log.exists() else 0) < goal:
                    status = process.wait(0.001)
                if status is None and kills % 2:
                    while status is None and not (where / MARK).exists():
                        status = process.wait(0)
                    status = status if status is not None else process.wait(draw.random() * 0.004)
                elif status is None:
                    status = process.wait(draw.random() * 0.02)
                if status is None:
                    in_writing += (where / MARK).exists()
                    process.kill()
                    kills += 1
            if status is None and kills >= options.kills:
                status = Process((method, precision, options.steps, where, log), options.fresh).wait()
            if status is not None:
                break
        if status != 0:
            raise RuntimeError(f"{method}, {precision}: a resumed training fails: {(folder / 'error.txt').read_text()[-1500:]}")
        for line in read(log):
            damaged += line.get("damaged", 0)
            if "step" in line:
                compared += 1
                if line["hash"] != expected[line["step"]]:
                    differing.append(line["step"])
        assert any("done" in line for line in read(log))
        for path in where.glob("*.ckpt"):
            path.unlink()
    return {
        "method": method, "precision": precision, "steps": options.steps, "kills": kills, "while writing": in_writing,
        "cut off files": damaged, "trainings": attempt, "hashes compared": compared, "differing": len(differing),
        "first differing step": min(differing, default=""),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="for each method and precision")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--fresh", action="store_true", help="start each process anew, without fork")
    parser.add_argument("--out", type=Path, required=True, help="an empty folder")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    draw, rows = random.Random(options.seed), []
    if not options.fresh:
        warnings.filterwarnings("ignore")
        warm_up()
    for method in options.methods.split(","):
        for precision in options.precisions.split(","):
            row = trial(method, precision, options, draw)
            rows.append(row)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            with (options.out / "kill_and_resume.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    differing = sum(row["differing"] for row in rows)
    print(f"torch {torch.__version__}, lightning {pl.__version__}: {sum(row['kills'] for row in rows)} kills, "
          f"{sum(row['while writing'] for row in rows)} while a checkpoint was written, "
          f"{sum(row['hashes compared'] for row in rows)} hashes compared, {differing} differ.")  # fmt: skip
    return int(differing > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        name, precision, steps, folder, log = sys.argv[2:]
        work(name, precision, int(steps), Path(folder), Path(log))
    else:
        sys.exit(main())
