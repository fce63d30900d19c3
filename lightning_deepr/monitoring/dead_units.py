"""Units that are cut off: without input, without output, on no path from an input to an output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from lightning_deepr.conversion import tables
from lightning_deepr.monitoring.flow import Edges, Flow, edges_of, flow_of
from lightning_deepr.monitoring.graph import Graph, graph_of


class DeadUnits:
    """The units of a network that are cut off, layer by layer; see :func:`dead_units`. It prints as a table.

    Attributes:
        rows: one dict per layer.
        indices: {layer: {"without_input": [...], "without_output": [...], "dead": [...]}}, the numbers of the units.
    """

    columns = ("layer", "units", "without_input", "without_output", "dead", "connections", "to_nowhere", "from_nowhere")

    def __init__(self, rows: list[dict[str, Any]], indices: dict[str, dict[str, list[int]]]) -> None:
        self.rows, self.indices = rows, indices

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def total(self) -> dict[str, int]:
        """The sums over the layers."""
        return {key: sum(row[key] for row in self.rows) for key in self.columns[1:]}

    def to_dict(self) -> dict[str, Any]:
        """Return rows, sums and the numbers of the units, in builtins only."""
        return {"rows": [dict(row) for row in self.rows], **self.total, "indices": self.indices}

    def _cells(self) -> tuple[list[list[Any]], list[Any]]:
        return [[row[key] for key in self.columns] for row in self.rows], ["total", *self.total.values()]

    def __str__(self) -> str:
        return tables.as_text(self.columns, *self._cells())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return tables.as_html(self.columns, *self._cells())


def dead_units(module: nn.Module) -> DeadUnits:
    """Find the units that connections do not reach or do not leave.

    Every connection counts, also one of value 0. Connections of a weight that is not converted are its entries other than 0.
    The cost is O(K). ``torch.fx`` follows the module's ``forward`` (without an input); where that fails, its largest parts
    that can be followed are read, each as a network of its own. An operation that is not known reads all of its inputs.

    Args:
        module: any module.

    Returns:
        rows with layer, units, without_input (units that no connection enters), without_output (that no connection leaves and
        no output shows), dead (units on no path from an input to an output), connections (K), to_nowhere (connections that
        enter a unit without a path to an output) and from_nowhere (that leave a unit without a path from an input).
        ``.indices`` has the numbers of the units, ``.total`` the sums.

    Raises:
        ValueError: no linear, convolutional or recurrent layer was found.

    Example::

        >>> from lightning_deepr import sparsify
        >>> net = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> net = sparsify(net, {"0": [0], "2": [1]})  # the first unit has an input, the second an output
        >>> found = dead_units(net)
        >>> found.indices["0"]["without_input"], found.indices["0"]["without_output"], found.total["to_nowhere"]
        ([1], [0], 1)
    """
    graph = graph_of(module)
    if not graph.layers:
        raise ValueError(
            f"dead_units: expected a network with linear, convolutional or recurrent layers, found none in "
            f"{type(module).__name__}."
        )
    edges = edges_of(graph)
    flow = flow_of(graph, edges)
    rows, indices = [], {}
    for number, layer in enumerate(graph.layers):
        mine = [one for one in edges if one.layer is layer]
        made = made_by(graph, number)
        found = {
            "without_input": ~flow.entered[made],
            "without_output": ~flow.left[made],
            "dead": ~(flow.reached[made] & flow.used[made]),
        }
        name = layer.name or "(the network)"
        indices[name] = {key: np.flatnonzero(mask).tolist() for key, mask in found.items()}
        rows.append(
            {
                "layer": name,
                "units": len(made),
                **{key: int(mask.sum()) for key, mask in found.items()},
                "connections": sum(len(one.places) for one in mine),
                "to_nowhere": sum(int((~flow.used[one.rows]).sum()) for one in mine),
                "from_nowhere": sum(int((~flow.reached[one.columns]).sum()) for one in mine),
            }
        )
    return DeadUnits(rows, indices)


def made_by(graph: Graph, number: int) -> np.ndarray:
    """List the units that a layer makes. Of layers whose outputs are added, each makes them."""
    layer = graph.layers[number]
    weights = list(layer.weights.values())
    found = np.concatenate([weight.rows for weight in weights])
    _, first = np.unique(found, return_index=True)
    return found[np.sort(first)]


def count_dead(graph: Graph, edges: list[Edges], flow: Flow | None = None) -> dict[str, int]:
    """Count what is cut off in the whole network, for the log.

    A unit that several layers make (their outputs are added) counts once.
    """
    flow = flow or flow_of(graph, edges)
    made = np.zeros(graph.count, bool)
    for layer in graph.layers:
        for weight in layer.weights.values():
            made[weight.rows] = True
    return {
        "units_without_input": int((made & ~flow.entered).sum()),
        "units_without_output": int((made & ~flow.left).sum()),
        "connections_to_nowhere": sum(int((~flow.used[one.rows]).sum()) for one in edges),
    }
