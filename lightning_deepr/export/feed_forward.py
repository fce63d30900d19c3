"""Read a feed-forward network from a module: linear layers, ReLU, and nothing else."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lightning_deepr.conversion.adapt import merged_copy
from lightning_deepr.conversion.convert import connections
from lightning_deepr.conversion.known import called_otherwise, evaluating, foreign, hooks_of
from lightning_deepr.export.matrices import rows_of
from lightning_deepr.weights.names import unwrapped

_KNOWN = (nn.Linear, nn.ReLU, nn.Flatten, nn.Identity, nn.Dropout)
_RELU = (torch.relu, F.relu, torch.relu_)
_EXPECTED = "expected a chain of Linear, ReLU, Flatten(1), Identity and Dropout"


@dataclass
class LinearLayer:
    """A linear layer in float32, y = weight @ x + bias, with the ReLU after it if there is one."""

    name: str
    columns: int  # the number of inputs
    pointers: np.ndarray  # int64 [rows + 1]
    places: np.ndarray  # int64 [K], the column of each connection, sorted within a row
    values: np.ndarray  # float32 [K], without zeros
    bias: np.ndarray | None  # float32 [rows]
    relu: bool = False

    @property
    def rows(self) -> int:
        return len(self.pointers) - 1

    def dense(self) -> np.ndarray:
        """Build the dense weight [rows, columns]."""
        weight = np.zeros((self.rows, self.columns), np.float32)
        weight[np.repeat(np.arange(self.rows), np.diff(self.pointers)), self.places] = self.values
        return weight


class _Tracer(fx.Tracer):
    """A tracer that does not enter layers, including converted ones."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _KNOWN) or super().is_leaf_module(m, module_qualified_name)


def read_layers(module: nn.Module) -> list[LinearLayer]:
    """List the linear layers of a feed-forward network in the order of its ``forward``.

    Args:
        module: a converted or dense network; the connections of a dense layer are its weights other than 0.

    Raises:
        ValueError: the network is not a chain of linear layers and ReLU; the message names the other part.
    """
    module = merged_copy(unwrapped(module))
    module = nn.Sequential(module) if isinstance(module, _KNOWN) else module
    for name, part in module.named_modules():
        different = hooks_of(part) or called_otherwise(part)
        if different:
            raise ValueError(_refusal(name, part, different))
    try:
        with evaluating(module):
            graph = _Tracer().trace(module)
    except Exception as error:
        raise ValueError(
            f"to_c_header: {_EXPECTED}; the forward of {type(module).__name__} can't be followed: {error}"
        ) from error
    found = connections(module)
    layers: list[LinearLayer] = []
    previous: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            if previous is not None:
                raise ValueError(f"to_c_header: {_EXPECTED} with one input, found a second one, `{node.target}`.")
        elif node.op == "output":
            if node.args[0] is not previous:
                raise ValueError(f"to_c_header: {_EXPECTED}; the output of {type(module).__name__} is not the last layer's.")
        elif previous is None or node.all_input_nodes != [previous]:
            raise ValueError(f"to_c_header: {_EXPECTED}; `{node.name}` is not a link of one chain.")
        else:
            _add(layers, node, module, found)
        previous = node
    if not layers:
        raise ValueError(f"to_c_header: {_EXPECTED}; {type(module).__name__} has no linear layer.")
    for before, after in itertools.pairwise(layers):
        if before.rows != after.columns:
            raise ValueError(
                f"to_c_header: `{before.name}` has {before.rows} outputs, and `{after.name}` takes {after.columns}."
            )
    return layers


def _add(layers: list[LinearLayer], node: fx.Node, module: nn.Module, found: dict[str, Any]) -> None:
    """Add one operation to the list, and skip an operation that changes no value."""
    part = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(part, _KNOWN):
        different = foreign(part, _KNOWN)
        if different:
            raise ValueError(_refusal(str(node.target), part, different))
    if isinstance(part, nn.Linear):
        layers.append(_linear(str(node.target), part, found))
    elif isinstance(part, nn.ReLU) or (node.op == "call_function" and node.target in _RELU) or _method(node, "relu", "relu_"):
        if not layers:
            raise ValueError(f"to_c_header: {_EXPECTED}; `{node.name}` comes before the first linear layer.")
        layers[-1].relu = True
    elif not _does_nothing(node, part):
        what = type(part).__name__ if part is not None else getattr(node.target, "__name__", node.target)
        place = f"`{node.target}` ({what})" if part is not None else f"`{what}`"
        raise ValueError(
            f"to_c_header: {_EXPECTED}, found {place} in {type(module).__name__}. to_onnx exports other networks; a softmax "
            "at the end is left to the caller."
        )


def _refusal(name: str, part: nn.Module, why: str) -> str:
    return (
        f"to_c_header: {_EXPECTED}, each exactly as torch computes it; `{name or type(part).__name__}` {why}. Export a network "
        "in which this is part of the weights (torch.nn.utils.prune.remove, "
        "torch.nn.utils.parametrize.remove_parametrizations, or handle.remove() of a hook)."
    )


def _method(node: fx.Node, *names: str) -> bool:
    return node.op == "call_method" and node.target in names


def _does_nothing(node: fx.Node, part: nn.Module | None) -> bool:
    """Tell whether an operation keeps the values of a sample and their order."""
    if part is not None:
        return isinstance(part, (nn.Identity, nn.Dropout)) or (
            isinstance(part, nn.Flatten) and (part.start_dim, part.end_dim) == (1, -1)
        )
    rest = node.args[1:]
    if node.target in (torch.flatten,) or _method(node, "flatten"):
        first = rest[0] if rest else node.kwargs.get("start_dim", 0)
        last = rest[1] if len(rest) > 1 else node.kwargs.get("end_dim", -1)
        return (first, last) == (1, -1)
    if _method(node, "view", "reshape"):
        return bool(len(rest) == 2 and rest[0] == -1 and isinstance(rest[1], int))
    if node.target is F.dropout:
        return bool(node.kwargs.get("training") is False)
    return _method(node, "contiguous") or node.target is operator.pos


def _linear(name: str, layer: nn.Linear, found: dict[str, Any]) -> LinearLayer:
    tensor = f"{name}.weight".removeprefix(".")
    if tensor in found:
        shape, places, values = found[tensor]
    else:
        shape, flat = layer.weight.shape, layer.weight.detach().reshape(-1)
        places = flat.nonzero().view(-1)
        values = flat[places]
    values = values.detach().cpu().float()
    places, values = places.cpu()[values != 0], values[values != 0]  # a connection of value 0 adds nothing
    bias = None if layer.bias is None else layer.bias.detach().cpu().float()
    for what, numbers in (("weights", values), ("biases", bias)):
        if isinstance(numbers, Tensor) and not bool(numbers.isfinite().all()):
            raise ValueError(f"to_c_header: expected finite {what}, found NaN or infinity in `{name}`.")
    pointers, columns, values = rows_of(shape, places, values)
    return LinearLayer(
        name=name,
        columns=shape[1],
        pointers=pointers.numpy(),
        places=columns.numpy(),
        values=values.numpy(),
        bias=None if bias is None else bias.numpy(),
    )
