"""Sparse compute of LSTMs and GRUs: whole sequences from the connections alone, layer by layer and direction by direction.

Sparsity saves work in the products, and a copy of the dense weights into the layout of the dense library. It does not save the
arithmetic of the cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_deepr import kernels
from lightning_deepr.compute.dense import rounded
from lightning_deepr.compute.eager import check_backward, is_plain, is_watched
from lightning_deepr.compute.gather import TWICE
from lightning_deepr.compute.layer import Shape
from lightning_deepr.kernels.cpu.fields import ProductArguments, ProductPhase, RecurrentArguments, filler


class _Plan(NamedTuple):
    """The settings that follow from the sizes alone.

    A part has W elements of the batch, a tile has V rows (see :mod:`lightning_deepr.kernels.cpu.recurrent`).
    """

    threads: int
    part: tuple[int, int, int]  # bytes per float, lanes, vectors
    parts: int
    padded: int  # the batch, rounded up to whole parts
    tile: tuple[int, int, int]  # bytes per float, lanes, vectors
    tiles: int

    @property
    def width(self) -> int:
        return self.part[1] * self.part[2]

    @property
    def tile_width(self) -> int:
        return self.tile[1] * self.tile[2]


@lru_cache(maxsize=512)
def _plan(steps: int, batch: int, columns: int, hidden: int, count: int, size: int, most: int) -> _Plan:
    from lightning_deepr.kernels.cpu import linear, recurrent

    work = steps * batch * (count + 20 * hidden + columns)
    threads = max(1, min(most, work >> 18))
    parts, lanes, vectors = recurrent.parts_of(batch, threads, size)
    padded = parts * lanes * vectors
    tile = linear.tile_of(steps * padded, size, max(4 * hidden, columns))
    return _Plan(threads, (size, lanes, vectors), parts, padded, (size, *tile), -(-steps * padded // (tile[0] * tile[1])))


@cache
def _kernels() -> tuple[Any, Any]:
    """Import the kernels once: an import statement in a function takes a microsecond in every call."""
    from lightning_deepr.kernels.cpu import products, recurrent

    return products, recurrent


_fill_product, _fill_steps = filler(ProductArguments), filler(RecurrentArguments)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _ordered(where: list[int]) -> dict[str, int]:
    return {"START": where[0], "INDEX": where[1], "SLOTS": where[2]}


def _of_products(plan: _Plan, steps: int, sums: Tensor, tiled: Tensor, weight: Any, hidden: int, skip: int) -> dict[str, int]:
    """Return the fields of a product: the sums of the gates, in 4 blocks, and their factors.

    A GRU's weight has no rows for the block ``skip``.
    """
    return {
        "COUNT": steps * plan.padded, "TILES": plan.tiles, "SHARES": plan.threads, "ROWS": 4 * hidden,
        "COLUMNS": weight.columns, "XT": tiled.data_ptr(), "YT": sums.data_ptr(),
        "SKIP": skip * hidden, "SKIPPED": 4 * hidden - weight.rows,
    }  # fmt: skip


def _of_steps(
    plan: _Plan, steps: int, batch: int, hidden: int, reverse: bool, cell_step: int,
    first: Sequence[Tensor | None], last: Sequence[Tensor | None],
) -> dict[str, int]:  # fmt: skip
    """Return the fields of the loop over the steps.

    ``first`` and ``last`` are the hidden state and, for an LSTM, the cell state before and after the loop; or their gradients.
    """
    fields = {
        "STEPS": steps, "BATCH": batch, "PARTS": plan.parts, "HIDDEN": hidden, "REVERSE": int(reverse), "V": plan.tile_width,
        "VECTORS": plan.part[2], "CELL_STEP": cell_step, "H_FIRST": _address(first[0]), "H_LAST": _address(last[0]),
    }  # fmt: skip
    if len(first) > 1:
        fields |= {"C_FIRST": _address(first[1]), "C_LAST": _address(last[1])}
    return fields


def _gather(theta: Tensor, values: Tensor, where: list[int], threads: int) -> dict[str, int]:
    """Write the signed values of the connections into ``values``, and return the fields that describe them.

    ``where`` has the addresses of starts, indices and slots, whose order the values follow.
    """
    _, recurrent = _kernels()
    fields = {"COUNT": theta.numel(), "VALUES": values.data_ptr(), "THETA": theta.data_ptr(), **_ordered(where)}
    recurrent.gather_kernel(theta.element_size())(_fill_steps(**fields), threads if theta.numel() > 20_000 else 1)
    return fields


def _forward(
    x: Tensor, theta_ih: Tensor, theta_hh: Tensor, bias: Tensor | None, states: Sequence[Tensor | None],
    ih: Any, hh: Any, reverse: bool, keep: bool,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:  # fmt: skip
    """Compute (y, last h and, for an LSTM, last c), and save what the backward pass needs.

    The second tuple has x in tiles, the gates, h before each step in tiles and, for an LSTM, the cell states. It is empty if
    ``keep`` is False.
    """
    products, recurrent = _kernels()
    steps, batch, columns = x.shape
    hidden, size, kind = hh.columns, x.element_size(), hh.rows // hh.columns
    plan = _plan(steps, batch, columns, hidden, ih.count + hh.count, size, torch.get_num_threads())
    wide = plan.tile_width
    if plan.padded != batch:
        x = torch.nn.functional.pad(x, (0, 0, 0, plan.padded - batch))
    x = x.contiguous()
    tiled, gates = x.new_empty(plan.tiles * columns * wide), x.new_empty(plan.tiles * 4 * hidden * wide)
    product = _of_products(plan, steps, gates, tiled, ih, hidden, 3) | _ordered(ih.addresses[:3])
    product |= {"X": x.data_ptr(), "THETA": theta_ih.data_ptr(), "BIAS": _address(bias)}
    for phase in (ProductPhase.TRANSPOSE, ProductPhase.MULTIPLY):
        products.product_kernel(*plan.tile)(_fill_product(**product, PHASE=phase), plan.threads)

    values = torch.empty_like(theta_hh)
    fields = _gather(theta_hh, values, hh.addresses[:3], plan.threads)
    state = hidden * plan.width
    kept = x.new_empty(plan.tiles * hidden * wide) if keep else None
    if kept is not None:
        _clear_rest(kept, plan, hidden, steps)
    cells = x.new_empty(plan.parts * (steps + 1 if keep else 1) * state) if kind == recurrent.LSTM else None
    scratch = x.new_empty(plan.parts * 2 * state)
    y, last = x.new_empty((steps, batch, hidden)), [x.new_empty((batch, hidden)) for _ in states]
    fields |= _of_steps(
        plan, steps, batch, hidden, reverse, state * size if keep and kind == recurrent.LSTM else 0, states, last
    )
    fields |= {
        "GATES": gates.data_ptr(), "CELLS": _address(cells), "SCRATCH": scratch.data_ptr(), "Y": y.data_ptr(),
        "KEPT": _address(kept),
    }  # fmt: skip
    recurrent.forward_kernel(kind, *plan.part)(_fill_steps(**fields), min(plan.threads, plan.parts))
    return (y, *last), tuple(one for one in (tiled, gates, kept, cells) if one is not None) if keep else ()


def _clear_rest(tiles: Tensor, plan: _Plan, features: int, steps: int) -> None:
    """Write zeros into the rows of the last tile that belong to no step."""
    rest = plan.tiles * plan.tile_width - steps * plan.padded
    if rest:
        tiles.view(plan.tiles, features, plan.tile_width)[-1, :, -rest:] = 0


def _backward(
    gradients: tuple[Tensor, ...], saved: tuple[Tensor, ...], theta_ih: Tensor, theta_hh: Tensor,
    ih: Any, hh: Any, reverse: bool, need: list[bool], threads: int,
) -> list[Tensor | None]:  # fmt: skip
    """Compute the needed gradients: of x, of both thetas, of the gates' sums, and of h and c before the first step."""
    products, recurrent = _kernels()
    (dy, *last), (tiled, gates, kept, *cells) = (tuple(one.contiguous() for one in gradients), saved)
    (steps, batch, hidden), size, columns = dy.shape, dy.element_size(), ih.columns
    plan = _plan(steps, batch, columns, hidden, ih.count + hh.count, size, threads)
    state, kind = hidden * plan.width, hh.rows // hidden

    values = torch.empty_like(theta_hh)
    fields = _gather(theta_hh, values, hh.addresses[3:], plan.threads)
    dgates, scratch = torch.empty_like(gates), dy.new_empty(plan.parts * 7 * state)
    _clear_rest(dgates, plan, 4 * hidden, steps)
    first = [dy.new_empty((batch, hidden)) if needed else None for needed in need[4:]]
    fields |= _of_steps(plan, steps, batch, hidden, reverse, state * size if cells else 0, first, last)
    fields |= {
        "GATES": gates.data_ptr(), "CELLS": (cells[0] if cells else kept).data_ptr(),
        "SCRATCH": scratch.data_ptr(), "Y": dy.data_ptr(), "KEPT": dgates.data_ptr(),
    }  # fmt: skip
    recurrent.backward_kernel(kind, *plan.part)(_fill_steps(**fields), min(plan.threads, plan.parts))

    dtheta_ih, dtheta_hh = (
        torch.empty_like(one) if needed else None for one, needed in zip((theta_ih, theta_hh), need[1:3], strict=True)
    )
    dx = dy.new_empty((steps, plan.padded, columns)) if need[0] else None
    dsums = dy.new_empty(4 * hidden) if need[3] else None
    if dtheta_hh is not None or dsums is not None:
        of_hidden = _of_products(plan, steps, dgates, kept, hh, hidden, 2) | _ordered(hh.addresses[:3])
        of_hidden |= {"DTHETA": _address(dtheta_hh), "DBIAS": _address(dsums)}
        products.theta_kernel(*plan.tile)(_fill_product(**of_hidden), plan.threads)
    of_input = _of_products(plan, steps, dgates, tiled, ih, hidden, 3)
    of_input |= {"THETA": theta_ih.data_ptr(), "DTHETA": _address(dtheta_ih), "DX": _address(dx)}
    if dx is not None:
        products.input_kernel(*plan.tile)(_fill_product(**of_input, **_ordered(ih.addresses[3:])), plan.threads)
        dx = dx[:, :batch]
    elif dtheta_ih is not None:
        products.theta_kernel(*plan.tile)(_fill_product(**of_input, **_ordered(ih.addresses[:3])), plan.threads)
    return [dx, dtheta_ih, dtheta_hh, dsums, *first]


class RecurrentFunction(torch.autograd.Function):
    """One layer in one direction: x [T, B, columns] -> y [T, B, hidden], last h and, for an LSTM, last c [B, hidden]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, theta_ih: Tensor, theta_hh: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None,
        buffer_ih: Tensor, buffer_hh: Tensor, ih: Any, hh: Any, reverse: bool, *states: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        found, saved = _forward(x, theta_ih, theta_hh, _of_sums(bias_ih, bias_hh, hh.columns), states, ih, hh, reverse, True)
        ctx.save_for_backward(*saved, theta_ih, theta_hh, buffer_ih, buffer_hh)
        ctx.ih, ctx.hh, ctx.reverse = ih, hh, reverse
        ctx.threads = torch.get_num_threads()
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(TWICE)
        *saved, theta_ih, theta_hh, _, _ = ctx.saved_tensors  # raises if a rewiring came in between
        check_backward(saved[0].dtype, gradients, (theta_ih, ctx.ih.count), (theta_hh, ctx.hh.count))
        asked = ctx.needs_input_grad
        need = [*asked[:3], asked[3] or asked[4], *asked[10:]]
        dx, dtheta_ih, dtheta_hh, dsums, *states = _backward(
            gradients, tuple(saved), theta_ih, theta_hh, ctx.ih, ctx.hh, ctx.reverse, need, ctx.threads
        )  # fmt: skip
        found = (None, None) if dsums is None else _of_biases(dsums, ctx.hh.rows)
        biases = (one if needed else None for one, needed in zip(found, asked[3:5], strict=True))
        return dx, dtheta_ih, dtheta_hh, *biases, None, None, None, None, None, *states


def _of_sums(ih: Tensor | None, hh: Tensor | None, hidden: int) -> Tensor | None:
    """Arrange both biases as the four blocks of sums. The third gate of a GRU has one block for each bias."""
    if ih is None or hh is None:
        return None
    if ih.numel() == 4 * hidden:
        return ih + hh
    both = 2 * hidden
    return torch.cat((ih[:both] + hh[:both], ih[both:], hh[both:]))


def _of_biases(dsums: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Split the gradient of the sums into those of the biases, as separate tensors: autograd accumulates in place."""
    if dsums.numel() == rows:
        return dsums, dsums.clone()
    return dsums[:rows].clone(), torch.cat((dsums[: dsums.numel() // 2], dsums[rows:]))


# -- the module ---------------------------------------------------------------------------------------------------------------


def capable(module: nn.Module, tensor_name: str, shape: Shape) -> bool:
    """Tell whether sparse compute can take this tensor: a weight of an LSTM without projections or of a GRU."""
    return _is_known(type_before_parametrizations(module), module) and tensor_name.startswith(("weight_ih_l", "weight_hh_l"))


def _is_known(kind: Any, module: Any) -> bool:
    """Tell whether a layer is an LSTM or GRU with torch's own forward and without projections."""
    return issubclass(kind, (nn.LSTM, nn.GRU)) and kind.forward in (nn.LSTM.forward, nn.GRU.forward) and module.proj_size == 0


def sparse_forward(plain: Any, module: Any, input: Any, hx: Any = None) -> tuple[Tensor, Any] | None:
    """Run ``forward`` of an ``nn.LSTM`` or ``nn.GRU`` by sparse compute; return None if the layer needs dense weights.

    Args:
        plain: the layer's class before it was parametrized.
        module: the layer.
        input, hx: the arguments of torch's ``forward``.
    """
    if not _is_known(plain, module) or torch.compiler.is_dynamo_compiling() or is_watched():
        return None
    states = _states(module, hx)
    layers = _layers(module)
    narrow = None
    if layers is not None and layers[0].weights[0][1].narrow is not None and states is not None and isinstance(input, Tensor):
        narrow, input, states, layers = _in_full(input, states, layers)
    if (
        layers is None
        or states is None
        or not _suits(module, input, states, layers, narrow)
        or not _prefers_sparse(module, input, layers)
    ):
        _note(module, "dense")
        return None
    _note(module, "sparse")
    batched = input.dim() == 3
    x = (input.transpose(0, 1) if module.batch_first else input) if batched else input.unsqueeze(1)
    given = [(one if batched else one.unsqueeze(1)).unbind(0) for one in states]
    nothing = [None] * (2 if isinstance(module, nn.LSTM) else 1)
    directions = 2 if module.bidirectional else 1
    last = []
    for number in range(module.num_layers):
        if number > 0 and module.dropout > 0:
            x = dropout(x, module.dropout, module.training)
        outputs = []
        for direction in range(directions):
            at = number * directions + direction
            first = [one[at].contiguous() for one in given] or nothing
            y, *state = _direction(x, layers[at], first, direction == 1)
            outputs.append(y)
            last.append(state)
        x = outputs[0] if directions == 1 else torch.cat(outputs, 2)
    ends = [torch.stack(one) for one in zip(*last, strict=True)]
    if narrow is not None:
        x, ends = x.to(narrow), [one.to(narrow) for one in ends]
    if not batched:
        x, ends = x.squeeze(1), [one.squeeze(1) for one in ends]
    elif module.batch_first:
        x = x.transpose(0, 1)
    return x, tuple(ends) if isinstance(module, nn.LSTM) else ends[0]


def _states(module: Any, hx: Any) -> list[Tensor] | None:
    """List the states before the first step: none, h, or h and c. None: torch has to refuse the argument."""
    if hx is None:
        return []
    if isinstance(module, nn.GRU):
        hx = (hx,)
    if not isinstance(hx, (tuple, list)) or len(hx) != (1 if isinstance(module, nn.GRU) else 2):
        return None
    return list(hx) if all(isinstance(one, Tensor) for one in hx) else None


def _note(module: Any, compute: str) -> None:
    """Record the kind of compute of the last training step, for the report."""
    if torch.is_grad_enabled():
        for holder in module.parametrizations.values():
            if hasattr(holder[0], "policy"):
                holder[0].compute = compute


class _Layer(NamedTuple):
    """One layer in one direction: theta and slots of the input's and of the hidden state's weight, and the biases."""

    weights: list[tuple[Tensor, Any]]
    biases: tuple[Tensor | None, Tensor | None]


def _layers(module: Any) -> list[_Layer] | None:
    """List all layers and directions of a module, or return None if one of its weights has no slots to compute from."""
    holders: Any = module._modules.get("parametrizations") or {}
    found = []
    for number in range(module.num_layers):
        for suffix in ("", "_reverse") if module.bidirectional else ("",):
            weights = []
            for kind in ("ih", "hh"):
                name = f"weight_{kind}_l{number}{suffix}"
                if name not in holders or len(holders[name]) != 1 or not hasattr(holders[name][0], "policy"):
                    return None
                weights.append((holders[name][0].own(holders[name].original), holders[name][0]))
            biases = [getattr(module, f"bias_{kind}_l{number}{suffix}") if module.bias else None for kind in ("ih", "hh")]
            found.append(_Layer(weights, (biases[0], biases[1])))
    return found


def _in_full(
    x: Tensor, states: list[Tensor], layers: list[_Layer]
) -> tuple[torch.dtype | None, Tensor, list[Tensor], list[_Layer]]:
    """Cast what the kernels read to theta's dtype, where weights, input, states and biases all have the same fewer bits.

    Returns:
        the dtype of the layer's results, None if nothing was cast; then the arguments. Anything else stays as it is, and
        :func:`_suits` refuses it.
    """
    narrow = layers[0].weights[0][1].narrow
    biases = [bias for layer in layers for bias in layer.biases if bias is not None]
    found = {slots.narrow for layer in layers for _, slots in layer.weights} | {one.dtype for one in (x, *states, *biases)}
    if narrow is None or found != {narrow} or torch.is_autocast_enabled("cpu"):
        return None, x, states, layers
    wide = layers[0].weights[0][0].dtype

    def widened(bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias.to(wide)

    full = [
        _Layer(
            [(rounded(theta, narrow), slots) for theta, slots in one.weights], (widened(one.biases[0]), widened(one.biases[1]))
        )
        for one in layers
    ]
    return narrow, x.to(wide), [one.to(wide) for one in states], full


def _suits(module: Any, x: Any, states: list[Tensor], layers: list[_Layer], narrow: torch.dtype | None) -> bool:
    """Tell whether the kernels can take these arguments. If they can't, torch computes the layer or refuses the arguments.

    Args:
        module: the layer.
        x, states, layers: its input, states and weights, in theta's dtype.
        narrow: the dtype that :func:`_in_full` has cast from.
    """
    if not isinstance(x, Tensor) or not is_plain(x):
        return False
    if x.dim() not in (2, 3) or x.shape[-1] != module.input_size or x.numel() == 0 or torch.is_autocast_enabled("cpu"):
        return False
    batch = () if x.dim() == 2 else (x.shape[0 if module.batch_first else 1],)
    if any(one.shape != (len(layers), *batch, module.hidden_size) for one in states):
        return False
    tensors = [x, *states]
    for layer in layers:
        biases = [bias for bias in layer.biases if bias is not None]
        if any(bias.shape != (layer.weights[0][1].rows,) or not bias.is_contiguous() for bias in biases):
            return False
        tensors += biases
        for theta, slots in layer.weights:
            if slots.policy == "dense" or slots.on_dense_gradient is not None:
                return False
            if theta.dtype != x.dtype or slots.narrow is not narrow or theta.numel() != slots.count or not kernels.suits(theta):
                return False
    return all(type(one) in (Tensor, nn.Parameter) and one.dtype == x.dtype and one.is_cpu for one in tensors)


def _prefers_sparse(module: Any, x: Tensor, layers: list[_Layer]) -> bool:
    batch = 1 if x.dim() == 2 else x.shape[0 if module.batch_first else 1]
    kind = "LSTM" if isinstance(module, nn.LSTM) else "GRU"
    for layer in layers:
        (_, ih), (_, hh) = layer.weights
        asked_for = ih.policy == hh.policy == "sparse"
        if not asked_for and not prefers_sparse(kind, batch, ih.columns, hh.columns, ih.count + hh.count):
            return False
    return True


def _direction(x: Tensor, layer: _Layer, states: Sequence[Tensor | None], reverse: bool) -> tuple[Tensor, ...]:
    (theta_ih, ih), (theta_hh, hh) = ((theta, slots.ordered()) for theta, slots in layer.weights)
    if torch.is_grad_enabled():
        return RecurrentFunction.apply(  # type: ignore[no-any-return]
            x, theta_ih, theta_hh, *layer.biases, ih.buffer, hh.buffer, ih, hh, reverse, *states
        )
    return _forward(x, theta_ih, theta_hh, _of_sums(*layer.biases, hh.columns), states, ih, hh, reverse, False)[0]


# Microseconds per step for each unit of the terms below, fitted to `benchmarks/recurrent.py`. LSTM: batches of 1 to 128,
# hidden sizes of 32 to 800, densities of 2 % to 30 %, two threads. GRU: hidden sizes of 32 to 400, densities of 5 % to 50 %,
# one thread. PyTorch's GRU takes far longer for a step than its LSTM.
SPARSE = {"LSTM": (7.1, 8.2e-5, 1.15e-2, 1.1e-3), "GRU": (6.9, 1.08e-4, 1.64e-2, 7.9e-4)}
DENSE = {"LSTM": (16.0, 2.5e-5, 1.64e-2, 1.2e-4), "GRU": (109.0, 2.76e-5, 4.25e-2, 7.1e-4)}


def prefers_sparse(kind: str, batch: int, columns: int, hidden: int, count: int) -> bool:
    """Tell whether sparse compute should be faster than dense weights, forward and backward together.

    The rule was right for 53 of the 60 LSTMs that it was fitted to; at worst, its choice was 1.28 times as slow as the other
    one. For GRUs it was right for all 72.

    Args:
        kind: "LSTM" | "GRU".
        batch: the batch size.
        columns: the number of inputs.
        hidden: the hidden size.
        count: the number of connections in both weights together.
    """
    sparse, dense = sparse_terms(batch, columns, hidden, count), dense_terms(kind, batch, columns, hidden)
    return sum(a * b for a, b in zip(SPARSE[kind], sparse, strict=True)) < sum(
        a * b for a, b in zip(DENSE[kind], dense, strict=True)
    )


def sparse_terms(batch: int, columns: int, hidden: int, count: int) -> tuple[float, ...]:
    """Count the work of a sparse step: the step itself, multiplications, hidden units of the batch, connections to read."""
    padded = 8 if batch <= 8 else 16 * math.ceil(batch / 16)  # the kernels work on whole vectors
    return 1, padded * count, padded * hidden, count


def dense_terms(kind: str, batch: int, columns: int, hidden: int) -> tuple[float, ...]:
    """Count the work of a dense step: the step itself, multiplications, hidden units of the batch, places to read."""
    total = (4 if kind == "LSTM" else 3) * hidden * (hidden + columns)
    return 1, batch * total, batch * hidden, total
