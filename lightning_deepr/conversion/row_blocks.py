"""One converted linear layer whose rows are shared out over ranks, for layers that outgrow a machine.

The rows are cut into a fixed number of blocks. A block is a converted tensor of its own: its rows of the bias, its slots,
its K (exact in each block), its optimizer state, its draws. Each rank has some of the blocks and nothing of the others. So the
number of ranks decides where a block is computed, and nothing else: the draws are those of the block's number.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ParallelStyle

from lightning_deepr.algorithm import randomness
from lightning_deepr.conversion.allocation import check_connectivity
from lightning_deepr.conversion.convert import check_seed, convert
from lightning_deepr.conversion.selection import candidates
from lightning_deepr.conversion.start import start

_INDICES = 1 << 16  # tensor numbers per layer; other tensors of a network have smaller ones


class RowBlocks(ParallelStyle):
    """A plan for ``parallelize_module``: convert a linear layer, and share its rows out over the ranks of a mesh.

    The layer takes a replicated input of ``[..., in_features]`` and returns the whole output ``[..., out_features]`` on every
    rank. Forward is one all-gather of the output, backward one all-reduce of the input's gradient (none if it needs none). A
    layer on the meta device is never whole anywhere: each rank draws its own blocks.

    Names in the ``state_dict`` have the block's number, ``blocks.3.parametrizations.weight.original``, and a rank has the names
    of its blocks only. ``torch.distributed.checkpoint`` saves all ranks' entries in one folder, and loads them on any number of
    ranks. ``load_state_dict`` passes over the blocks of other ranks. What sums over all parameters, like clipping by the norm,
    has to sum over the ranks.

    Args:
        connectivity: float in (0, 1] or int (the number of connections K of the layer); every block has its share, exactly.
        blocks: the number of blocks, at least the number of ranks. A checkpoint fits the same number of blocks.
        init: "module" | "largest" | "deepr", per block; see :func:`lightning_deepr.sparsify`.
        seed: the seed of places, signs and values.
        compute: "sparse" | "auto" | "dense".
        layer: the number of this layer among those of a network with ``RowBlocks`` plans of their own: their draws must
            differ. A plan that is used for several layers counts up by itself.

    Raises:
        ValueError: the module is no ``nn.Linear``, is converted already, or the blocks do not fit the ranks, rows or
            connections.

    Example::

        >>> layer = RowBlocks(5_000, blocks=4).convert(nn.Linear(1_000_000, 1_000_000, device="meta"))
        >>> layer(torch.zeros(2, 1_000_000)).shape, sorted(layer.blocks), layer.blocks["0"].weight.shape
        (torch.Size([2, 1000000]), ['0', '1', '2', '3'], torch.Size([250000, 1000000]))
    """

    def __init__(
        self,
        connectivity: int | float,
        *,
        blocks: int = 8,
        init: str = "module",
        seed: int = 0,
        compute: str = "sparse",
        layer: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(connectivity, dict):
            raise TypeError("connectivity: expected a float or an int for one layer, found a dict.")
        check_connectivity(connectivity)
        check_seed(seed)
        if not isinstance(blocks, int) or not 1 <= blocks <= _INDICES:
            raise ValueError(f"blocks: expected an int from 1 to {_INDICES}, found {blocks!r}.")
        self.connectivity, self.blocks, self.init = connectivity, blocks, init
        self.seed, self.compute, self.layer = seed, compute, layer

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        return self.convert(module, device_mesh)

    def convert(self, module: nn.Module, mesh: Any = None) -> nn.Module:
        """Convert a layer in place, and return it.

        Args:
            module: an ``nn.Linear``, also on the meta device.
            mesh: a one-dimensional device mesh; None: this process has all blocks.
        """
        if type(module) is not nn.Linear:
            raise ValueError(
                f"RowBlocks: expected an nn.Linear that is not converted yet, found a {type(module).__name__}. Give the dense "
                "layer (or one on the meta device) to the plan; it is converted there."
            )
        if mesh is not None and mesh.ndim != 1:
            raise ValueError(f'RowBlocks: expected a mesh of one dimension, found {mesh.ndim}: give one of it, mesh["tp"].')
        ranks, rank = (1, 0) if mesh is None else (mesh.size(), mesh.get_local_rank())
        rows, columns = module.weight.shape
        if not ranks <= self.blocks <= rows:
            raise ValueError(
                f"RowBlocks: expected from {ranks} (the number of ranks) to {rows} (the number of rows) blocks, found "
                f"{self.blocks}."
            )
        counts = self._counts(rows, columns)
        edges = [rows * block // self.blocks for block in range(self.blocks + 1)]
        owners = [self.blocks * one // ranks for one in range(ranks + 1)]
        own = range(owners[rank], owners[rank + 1])
        first = _INDICES * (1 + self.layer)
        held = _Blocks(self.blocks)
        for block in own:
            held[str(block)] = self._block(
                module, slice(edges[block], edges[block + 1]), counts[block], first + block, str(block)
            )
        self.layer += 1
        for name in ("weight", "bias"):
            del module._parameters[name]
        module.__class__ = RowBlockLinear  # type: ignore[assignment]
        assert isinstance(module, RowBlockLinear)
        module.blocks = held
        module.group = None if ranks == 1 else mesh.get_group()
        module.rows_of_ranks = [edges[owners[one + 1]] - edges[owners[one]] for one in range(ranks)]
        return module

    def _counts(self, rows: int, columns: int) -> list[int]:
        """Share K out over the blocks in proportion to their rows, by largest remainder."""
        total = rows * columns
        count = self.connectivity if isinstance(self.connectivity, int) else max(round(self.connectivity * total), 1)
        sizes = [(rows * (b + 1) // self.blocks - rows * b // self.blocks) * columns for b in range(self.blocks)]
        counts = [count * size // total for size in sizes]
        by_rest = sorted(range(self.blocks), key=lambda b: (-(count * sizes[b] % total), b))
        for block in by_rest[: count - sum(counts)]:
            counts[block] += 1
        if min(counts) < 1 or any(k > size for k, size in zip(counts, sizes, strict=True)):
            raise ValueError(
                f"RowBlocks: expected from {self.blocks} (one per block) to {total} connections, found {count} "
                f"(connectivity={self.connectivity})."
            )
        return counts

    def _block(self, module: nn.Linear, rows: slice, count: int, index: int, name: str) -> nn.Linear:
        weight, height = module.weight, rows.stop - rows.start
        block = nn.Linear(module.in_features, height, module.bias is not None, device="meta", dtype=weight.dtype)
        on_meta = weight.is_meta
        if not on_meta:
            block.weight = nn.Parameter(weight.detach()[rows].clone(), weight.requires_grad)

        def begin(candidate: Any, count: int, _: int, **options: Any) -> Any:
            return start(candidate, count, index, **options)

        chosen = candidates(block)
        (made,) = convert(
            block, chosen, {chosen[0].name: count}, init=self.init, seed=self.seed, compute=self.compute, begin=begin
        )
        made.slots.is_block, made.slots.name = True, f"blocks.{name}.weight"
        if module.bias is not None:
            block.bias = nn.Parameter(
                _bias(block, self.seed, index) if on_meta else module.bias.detach()[rows].clone(), module.bias.requires_grad
            )
        return block


def _bias(block: nn.Linear, seed: int, index: int) -> Tensor:
    """Draw a bias as torch does, uniform on +- 1 / sqrt(in_features), by the block's number."""
    numbers = randomness.counters(index, torch.arange(block.out_features))
    bits = randomness.bits(randomness.key(seed, randomness.START_THETA, 1), numbers)
    uniform = (bits >> 11).bitwise_and_((1 << 53) - 1).double() * 2.0**-52 - 1
    return (uniform / math.sqrt(block.in_features)).to(block.weight.dtype)


class _Blocks(nn.ModuleDict):
    """The blocks of this rank, by their numbers."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.total = total

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        _, _, _, unexpected, errors = args
        elsewhere = {str(block) for block in range(self.total)} - set(self)
        numbers = {name[len(prefix) :].partition(".")[0] for name in state_dict if name.startswith(prefix)}
        unexpected[:] = [name for name in unexpected if name[len(prefix) :].partition(".")[0] not in elsewhere]
        if numbers and max(map(int, filter(str.isdigit, numbers)), default=0) >= self.total:
            errors.append(
                f"`{prefix}`: expected a checkpoint of {self.total} blocks, found one of more. Give the same `blocks`."
            )


class RowBlockLinear(nn.Module):
    """A linear layer of which this rank has some blocks of rows. :class:`RowBlocks` makes it."""

    in_features: int
    out_features: int
    blocks: _Blocks
    group: Any
    rows_of_ranks: list[int]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the whole output ``[..., out_features]`` from the whole input ``[..., in_features]``."""
        if self.group is not None:
            x = _Replicated.apply(x, self.group)
        parts = [block(x) for block in self.blocks.values()]
        own = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return own if self.group is None else _Gathered.apply(own, self.group, self.rows_of_ranks)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        held = f"{len(self.blocks)} of {self.blocks.total} blocks"
        return f"in_features={self.in_features}, out_features={self.out_features}, {held}"


class _Replicated(torch.autograd.Function):
    """The input, which every rank has. Its gradient is the sum over the rows of all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Gathered(torch.autograd.Function):
    """The rows of all ranks, from this rank's rows. Every rank goes on with the same output, so its gradient is here, too."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any, rows: list[int]) -> Tensor:
        rank, most = torch.distributed.get_rank(group), max(rows)
        ctx.range = sum(rows[:rank]), rows[rank]
        padded = nn.functional.pad(own, (0, most - own.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in rows]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[..., :count] for part, count in zip(parts, rows, strict=True)], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.narrow(-1, *ctx.range).contiguous(), None, None
