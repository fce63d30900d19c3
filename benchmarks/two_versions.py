"""Is this version as fast as another one?

    git worktree add ../before COMMIT
    python benchmarks/two_versions.py ../before                 # two_versions.csv
    python benchmarks/two_versions.py ../before --rounds 40 --only lenet

It times training steps of ``step_time.py``'s networks under DeepR in two processes that take turns in short blocks. One process
imports this checkout, the other one the named checkout. Each round gives the ratio of the two medians; the table has the median
and the quartiles of these ratios. A machine that is busy for a while slows both versions.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEPS = {"lenet": 200, "mlp": 15, "cifar": 3}


class Worker:
    """A process that runs blocks of steps of one version."""

    def __init__(self, checkout: Path, threads: int) -> None:
        folders = [str(checkout), str(checkout / "benchmarks")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, str(Path(__file__).resolve()), "--work", str(threads)]
        # Python searches the working folder first: the process must not start in a folder of the other version.
        self.process = subprocess.Popen(
            command, env=environment, cwd=checkout / "benchmarks", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.where = self.ask("where")

    def ask(self, question: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(question, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"The process of {self.process.args} ended: see its messages above.")
        return str(json.loads(answer))

    def seconds(self, network: str, batch: int, steps: int) -> float:
        """Return the median seconds of a step."""
        return float(self.ask(f"{network} {batch} {steps}"))


def work(threads: int) -> None:
    """Run a worker, which reads questions from stdin and prints answers."""
    answers, sys.stdout = sys.stdout, sys.stderr  # other prints go to stderr, so that stdout has answers only
    sys.path = [one for one in sys.path if Path(one or ".").resolve() != HERE or str(HERE) in os.environ["PYTHONPATH"]]
    import logging
    import warnings

    import torch
    from step_time import NETWORKS, Arms

    import lightning_deepr

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    blocks: dict[tuple[str, int], object] = {}
    for question in sys.stdin:
        if question.strip() == "where":
            answer: object = str(Path(lightning_deepr.__file__).parent)
        else:
            network, batch, steps = question.split()
            key = network, int(batch)
            if key not in blocks:
                arms = Arms(NETWORKS[network], int(batch))
                arms.deepr("auto")
                (blocks[key],) = arms.found.values()
                blocks[key](max(int(steps), 30))  # type: ignore[operator]
            answer = statistics.median(blocks[key](int(steps)))  # type: ignore[operator]
        print(json.dumps(answer), file=answers, flush=True)


def main() -> None:
    from common import parser, prepare, save

    options = parser(__doc__, rounds=40)
    options.add_argument("before", type=Path, help="another checkout")
    options.add_argument("--only", nargs="*", default=["lenet", "mlp"], choices=list(STEPS))
    given = options.parse_args()
    prepare(given)
    from step_time import NETWORKS

    # Which process starts first matters, by a few percent in memory alone: each pair is started both ways.
    pairs = []
    for now_first in (False, True):
        checkouts = [given.before.resolve(), HERE.parent]
        started = [Worker(one, given.threads) for one in (checkouts[::-1] if now_first else checkouts)]
        pairs.append(started[::-1] if now_first else started)
    if pairs[0][0].where == pairs[0][1].where:
        raise SystemExit(f"two_versions: both processes import {pairs[0][0].where}: expected two checkouts.")
    rows = []
    for name in given.only:
        for batch in NETWORKS[name].batch_sizes:
            ratios = []
            for i in range(given.rounds):
                before, now = pairs[i % 2]
                order = (before, now) if i // 2 % 2 else (now, before)
                took = {one: one.seconds(name, batch, STEPS[name]) for one in order}
                ratios.append(took[now] / took[before])
            low, middle, high = statistics.quantiles(ratios, n=4)
            row = {"network": NETWORKS[name].title, "batch": batch, "now_over_before": f"{middle:.3f}"}
            rows.append({**row, "quartiles": f"{low:.3f} to {high:.3f}", "rounds": given.rounds})
            print(rows[-1], flush=True)
    save(rows, given, "two_versions")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(int(sys.argv[2]))
    else:
        main()
