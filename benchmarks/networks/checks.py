"""What is checked of one architecture."""

from __future__ import annotations

import copy
import linecache
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightning_deepr
from lightning_deepr import DeepR, connections, connectivity_report, densify, load_state_dict, save_sparse, sparsify
from networks.case import Case
from networks.values import GRADIENT, difference, loss_of, tensors

CONNECTIVITY = 0.1
STEPS = 3
ENOUGH = 1000  # of so many connections some move in three steps
CHECKS = ("convert", "train", "state_dict", "sparse_file", "deepcopy", "export", "compute", "densify")
LIBRARY = str(Path(lightning_deepr.__file__).parent)


class Wrong(AssertionError):
    """A check found another result than expected."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Wrong(what)


# -- how a check ended -------------------------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def is_refusal(error: BaseException) -> bool:
    """Tell whether the library raised an error itself: the last line that ran is a ``raise`` in its files.

    A failed invariant is no refusal.
    """
    seen: BaseException | None = error
    while seen is not None:
        frames = traceback.extract_tb(seen.__traceback__)
        if frames and frames[-1].filename.startswith(LIBRARY) and "check_invariants" not in str(seen):
            line = linecache.getline(frames[-1].filename, frames[-1].lineno or 0)
            if line.strip().startswith("raise"):
                return True
        seen = seen.__cause__ or seen.__context__
    return False


def outcome(work: Callable[[], Any], dense: Callable[[], Any] | None = None) -> str:
    """Run a check, and the same with the dense network if it fails."""
    try:
        work()
    except Exception as error:
        if dense is not None:
            try:
                dense()
            except Exception as same:
                return f"dense fails, too: {first_line(same)}"
        return f"{'refused' if is_refusal(error) else 'FAILED'}: {first_line(error)}"
    return "ok"


# -- parts -------------------------------------------------------------------------------------------------------------------


def evaluated(case: Case, net: Callable[..., Any]) -> list[Tensor]:
    """Compute the outputs in eval mode."""
    if isinstance(net, nn.Module):
        net.eval()
    feed = case.inputs(training=False)
    torch.manual_seed(3)
    with torch.no_grad():
        return list(tensors(net(*feed.args, **feed.kwargs)))


def agrees(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    wrong = difference(found, expected)
    require(not wrong, f"{what}: {wrong}")


def train(case: Case, net: nn.Module, steps: int = STEPS, rewire: bool = True) -> None:
    """Train with AdamW in a plain loop."""
    net.train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    rewiring = DeepR(check_invariants=True).attach(net, optimizer, total_steps=10 * steps) if rewire else None
    feed = case.inputs(training=True)
    torch.manual_seed(3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(net(*feed.args, **feed.kwargs))
        require(bool(loss.isfinite()), f"loss {float(loss)}")
        loss.backward()
        optimizer.step()
    if rewiring is not None:
        rewiring.remove()


def sorted_connections(net: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """List places and values of every tensor, in the order of the places."""
    found = {}
    for name, (_, places, values) in connections(net).items():
        order = places.argsort()
        found[name] = (places[order], values[order])
    return found


def same_connections(one: nn.Module, other: dict[str, tuple[Tensor, Tensor]], what: str) -> None:
    found = sorted_connections(one)
    require(found.keys() == other.keys(), f"{what}: other tensors are converted")
    for name, (places, values) in other.items():
        require(torch.equal(found[name][0], places), f"{what}: `{name}` has other places")
        require(torch.equal(found[name][1], values), f"{what}: `{name}` has other values")


def with_gradient(net: nn.Module) -> set[str]:
    """List the dense names of the parameters that have a gradient."""
    plain = {name.replace("parametrizations.", "").removesuffix(".original"): p for name, p in net.named_parameters()}
    return {name for name, p in plain.items() if p.grad is not None}


def gradients(case: Case, net: nn.Module) -> dict[str, Tensor]:
    """Compute the gradients in eval mode, where no layer draws."""
    net.eval()
    net.zero_grad()
    feed = case.inputs(training=False)
    torch.manual_seed(3)
    output = net(*feed.args, **feed.kwargs)
    if not any(part.requires_grad and part.numel() for part in tensors(output)):
        return {}
    loss_of(output).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def exported(case: Case, net: nn.Module) -> Callable[..., Any]:
    net.eval()
    feed = case.inputs(training=False)
    with torch.no_grad():
        program = torch.export.export(net, feed.args, dict(feed.kwargs)).module()
    return lambda *args, **kwargs: program(*args, **kwargs)  # which refuses eval()


# -- the checks --------------------------------------------------------------------------------------------------------------


class Subject:
    """One architecture under test; ``row()`` has the outcome of each check."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.net = case.network()
        self.state: dict[str, Any] = {}
        self.expected: list[Tensor] = []
        self.trained: dict[str, tuple[Tensor, Tensor]] = {}

    def row(self) -> dict[str, Any]:
        """Run all checks."""
        started = time.perf_counter()
        parameters = sum(p.numel() for p in self.net.parameters())
        row: dict[str, Any] = {"architecture": self.case.name, "parameters": parameters}
        row |= dict.fromkeys(CHECKS, "not run")
        for name in CHECKS:
            row[name] = outcome(getattr(self, name), getattr(self, "dense_" + name, None))
            if name in ("convert", "train") and row[name] != "ok":
                break
            if name == "convert":
                report = connectivity_report(self.net)
                row |= {"converted": report.total, "connections": report.active}
        row["seconds"] = f"{time.perf_counter() - started:.1f}"
        return row

    def fresh(self) -> nn.Module:
        return self.case.network()

    def convert(self) -> None:
        names = {name for name, _ in self.net.named_parameters(remove_duplicate=False)}
        sparsify(self.net, CONNECTIVITY, target_modules=self.case.targets)
        report = connectivity_report(self.net)
        require(report.active == round(CONNECTIVITY * report.total), f"K = {report.active} of N = {report.total}")
        strangers = [row["name"] for row in report if row["name"] not in names]
        require(not strangers, f"names of no dense parameter: {strangers[:3]}")

    def train(self) -> None:
        before = sorted_connections(self.net)
        train(self.case, self.net)
        dense = self.fresh()
        train(self.case, dense, steps=1, rewire=False)
        missing = (with_gradient(dense) - with_gradient(self.net)) & before.keys()
        require(not missing, f"without a gradient, unlike the dense ones: {sorted(missing)[:3]}")
        self.trained = sorted_connections(self.net)
        moved = sum(int((~torch.isin(places, before[name][0])).sum()) for name, (places, _) in self.trained.items())
        count = sum(len(places) for places, _ in before.values())
        require(moved > 0 or count < ENOUGH, f"none of {count} connections moved")
        self.expected = evaluated(self.case, self.net)
        require(all(bool(part.isfinite().all()) for part in self.expected), "outputs are not finite")
        require(bool(self.expected), "no output")
        self.state = copy.deepcopy(self.net.state_dict())

    def dense_train(self) -> None:
        net = self.fresh()
        train(self.case, net, rewire=False)
        require(all(bool(part.isfinite().all()) for part in evaluated(self.case, net)), "outputs are not finite")

    def _continues(self, net: nn.Module, what: str) -> None:
        """Check that a copy has the same connections and outputs, and can be trained on without changing its source."""
        same_connections(net, self.trained, what)
        agrees(evaluated(self.case, net), self.expected, what)
        train(self.case, net, steps=1)
        same_connections(self.net, self.trained, f"the source after training {what}")

    def state_dict(self) -> None:
        self._continues(load_state_dict(self.fresh(), self.net.state_dict()), "loaded")

    def dense_state_dict(self) -> None:
        net = self.fresh()
        self.fresh().load_state_dict(net.state_dict())
        agrees(evaluated(self.case, net), evaluated(self.case, net), "twice the same")

    def sparse_file(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = save_sparse(self.net, Path(folder) / "net.safetensors")
            self._continues(load_state_dict(self.fresh(), path), "loaded")

    dense_sparse_file = dense_state_dict

    def deepcopy(self) -> None:
        self._continues(copy.deepcopy(self.net), "the copy")

    def dense_deepcopy(self) -> None:
        net = self.fresh()
        train(self.case, net, steps=1, rewire=False)
        copy.deepcopy(net)

    def export(self) -> None:
        agrees(evaluated(self.case, exported(self.case, self.net)), self.expected, "exported")

    def dense_export(self) -> None:
        net = self.fresh()
        agrees(evaluated(self.case, exported(self.case, net)), evaluated(self.case, net), "exported")

    def compute(self) -> None:
        found = {}
        for compute in ("dense", "sparse"):
            net = sparsify(self.fresh(), CONNECTIVITY, target_modules=self.case.targets, compute=compute)
            load_state_dict(net, self.state)
            agrees(evaluated(self.case, net), self.expected, compute)
            found[compute] = gradients(self.case, net)
        require(found["dense"].keys() == found["sparse"].keys(), "gradients of other parameters")
        for name, gradient in found["dense"].items():
            wrong = difference([found["sparse"][name]], [gradient], GRADIENT)
            require(not wrong, f"gradient of `{name}`: {wrong}")

    def dense_compute(self) -> None:
        net = self.fresh()
        agrees(evaluated(self.case, net), evaluated(self.case, net), "twice the same")

    def densify(self) -> None:
        densify(self.net)
        agrees(evaluated(self.case, self.net), self.expected, "densified")
        plain = self.fresh()
        plain.load_state_dict(self.net.state_dict())
        agrees(evaluated(self.case, plain), self.expected, "an ordinary network with its state_dict")

    dense_densify = dense_state_dict
