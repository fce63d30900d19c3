"""Small architectures of torchvision, timm and transformers pass all checks of ``benchmarks/zoo_of_networks.py``."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow  # a process that imports everything; each architecture takes some seconds

SCRIPT = ROOT / "benchmarks" / "zoo_of_networks.py"
SMALL = {
    "torchvision": ("densenet", "swin_v2", "vit"),  # vit has nn.MultiheadAttention
    "timm": ("test_resnet", "test_vit3"),
    "transformers": (
        "BertForMaskedLM",
        "LlamaForCausalLM",
        "MixtralForCausalLM",
        "GPT2LMHeadModel.named",
        "MobileBertForMaskedLM",
    ),
}


@pytest.fixture(scope="module")
def zoo() -> Any:
    spec = importlib.util.spec_from_file_location("zoo_of_networks", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["zoo_of_networks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("package", SMALL)
def test_small_architectures_pass_all_checks(zoo: Any, tmp_path: Path, package: str) -> None:
    pytest.importorskip(package)
    names = [f"{package}/{name}" for name in SMALL[package]]
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--only", ",".join(names)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    with (tmp_path / "zoo_of_networks.csv").open(encoding="utf-8") as file:
        rows = {row["architecture"]: row for row in csv.DictReader(file)}
    assert rows.keys() >= set(names)
    wrong = {(name, check): row[check] for name, row in rows.items() for check in zoo.CHECKS if row[check] != "ok"}
    assert not wrong, done.stdout
    assert all(int(row["connections"]) == round(0.1 * int(row["converted"])) for row in rows.values())

    again = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert "\n0 of " in f"\n{again.stdout}", "a line that is there is not measured again"  # after what is not installed
    shown = subprocess.run([*command, "--table"], capture_output=True, text=True, timeout=1800).stdout
    assert all(f"| {name} |" in shown for name in names)


def case_of(zoo: Any, build: Callable[[], nn.Module]) -> Any:
    feed = importlib.import_module("networks.case").Feed
    return zoo.Case("torchvision/made_up", build, lambda training: feed((torch.ones(4, 12),)))


def made_up(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), layer)


def crash() -> nn.Module:
    os._exit(3)


def hang() -> nn.Module:
    time.sleep(600)
    raise AssertionError


@pytest.mark.parametrize(("build", "said"), [(crash, "CRASHED: exit code 3"), (hang, "CRASHED: more than 2 s")])
def test_an_architecture_that_does_not_come_back_is_a_line(zoo: Any, build: Callable[[], nn.Module], said: str) -> None:
    row = zoo.run(case_of(zoo, build), limit=2)
    assert {row[name] for name in zoo.CHECKS} == {said}
    assert row.keys() <= set(zoo.COLUMNS)


class Forgetful(nn.Linear):
    """A layer whose deep copy computes something else."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Linear:
        return nn.Linear(self.in_features, self.out_features)


CALLS = itertools.count(1)


class Random(nn.Module):
    """Not the same twice, converted or dense."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * next(CALLS)


class Reading(nn.Linear):
    """A layer whose forward pass writes its weight, which is refused."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.weight.data.mul_(1.0)
        return super().forward(x)


@pytest.mark.parametrize(
    ("layer", "check", "kind"),
    [
        (lambda: nn.Linear(20, 5), "deepcopy", "ok"),
        (lambda: Forgetful(20, 5), "deepcopy", "FAILED"),
        (lambda: Random(), "state_dict", "dense fails, too"),
        (lambda: Reading(20, 5), "train", "refused"),
    ],
)
def test_the_outcome_says_who_is_to_blame(zoo: Any, layer: Callable[[], nn.Module], check: str, kind: str) -> None:
    row = zoo.Subject(case_of(zoo, lambda: made_up(layer()))).row()
    assert zoo.kind(row[check]) == kind, row
