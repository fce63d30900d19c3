"""Connectivities of one's own: which places a tensor starts with, if a user gives them instead of a number.

A value is "nonzero" (the weights that are not 0), a bool mask, places, a matrix of torch or SciPy in COO or CSR format, or a
dense tensor with zeros, as a ``state_dict`` has it.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_deepr.conversion import pruned

NONZERO = "nonzero"


class Weight(Protocol):
    """What this module reads of a :class:`lightning_deepr.conversion.selection.Candidate`."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> nn.Module: ...
    @property
    def tensor_name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def slots(self) -> Any: ...
    @property
    def total(self) -> int: ...
    @property
    def parameter(self) -> Tensor | None: ...


Weights = TypeVar("Weights", bound=Weight)


class Given(NamedTuple):
    """The places that a tensor starts with."""

    places: Tensor  # int64 [K], all different, on the CPU
    own: bool  # whether ``init="module"`` takes the module's own values and signs, as they are


class StartingPlaces(ABC):
    """A connectivity that names its tensors by itself, for example ``Topology``."""

    @abstractmethod
    def starting_places(self) -> dict[str, Tensor]:
        """Return the places of each tensor, int64, by name."""


def as_mapping(connectivity: Any) -> Any:
    """Read a connectivity that names its tensors by itself, and the tensors of a ``state_dict`` that may be weights."""
    if isinstance(connectivity, StartingPlaces):
        return connectivity.starting_places()
    if isinstance(connectivity, Mapping) and any(_is_dense(value) for value in connectivity.values()):
        return {name: value for name, value in connectivity.items() if not isinstance(value, Tensor) or _may_be(value)}
    return connectivity


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and value.is_floating_point()


def _may_be(value: Tensor) -> bool:
    """Whether an entry of a ``state_dict`` gives places: a weight with zeros, or a mask or a list that was put there."""
    if not _is_dense(value):
        return True
    return value.dim() >= 2 and bool((value == 0).any() or not value.isfinite().all())  # (what is not finite is refused later)


def is_given(value: Any) -> bool:
    """Whether a value gives places and no number of connections."""
    if isinstance(value, str):
        return value == NONZERO
    if isinstance(value, Tensor) or _is_scipy(value) or isinstance(value, StartingPlaces):
        return True
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, bytes)


def asks_for_nonzero(connectivity: Any) -> bool:
    """Whether a connectivity looks at the values of the weights."""
    if isinstance(connectivity, Mapping):
        return any(asks_for_nonzero(value) for value in connectivity.values())
    return isinstance(connectivity, str) and connectivity == NONZERO


def gives_places(connectivity: Any) -> bool:
    """Whether a connectivity, or one of its values, gives places."""
    if isinstance(connectivity, Mapping):
        return any(is_given(value) for value in connectivity.values())
    return is_given(connectivity)


def with_zeros(chosen: Sequence[Weights], values: Mapping[str, Any]) -> list[Weights]:
    """Leave out the tensors of which "nonzero" would take all weights, and say so.

    Args:
        chosen: the tensors.
        values: the connectivity of each, by name.

    Raises:
        ValueError: all of them are left out.
    """
    asked = [c for c in chosen if c.slots is None and isinstance(values[c.name], str)]
    without = [c for c in asked if _nonzero(c).numel() == c.total]
    if not without:
        return list(chosen)
    names = ", ".join(f"`{c.name}`" for c in without[:5]) + (", ..." if len(without) > 5 else "")
    if len(without) == len(chosen):
        raise ValueError(
            f'connectivity="nonzero" expects weights with zeros, which say where the connections are, found none in {names}. '
            "Load the sparse weights first, prune the network (torch.nn.utils.prune), or give a mask, places or a number."
        )
    warnings.warn(f'connectivity="nonzero": {names} without a zero: left dense.', stacklevel=4)
    left = {c.name for c in without}
    return [c for c in chosen if c.name not in left]


def places_of(candidate: Weight, value: Any) -> Given:
    """Read the places of a tensor.

    Raises:
        ValueError: they do not fit the tensor.
    """
    name, shape, total = candidate.name, tuple(candidate.shape), candidate.total
    own = isinstance(value, str)
    if own:
        places = _nonzero(candidate)
    elif _is_scipy(value):
        matrix = value.tocoo()
        _check_matrix(name, shape, tuple(matrix.shape))
        columns = int(matrix.shape[1])
        places = torch.from_numpy(matrix.row.astype(np.int64) * columns + matrix.col.astype(np.int64)).unique()
    elif isinstance(value, Tensor) and value.layout is not torch.strided:
        _check_matrix(name, shape, tuple(value.shape))
        indices = value.detach().to_sparse_coo().coalesce().indices().cpu()
        sizes = torch.tensor([1, *reversed(value.shape)]).cumprod(0)[:-1].flip(0)
        places = (indices * sizes[:, None]).sum(0)
    else:
        places = _of_array(candidate, value)
    if places.numel() == 0:
        what = "weights that are not 0" if own else "a connection"
        raise ValueError(f"`{name}`: expected {what}, found none (all {total} places are off). Leave the tensor out.")
    if int(places.min()) < 0 or int(places.max()) >= total:
        wrong = int(places.min()) if int(places.min()) < 0 else int(places.max())
        raise ValueError(f"`{name}`: expected places from 0 to {total - 1}, flat indices into {shape}, found {wrong}.")
    if places.unique().numel() != places.numel():
        raise ValueError(
            f"`{name}`: expected different places, found {places.numel()} of which {places.unique().numel()} differ."
        )
    return Given(places, own)


def _nonzero(candidate: Weight) -> Tensor:
    """List the places whose weight is not 0. A weight that ``torch.nn.utils.prune`` had pruned has those of its mask."""
    mask = pruned.mask_of(candidate.module, candidate.tensor_name)
    weight = candidate.parameter
    assert weight is not None
    if mask is not None:
        return mask.reshape(-1).nonzero().view(-1).cpu()
    if weight.device.type == "meta":
        raise ValueError(
            f'`{candidate.name}` is on the meta device and has no values: connectivity="nonzero" needs weights. Give a mask.'
        )
    flat = weight.detach().reshape(-1)
    if not bool(torch.isfinite(flat).all()):
        raise ValueError(
            f'`{candidate.name}`: expected finite weights for connectivity="nonzero", found '
            f"{int((~torch.isfinite(flat)).sum())} that are NaN or infinite. Load the trained weights again."
        )
    return flat.nonzero().view(-1).cpu()


def _of_array(candidate: Weight, value: Any) -> Tensor:
    """Read a mask, a list of places, or a dense weight with zeros."""
    name, shape = candidate.name, tuple(candidate.shape)
    try:
        array = value.detach() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise TypeError(f"`{name}`: expected a mask, places or a sparse matrix, found {type(value).__name__}.") from error
    weight = candidate.parameter
    where = None if weight is None or not isinstance(value, Tensor) else weight.device
    if array.device.type == "meta" or (where is not None and where.type not in ("meta", array.device.type)):
        raise ValueError(f"`{name}`: expected its connectivity on {where}, where the weight is, found it on {array.device}.")
    array = array.cpu()
    if array.dtype is torch.bool or array.is_floating_point():
        if tuple(array.shape) != shape:
            raise ValueError(f"`{name}`: expected a mask of shape {shape}, that of the weight, found {tuple(array.shape)}.")
        if array.is_floating_point() and not bool(torch.isfinite(array).all()):
            raise ValueError(f"`{name}`: expected finite values, found NaN or infinity in the weight that gives the places.")
        return array.reshape(-1).nonzero().view(-1)
    if array.dim() != 1 or array.is_complex():
        raise ValueError(
            f"`{name}`: expected a bool mask of shape {shape} or a list of places (flat indices), found {array.dtype} of shape "
            f"{tuple(array.shape)}."
        )
    return array.long().clone()


def _check_matrix(name: str, shape: tuple[int, ...], found: tuple[int, ...]) -> None:
    flat = (shape[0], int(np.prod(shape[1:])))
    if found not in (shape, flat):
        wanted = f"{shape}" if flat == shape else f"{shape} or {flat}"
        raise ValueError(f"`{name}`: expected a matrix of shape {wanted}, found {found}.")


def _is_scipy(value: Any) -> bool:
    return hasattr(value, "tocoo") and hasattr(value, "nnz")
