"""The connectivity of another network, without its values: where a network of one's own starts."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_deepr.conversion.connectivities import StartingPlaces
from lightning_deepr.files import container, sparse_file
from lightning_deepr.files.checkpoint import read_state
from lightning_deepr.weights.find import converted_tensors
from lightning_deepr.weights.names import join, split_head, without_wrappers
from lightning_deepr.zoo.loading import open_file, path_of

_PLACES = ".0.places"


class Topology(StartingPlaces):
    """The places of the connections of another network, for ``sparsify`` and every callback in the place of a connectivity.

    Only the places are taken: values and signs are new, as ``init`` and ``signs`` say. So a topology shows whether the places
    or the values of a network matter. (A network's own values stay with ``connectivity="nonzero"``.)

    Args:
        source: a model of the zoo or a sparse file; a checkpoint or a ``state_dict`` (with connections, or dense with zeros:
            its weights of two or more dimensions that have a zero); or a converted network.

    Raises:
        TypeError: the source is none of these.
        FileNotFoundError: there is no such model or file (when the places are read).
        ValueError: the file is damaged, or has no connectivity.

    Example::

        >>> from lightning_deepr import Topology, connections, sparsify
        >>> from lightning_deepr.models import LeNet300100
        >>> net = sparsify(LeNet300100(), Topology(sparsify(LeNet300100(), 0.01, seed=7)))
        >>> [len(places) for shape, places, values in connections(net).values()]
        [1810, 668, 184]
    """

    def __init__(self, source: str | PathLike[str] | Mapping[str, Any] | nn.Module) -> None:
        if not isinstance(source, (str, PathLike, Mapping, nn.Module)):
            raise TypeError(
                "Topology: expected a path, a name of the zoo, a state_dict or a converted network, found "
                f"{type(source).__name__}."
            )
        self.source = source
        self._places: dict[str, Tensor] | None = None

    def __repr__(self) -> str:
        named = isinstance(self.source, (str, PathLike))
        return f"Topology({str(self.source)!r})" if named else f"Topology({type(self.source).__name__})"

    def starting_places(self) -> dict[str, Tensor]:
        """Return the places of each tensor, int64, by name. The source is read once.

        Raises:
            FileNotFoundError, ValueError: see the class.
        """
        if self._places is None:
            self._places = self._read()
            if not self._places:
                raise ValueError(f"{self!r}: expected weights with connections or with zeros, found none.")
        return dict(self._places)

    def _read(self) -> dict[str, Tensor]:
        source = self.source
        if isinstance(source, nn.Module):
            return {one.name: one.slots.active(one.theta)[0].cpu() for one in converted_tensors(source)}
        if isinstance(source, Mapping):
            return _of_state(source)
        path = path_of(source)
        if container.kind_of(Path(path)) == "sparse":
            _, contents = open_file(source)
            return {name: found.places for name, found in sparse_file.all_connections(contents)}
        return _of_state(read_state(path))


def _of_state(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the places of a ``state_dict``, of recorded connections and of dense weights with zeros."""
    state = state.get("state_dict", state)
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        parts = split_head(name)
        if parts is not None:
            if name.endswith(_PLACES):
                found[without_wrappers(join(parts[0], parts[1]))] = value.detach().long().cpu()
        elif value.dim() >= 2 and value.is_floating_point() and bool((value == 0).any()):
            found[without_wrappers(name)] = value.detach().reshape(-1).nonzero().view(-1).cpu()
    return found
