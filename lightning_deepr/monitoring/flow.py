"""Which units signals reach and leave: paths over the connections of a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_deepr.monitoring.graph import Graph, Layer, Weight
from lightning_deepr.weights.find import Converted, slots_of


@dataclass
class Edges:
    """The connections of a weight: units and values.

    Attributes:
        layer, weight: what they belong to.
        places: int64 [K], flat indices into the weight.
        rows, columns: int64 [K], the unit that a connection enters, and the one that it leaves.
        values: float [K]; None: not asked for.
    """

    layer: Layer
    weight: Weight
    places: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray | None = None


def converted_of(layer: Layer, weight: Weight) -> Converted | None:
    """Return the converted tensor of a weight, or None if the weight is dense (as the sum with a frozen weight is)."""
    slots = slots_of(layer.module, weight.name)
    return (
        None
        if slots is None or slots.adapts
        else Converted(f"{layer.name}.{weight.name}".lstrip("."), layer.module, weight.name, slots)
    )


def edges_of(graph: Graph, *, values: bool = False, dense: bool = True) -> list[Edges]:
    """List the connections of every weight, in the order of the layers.

    Args:
        graph: the units.
        values: whether the values are needed.
        dense: whether the connections of a weight that is not converted are its entries other than 0. False: it connects all
            units with all; it is left out here, and :func:`flow` knows.
    """
    return [one for layer in graph.layers for weight in layer.weights.values() for one in _edges(layer, weight, values, dense)]


def _edges(layer: Layer, weight: Weight, values: bool, dense: bool) -> Iterator[Edges]:
    converted = converted_of(layer, weight)
    found: torch.Tensor | None = None
    if converted is not None:
        slots = converted.slots
        theta = converted.theta.detach()
        if values or not hasattr(slots, "places"):
            at, found = slots.active(theta)
        else:
            at = slots.places  # type: ignore[assignment]
    elif dense:
        whole: nn.Parameter = getattr(layer.module, weight.name)
        flat = whole.detach().reshape(-1)
        at = flat.nonzero().view(-1)
        found = flat[at]
    else:
        return
    places = at.cpu().numpy()
    entry = places // weight.inner if weight.inner > 1 else places
    width = max(len(weight.columns), 1)
    row = entry // width
    number = found.double().cpu().numpy() if values and found is not None else None
    yield Edges(layer, weight, places, weight.rows[row], weight.columns[entry - row * width], number)


@dataclass
class Flow:
    """Where signals go.

    Attributes:
        reached: bool [units], whether a path of connections leads from an input to the unit.
        used: bool [units], whether a path of connections leads from the unit to an output.
        entered, left: bool [units], whether any connection enters, or leaves, the unit.
    """

    reached: np.ndarray
    used: np.ndarray
    entered: np.ndarray
    left: np.ndarray


def flow_of(graph: Graph, edges: list[Edges]) -> Flow:
    """Follow the connections from the inputs and from the outputs."""
    listed = {(id(one.layer), one.weight.name): one for one in edges}
    steps: list[Edges | Weight] = [
        listed.get((id(layer), weight.name), weight) for layer in graph.layers for weight in layer.weights.values()
    ]
    reached, used = graph.source.copy(), graph.read.copy()
    entered, left = np.zeros(graph.count, bool), np.zeros(graph.count, bool)
    for one in steps:
        entered[one.rows] = left[one.columns] = True
    _spread(reached, [(one, one.columns, one.rows) for one in steps], graph.has_loops)
    _spread(used, [(one, one.rows, one.columns) for one in reversed(steps)], graph.has_loops)
    return Flow(reached, used, entered | graph.source, left | graph.read)


def _spread(marked: Any, steps: Sequence[tuple[Any, Any, Any]], again: bool) -> None:
    """Mark all units to which a step leads from a marked one.

    Args:
        marked: bool [units], changed in place.
        steps: each with the units that it begins and ends at; all pairs of them for a ``Weight``, else one pair per entry.
        again: whether to repeat this until nothing changes, as loops need.
    """
    while True:
        before = int(marked.sum())
        for one, begin, end in steps:
            if isinstance(one, Weight):
                marked[end] |= bool(marked[begin].any())
            else:
                marked[end[marked[begin]]] = True
        if not again or int(marked.sum()) == before:
            return
