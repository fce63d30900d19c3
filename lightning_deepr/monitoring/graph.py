"""Which units of a network each layer connects, read from the network's ``forward``.

A *unit* is an output of a linear layer, a channel of a convolution or a hidden unit of a recurrent layer. ``torch.fx`` follows
``forward`` once, without an input. Operations that treat every unit alone (activations, batch norm, pooling, dropout) keep the
units; everything else that is not known is *opaque*: it is taken to read all units of its inputs and to make units of its own,
which stay.
"""

from __future__ import annotations

import inspect
import operator
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized, type_before_parametrizations

from lightning_deepr.conversion.known import called_otherwise, evaluating, foreign, hooks_of
from lightning_deepr.models import ResponseNorm
from lightning_deepr.packages.names import is_a
from lightning_deepr.weights.base import Parametrization
from lightning_deepr.weights.find import slots_of, stacked_upon
from lightning_deepr.weights.names import paths_of, unwrapped

LINEAR, CONVOLUTIONS, RECURRENT = (nn.Linear,), (nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.LSTM, nn.GRU, nn.RNN)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Softplus,
    nn.Softsign, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink,
    nn.Threshold,
)  # fmt: skip
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_KEPT = (*_ACTIVATIONS, *_NOTHING, *_POOLS, *_AVERAGES)
_KNOWN = (*LINEAR, *CONVOLUTIONS, *RECURRENT, *BATCH_NORMS, *_KEPT, nn.Flatten, ResponseNorm)
_FUNCTIONS = {
    torch.relu, torch.relu_, torch.tanh, torch.sigmoid, F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu,
    F.mish, F.sigmoid, F.tanh, F.softplus, F.softsign, F.hardtanh, F.hardswish, F.hardsigmoid, F.logsigmoid,
}  # fmt: skip
_METHODS = {"relu", "relu_", "tanh", "tanh_", "sigmoid", "sigmoid_"}
_SAME_METHODS = {"contiguous", "clone", "detach"}
_POOLING_FUNCTIONS = {F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d}
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}
_SIZES = {"size", "dim", "numel"}


class Untraceable(ValueError):
    """The ``forward`` of a module can't be followed."""


@dataclass
class Value:
    """The tensor between two operations.

    Attributes:
        units: int64 [channels], the number of each channel's unit in the network.
        layout: where the channels are: "channels" (dimension 1) | "features" (the last one) | "flat" (channels and the
            positions of each, in one dimension).
    """

    units: np.ndarray
    layout: str


@dataclass
class Operation:
    """An operation between values. ``kind``: "layer" | "each" (an activation) | "same" | "norm" | "coupled" | "sum"."""

    kind: str
    inputs: list[Value]
    output: Value
    layer: Layer | None = None
    module: nn.Module | None = None
    function: Callable[[Tensor], Tensor] | None = None
    zero_padded: bool = False  # whether zeros come in at the borders: a unit that is constant does not stay so


@dataclass
class Layer:
    """A linear, convolutional or recurrent layer.

    Attributes:
        name: the module's name in the network.
        module: the layer.
        weights: {tensor name: what its places connect}; a recurrent layer has several tensors.
        inputs, outputs: the values before and after it.
    """

    name: str
    module: nn.Module
    inputs: Value
    outputs: Value
    weights: dict[str, Weight] = field(default_factory=dict)


@dataclass
class Weight:
    """A weight of a layer: the units of its rows and columns.

    Attributes:
        rows, columns: int64, the unit of each row and of each column. Rows of an LSTM's four gates have the same units.
        inner: the positions of a kernel at each pair.
    """

    name: str
    rows: np.ndarray
    columns: np.ndarray
    inner: int = 1


@dataclass
class Graph:
    """The units and the layers of a network, in the order in which it computes.

    Attributes:
        count: the number of units.
        fixed: bool [count], the units that stay: inputs, outputs, and those that an opaque operation makes or reads.
        source: bool [count], the units that come from outside: inputs, and what opaque operations make.
        read: bool [count], the units that the network's output or an opaque operation reads.
        owner: int64 [count], the number of the layer that makes the unit, or -1.
        has_loops: whether a unit may depend on a later one (recurrent layers, residual streams).
    """

    layers: list[Layer] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    count: int = 0
    fixed: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    source: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    read: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    owner: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    has_loops: bool = False

    def new_units(self, number: int, *, fixed: bool = False, source: bool = False, owner: int = -1) -> np.ndarray:
        """Add units, and return their numbers."""
        self.fixed = np.append(self.fixed, np.full(number, fixed))
        self.source = np.append(self.source, np.full(number, source))
        self.read = np.append(self.read, np.zeros(number, bool))
        self.owner = np.append(self.owner, np.full(number, owner))
        self.count += number
        return np.arange(self.count - number, self.count)


class _Tracer(fx.Tracer):
    """A tracer that does not enter layers that are known, or whose calls do something else than their ``forward``."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = isinstance(m, _KNOWN) or is_parametrized(m) or hooks_of(m) or called_otherwise(m)
        return bool(known) or super().is_leaf_module(m, module_qualified_name)


def _shell(module: nn.Module) -> nn.Module:
    """Copy the modules without their tensors: what a ``forward`` assigns to ``self`` while it is followed goes to the copy."""
    seen: dict[int, nn.Module] = {}

    def copied(one: nn.Module) -> nn.Module:
        if id(one) not in seen:
            new = seen[id(one)] = one.__class__.__new__(one.__class__)
            vars(new).update(vars(one))
            vars(new)["_modules"] = {name: None if part is None else copied(part) for name, part in one._modules.items()}
            for kind in ("_parameters", "_buffers"):
                vars(new)[kind] = dict(vars(one)[kind])
        return seen[id(one)]

    return copied(module)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Keep the global generators as they are: a ``forward`` that draws runs once more."""
    python, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)  # noqa: NPY002


def _followed(module: nn.Module) -> fx.Graph:
    """Follow a module's ``forward`` in eval mode, with its required arguments.

    Raises:
        Untraceable: it can't be followed.
    """
    try:
        optional = {
            name: parameter.default
            for name, parameter in inspect.signature(module.forward).parameters.items()
            if parameter.default is not parameter.empty
        }
        shell = _shell(module)
        with _generators_kept(), evaluating(shell), torch.no_grad():
            return _Tracer().trace(shell, concrete_args=optional or None)
    except Exception as error:
        raise Untraceable(
            f"the forward of {type_before_parametrizations(module).__name__} can't be followed: {error}"
        ) from error


def graph_of(module: nn.Module, *, whole: bool = False) -> Graph:
    """Read which units a network's layers connect.

    Args:
        module: any module.
        whole: whether the module's own ``forward`` has to be followed. Otherwise the largest parts that can be are read; their
            inputs and outputs are taken for the network's.

    Raises:
        Untraceable: with ``whole``: the ``forward`` can't be followed.
    """
    root = unwrapped(module)
    names = {one: paths[0] for one, paths in paths_of(module).items()}
    graph = Graph()
    shared = _shared_parameters(root)
    if whole:
        _read(graph, root, names, shared)
        return graph
    _read_parts(graph, root, names, shared)
    return graph


def _read_parts(graph: Graph, module: nn.Module, names: dict[nn.Module, str], shared: set[int]) -> None:
    if is_a(module, "core.module", "LightningModule") and type(module).forward.__qualname__.startswith("LightningModule."):
        parts = list(module.children())  # no forward of its own
    else:
        try:
            _read(graph, module, names, shared)
            return
        except Untraceable:
            parts = list(module.children())
    for part in parts:
        _read_parts(graph, part, names, shared)


def _shared_parameters(root: nn.Module) -> set[int]:
    """List the modules that share a parameter with another one (tied weights). Layers with one K for all share theta alone."""
    holders: dict[int, list[nn.Module]] = {}
    for part in root.modules():
        if not isinstance(part, ParametrizationList):
            for parameter in part._parameters.values():
                if parameter is not None:
                    holders.setdefault(id(parameter), []).append(part)
    return {id(part) for parts in holders.values() if len(parts) > 1 for part in parts}


class _Reader:
    """Read the nodes of one ``fx`` graph, in order."""

    def __init__(self, graph: Graph, root: nn.Module, names: dict[nn.Module, str], shared: set[int], calls: dict[str, int]):
        self.graph, self.root, self.names, self.shared, self.calls = graph, root, names, shared, calls
        self.values: dict[fx.Node, Any] = {}
        self.merged: list[tuple[np.ndarray, np.ndarray]] = []

    def read(self, nodes: Any) -> None:
        for node in nodes:
            self.values[node] = self._value(node)

    def _value(self, node: fx.Node) -> Any:
        if node.op in ("placeholder", "get_attr"):
            return None  # an input of the network: how many units it has, the first layer says
        if node.op == "output":
            self._reads(node)
            return None
        if node.target is operator.getitem and not node.users:
            return None  # `y, _ = lstm(x)`
        found = None if _writes_what_others_read(node, self.root) else self._known(node)
        if found is None:
            self._reads(node)
        return found

    def _reads(self, node: fx.Node) -> None:
        """Note that an opaque operation reads its inputs."""
        for one in node.all_input_nodes:
            value = self.values.get(one)
            for found in value if isinstance(value, tuple) else (value,):
                if isinstance(found, Value):
                    self.graph.read[found.units] = self.graph.fixed[found.units] = True

    def _known(self, node: fx.Node) -> Any:
        """Return the value of an operation that is known; None: it is opaque."""
        first = node.args[0] if node.args else None
        value = self.values.get(first) if isinstance(first, fx.Node) else None
        if node.op == "call_module":
            return self._module(node, self.root.get_submodule(str(node.target)), value)
        if node.target is operator.getitem and isinstance(value, tuple):  # of a recurrent layer: the outputs, the last states
            return value[0] if node.args[1] == 0 else self._states(value)
        if _is_sum(node):
            return self._sum(node)
        if not isinstance(value, Value):
            return None
        if node.op == "call_method":
            return self._method(node, value)
        return self._function(node, value)

    def _states(self, value: tuple[Any, ...]) -> None:
        """Note that the last states of a recurrent layer are read."""
        self.graph.read[value[0].units] = self.graph.fixed[value[0].units] = True
        for units in value[1]:
            self.graph.read[units] = self.graph.fixed[units] = True

    def _function(self, node: fx.Node, value: Value) -> Value | None:
        target, rest = node.target, node.args[1:]
        others = [one for one in node.all_input_nodes if one is not node.args[0]]
        if target is getattr or others:
            if target is getattr and node.args[1] in ("shape", "dtype", "device"):
                return _Size()  # type: ignore[return-value]
            return None
        if target in _FUNCTIONS:
            return self._each(value, lambda x: target(x, *rest, **node.kwargs))  # type: ignore[operator]
        if target in _DROPOUTS:
            training = rest[1] if len(rest) > 1 else node.kwargs.get("training", True)
            return self._same(value) if training is False else None
        if target in _POOLING_FUNCTIONS and value.layout == "channels":
            return self._same(value)
        if target is torch.flatten:
            return self._flatten(node, value)
        if target in (operator.mul, operator.truediv, torch.mul) and len(rest) == 1 and isinstance(rest[0], (int, float)):
            return self._each(value, lambda x: target(x, rest[0]))  # type: ignore[operator]
        if target is operator.getitem and value.layout == "channels":
            index = node.args[1]
            whole = slice(None)
            if isinstance(index, tuple) and len(index) > 2 and index[:2] == (whole, whole) and _only_slices(index):
                return self._same(value)
        if target is torch.mean:
            return self._mean(node, value)
        return None

    def _method(self, node: fx.Node, value: Value) -> Value | None:
        name, rest = str(node.target), node.args[1:]
        if name in _SIZES:
            return _Size()  # type: ignore[return-value]
        if name in _METHODS and not rest:
            return self._each(value, lambda x: getattr(x.clone(), name)())
        if name in _SAME_METHODS:
            return self._same(value)
        if name == "flatten":
            return self._flatten(node, value)
        if name in ("view", "reshape") and len(rest) == 2 and rest[1] == -1 and value.layout == "channels":
            size = rest[0]
            if isinstance(size, fx.Node) and self._is_batch_size(size, node.args[0]):
                return self._same(value, "flat")
        if name == "mean":
            return self._mean(node, value)
        return None

    def _is_batch_size(self, node: fx.Node, of: Any) -> bool:
        """Whether a node is the size of dimension 0: ``x.size(0)``, ``x.shape[0]``."""
        if node.op == "call_method" and node.target == "size":
            return bool(node.args[1:] == (0,))
        if node.target is operator.getitem and node.args[1] == 0 and isinstance(node.args[0], fx.Node):
            inside = node.args[0]
            by_attribute = inside.target is getattr and inside.args[1] == "shape"
            return bool(by_attribute or (inside.target == "size" and len(inside.args) == 1))
        return False

    def _flatten(self, node: fx.Node, value: Value) -> Value | None:
        rest = node.args[1:]
        first = rest[0] if rest else node.kwargs.get("start_dim", 0)
        last = rest[1] if len(rest) > 1 else node.kwargs.get("end_dim", -1)
        if (first, last) != (1, -1):
            return None
        return self._same(value, "flat" if value.layout != "features" else "features")

    def _mean(self, node: fx.Node, value: Value) -> Value | None:
        dimensions = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if value.layout != "channels" or node.kwargs.get("keepdim") or len(node.args) > 2 or not dimensions:
            return None
        found = dimensions if isinstance(dimensions, (tuple, list)) else (dimensions,)
        return self._same(value, "features") if sorted(found) in ([2, 3], [-2, -1]) else None

    def _sum(self, node: fx.Node) -> Value | None:
        values = [self.values.get(one) if isinstance(one, fx.Node) else one for one in node.args]
        number = [one for one in values if isinstance(one, (int, float)) and not isinstance(one, bool)]
        found = [one for one in values if isinstance(one, Value)]
        if len(node.args) != 2 or node.kwargs or len(number) + len(found) != 2 or not found:
            return None
        if number:
            added = number[0]
            return self._each(found[0], lambda x: x + added)
        one, two = found
        if one.layout != two.layout or one.units.shape != two.units.shape:
            return None
        self.merged.append((one.units, two.units))
        return self._done(Operation("sum", [one, two], Value(one.units, one.layout)))

    def _module(self, node: fx.Node, part: nn.Module, value: Any) -> Any:
        kind = type_before_parametrizations(part)
        base = next((one for one in kind.__mro__ if one in _KNOWN), None)
        inputs = list(node.all_input_nodes)
        if base is None or len(inputs) != 1 or node.kwargs or len(node.args) != 1 or _differs(part, base):
            return None
        alone = self.calls[str(node.target)] == 1 and id(part) not in self.shared
        if base in (*LINEAR, *CONVOLUTIONS, *RECURRENT):
            if not alone:
                return None
            if not isinstance(value, Value):
                self._reads(node)
                value = None
            if base in LINEAR:
                return self._linear(part, value)
            return self._convolution(part, value) if base in CONVOLUTIONS else self._recurrent(part, value)
        if not isinstance(value, Value):
            return None
        if base in BATCH_NORMS:
            fits = value.layout == "channels" or (value.layout == "features" and base is nn.BatchNorm1d)
            plain = getattr(part, "track_running_stats", False) and part.running_mean is not None
            if not (alone and fits and plain and part.num_features == len(value.units)):
                return None
            return self._done(Operation("norm", [value], Value(value.units, value.layout), module=part))
        if base is ResponseNorm:
            if not alone or value.layout != "channels" or cast("Tensor", part.band).shape[0] != len(value.units):
                return None
            return self._done(Operation("coupled", [value], Value(value.units, value.layout), module=part))
        if base is nn.Flatten:
            if (part.start_dim, part.end_dim) != (1, -1):
                return None
            return self._same(value, "flat" if value.layout != "features" else "features")
        if base in _ACTIVATIONS:
            return self._each(value, part)
        if base in (*_POOLS, *_AVERAGES) and value.layout != "channels":
            return None
        if base in _AVERAGES:
            padding: Any = part.padding
            borders = part.ceil_mode or any(padding if isinstance(padding, tuple) else (padding,))
            return self._done(Operation("same", [value], Value(value.units, value.layout), zero_padded=bool(borders)))
        return None if getattr(part, "return_indices", False) else self._same(value)

    def _done(self, operation: Operation) -> Value:
        self.graph.operations.append(operation)
        return operation.output

    def _same(self, value: Value, layout: str | None = None) -> Value:
        return self._done(Operation("same", [value], Value(value.units, layout or value.layout)))

    def _each(self, value: Value, function: Callable[[Tensor], Tensor]) -> Value:
        return self._done(Operation("each", [value], Value(value.units, value.layout), function=function))

    def _layer(self, part: nn.Module, value: Value | None, columns: int, rows: int, layout: str) -> tuple[Layer, Value]:
        """Add a layer, and its input if that comes from outside or does not fit."""
        name = self.names.get(part, "")
        if (
            value is not None
            and len(value.units) != columns
            and not (value.layout == "flat" and len(value.units) and columns % len(value.units) == 0)
        ):
            self.graph.read[value.units] = self.graph.fixed[value.units] = True
            value = None
        if value is None:
            value = Value(self.graph.new_units(columns, fixed=True, source=True), layout)
        made = self.graph.new_units(rows, owner=len(self.graph.layers))
        layer = Layer(name, part, value, Value(made, layout))
        self.graph.layers.append(layer)
        return layer, layer.outputs

    def _linear(self, part: Any, value: Value | None) -> Value | None:
        if value is not None and value.layout == "channels":  # over the last dimension, whose sizes are no channels
            self.graph.read[value.units] = self.graph.fixed[value.units] = True
            value = None
        layer, output = self._layer(part, value, part.in_features, part.out_features, "features")
        units = layer.inputs.units
        layer.weights["weight"] = Weight("weight", output.units, np.repeat(units, part.in_features // max(len(units), 1)))
        return self._done(Operation("layer", [layer.inputs], output, layer))

    def _convolution(self, part: Any, value: Value | None) -> Value | None:
        if part.groups != 1 or (value is not None and value.layout != "channels"):
            if value is not None:
                self.graph.read[value.units] = self.graph.fixed[value.units] = True
            return None
        layer, output = self._layer(part, value, part.in_channels, part.out_channels, "channels")
        kernel = int(np.prod(part.kernel_size))
        layer.weights["weight"] = Weight("weight", output.units, layer.inputs.units, kernel)
        padded = (
            part.padding_mode == "zeros"
            and part.padding not in ("valid", 0)
            and any((part.padding,) if isinstance(part.padding, (int, str)) else part.padding)
        )
        return self._done(Operation("layer", [layer.inputs], output, layer, zero_padded=bool(padded)))

    def _recurrent(self, part: Any, value: Value | None) -> Any:
        if getattr(part, "proj_size", 0) or (value is not None and value.layout != "features"):
            if value is not None:
                self.graph.read[value.units] = self.graph.fixed[value.units] = True
            return None
        self.graph.has_loops = True
        directions, hidden = 1 + part.bidirectional, part.hidden_size
        layer, output = self._layer(part, value, part.input_size, directions * hidden, "features")
        gates = part.weight_hh_l0.shape[0] // hidden
        below, states = layer.inputs.units, []
        for number in range(part.num_layers):
            units = output.units
            if number < part.num_layers - 1:
                units = self.graph.new_units(directions * hidden, owner=len(self.graph.layers) - 1)
                states.append(units)
            for direction, own in enumerate(units.reshape(directions, hidden)):
                suffix = f"l{number}{'_reverse' if direction else ''}"
                rows = np.tile(own, gates)
                layer.weights[f"weight_ih_{suffix}"] = Weight(f"weight_ih_{suffix}", rows, below)
                layer.weights[f"weight_hh_{suffix}"] = Weight(f"weight_hh_{suffix}", rows, own)
            below = units
        self._done(Operation("layer", [layer.inputs], output, layer))
        return output, tuple(states)


def _writes_what_others_read(node: fx.Node, root: nn.Module) -> bool:
    """Whether an operation in place changes a tensor that other operations read, perhaps later."""
    name = str(getattr(node.target, "__name__", node.target))
    part = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    in_place = getattr(part, "inplace", False) or node.kwargs.get("inplace") or node.target is operator.iadd
    in_place = in_place or (part is None and name.endswith("_") and not name.endswith("__"))
    return bool(in_place) and any(len(one.users) > 1 for one in node.all_input_nodes[:1])


class _Size:
    """What ``x.shape`` or ``x.size()`` is: it reads no unit."""


def _only_slices(index: tuple[Any, ...]) -> bool:
    return all(isinstance(one, slice) and not any(isinstance(end, fx.Node) for end in (one.start, one.stop)) for one in index)


def _is_sum(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("add", "add_")
    return node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)


def _differs(part: nn.Module, base: type) -> bool:
    """Whether a layer may compute something else than its class."""
    kind = type_before_parametrizations(part)
    if kind is not base and getattr(kind, "forward", None) is not getattr(base, "forward", None):
        return True
    if hooks_of(part) or called_otherwise(part):
        return True
    if base in LINEAR and foreign(part, LINEAR):
        return True
    if is_parametrized(part):
        for tensor_name, holder in part.parametrizations.items():  # type: ignore[union-attr, operator]
            if not isinstance(holder[0], Parametrization) or stacked_upon(holder) or slots_of(part, tensor_name).is_block:
                return True
    return False


def _read(graph: Graph, module: nn.Module, names: dict[nn.Module, str], shared: set[int]) -> None:
    """Add what a module's ``forward`` does to a graph.

    Raises:
        Untraceable: it can't be followed.
    """
    if isinstance(module, _KNOWN):  # a single layer
        root: nn.Module = nn.Sequential()
        root._modules["0"] = module
        module = root
    followed = _followed(module)
    calls: dict[nn.Module, int] = {}
    for node in followed.nodes:
        if node.op == "call_module":
            part = module.get_submodule(str(node.target))
            calls[part] = calls.get(part, 0) + 1
    by_name = {str(n.target): calls[module.get_submodule(str(n.target))] for n in followed.nodes if n.op == "call_module"}
    reader = _Reader(graph, module, names, shared, by_name)
    reader.read(followed.nodes)
    _merge(graph, reader.merged)


def _merge(graph: Graph, pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Make one unit of those that are added to each other: a residual stream is written by several layers."""
    if not pairs:
        return
    graph.has_loops = True
    parent = np.arange(graph.count)

    def root_of(unit: int) -> int:
        while parent[unit] != unit:
            parent[unit] = parent[parent[unit]]
            unit = parent[unit]
        return unit

    for one, two in pairs:
        for a, b in zip(one.tolist(), two.tolist(), strict=True):
            a, b = root_of(a), root_of(b)
            parent[max(a, b)] = min(a, b)
    roots = np.array([root_of(unit) for unit in range(graph.count)])
    for flags in (graph.fixed, graph.source, graph.read):
        np.logical_or.at(flags, roots, flags.copy())
        flags[:] = flags[roots]
    values = [value for operation in graph.operations for value in (*operation.inputs, operation.output)]
    for value in {id(value): value for value in values}.values():
        value.units = roots[value.units]
    for layer in graph.layers:
        for weight in layer.weights.values():
            weight.rows, weight.columns = roots[weight.rows], roots[weight.columns]
    graph.owner[roots != np.arange(graph.count)] = -1  # one unit, one owner
