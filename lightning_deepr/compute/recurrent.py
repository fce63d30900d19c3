"""Sparse compute of LSTMs: whole sequences from the connections alone, layer by layer and direction by direction.

The cell's arithmetic is a share of the time that no sparsity saves; what is saved are the products, and a copy of dense weights into the
layout of the dense library.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from lightning_deepr import kernels
from lightning_deepr.compute.gather import TWICE
from lightning_deepr.compute.sparse import _is_plain

State = tuple[Tensor, Tensor]


class _Plan(NamedTuple):
    """What depends on the sizes alone. Parts of W elements of the batch, tiles of V rows (see :mod:`lightning_deepr.kernels.lstm`)."""

    threads: int
    part: tuple[int, int, int]  # bytes per float, lanes, vectors
    parts: int
    padded: int  # batch
    tile: tuple[int, int, int]
    tiles: int

    @property
    def width(self) -> int:
        return self.part[1] * self.part[2]

    @property
    def tile_width(self) -> int:
        return self.tile[1] * self.tile[2]


@lru_cache(maxsize=512)
def _plan(steps: int, batch: int, columns: int, hidden: int, count: int, size: int, most: int) -> _Plan:
    from lightning_deepr.kernels import linear, lstm

    work = steps * batch * (count + 20 * hidden + columns)
    threads = max(1, min(most, work >> 18))
    parts, lanes, vectors = lstm.parts_of(batch, threads, size)
    padded = parts * lanes * vectors
    tile = linear.tile_of(steps * padded, size, max(4 * hidden, columns))
    return _Plan(threads, (size, lanes, vectors), parts, padded, (size, *tile), -(-steps * padded // (tile[0] * tile[1])))


def _run(kernel: Any, fields: dict[int, int], threads: int) -> None:
    arguments = (ctypes.c_int64 * 36)()
    for position, value in fields.items():
        arguments[position] = value
    kernel(arguments, threads)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _ordered(where: list[int]) -> dict[int, int]:
    from lightning_deepr.kernels import lstm

    return {lstm.START: where[0], lstm.INDEX: where[1], lstm.SLOTS: where[2]}


def _of_steps(plan: _Plan, steps: int, batch: int, hidden: int, reverse: bool, cell_step: int) -> dict[int, int]:
    from lightning_deepr.kernels import lstm

    return {
        lstm.PHASE: lstm.RUN, lstm.STEPS: steps, lstm.BATCH: batch, lstm.PARTS: plan.parts, lstm.HIDDEN: hidden,
        lstm.REVERSE: int(reverse), lstm.V: plan.tile_width, lstm.VECTORS: plan.part[2], lstm.CELL_STEP: cell_step,
    }  # fmt: skip


def _gather(kernel: Any, theta: Tensor, values: Tensor, where: list[int], threads: int) -> dict[int, int]:
    """The connections' signed values to ``values``, in the order of starts, indices and slots at ``where``; the fields that say so."""
    from lightning_deepr.kernels import lstm

    fields = {lstm.COUNT: theta.numel(), lstm.VALUES: values.data_ptr(), lstm.THETA: theta.data_ptr()}
    fields |= _ordered(where)
    _run(kernel, {lstm.PHASE: lstm.GATHER, **fields}, threads if theta.numel() > 20_000 else 1)
    return fields


def _forward(
    x: Tensor, theta_ih: Tensor, theta_hh: Tensor, bias: Tensor | None, h: Tensor | None, c: Tensor | None,
    ih: Any, hh: Any, reverse: bool, keep: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:  # fmt: skip
    """(y, last h, last c), and what the backward pass needs: x in tiles, gates, cell states, h before each step in tiles."""
    from lightning_deepr.kernels import lstm

    steps, batch, columns = x.shape
    hidden, size = hh.columns, x.element_size()
    plan = _plan(steps, batch, columns, hidden, ih.count + hh.count, size, torch.get_num_threads())
    rows, wide, count = 4 * hidden, plan.tile_width, steps * plan.padded
    if plan.padded != batch:
        x = torch.nn.functional.pad(x, (0, 0, 0, plan.padded - batch))
    x = x.contiguous()
    tiled, gates = x.new_empty(plan.tiles * columns * wide), x.new_empty(plan.tiles * rows * wide)
    product = {
        lstm.COUNT: count, lstm.TILES: plan.tiles, lstm.ROWS: rows, lstm.COLUMNS: columns, lstm.X: x.data_ptr(),
        lstm.XT: tiled.data_ptr(), lstm.YT: gates.data_ptr(), lstm.THETA: theta_ih.data_ptr(), lstm.BIAS: _address(bias),
        **_ordered(ih.addresses[:3]),
    }  # fmt: skip
    for phase in (lstm.TRANSPOSE, lstm.MULTIPLY):
        _run(lstm.product_kernel(*plan.tile), {**product, lstm.PHASE: phase}, plan.threads)

    kernel = lstm.forward_kernel(*plan.part)
    values = torch.empty_like(theta_hh)
    fields = _gather(kernel, theta_hh, values, hh.addresses[:3], plan.threads)
    state = hidden * plan.width
    cells = x.new_empty(plan.parts * (steps + 1 if keep else 1) * state)
    kept = x.new_empty(plan.tiles * hidden * wide) if keep else None
    if kept is not None:
        _clear_rest(kept, plan, hidden, count)
    scratch = x.new_empty(plan.parts * 2 * state)
    y, last_h, last_c = x.new_empty((steps, batch, hidden)), x.new_empty((batch, hidden)), x.new_empty((batch, hidden))
    fields |= _of_steps(plan, steps, batch, hidden, reverse, state * size if keep else 0)
    fields |= {
        lstm.GATES: gates.data_ptr(), lstm.CELLS: cells.data_ptr(), lstm.SCRATCH: scratch.data_ptr(), lstm.H_FIRST: _address(h),
        lstm.C_FIRST: _address(c), lstm.H_LAST: last_h.data_ptr(), lstm.C_LAST: last_c.data_ptr(), lstm.Y: y.data_ptr(),
        lstm.KEPT: _address(kept),
    }  # fmt: skip
    _run(kernel, fields, min(plan.threads, plan.parts))
    return (y, last_h, last_c), (tiled, gates, cells, kept) if kept is not None else ()


def _clear_rest(tiles: Tensor, plan: _Plan, features: int, count: int) -> None:
    """Zeros in the rows of the last tile that belong to no step."""
    rest = plan.tiles * plan.tile_width - count
    if rest:
        tiles.view(plan.tiles, features, plan.tile_width)[-1, :, -rest:] = 0


def _backward(
    gradients: tuple[Tensor, ...], saved: tuple[Tensor, ...], theta_ih: Tensor, theta_hh: Tensor,
    ih: Any, hh: Any, reverse: bool, need: list[bool], threads: int,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x, theta of both weights, the biases' sum, h and c before the first step, where needed."""
    from lightning_deepr.kernels import lstm

    (dy, dh, dc), (tiled, gates, cells, kept) = (tuple(one.contiguous() for one in gradients), saved)
    (steps, batch, hidden), size, columns = dy.shape, dy.element_size(), ih.columns
    plan = _plan(steps, batch, columns, hidden, ih.count + hh.count, size, threads)
    rows, count, state = 4 * hidden, steps * plan.padded, hidden * plan.width

    kernel = lstm.backward_kernel(*plan.part)
    values = torch.empty_like(theta_hh)
    fields = _gather(kernel, theta_hh, values, hh.addresses[3:], plan.threads)
    dgates, scratch = torch.empty_like(gates), dy.new_empty(plan.parts * 7 * state)
    _clear_rest(dgates, plan, rows, count)
    first_dh, first_dc = (dy.new_empty((batch, hidden)) if needed else None for needed in need[4:])
    fields |= _of_steps(plan, steps, batch, hidden, reverse, state * size)
    fields |= {
        lstm.GATES: gates.data_ptr(), lstm.CELLS: cells.data_ptr(), lstm.SCRATCH: scratch.data_ptr(), lstm.Y: dy.data_ptr(),
        lstm.H_LAST: dh.data_ptr(), lstm.C_LAST: dc.data_ptr(), lstm.H_FIRST: _address(first_dh), lstm.C_FIRST: _address(first_dc),
        lstm.KEPT: dgates.data_ptr(),
    }  # fmt: skip
    _run(kernel, fields, min(plan.threads, plan.parts))

    common = {
        lstm.COUNT: count, lstm.TILES: plan.tiles, lstm.SHARES: plan.threads, lstm.ROWS: rows, lstm.YT: dgates.data_ptr()
    }  # fmt: skip
    dtheta_ih, dtheta_hh = (
        torch.empty_like(one) if needed else None for one, needed in zip((theta_ih, theta_hh), need[1:3], strict=True)
    )
    dx = dy.new_empty((steps, plan.padded, columns)) if need[0] else None
    dbias = dy.new_empty(rows) if need[3] else None
    of_hidden = {lstm.COLUMNS: hidden, lstm.XT: kept.data_ptr(), lstm.DTHETA: _address(dtheta_hh), lstm.DBIAS: _address(dbias)}
    if dtheta_hh is not None or dbias is not None:
        _run(lstm.theta_kernel(*plan.tile), {**common, **of_hidden, **_ordered(hh.addresses[:3])}, plan.threads)
    of_input = {
        lstm.COLUMNS: columns,
        lstm.XT: tiled.data_ptr(),
        lstm.THETA: theta_ih.data_ptr(),
        lstm.DTHETA: _address(dtheta_ih),
    }
    if dx is not None:
        of_input[lstm.DX] = dx.data_ptr()
        _run(lstm.input_kernel(*plan.tile), {**common, **of_input, **_ordered(ih.addresses[3:])}, plan.threads)
        dx = dx[:, :batch]
    elif dtheta_ih is not None:
        _run(lstm.theta_kernel(*plan.tile), {**common, **of_input, **_ordered(ih.addresses[:3])}, plan.threads)
    return [dx, dtheta_ih, dtheta_hh, dbias, first_dh, first_dc]


class LSTMFunction(torch.autograd.Function):
    """One layer in one direction. x [T, B, columns] -> y [T, B, hidden], last h and c [B, hidden]."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, theta_ih: Tensor, theta_hh: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None,
        h: Tensor | None, c: Tensor | None, buffer_ih: Tensor, buffer_hh: Tensor, ih: Any, hh: Any, reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        found, saved = _forward(x, theta_ih, theta_hh, _sum(bias_ih, bias_hh), h, c, ih, hh, reverse, True)
        ctx.save_for_backward(*saved, theta_ih, theta_hh, buffer_ih, buffer_hh)
        ctx.ih, ctx.hh, ctx.reverse = ih, hh, reverse
        ctx.threads = torch.get_num_threads()
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(TWICE)
        *saved, theta_ih, theta_hh, _, _ = ctx.saved_tensors  # raises if connections were rewired since
        asked = ctx.needs_input_grad
        need = [*asked[:3], asked[3] or asked[4], *asked[5:7]]
        dx, dtheta_ih, dtheta_hh, dbias, dh, dc = _backward(
            gradients, tuple(saved), theta_ih, theta_hh, ctx.ih, ctx.hh, ctx.reverse, need, ctx.threads
        )  # fmt: skip
        # gradients are accumulated in place: each bias needs its own
        second = dbias.clone() if dbias is not None and asked[3] else dbias
        return (
            dx, dtheta_ih, dtheta_hh, dbias if asked[3] else None, second if asked[4] else None,
            dh, dc, None, None, None, None, None,
        )  # fmt: skip


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a + b


# -- the module ---------------------------------------------------------------------------------------------------------------


def capable(module: nn.Module, tensor_name: str) -> bool:
    """Whether sparse compute may take a tensor of a recurrent layer: a weight of an LSTM without projections."""
    return isinstance(module, nn.LSTM) and module.proj_size == 0 and tensor_name.startswith(("weight_ih_l", "weight_hh_l"))


def lstm_forward(module: Any, input: Any, hx: Any = None) -> tuple[Tensor, State] | None:
    """``nn.LSTM.forward`` by sparse compute; None where the dense weights have to be built."""
    if torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing():
        return None
    layers = _layers(module)
    if layers is None or not _suits(module, input, hx, layers) or not _prefers_sparse(module, input, layers):
        _note(module, "dense")
        return None
    _note(module, "sparse")
    batched = input.dim() == 3
    x = (input.transpose(0, 1) if module.batch_first else input) if batched else input.unsqueeze(1)
    states = None if hx is None else [(one if batched else one.unsqueeze(1)).unbind(0) for one in hx]
    directions = 2 if module.bidirectional else 1
    last: list[State] = []
    for number in range(module.num_layers):
        if number > 0 and module.dropout > 0:
            x = dropout(x, module.dropout, module.training)
        outputs = []
        for direction in range(directions):
            at = number * directions + direction
            h, c = (None, None) if states is None else (states[0][at].contiguous(), states[1][at].contiguous())
            y, *state = _direction(x, layers[at], h, c, direction == 1)
            outputs.append(y)
            last.append((state[0], state[1]))
        x = outputs[0] if directions == 1 else torch.cat(outputs, 2)
    h, c = (torch.stack(one) for one in zip(*last, strict=True))
    if not batched:
        return x.squeeze(1), (h.squeeze(1), c.squeeze(1))
    return (x.transpose(0, 1) if module.batch_first else x), (h, c)


def _note(module: Any, compute: str) -> None:
    """What training did last is what a report says."""
    if torch.is_grad_enabled():
        for holder in module.parametrizations.values():
            if hasattr(holder[0], "policy"):
                holder[0].compute = compute


class _Layer(NamedTuple):
    """One layer in one direction: theta and slots of the weights of its input and of its hidden state; biases."""

    weights: list[tuple[Tensor, Any]]
    biases: tuple[Tensor | None, Tensor | None]


def _layers(module: Any) -> list[_Layer] | None:
    """All layers and directions of an LSTM, or None where some weight has no connections to compute from."""
    if not isinstance(module, nn.LSTM) or module.proj_size:
        return None
    holders: Any = module._modules.get("parametrizations") or {}
    found = []
    for number in range(module.num_layers):
        for suffix in ("", "_reverse") if module.bidirectional else ("",):
            weights = []
            for kind in ("ih", "hh"):
                name = f"weight_{kind}_l{number}{suffix}"
                if name not in holders or len(holders[name]) != 1 or not hasattr(holders[name][0], "policy"):
                    return None
                weights.append((holders[name].original, holders[name][0]))
            biases = [getattr(module, f"bias_{kind}_l{number}{suffix}") if module.bias else None for kind in ("ih", "hh")]
            found.append(_Layer(weights, (biases[0], biases[1])))
    return found


def _suits(module: Any, x: Any, hx: Any, layers: list[_Layer]) -> bool:
    """Whether kernels can take these arguments; what doesn't fit is left to torch, which says so."""
    if not isinstance(x, Tensor) or not _is_plain(x):
        return False
    if x.dim() not in (2, 3) or x.shape[-1] != module.input_size or x.numel() == 0 or torch.is_autocast_enabled("cpu"):
        return False
    tensors = [x]
    if hx is not None:
        batch = () if x.dim() == 2 else (x.shape[0 if module.batch_first else 1],)
        shape = (len(layers), *batch, module.hidden_size)
        if not isinstance(hx, (tuple, list)) or len(hx) != 2 or any(not isinstance(h, Tensor) or h.shape != shape for h in hx):
            return False
        tensors += hx
    for layer in layers:
        tensors += [bias for bias in layer.biases if bias is not None]
        for theta, slots in layer.weights:
            if slots.policy == "dense" or theta.dtype != x.dtype or theta.numel() != slots.count or not kernels.suits(theta):
                return False
    return all(type(one) in (Tensor, nn.Parameter) and one.dtype == x.dtype and one.is_cpu for one in tensors)


def _prefers_sparse(module: Any, x: Tensor, layers: list[_Layer]) -> bool:
    batch = 1 if x.dim() == 2 else x.shape[0 if module.batch_first else 1]
    for layer in layers:
        (_, ih), (_, hh) = layer.weights
        asked_for = ih.policy == hh.policy == "sparse"
        if not asked_for and not prefers_sparse(batch, ih.columns, hh.columns, ih.count + hh.count):
            return False
    return True


def _direction(x: Tensor, layer: _Layer, h: Tensor | None, c: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    (theta_ih, ih), (theta_hh, hh) = ((theta, slots.ordered()) for theta, slots in layer.weights)
    if torch.is_grad_enabled():
        return LSTMFunction.apply(  # type: ignore[no-any-return]
            x, theta_ih, theta_hh, *layer.biases, h, c, ih.buffer, hh.buffer, ih, hh, reverse
        )
    return _forward(x, theta_ih, theta_hh, _sum(*layer.biases), h, c, ih, hh, reverse, False)[0]


# Microseconds per step, fitted to `benchmarks/recurrent.py` (batches of 1 to 128, hidden sizes of 32 to 800, 2 % to 30 %): a step; a
# multiplication per connection or place and element of the batch; a unit and element; reading a connection or place.
SPARSE = (7.1, 8.2e-5, 1.15e-2, 1.1e-3)
DENSE = (16.0, 2.5e-5, 1.64e-2, 1.2e-4)


def prefers_sparse(batch: int, columns: int, hidden: int, count: int) -> bool:
    """Whether a layer with so many connections in both weights is expected to be faster without dense weights, forward and backward.

    The rule was right for 53 of the 60 layers that it was fitted to, and 1.28 times too slow at worst.
    """
    padded = 8 if batch <= 8 else 16 * math.ceil(batch / 16)  # the kernels work on whole vectors
    total = 4 * hidden * (hidden + columns)
    sparse = SPARSE[0] + SPARSE[1] * padded * count + SPARSE[2] * padded * hidden + SPARSE[3] * count
    return sparse < DENSE[0] + DENSE[1] * batch * total + DENSE[2] * batch * hidden + DENSE[3] * total
