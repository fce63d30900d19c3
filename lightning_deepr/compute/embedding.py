"""``nn.Embedding`` and ``nn.EmbeddingBag`` from the connections: only the rows that are looked up are built."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_deepr.compute.eager import dispatch_modes, needs_operators, transforms
from lightning_deepr.compute.layer import Shape, Slots, slots_and_theta, with_forward
from lightning_deepr.compute.weight import SparseWeight


def _rows(indices: Tensor, theta: Tensor, slots: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Build the rows that are looked up. O(K + rows + looked up rows * columns), in place of O(rows * columns).

    Args:
        indices: the indices of any shape.
        theta: [K].
        slots: the connections of a weight [rows, columns].

    Returns:
        the different indices, sorted [U]; the indices by their position among these, in the shape of ``indices``; and the
        weight's rows [U, columns], differentiable in theta.

    Raises:
        IndexError: an index lies outside of the rows, as torch says.
    """
    used, where = indices.unique(return_inverse=True)
    rows, columns = slots.shape
    if used.numel() == 0:
        used = used.new_zeros(1)  # torch wants at least one row
    if int(used[0]) < 0 or int(used[-1]) >= rows:
        raise IndexError(f"index out of range in self: expected 0 ... {rows - 1}, found {int(used[0])} ... {int(used[-1])}")
    number = torch.full((rows,), -1, dtype=torch.int64, device=theta.device)
    number[used.long()] = torch.arange(used.numel(), device=theta.device)
    row = slots.places // columns
    at = number[row]
    mine = (at >= 0).nonzero().view(-1)
    places = at[mine] * columns + slots.places[mine] - row[mine] * columns
    values = (theta * slots.signs)[mine]
    values = values if slots.adapts else values.to(slots.narrow or theta.dtype)
    table = torch.zeros(used.numel() * columns, dtype=values.dtype, device=theta.device).index_copy(0, places, values)
    table = table.view(used.numel(), columns)
    if slots.adapts:
        own = slots.base.detach().index_select(0, used.long())
        table = (own.to(theta.dtype) + table).to(own.dtype)
    return used, where.view(indices.shape), table


def _padding(used: Tensor, padding: int | None) -> int | None:
    """Return the position of the padding index among the looked up rows; None: it is not looked up, or there is none."""
    if padding is None:
        return None
    found = (used == padding).nonzero().view(-1)
    return int(found[0]) if found.numel() else None


def _sparse(self: Any, indices: Tensor) -> Any:
    """Return slots and theta if this lookup computes from the connections, else None."""
    found = slots_and_theta(self)
    if found is None or torch.compiler.is_compiling() or dispatch_modes() != 0 or transforms() is not None:
        return None  # the number of rows that are built depends on the data: nothing for compilers
    if not isinstance(indices, Tensor) or needs_operators():  # torch.fx has proxies, a trace is for any input
        return None
    if indices.is_nested or not found[0].uses_sparse(indices, self):
        return None
    return found[0], found[0].own(found[1])


def _built(weight: Tensor) -> Tensor:
    return weight.build() if type(weight) is SparseWeight else weight


def embedding_forward(self: Any, input: Tensor) -> Tensor:
    """Replace ``nn.Embedding.forward`` in a converted layer."""
    found = _sparse(self, input)
    if found is None:
        return F.embedding(input, _built(self.weight), self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse)
    used, where, table = _rows(input, found[1], found[0])
    return F.embedding(where, table, _padding(used, self.padding_idx), None, 2.0, self.scale_grad_by_freq)


def embedding_bag_forward(
    self: Any, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
) -> Tensor:
    """Replace ``nn.EmbeddingBag.forward`` in a converted layer: all modes, offsets, weights and padding."""
    options = self.scale_grad_by_freq, self.mode, False, per_sample_weights, self.include_last_offset
    found = _sparse(self, input)
    if found is None:
        weight = _built(self.weight)
        return F.embedding_bag(input, weight, offsets, None, 2.0, *options, self.padding_idx)
    used, where, table = _rows(input, found[1], found[0])
    if offsets is not None and offsets.dtype != where.dtype:
        offsets = offsets.to(where.dtype)
    return F.embedding_bag(where, table, offsets, None, 2.0, *options, _padding(used, self.padding_idx))


def _capable(module: Any, tensor_name: str, shape: Shape) -> bool:
    return len(shape) == 2 and tensor_name == "weight"


def _guess(slots: Slots) -> bool:
    return slots.count / slots.total <= 0.2


def _prefers(slots: Slots, module: Any, indices: Tensor) -> bool:
    # Dense: N numbers are written, and the gradient has as many. Sparse: some ten passes over K, and the rows.
    if indices.device.type != "cpu":
        return False  # the number of rows depends on the data: the host would wait
    return 200_000 + 10 * slots.count + 3 * indices.numel() * slots.columns + slots.rows < 2 * slots.total


EMBEDDING = with_forward(nn.Embedding, embedding_forward, capable=_capable, guess=_guess, prefers=_prefers)
EMBEDDING_BAG = with_forward(nn.EmbeddingBag, embedding_bag_forward, capable=_capable, guess=_guess, prefers=_prefers)
