"""The zoo's adapters: sparse differences to models of the zoo, a few kilobytes each.

The base of an adapter is a model of the zoo as an ordinary dense network (``zoo.load(base, dense=True)``), so it needs no file
of its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lightning_deepr.adapters.file import load_adapter as load_file
from lightning_deepr.files import container
from lightning_deepr.files.gaps import FormatError
from lightning_deepr.zoo import loading


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter of the zoo.

    Attributes:
        name: the file is ``zoo/adapters/<name>.safetensors``, its card ``zoo/adapters/<name>.md``.
        base: the model of the zoo that it is a difference to.
        sha256: checksum of the file, 64 hex digits.
    """

    name: str
    base: str
    sha256: str

    @property
    def path(self) -> Path:
        return loading.folder() / "adapters" / f"{self.name}.safetensors"


ADAPTERS: tuple[AdapterEntry, ...] = (
    AdapterEntry(
        "lenet300_100.rotated_digits",
        "lenet300_100.deepr_20pct_mnist",
        "f000f121547f320f303ce58671a835328505db0ec76240408644c28df3f0e96c",
    ),
)


def list_adapters() -> list[str]:
    """List the names of the zoo's adapters.

    Example::

        >>> list_adapters()
        ['lenet300_100.rotated_digits']
    """
    return sorted(entry.name for entry in ADAPTERS)


def load_adapter(name: str) -> nn.Module:
    """Load an adapter of the zoo upon its base, in eval mode on the CPU.

    Args:
        name: a name of :func:`list_adapters`.

    Returns:
        the adapted network, whose ``preprocess`` is that of the base. ``lightning_deepr.adapters.detach(net)`` gives the base
        back, ``merge(net)`` writes the difference into its weights.

    Raises:
        ValueError: there is no such adapter; the message lists the names.
        FormatError: (a ValueError) the file is damaged, or its sha256 is not the registry's.

    Example::

        >>> import torch
        >>> net = load_adapter("lenet300_100.rotated_digits")
        >>> net(net.preprocess(torch.zeros(28, 28, dtype=torch.uint8))[None]).shape
        torch.Size([1, 10])
    """
    entry = next((one for one in ADAPTERS if one.name == name), None)
    if entry is None:
        raise ValueError(
            f"expected an adapter of the zoo, one of {', '.join(list_adapters())}, found {name!r}. A file of your own: "
            "`lightning_deepr.load_adapter(net, path)`; one of the Hub: `hub.load_adapter(net, repo_id)`."
        )
    with container.about(entry.path):
        found = hashlib.sha256(entry.path.read_bytes()).hexdigest()
        if found != entry.sha256:
            raise FormatError(
                f"expected sha256 {entry.sha256} (the registry's), found {found}: "
                "the installation is damaged. Install the package again."
            )
    return load_file(loading.load(entry.base, dense=True), entry.path).eval()
