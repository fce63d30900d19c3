"""The benchmark scripts run; what they measure is not tested."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_step_time(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "step_time.py"), "--rounds", "1", "--steps", "4", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    with (tmp_path / "step_time.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["batch"], row["arm"]) for row in rows} >= {("10", "dense"), ("10", "DeepR, Trainer"), ("128", "masked dense")}
    assert (tmp_path / "step_time.png").is_file()


def test_the_table_of_the_mnist_results_is_printed_from_the_recorded_runs() -> None:
    command = [sys.executable, str(SCRIPTS / "reproduction" / "mnist.py"), "--table"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    with (SCRIPTS / "reproduction" / "results.csv").open() as file:
        arms = {row["arm"] for row in csv.DictReader(file)}
    assert arms
    assert all(f"| {arm} |" in done.stdout for arm in arms)
