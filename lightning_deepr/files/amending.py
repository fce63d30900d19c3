"""Adds metadata to a sparse file; its tensors stay byte for byte."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from lightning_deepr.files import container, sparse_file
from lightning_deepr.files.checkpoint import refuse_reserved


def amend(path: str | PathLike[str], out: str | PathLike[str] | None = None, **metadata: Any) -> Path:
    """Write a sparse file again, with more metadata, or with others under the same names.

    Args:
        path: a file that ``zoo.save`` wrote.
        out: the file to write; None: ``path`` itself.
        metadata: JSON values, as for :func:`lightning_deepr.save_sparse`.

    Returns:
        the path of the written file. Its tensors, its ``package_version`` and everything else are those of ``path``; its sha256
        is another one.

    Raises:
        FormatError: (a ValueError) the file is damaged or none of this package; nothing is written.
        ValueError: the metadata are not JSON, or have a name that ``zoo.info`` fills in itself.
        FileNotFoundError: there is no such file.

    Example::

        >>> import tempfile
        >>> from torch import nn
        >>> from lightning_deepr import sparsify, zoo
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = zoo.save(sparsify(nn.Linear(100, 10), 0.05), f"{folder}/net.safetensors", license="MIT")
        ...     found = zoo.info(amend(file, description="A test."))
        >>> found["license"], found["description"]
        ('MIT', 'A test.')
    """
    refuse_reserved(metadata)
    path = Path(path)
    contents = container.read(path)
    with container.about(path):
        sparse_file.check(contents)
    record = {**contents.record, "metadata": {**contents.record["metadata"], **metadata}}
    written = path if out is None else Path(out)
    container.write(written, container.pack(record, {name: piece.tensor() for name, piece in contents.pieces.items()}))
    return written
