"""Remove the units that nothing reaches or leaves."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_deepr.algorithm.randomness import signs_of
from lightning_deepr.conversion import tables
from lightning_deepr.monitoring.constants import Constants, unfoldable
from lightning_deepr.monitoring.dead_units import made_by
from lightning_deepr.monitoring.flow import Edges, converted_of, edges_of, flow_of
from lightning_deepr.monitoring.graph import CONVOLUTIONS, LINEAR, RECURRENT, Graph, Layer, Untraceable, graph_of
from lightning_deepr.weights import precision
from lightning_deepr.weights.find import Converted, converted_tensors
from lightning_deepr.weights.install import warn_if_nobody_rewires
from lightning_deepr.weights.k_slots import KSlots


class PrunedUnits:
    """What :func:`prune_dead_units` has removed. It prints as a table.

    Attributes:
        rows: one dict per layer: layer, units_before, units, connections_before, connections.
        bytes_before, bytes: the bytes of parameters, buffers and places (int64).
        dense_bytes_before, dense_bytes: the same after ``densify``.
    """

    columns = ("layer", "units_before", "units", "connections_before", "connections")

    def __init__(self, rows: list[dict[str, Any]], before: tuple[int, int], after: tuple[int, int]) -> None:
        self.rows = rows
        self.bytes_before, self.dense_bytes_before = before
        self.bytes, self.dense_bytes = after

    @property
    def units(self) -> int:
        """The number of removed units."""
        return sum(row["units_before"] - row["units"] for row in self.rows)

    @property
    def connections(self) -> int:
        """The number of removed connections: each was on no path from an input to an output."""
        return sum(row["connections_before"] - row["connections"] for row in self.rows)

    @property
    def saved(self) -> int:
        """The number of bytes that are saved."""
        return self.bytes_before - self.bytes

    @property
    def dense_saved(self) -> int:
        """The number of bytes that are saved in the dense network."""
        return self.dense_bytes_before - self.dense_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return rows and sums, in builtins only."""
        return {
            "rows": [dict(row) for row in self.rows],
            **{key: getattr(self, key) for key in ("units", "connections", "saved", "dense_saved")},
            **{key: getattr(self, key) for key in ("bytes_before", "bytes", "dense_bytes_before", "dense_bytes")},
        }

    def _cells(self) -> tuple[list[list[Any]], list[Any]]:
        sums = [sum(row[key] for row in self.rows) for key in self.columns[1:]]
        return [[row[key] for key in self.columns] for row in self.rows], ["total", *sums]

    @property
    def _line(self) -> str:
        return (
            f"removed {self.units:,} units and {self.connections:,} connections: {self.saved:,} of {self.bytes_before:,} bytes "
            f"({self.dense_saved:,} of {self.dense_bytes_before:,} in the dense network)"
        )

    def __str__(self) -> str:
        return f"{tables.as_text(self.columns, *self._cells())}\n{self._line}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"{tables.as_html(self.columns, *self._cells())}<p>{self._line}</p>"


def prune_dead_units(module: nn.Module) -> PrunedUnits:
    """Remove the units that no input reaches, and those from which no path leads to an output, in place.

    The outputs in eval mode stay the same up to rounding. A unit that no input reaches has a constant value, from its bias
    through activations and batch norm; it is added to the biases of the next layer (which gets one where it has none). Linear
    layers, convolutions without groups and the batch norm behind them get smaller. So do recurrent layers, as far as all of
    their directions and levels have units that nothing reads: they have one size. A unit stays

    - if the network's output, or an operation that is not known, reads it (attention, layer norm, a concatenation);
    - if it is constant, but not 0, before a convolution with zero padding, whose borders would change;
    - if it is the last one of its layer.

    A rewiring draws places of dead units like any others, as in the paper: call this after the training. The parameters are
    new objects, so an optimizer has to be made anew. Changed layers have K slots of their own, also if they had a theta for
    every place (:class:`~lightning_deepr.SoftDeepR`, pruning) or shared one.

    Args:
        module: a network whose own ``forward`` can be followed by ``torch.fx``; of a LightningModule pass the network inside
            it. Weights that are not converted have their entries other than 0 as connections.

    Returns:
        what was removed, in units, connections and bytes.

    Raises:
        ValueError: ``forward`` can't be followed, there is no layer, or a layer that would change has places or signs that
            follow rules (``candidates=``, ``signs=``): call :func:`lightning_deepr.densify` first. Nothing is changed.
        RuntimeError: a callback is at work on the network.

    Example::

        >>> from lightning_deepr import sparsify
        >>> net = sparsify(nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 10)), 0.002).eval()
        >>> x = torch.randn(5, 784)
        >>> y = net(x)
        >>> report = prune_dead_units(net)
        >>> bool((net(x) - y).abs().max() < 1e-6), net[0].out_features < 300, report.units > 0
        (True, True, True)
    """
    for converted in converted_tensors(module):
        if converted.slots.adapts:
            raise ValueError(
                f"prune_dead_units: `{converted.name}` has a frozen weight below its connections, which connects all units: "
                "expected sparse weights. densify(copy.deepcopy(module)) has the sums of both."
            )
        if converted.slots.owner() is not None:
            raise RuntimeError(
                f"prune_dead_units: {type(converted.slots.owner()).__name__} is at work on `{converted.name}`: expected a "
                "network whose training is over. Call it after the fit, or after `rewiring.remove()`."
            )
    try:
        graph = graph_of(module, whole=True)
    except Untraceable as error:
        raise ValueError(
            f"prune_dead_units: {error}. Expected a network whose layers follow from its forward: pass the part that can be "
            "followed, for example `module.net` of a LightningModule."
        ) from error
    if not graph.layers:
        raise ValueError(
            f"prune_dead_units: expected linear, convolutional or recurrent layers, found none in {type(module).__name__}."
        )
    edges = edges_of(graph, values=True)
    keep, constants = _plan(graph, edges)
    touched = [one for one in edges if not (keep[one.weight.rows].all() and keep[one.weight.columns].all())]
    shared = [one for one in edges if (found := converted_of(one.layer, one.weight)) is not None and found.slots.shares]
    if touched and shared:  # all layers with one theta leave it
        touched += [one for one in shared if all(one is not other for other in touched)]
    for one in touched:
        _refuse_rules(one)
    before, rows = _sizes(module), _rows(graph, edges, keep)
    folded = {
        id(operation.layer): _folded(operation, edges, keep, constants) for operation in graph.operations if operation.layer
    }
    for one in touched:
        _shrink_weight(one, keep)
    for operation in graph.operations:
        if operation.layer is not None:
            _shrink_layer(operation.layer, keep, folded[id(operation.layer)])
        elif operation.module is not None:
            _shrink_norm(operation.module, keep[operation.output.units])
    return PrunedUnits(rows, before, _sizes(module))


def pruned_copy(module: nn.Module, prune: bool = True) -> nn.Module:
    """Return a copy without dead units, for an export; with ``prune=False`` the module itself."""
    if not prune:
        return module
    copied = copy.deepcopy(module)
    prune_dead_units(copied)
    return copied


def _plan(graph: Graph, edges: list[Edges]) -> tuple[np.ndarray, Constants]:
    """Decide which units stay, bool [units], and compute the constants of those that no input reaches."""
    flow = flow_of(graph, edges)
    stays = graph.fixed.copy()  # taken for reached: not constant
    for layer in graph.layers:
        if isinstance(layer.module, RECURRENT):
            for weight in layer.weights.values():
                stays[weight.rows] = True
    while True:
        reached = _closure(graph, edges, flow.reached | stays)
        constants = Constants(graph, edges, reached)
        stuck = unfoldable(graph, edges, constants)
        if len(stuck):
            stays[stuck] = True
            continue
        used = flow.used.copy()
        for operation in graph.operations:
            if operation.kind == "coupled":  # every channel that changes is read by its neighbours
                units = operation.inputs[0].units
                used[units] |= reached[units]
        used = _closure(graph, edges, used | graph.fixed, backwards=True)
        keep = graph.fixed | (used & reached)
        keep = _one_size(graph, keep, used)
        lonely = [
            made[:1] for number in range(len(graph.layers)) if len(made := made_by(graph, number)) and not keep[made].any()
        ]
        if not lonely:
            return keep, constants
        first = np.concatenate(lonely)
        if reached[first].all():
            keep[first] = True  # no layer gets empty
            return keep, constants
        stays[first] = True


def _closure(graph: Graph, edges: list[Edges], start: np.ndarray, backwards: bool = False) -> np.ndarray:
    """Add to some units those that their connections lead to, or with ``backwards`` come from."""
    found = start.copy()
    while True:
        before = int(found.sum())
        for one in reversed(edges) if backwards else edges:
            come, go = (one.rows, one.columns) if backwards else (one.columns, one.rows)
            found[go[found[come]]] = True
        if int(found.sum()) == before:
            return found


def _one_size(graph: Graph, keep: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Keep as many units of every direction and level of a recurrent layer."""
    for layer in graph.layers:
        if not isinstance(layer.module, RECURRENT):
            continue
        blocks = [weight.columns for name, weight in layer.weights.items() if name.startswith("weight_hh")]
        size = max(1, *(int((used[block] | graph.fixed[block]).sum()) for block in blocks))
        for block in blocks:
            wanted = used[block] | graph.fixed[block]
            spare = np.flatnonzero(~wanted)[: size - int(wanted.sum())]
            wanted[spare] = True
            keep[block] = wanted
    return keep


def _folded(operation: Any, edges: list[Edges], keep: np.ndarray, constants: Constants) -> dict[str, np.ndarray]:
    """Sum up what removed constant units add to each row, float64 per weight [units]."""
    found = {}
    values = constants.by_unit(operation.inputs[0])
    for one in edges:
        if (
            one.layer is operation.layer
            and one.weight.name.startswith(("weight_ih_l0", "weight"))
            and "_hh_" not in one.weight.name
        ):
            assert one.values is not None
            gone = ~keep[one.columns] & ~constants.reached[one.columns]
            sums = np.zeros(len(one.weight.rows))
            row = one.places // one.weight.inner // max(len(one.weight.columns), 1)
            np.add.at(sums, row[gone], one.values[gone] * values[one.columns[gone]])
            found[one.weight.name] = sums
    return found


# -- layers -----------------------------------------------------------------------------------------------------------------


def _refuse_rules(one: Edges) -> None:
    converted = converted_of(one.layer, one.weight)
    if converted is not None and (converted.slots.allowed is not None or converted.slots.sign_table is not None):
        raise ValueError(
            f"prune_dead_units: `{converted.name}` has places or signs that follow rules (candidates=, signs=), which are for "
            "its present size: expected a network without them. Call densify(module) first."
        )


def _shrink_weight(one: Edges, keep: np.ndarray) -> None:
    """Leave the kept rows and columns of a weight. Nothing of the weight's dense size is made if it is converted."""
    rows, columns = keep[one.weight.rows], keep[one.weight.columns]
    converted = converted_of(one.layer, one.weight)
    if converted is None:
        parameter = one.layer.module._parameters[one.weight.name]
        assert parameter is not None
        kept = _sliced(_sliced(parameter.detach(), rows, 0), columns, 1)
        one.layer.module._parameters[one.weight.name] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
        return
    old, width = converted.slots, max(len(columns), 1)
    stays = keep[one.rows] & keep[one.columns]
    at = one.places[stays]
    position, entry = at % one.weight.inner, at // one.weight.inner
    new_row, new_column = np.cumsum(rows) - 1, np.cumsum(columns) - 1
    places = (new_row[entry // width] * int(columns.sum()) + new_column[entry % width]) * one.weight.inner + position
    assert one.values is not None
    shape = torch.Size((int(rows.sum()), int(columns.sum()), *old.shape[2:]))
    theta = converted.theta.detach()
    values = torch.from_numpy(one.values[stays]).to(theta.device, theta.dtype)
    born = old.born[torch.from_numpy(stays).to(theta.device)] if isinstance(old, KSlots) else None
    _replace(converted, shape, torch.from_numpy(places).to(theta.device), values, born)


def _replace(converted: Converted, shape: torch.Size, places: Tensor, values: Tensor, born: Tensor | None) -> None:
    """Give a converted weight other connections and another shape."""
    old, holder = converted.slots, converted.holder
    if not len(places):  # a weight has at least one connection; this one adds nothing
        places, values, born = places.new_zeros(1), values.new_zeros(1), None
    hashed = signs_of(old.sign_seed, places, values.dtype)
    exceptions = places[(values != 0) & (values.sign() != hashed)].sort().values
    slots = KSlots(shape, places, old.index, old.sign_seed, exceptions, old.weight_dtype, old.notice)
    if born is not None:
        slots.born = born.contiguous()
    theta = nn.Parameter(values.abs().to(precision.kept(old.weight_dtype)), requires_grad=converted.theta.requires_grad)
    slots.layer, slots.name = old.layer, old.name
    slots.l1_taken, slots.l1_rule, slots.lr_scale_taken = old.l1_taken, old.l1_rule, old.lr_scale_taken
    holder._modules["0"] = slots
    holder._parameters["original"] = theta
    slots.hold(holder)
    _fit_sizes(converted.module, converted.tensor_name, shape)  # the choice of the compute reads them
    slots.choose_compute(
        "tune" if old.tunes else old.policy, slots.layer.capable(converted.module, converted.tensor_name, tuple(shape))
    )
    warn_if_nobody_rewires(theta, slots, old.name)


def _fit_sizes(module: Any, tensor_name: str, shape: torch.Size) -> None:
    if isinstance(module, LINEAR):
        module.out_features, module.in_features = shape[0], shape[1]
    elif isinstance(module, CONVOLUTIONS):
        module.out_channels, module.in_channels = shape[0], shape[1]
    elif tensor_name == "weight_ih_l0":
        module.input_size = shape[1]


def _shrink_layer(layer: Layer, keep: np.ndarray, folded: dict[str, np.ndarray]) -> None:
    """Give a layer its new sizes and biases."""
    module: Any = layer.module
    if isinstance(module, RECURRENT):
        _shrink_recurrent(layer, keep, folded)
        return
    weight = layer.weights["weight"]
    rows, columns = keep[weight.rows], keep[weight.columns]
    shape = (int(rows.sum()), int(columns.sum()))
    _fit_sizes(module, "weight", torch.Size(shape))
    sums = folded.get("weight", np.zeros(len(rows)))
    if module.bias is None and not sums[rows].any():
        return
    if rows.all() and not sums.any():
        return
    module.bias = _bias(module.bias, sums, rows, next(module.parameters()))


def _bias(old: nn.Parameter | None, sums: np.ndarray, rows: np.ndarray, like: Tensor) -> nn.Parameter:
    """Add the constants of removed units to a bias, and leave the kept rows."""
    dtype, device = (like.dtype, like.device) if old is None else (old.dtype, old.device)
    added = torch.from_numpy(sums).to(device)
    whole = added if old is None else old.detach().double() + added
    return nn.Parameter(_sliced(whole, rows, 0).to(dtype), requires_grad=True if old is None else old.requires_grad)


def _shrink_recurrent(layer: Layer, keep: np.ndarray, folded: dict[str, np.ndarray]) -> None:
    module: Any = layer.module
    size = module.hidden_size
    for name, weight in layer.weights.items():
        rows = keep[weight.rows]
        size = int(keep[weight.columns].sum()) if "_hh_" in name else size
        if not module.bias:
            continue
        bias = name.replace("weight", "bias")
        sums = folded.get(name, np.zeros(len(rows)))
        if not rows.all() or sums.any():
            module._parameters[bias] = _bias(module._parameters[bias], sums, rows, module._parameters[bias])
    module.hidden_size = size
    module.input_size = int(keep[layer.weights["weight_ih_l0"].columns].sum())
    if hasattr(module, "_init_flat_weights"):
        module._init_flat_weights()


def _shrink_norm(module: Any, keep: np.ndarray) -> None:
    """Leave the kept channels of a batch norm or a response norm."""
    if keep.all():
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(_sliced(parameter.detach(), keep, 0), requires_grad=parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None and buffer.dim():
            kept = _sliced(buffer, keep, 0)
            module._buffers[name] = _sliced(kept, keep, 1) if name == "band" else kept
    if hasattr(module, "num_features"):
        module.num_features = int(keep.sum())


def _sliced(tensor: Tensor, keep: np.ndarray, dimension: int) -> Tensor:
    index = torch.from_numpy(np.flatnonzero(keep)).to(tensor.device)
    return tensor.index_select(dimension, index).contiguous()


# -- the report -------------------------------------------------------------------------------------------------------------


def _rows(graph: Graph, edges: list[Edges], keep: np.ndarray) -> list[dict[str, Any]]:
    found = []
    for number, layer in enumerate(graph.layers):
        made, mine = made_by(graph, number), [one for one in edges if one.layer is layer]
        found.append(
            {
                "layer": layer.name or "(the network)",
                "units_before": len(made),
                "units": int(keep[made].sum()),
                "connections_before": sum(len(one.places) for one in mine),
                "connections": sum(_kept(one, keep) for one in mine),
            }
        )
    return found


def _kept(one: Edges, keep: np.ndarray) -> int:
    """Count the connections that a weight has afterwards: a converted one keeps one of value 0 where none is left."""
    left = int((keep[one.rows] & keep[one.columns]).sum())
    return left if left or converted_of(one.layer, one.weight) is None else 1


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Count the bytes of parameters, buffers and places, and those of the dense network."""
    plain = sum(one.numel() * one.element_size() for one in (*module.parameters(), *module.buffers()))
    dense = plain
    for converted in converted_tensors(module):
        dense += converted.slots.total * converted.slots.weight_dtype.itemsize
    for theta in {id(c.theta): c.theta for c in converted_tensors(module)}.values():
        dense -= theta.numel() * theta.element_size()
    places = [c.slots.places for c in converted_tensors(module) if isinstance(c.slots, KSlots)]
    return plain + sum(8 * one.numel() for one in places), dense
