"""The file of an adapter: values, gaps between places, signs by their hash, and the digests of the weights that it belongs to.

It has the form of a sparse file (``docs/format.md``) with another record.
"""

from __future__ import annotations

import math
import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_deepr._version import __version__
from lightning_deepr.adapters.adapter import Adapter, adapter_of
from lightning_deepr.adapters.installing import install_adapter
from lightning_deepr.files import container, sparse_file
from lightning_deepr.files.container import Contents
from lightning_deepr.files.gaps import FormatError

_KEYS = {"adapter", "digests", "others", "package_version"}


def save_adapter(net: nn.Module | Adapter, path: str | PathLike[str], *, dtype: torch.dtype | None = None) -> Path:
    """Write the adapter of a network: about 5 bytes per connection, and what was trained beside it.

    Args:
        net: an adapted network, or an adapter by itself.
        path: the file to write.
        dtype: the dtype of the values in the file; None: float32 as they are. torch.bfloat16 and torch.float16 round them and
            save 2 bytes per connection.

    Returns:
        the path.

    Raises:
        ValueError: there is no adapter, or a value is not finite.
    """
    adapter = net if isinstance(net, Adapter) else adapter_of(net)
    sparse: dict[str, Any] = {}
    tensors = dict(adapter.others)
    for name, found in adapter.tensors.items():
        values = found.values if dtype is None else found.values.to(dtype)
        sparse_file.refuse_infinite(name, values)
        sparse[name], streams = sparse_file.encoded(found._replace(values=values))
        tensors.update((f"{name}.{key}", value) for key, value in streams.items())
    for name, value in adapter.others.items():
        sparse_file.refuse_infinite(name, value)
    record = {
        "adapter": sparse, "digests": adapter.digests, "others": sorted(adapter.others), "package_version": __version__,
    }  # fmt: skip
    container.write(Path(path), container.pack(record, tensors))
    return Path(path)


def load_adapter(net: nn.Module, path: str | PathLike[str] | Adapter) -> nn.Module:
    """Put an adapter of a file upon the network that it belongs to, in place of the one that it has.

    Args:
        net: a network with the pretrained weights.
        path: the file, or an adapter by itself.

    Returns:
        the network itself. All but the difference, and what was trained beside it, is frozen.

    Raises:
        FormatError: (a ValueError) it is another file, or damaged.
        ValueError: the adapter belongs to other weights: the message names the first one. Nothing is changed.
        FileNotFoundError: there is no such file.

    Example::

        >>> import copy, tempfile
        >>> from lightning_deepr import adapt
        >>> pretrained = nn.Linear(100, 10)
        >>> net = adapt(copy.deepcopy(pretrained), 0.05)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load_adapter(pretrained, save_adapter(net, f"{folder}/adapter.safetensors"))
        >>> torch.equal(again.weight + 0, net.weight + 0)
        True
    """
    return install_adapter(net, path if isinstance(path, Adapter) else read_adapter(path))


def read_adapter(path: str | PathLike[str]) -> Adapter:
    """Read the file of an adapter, without a network.

    Raises:
        FormatError, FileNotFoundError: as :func:`load_adapter`.
    """
    contents = container.read(Path(path))
    with container.about(Path(path)):
        return _adapter(contents)


def _adapter(contents: Contents) -> Adapter:
    record, pieces = contents.record, contents.pieces
    if set(record) != _KEYS:
        raise FormatError(
            f"expected the file of an adapter, found a record of {', '.join(sorted(record))[:200]}. "
            "`lightning_deepr.load_state_dict(module, path)` loads sparse networks."
        )
    sparse, digests, others = record["adapter"], record["digests"], record["others"]
    if not isinstance(sparse, dict) or not isinstance(digests, dict) or sparse.keys() != digests.keys() or not sparse:
        raise FormatError("record: expected an adapter with a digest for each of its tensors.")
    if not all(isinstance(one, str) and re.fullmatch("[0-9a-f]{32}", one) for one in digests.values()):
        raise FormatError("record: digests: expected 32 hex digits each.")
    if not isinstance(others, list) or not all(isinstance(one, str) and one in pieces for one in others):
        raise FormatError("record: others: expected names of tensors in the file.")
    own = set(others)
    for name, entry in sparse.items():
        sparse_file.check_entry(name, entry, pieces)
        own |= {f"{name}.{key}" for key in sparse_file.names_of_streams(entry)}
    if own != pieces.keys():
        raise FormatError(f"`{min(own ^ pieces.keys())[:80]}`: expected a tensor of the adapter, found another.")
    tensors = {}
    for name, entry in sorted(sparse.items(), key=lambda item: item[1]["index"]):
        try:
            found = sparse_file.decoded(name, entry, pieces)
        except FormatError as error:
            raise FormatError(f"`{name}`: {error}") from error
        assert math.prod(found.shape) == entry["total"]
        wide = found.values.to(torch.float32) if found.values.dtype.itemsize < 4 else found.values
        tensors[name] = found._replace(values=wide)
    return Adapter(tensors, dict(digests), {name: pieces[name].tensor() for name in others})
