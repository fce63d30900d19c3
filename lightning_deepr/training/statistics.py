"""The statistics of a training: what a callback notes after each step, and what it returns and logs."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from lightning_deepr.monitoring.dead_units import count_dead
from lightning_deepr.monitoring.degrees import degrees_of
from lightning_deepr.monitoring.flow import edges_of
from lightning_deepr.monitoring.graph import Graph, graph_of
from lightning_deepr.monitoring.record import TensorRecord, survival
from lightning_deepr.packages.messages import rank_zero_warn
from lightning_deepr.weights.find import Converted
from lightning_deepr.weights.k_slots import KSlots

if TYPE_CHECKING:
    from lightning_deepr.training.tracked import TrackedTensor

LEVELS = ("none", "network", "tensors", "all")
THETA_EDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Observer:
    """What a callback notes for its statistics.

    Args:
        level: "network" | "tensors" | "all".
        loaded: the state with which the next training goes on.
    """

    def __init__(self, level: str, loaded: dict[str, Any] | None = None) -> None:
        self.level = level
        self._records: dict[str, TensorRecord] = {}
        self._networks: list[weakref.ref[nn.Module]] = []
        self._graphs: tuple[tuple[int, ...], list[Graph]] | None = None
        self._loaded = loaded or {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Observer:
        return Observer(self.level, self.state())  # a copy of a callback watches a network of its own

    def __reduce__(self) -> Any:
        return Observer, (self.level, self.state())

    def add(self, network: nn.Module) -> None:
        """Take a network into account when units are counted."""
        self._networks = [one for one in self._networks if one() not in (None, network)] + [weakref.ref(network)]

    def begin(self, tensors: Sequence[TrackedTensor], anew: bool) -> None:
        """Begin to note the births of some tensors.

        Args:
            tensors: the tensors.
            anew: whether a training begins; otherwise tensors that are known go on.
        """
        known = {} if anew or self._loaded else self._records
        self._records = {}
        for tensor in tensors:
            if not isinstance(tensor.weight, KSlots):
                continue
            record = known.get(tensor.name)
            if record is None or record.slots is not tensor.slots:
                record = TensorRecord(tensor.slots, tensor.step, self.level == "all")
            tensor.slots.notes = self._records[tensor.name] = record
            if tensor.name in self._loaded:
                record.load(self._loaded[tensor.name])
        self._loaded = {}

    def end(self) -> None:
        """Note nothing more. What was noted stays."""
        for record in self._records.values():
            if record.slots.notes is record:
                record.slots.notes = None

    def record_of(self, tensor: TrackedTensor) -> TensorRecord | None:
        record = self._records.get(tensor.name)
        return record if record is not None and record.slots is tensor.weight else None

    def state(self) -> dict[str, Any]:
        """Return the places that have been tried, for a checkpoint."""
        return {name: record.state() for name, record in self._records.items()} or dict(self._loaded)

    def load(self, state: dict[str, Any]) -> None:
        """Continue with what :meth:`state` returned, from the next :meth:`begin` on."""
        self._loaded = dict(state)

    def graphs(self, tensors: Sequence[TrackedTensor]) -> list[Graph]:
        """Return the units of the networks that hold some tensors. They are read once."""
        key = tuple(id(tensor.weight) for tensor in tensors)
        if self._graphs is None or self._graphs[0] != key:
            layers = {tensor.converted.module for tensor in tensors}
            networks = [network for one in self._networks if (network := one()) is not None]
            held = [network for network in networks if not layers.isdisjoint(network.modules())]
            try:
                self._graphs = key, [graph_of(network) for network in held]
            except Exception as error:  # a forward may do anything; the training goes on
                rank_zero_warn(
                    f"The units of the network could not be read for the statistics ({type(error).__name__}: {error})."
                )
                self._graphs = key, []
        return self._graphs[1]


# -- the values -------------------------------------------------------------------------------------------------------------


def log_name(method: Any) -> str:
    """Return the first part of a method's keys: its ``log_name``, or the name of its class in snake case.

    Example::

        >>> class SparseMomentum: log_name = ""
        >>> log_name(SparseMomentum())
        'sparse_momentum'
    """
    return method.log_name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(method).__name__).lower()


def of_network(
    observer: Observer | None,
    tensors: Sequence[TrackedTensor],
    newborn_since: Callable[[int], int],
) -> dict[str, float]:
    """Compute the few values of the network as a whole, before the counts of the tensors are taken."""
    found: dict[str, float] = {}
    exposed = sum(tensor.turnover.steps * tensor.turnover.count for tensor in tensors)
    if exposed:
        found["turnover"] = sum(tensor.turnover.reborn for tensor in tensors) / exposed
    on_slots = [tensor for tensor in tensors if isinstance(tensor.weight, KSlots)]
    if on_slots:
        count = sum(tensor.slots.count for tensor in on_slots)
        young = sum(int((tensor.slots.born >= newborn_since(tensor.step)).sum()) for tensor in on_slots)
        found["newborns"] = young / count
    alphas = [(tensor.last_alpha, tensor.weight.count) for tensor in tensors if tensor.last_alpha is not None]
    if alphas and any(float(alpha) for alpha, _ in alphas):
        found["alpha"] = sum(float(alpha) * count for alpha, count in alphas) / max(sum(count for _, count in alphas), 1)
    if observer is not None:
        records = [record for tensor in on_slots if (record := observer.record_of(tensor)) is not None]
        if records:
            found["explored"] = explored(records)
        for graph in observer.graphs(tensors):
            for key, value in count_dead(graph, edges_of(graph, dense=False)).items():
                found[key] = found.get(key, 0) + value
    return found


def connectivity_of(tensors: Sequence[TrackedTensor]) -> float:
    """Return K / N of some tensors together."""
    return sum(tensor.weight.count for tensor in tensors) / max(sum(tensor.weight.total for tensor in tensors), 1)


def explored(records: Sequence[TensorRecord]) -> float:
    """Return the share of the places of some tensors that have ever had a connection."""
    totals = [record.slots.total if record.slots.allowed is None else record.slots.allowed.count for record in records]
    return sum(record.explored * total for record, total in zip(records, totals, strict=True)) / max(sum(totals), 1)


def everything(observer: Observer, tensors: Sequence[TrackedTensor], newborn_since: Callable[[int], int]) -> dict[str, float]:
    """Compute what is not in the other two levels, for each tensor and for all of them together. Keys: [name/]what."""
    found = _births(tensors)
    records: list[TensorRecord] = []
    ages, thetas = Ages(), Thetas()
    total = sum(tensor.weight.count for tensor in tensors)
    for tensor in tensors:
        name, weight = tensor.name, tensor.weight
        on_slots = isinstance(weight, KSlots)
        theta = weight.own(tensor.theta.detach()) if on_slots else weight.active(tensor.theta)[1]
        own: dict[str, float] = {"share": weight.count / max(total, 1)}
        own |= thetas.add(theta.detach().abs().double().cpu().numpy())
        own |= degrees(tensor.converted)
        if isinstance(weight, KSlots):
            born = weight.born.cpu().numpy()
            own |= ages.add(tensor.step - 1 - born)
            own["newborns"] = int((born >= newborn_since(tensor.step)).sum()) / max(weight.count, 1)
        if tensor.last_alpha is not None and float(tensor.last_alpha):
            own["alpha"] = float(tensor.last_alpha)
        record = observer.record_of(tensor)
        if record is not None:
            records.append(record)
            own["explored"] = record.explored
            own |= _of_records([record], tensor.step)
        found |= {f"{name}/{key}": value for key, value in own.items()}
    found |= thetas.shares() | ages.shares()
    if records:
        found |= _of_records(records, max(tensor.step for tensor in tensors))
    for record in records:
        record.look()
    return found


def _births(tensors: Sequence[TrackedTensor]) -> dict[str, float]:
    counts = [(tensor.name, tensor.turnover) for tensor in tensors if tensor.turnover.steps]
    found = {f"{name}/births": (one.reborn - one.moved) / one.steps for name, one in counts}
    return found | ({"births": sum(found.values())} if found else {})


def _of_records(records: Sequence[TensorRecord], step: int) -> dict[str, float]:
    counts = [record.slots.count for record in records]
    found = {
        key: sum(record.overlap(first) * count for record, count in zip(records, counts, strict=True)) / max(sum(counts), 1)
        for key, first in (("overlap_start", True), ("overlap_last", False))
    }
    return found | {f"survival/{lived}": share for lived, share in survival(records, step).items()}


def _bins(values: np.ndarray) -> np.ndarray:
    """Count numbers in the bins 0, 1, 2-3, 4-7, ...: int64 [64]."""
    return np.bincount(np.frexp(values)[1], minlength=64)


def _lower(number: int) -> int:
    """Return the lower end of a bin."""
    return 2 ** (number - 1) if number else 0


class Ages:
    """The ages of connections, of several tensors."""

    def __init__(self, count: int = 0, total: int = 0, bins: np.ndarray | int = 0) -> None:
        self.count, self.total, self.bins = count, total, bins

    def add(self, ages: np.ndarray) -> dict[str, float]:
        """Add a tensor's ages, and return its own shares."""
        one = Ages(len(ages), int(ages.sum()), _bins(ages))
        self.count, self.total, self.bins = self.count + one.count, self.total + one.total, self.bins + one.bins
        return one.shares()

    def shares(self) -> dict[str, float]:
        """Return the mean age and the share of each bin, up to the oldest."""
        if not self.count:
            return {}
        last = int(np.flatnonzero(self.bins)[-1])
        shares = {f"ages/{_lower(n)}": int(self.bins[n]) / self.count for n in range(last + 1)}  # type: ignore[index]
        return {"age_mean": self.total / self.count, **shares}


class Thetas:
    """The values of theta, of several tensors."""

    def __init__(self, count: int = 0, zeros: int = 0, bins: np.ndarray | int = 0) -> None:
        self.count, self.zeros, self.bins = count, zeros, bins

    def add(self, thetas: np.ndarray) -> dict[str, float]:
        """Add a tensor's abs(theta), and return its own shares."""
        bins = np.bincount(np.searchsorted(THETA_EDGES, thetas, side="right") - 1, minlength=len(THETA_EDGES))
        one = Thetas(len(thetas), int((thetas == 0).sum()), bins)
        self.count, self.zeros, self.bins = self.count + one.count, self.zeros + one.zeros, self.bins + one.bins
        return one.shares()

    def shares(self) -> dict[str, float]:
        """Return the share of connections at exactly 0, and those from one edge to the next."""
        if not self.count:
            return {}
        shares = {f"theta/{edge:g}": int(n) / self.count for edge, n in zip(THETA_EDGES, self.bins, strict=True)}  # type: ignore[arg-type]
        return {"zeros": self.zeros / self.count, **shares}


def degrees(converted: Converted) -> dict[str, float]:
    """Return how many output units have 0, 1, 2-3, 4-7, ... connections, and how many input units."""
    found: dict[str, float] = {}
    for key, counts in zip(("in_degrees", "out_degrees"), degrees_of(converted), strict=True):
        sizes = _bins(counts)
        found |= {f"{key}/{_lower(n)}": float(sizes[n]) for n in range(int(np.flatnonzero(sizes)[-1]) + 1)}
    return found
