"""Loads a model of the zoo or a file, and reads its record."""

from __future__ import annotations

import difflib
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deepr.conversion.convert import densify
from lightning_deepr.files import container, sparse_file
from lightning_deepr.files.checkpoint import load_contents, rows_of
from lightning_deepr.files.container import Contents
from lightning_deepr.files.gaps import FormatError
from lightning_deepr.zoo import inputs
from lightning_deepr.zoo.registry import entry_of, list_models


def folder() -> Path:
    """Return the folder of the package's models: ``zoo/`` of a checkout, or the folder in the installed package."""
    return Path(str(resources.files("lightning_deepr.zoo.data")))


def folder_of_checkout(option: str) -> Path:
    """Return the checkout's folder ``zoo/``, to write files there. Nothing is ever written into an installed package.

    Args:
        option: name of the command's option that sets another folder, for the message.

    Raises:
        ValueError: the package is installed, not a checkout.
    """
    found = folder()
    package = Path(__file__).parents[1]
    if package in found.parents:
        raise ValueError(
            f"expected {option}: the package is installed, and nothing is written into it ({found}). "
            f"Without {option} the folder zoo/ of a checkout is used: git clone, then pip install -e ."
        )
    return found


def path_of(name_or_path: str | PathLike[str]) -> Path:
    """Return the path of a model's file.

    Args:
        name_or_path: a name of the zoo, or the path of an existing file.

    Raises:
        FileNotFoundError: ``name_or_path`` is neither; the message lists similar names. Or the model is in the repository only.
    """
    entry = entry_of(name_or_path) if isinstance(name_or_path, str) else None
    if entry is not None:
        file = folder() / entry.filename
        if not entry.in_wheel and not file.is_file():
            raise FileNotFoundError(
                f"{entry.name}: the wheel does not have this model, to stay small. Get zoo/{entry.filename} from the "
                "repository, and give its path."
            )
        return file
    path = Path(name_or_path)
    if not path.is_file():
        names = list_models()
        near = difflib.get_close_matches(str(name_or_path), names, n=3, cutoff=0.5) or names
        raise FileNotFoundError(
            f"expected a model of the zoo or a file, found neither at {str(name_or_path)!r}. "
            f'Models: {", ".join(near) or "none"} (zoo.list_models() lists all). A model of the Hub needs source="hub".'
        )
    return path


def open_file(name_or_path: str | PathLike[str]) -> tuple[Path, Contents]:
    """Read and check a file; for a model of the zoo, also compare its sha256 with the registry's.

    Raises:
        FileNotFoundError: there is no such model or file.
        FormatError: the file is damaged, or its sha256 is not the registry's.
    """
    path = path_of(name_or_path)
    contents = container.read(path)
    with container.about(path):
        sparse_file.check(contents)
        entry = entry_of(name_or_path) if isinstance(name_or_path, str) else None
        if entry is not None and contents.sha256 != entry.sha256:
            raise FormatError(
                f"expected sha256 {entry.sha256} (the registry's), found {contents.sha256}: "
                "the installation is damaged. Install the package again."
            )
    return path, contents


def load(
    name_or_path: str | PathLike[str],
    *,
    dense: bool = False,
    module: nn.Module | None = None,
    source: str = "package",
    revision: str | None = None,
    **options: Any,
) -> nn.Module:
    """Load a trained network in eval mode on the CPU.

    The function reads only safetensors and JSON, checks all of it, and never loads code from a file. It builds no dense weight
    unless ``dense`` is True.

    Args:
        name_or_path: a name from :func:`list_models`, or the path of a file that :func:`save` wrote, or ``owner/name`` with
            ``source="hub"``.
        dense: whether to load ordinary dense weights with zeros instead of K slots each; such a network works without this
            package.
        module: the network to load into, for a file that names no architecture of :mod:`lightning_deepr.models`. It is dense,
            of any class, and may be on the meta device.
        source: "package" | "hub".
        revision: a branch, tag or commit, with ``source="hub"`` only.
        options: sha256, token, cache_dir and local_files_only, as for :func:`lightning_deepr.hub.download`, with
            ``source="hub"`` only.

    Returns:
        the network, which is ``module`` itself if given. To continue its training, use a ``Trainer`` with ``DeepR()`` among its
        callbacks: the callback starts from the loaded connections. ``net.preprocess`` turns a raw image or recording into its
        input, if the file says how (:mod:`lightning_deepr.zoo.inputs`), and ``net.preprocess.classes`` names its classes.

    Raises:
        FileNotFoundError: ``name_or_path`` is neither a name nor a file.
        FormatError: (a ValueError) the file is damaged, has a newer format, names an unknown architecture, or does not fit.
        HubError: see :func:`lightning_deepr.hub.download`.

    Example::

        >>> import tempfile
        >>> from lightning_deepr import sparsify, zoo
        >>> from lightning_deepr.models import LeNet300100
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = zoo.save(sparsify(LeNet300100(), 0.01), f"{folder}/net.safetensors", license="Apache-2.0")
        ...     net = zoo.load(path)
        >>> isinstance(net, LeNet300100), net.training, int((net.fc1.weight != 0).sum())
        (True, False, 1810)
    """
    if source == "hub":
        return load_from_hub(str(name_or_path), dense=dense, module=module, revision=revision, **options)
    if source != "package":
        raise ValueError(f'source: expected "package" or "hub", found {source!r}.')
    for option, value in {"revision": revision, **options}.items():
        if value is not None:
            raise ValueError(f'{option}: expected with source="hub" only, found {value!r}.')
    path, contents = open_file(name_or_path)
    with container.about(path):
        loaded = load_contents(contents, module)
        how = inputs.input_of(contents.record["metadata"], contents.record["architecture"])
    if how is not None and not hasattr(loaded, "preprocess"):
        loaded.preprocess = how  # type: ignore[assignment]
    return (densify(loaded) if dense else loaded).eval()


def load_from_hub(
    repo_id: str, *, dense: bool = False, module: nn.Module | None = None, revision: str | None = None, **options: Any
) -> nn.Module:
    """Load a network from the Hub, as ``load(repo_id, source="hub")`` does. ``hub.load`` is an alias of this function."""
    from lightning_deepr.hub import transfer

    if repo_id.count("/") != 1:
        raise ValueError(
            f'expected a repository of the Hub as "owner/name", found {repo_id!r}. '
            'A model of the package needs source="package".'
        )
    return load(transfer.download(repo_id, revision=revision, **options), dense=dense, module=module)


def connections_of(name_or_path: str | PathLike[str]) -> dict[str, tuple[torch.Size, Tensor, Tensor]]:
    """Read the connections in a file, without building its network.

    Args:
        name_or_path: a model or file, as for :func:`load`.

    Returns:
        {tensor name: (shape, places int64 [K], values [K])}, as :func:`lightning_deepr.connections` returns, in increasing
        order of the places.

    Raises:
        FileNotFoundError: ``name_or_path`` is neither a name nor a file.
        FormatError: the file is damaged.
    """
    path, contents = open_file(name_or_path)
    with container.about(path):
        return {name: (torch.Size(c.shape), c.places, c.values) for name, c in sparse_file.all_connections(contents)}


def info(name_or_path: str | PathLike[str]) -> dict[str, Any]:
    """Read the record of a model from its file, without building its network.

    Args:
        name_or_path: a model or file, as for :func:`load`.

    Returns:
        name, file, bytes, sha256 (of the file), digest (of its contents), format_version, package_version, architecture,
        arguments, dense_parameters (count of numbers outside the sparse tensors), connectivity (``rows`` with name, shape,
        total, active, connectivity, and l1 if it was steered; total, active, connectivity, left_out) and the metadata that
        :func:`save` got: task, algorithm, hyperparameters, seeds, metrics, data, recipe, license, input, ... (``input``, how
        the raw input is prepared, is there for older files of this package's data sets, too)

    Raises:
        FileNotFoundError: ``name_or_path`` is neither a name nor a file.
        FormatError: the file is damaged.
    """
    path, contents = open_file(name_or_path)
    record = contents.record
    rows = rows_of(contents)
    total, active = record["connectivity"]["total"], record["connectivity"]["active"]
    how = inputs.input_of(record["metadata"], record["architecture"])
    return {
        **record["metadata"],
        **({} if how is None else {"task": how.task, "input": inputs.recorded(how)}),
        "name": str(name_or_path) if entry_of(str(name_or_path)) else path.stem,
        "file": str(path),
        "bytes": contents.size,
        "sha256": contents.sha256,
        "digest": contents.digest,
        "format_version": container.VERSION,
        "package_version": record["package_version"],
        "architecture": record["architecture"],
        "arguments": record["arguments"],
        "dense_parameters": sum(contents.pieces[name].numel for name in sparse_file.dense_names(contents)),
        "connectivity": {
            "rows": rows,
            "total": total,
            "active": active,
            "connectivity": active / total if total else 0.0,
            "left_out": record["left_out"],
        },
    }
