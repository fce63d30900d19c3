"""Export to a dense ``state_dict`` and to compressed sparse rows."""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deepr._needed import EXPORT, needed
from lightning_deepr.monitoring.prune import pruned_copy
from lightning_deepr.weights.find import Converted, converted_tensors
from lightning_deepr.weights.names import keep_metadata
from lightning_deepr.weights.outside import as_densified, outside, refuse_stacked

_LARGEST_DENSE = 1 << 34  # bytes, the same limit as in densify


def to_dense_state_dict(module: nn.Module, *, prune: bool = False) -> dict[str, Any]:
    """Make the ``state_dict`` of the module without this package: dense weights, with 0 for dormant connections.

    Unlike :func:`lightning_deepr.densify`, it does not change the module. The names have no prefixes of ``torch.compile``, DDP,
    Fabric or FSDP. A parametrization of others upon a converted weight is kept, as ``densify`` keeps it.

    Args:
        module: a module with or without converted weights.
        prune: True to leave out the units that are cut off, as :func:`lightning_deepr.prune_dead_units` does in a copy. The
            outputs stay the same, the shapes get smaller.

    Returns:
        copies of all tensors, on their devices, under the names of the plain module.

    Raises:
        RuntimeError: a dense weight would take more than 16 GiB.
        ValueError: two different tensors have one name without the prefixes of wrappers.

    Example::

        >>> from lightning_deepr import sparsify
        >>> state = to_dense_state_dict(sparsify(nn.Linear(100, 10), 0.05))
        >>> sorted(state), int((state["weight"] != 0).sum())
        (['bias', 'weight'], 50)
        >>> nn.Linear(100, 10).load_state_dict(state)
        <All keys matched successfully>
    """
    rest = outside(pruned_copy(module, prune))
    for one in rest.converted.values():
        size = one.slots.total * one.theta.element_size()
        if size > _LARGEST_DENSE:
            raise RuntimeError(
                f"`{one.name}` of shape {tuple(one.slots.shape)} would take {size / 2**30:.0f} GiB as a dense weight (more "
                "than 16 GiB). `to_csr(module)` keeps it sparse."
            )
    built: dict[nn.Module, Tensor] = {}
    state: OrderedDict[str, Any] = OrderedDict()
    for name in rest.order:
        if name not in rest.converted:
            value = rest.values[name]
            state[name] = value.detach().clone() if isinstance(value, Tensor) else value
            continue
        one = rest.converted[name]
        if one.slots not in built:
            built[one.slots] = one.slots.whole(one.theta.detach()).detach().clone()
        state.update(as_densified(name, built[one.slots], one, rest.upon.get(name, {})))
    keep_metadata(state, rest.values)
    return state


def to_csr(module: nn.Module, *, prune: bool = False) -> dict[str, Tensor]:
    """Export every converted weight as a ``torch.sparse_csr`` matrix, without building a dense tensor.

    Args:
        module: a module with converted weights.
        prune: True to leave out the units that are cut off, as :func:`lightning_deepr.prune_dead_units` does in a copy. The
            outputs stay the same, the shapes get smaller.

    Returns:
        {tensor name: CSR [rows, columns]} with all K connections, including those of value 0, sorted by row and column. A
        weight of more than two dimensions becomes a matrix of ``shape[0]`` rows: a convolution's columns are (channel, height,
        width), in that order. An adapted weight is the sum, with all of its places. Tensors that are not converted, such as
        biases, are not included.

    Raises:
        ValueError: another parametrization computes a weight from the connections.

    Example::

        >>> from lightning_deepr import sparsify
        >>> net = sparsify(nn.Linear(100, 10), 0.05)
        >>> matrix = to_csr(net)["weight"]
        >>> matrix.shape, matrix.values().shape
        (torch.Size([10, 100]), torch.Size([50]))
        >>> x = torch.randn(100)
        >>> torch.allclose(matrix @ x + net.bias, net(x), atol=1e-5)
        True
    """
    for converted in converted_tensors(module):
        refuse_stacked(converted, "to_csr")
    module = pruned_copy(module, prune)
    return {one.name: _csr(one.slots.shape, *_entries(one)) for one in converted_tensors(module)}


def _entries(one: Converted) -> tuple[Tensor, Tensor]:
    """List the places and the values of a weight; those of an adapted one are all places, with the sums."""
    if not one.slots.adapts:
        return one.slots.active(one.theta)
    whole = one.slots.whole(one.theta.detach()).detach().reshape(-1)
    return torch.arange(whole.numel(), device=whole.device), whole


def to_scipy(module: nn.Module, *, prune: bool = False) -> dict[str, Any]:
    """Export every converted weight as a ``scipy.sparse.csr_array`` on the CPU, with the contents of :func:`to_csr`.

    Raises:
        ImportError: SciPy is missing (``pip install 'lightning-deepr[export]'``).
        ValueError: another parametrization computes a weight from the connections.

    Example::

        >>> from lightning_deepr import sparsify
        >>> to_scipy(sparsify(nn.Linear(100, 10), 0.05))["weight"].nnz
        50
    """
    (sparse,) = needed("scipy.sparse", purpose="to_scipy", install=EXPORT)
    result = {}
    for name, matrix in to_csr(module, prune=prune).items():
        matrix = matrix.cpu()
        values = matrix.values()
        values = (
            values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
        )  # SciPy can't multiply 16-bit floats
        parts = (values.numpy(), matrix.col_indices().numpy(), matrix.crow_indices().numpy())
        result[name] = sparse.csr_array(parts, shape=tuple(matrix.shape))
    return result


def rows_of(shape: torch.Size, places: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort connections by row and column: row pointers int64 [rows + 1], columns int64 [K], values [K]."""
    order = places.argsort()
    places, values = places[order], values[order]
    columns = max(math.prod(shape[1:]), 1)
    counts = torch.bincount(places // columns, minlength=shape[0])
    pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return pointers, places % columns, values


def _csr(shape: torch.Size, places: Tensor, values: Tensor) -> Tensor:
    pointers, columns, ordered = rows_of(shape, places, values)
    size = (shape[0], math.prod(shape[1:]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(pointers, columns, ordered, size=size, check_invariants=True)
