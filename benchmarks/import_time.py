"""How long do the imports of the package take, on top of torch and Lightning?

    python benchmarks/import_time.py                    # medians of 11 rounds, arms taking turns; writes import_time.csv
    python benchmarks/import_time.py --modules          # which modules of the package's own imports take longest

Each import runs in a process of its own. The arms: torch and Lightning alone; with `import lightning_deepr`; with what a
training script asks for, `from lightning_deepr import DeepR, sparsify`. A process that only starts Python is taken off all.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
BASE = "import torch, lightning"
ARMS = {
    "python": "pass",
    "torch, lightning": BASE,
    "+ import lightning_deepr": f"{BASE}; import lightning_deepr",
    "+ DeepR, sparsify": f"{BASE}; from lightning_deepr import DeepR, sparsify",
    "+ DeepR made": f"{BASE}; from lightning_deepr import DeepR, sparsify; DeepR(0.1)",
}


def seconds(program: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, cwd=HERE.parent)
    return time.perf_counter() - begin


def modules(program: str, count: int = 25) -> list[tuple[float, float, str]]:
    """Return the slowest imports after torch and Lightning: milliseconds of their own, with what they import, and the name."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program], check=True, cwd=HERE.parent, capture_output=True, text=True
    )
    found = []
    for line in done.stderr.splitlines():
        parts = line.removeprefix("import time:").split("|")
        if len(parts) == 3 and parts[0].strip().isdigit():
            found.append((int(parts[0]) / 1000, int(parts[1]) / 1000, parts[2]))
    last = max(at for at, (_, _, name) in enumerate(found) if name.strip() == "lightning")
    return sorted(found[last + 1 :], reverse=True)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--modules", action="store_true")
    given = parser.parse_args()
    if given.modules:
        for own, total, name in modules(ARMS["+ DeepR made"]):
            print(f"{own:8.1f} {total:8.1f} ms {name}")
        return
    taken: dict[str, list[float]] = {name: [] for name in ARMS}
    for program in ARMS.values():
        seconds(program)  # files come into the system's cache
    for _ in range(given.rounds):
        for name, program in ARMS.items():
            taken[name].append(seconds(program))
    start = statistics.median(taken["python"])
    base = statistics.median(taken["torch, lightning"]) - start
    with (HERE / "import_time.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("arm", "median_s", "over_torch_and_lightning"))
        for name, found in taken.items():
            if name != "python":
                spent = statistics.median(found) - start
                writer.writerow((name, f"{spent:.3f}", f"{spent / base:.3f}"))
                print(f"{name:26s} {spent:6.3f} s  {spent / base:.3f}")


if __name__ == "__main__":
    main()
