"""The values of units that no input reaches: they are the same for every input, and can be added to later biases."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_deepr.monitoring.flow import Edges
from lightning_deepr.monitoring.graph import RECURRENT, Graph, Operation, Value


class Constants:
    """The constant value of each unit at each point of the network, NaN where it is not constant or not known.

    Args:
        graph: the units.
        edges: the connections, with values.
        reached: bool [units], the units whose values may change.
    """

    def __init__(self, graph: Graph, edges: list[Edges], reached: np.ndarray) -> None:
        self.graph, self.reached = graph, reached
        self.by_layer: dict[int, list[Edges]] = {}
        for one in edges:
            self.by_layer.setdefault(id(one.layer), []).append(one)
        self.values: dict[int, np.ndarray] = {}
        for operation in graph.operations:
            self._follow(operation)

    def of(self, value: Value) -> np.ndarray:
        """Return float64 [channels]."""
        found = self.values.get(id(value))
        return np.full(len(value.units), np.nan) if found is None else found

    def by_unit(self, value: Value) -> np.ndarray:
        """Return float64 [units]; NaN for the units of other values."""
        spread = np.full(self.graph.count, np.nan)
        spread[value.units] = self.of(value)
        return spread

    def _follow(self, operation: Operation) -> None:
        if operation.kind == "layer":
            found = self._layer(operation)
        elif operation.kind == "sum":
            found = self.of(operation.inputs[0]) + self.of(operation.inputs[1])
        else:
            found = self._each(operation, self.of(operation.inputs[0]))
        found = np.where(self.reached[operation.output.units], np.nan, found)
        self.values[id(operation.output)] = found

    def _each(self, operation: Operation, before: np.ndarray) -> np.ndarray:
        if operation.kind == "each":
            assert operation.function is not None
            with torch.no_grad():
                return np.asarray(operation.function(torch.from_numpy(before.copy())))
        if operation.kind == "norm":
            norm: Any = operation.module
            mean, variance = (_numbers(one) for one in (norm.running_mean, norm.running_var))
            scale = 1.0 if norm.weight is None else _numbers(norm.weight)
            shift = 0.0 if norm.bias is None else _numbers(norm.bias)
            return (before - mean) / np.sqrt(variance + norm.eps) * scale + shift
        if operation.kind == "coupled" or operation.zero_padded:  # 0 stays 0
            return np.where(before == 0, 0.0, np.nan)
        return before

    def _layer(self, operation: Operation) -> np.ndarray:
        layer = operation.layer
        assert layer is not None
        if isinstance(layer.module, RECURRENT):
            return np.full(len(operation.output.units), np.nan)  # it changes with time
        bias: Any = layer.module.bias
        sums = np.zeros(self.graph.count)
        before = self.by_unit(operation.inputs[0])
        for one in self.by_layer.get(id(layer), []):
            assert one.values is not None
            among = ~self.reached[one.rows]
            constant = before[one.columns[among]]
            if operation.zero_padded:
                constant = np.where(constant == 0, 0.0, np.nan)
            np.add.at(sums, one.rows[among], one.values[among] * constant)
        found = sums[operation.output.units]
        return found if bias is None else found + _numbers(bias)


def unfoldable(graph: Graph, edges: list[Edges], constants: Constants) -> np.ndarray:
    """Find the constant units that can't be added to a later bias: at a padded border they are 0, or their value is not known.

    Returns:
        int64, the units.
    """
    found: list[np.ndarray] = []
    for operation in graph.operations:
        if operation.kind == "coupled":  # the neighbours of a channel see it
            units, values = operation.inputs[0].units, constants.of(operation.inputs[0])
            found.append(units[~constants.reached[units] & (values != 0)])
        if operation.kind != "layer":
            continue
        layer = operation.layer
        assert layer is not None
        values = constants.by_unit(operation.inputs[0])
        for one in constants.by_layer.get(id(layer), []):
            columns = one.columns[~constants.reached[one.columns]]
            needs_zero = operation.zero_padded or (isinstance(layer.module, RECURRENT) and not layer.module.bias)
            fails = values[columns] != 0 if needs_zero else np.isnan(values[columns])
            found.append(columns[fails])
    return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)


def _numbers(tensor: torch.Tensor | nn.Parameter) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
