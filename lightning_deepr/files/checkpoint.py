"""Write a network as a sparse file, and load a sparse file or a ``state_dict`` with connections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_deepr.conversion import sharing
from lightning_deepr.conversion.convert import convert
from lightning_deepr.conversion.report import ConnectivityReport
from lightning_deepr.conversion.selection import Candidate, candidates
from lightning_deepr.conversion.start import STARTS
from lightning_deepr.files import architectures, container, sparse_file
from lightning_deepr.files.container import Contents
from lightning_deepr.files.gaps import FormatError
from lightning_deepr.files.records import active_by_record, kind_of_record, shared_by_record, wanted_by_record
from lightning_deepr.files.sparse_file import Connections
from lightning_deepr.weights.base import FORMAT_KEY
from lightning_deepr.weights.find import converted_tensors
from lightning_deepr.weights.install import remove

# the names that zoo.info fills in from the file itself
RESERVED = frozenset(
    {"architecture", "arguments", "bytes", "connectivity", "dense_parameters", "digest", "file", "format_version", "name"}
    | {"package_version", "sha256"}
)


def load_state_dict(module: nn.Module, path_or_dict: str | PathLike[str] | Mapping[str, Any]) -> nn.Module:
    """Load a sparse checkpoint into a module: convert its dense weights as recorded, then load.

    Args:
        module: a module of the checkpoint's architecture; tensors that are converted already must have the recorded K.
        path_or_dict: a ``state_dict``, a Lightning checkpoint (its ``state_dict`` is used), or a path to one of them as
            ``.ckpt``, ``.pt``, ``.pth`` (loaded with ``weights_only=True``), or to a sparse file, ``.safetensors``
            (:func:`save_sparse`).

    Returns:
        the module itself.

    Raises:
        ValueError: the file is not a checkpoint, or names layers or shapes that the module does not have.
        RuntimeError: keys are missing or left over (the message is torch's). A module that was dense stays unchanged.
    """
    if _is_sparse_file(path_or_dict):
        contents = _open(path_or_dict)  # type: ignore[arg-type]
        with container.about(path_or_dict):  # type: ignore[arg-type]
            return load_contents(contents, module)
    state = _read(path_or_dict) if isinstance(path_or_dict, (str, PathLike)) else path_or_dict
    return load_checked(module, dict(state.get("state_dict", state)), {})


def load_checked(module: nn.Module, state: dict[str, Any], checked: Mapping[str, Connections]) -> nn.Module:
    """Do what :func:`load_state_dict` does, for a ``state_dict``.

    Args:
        module: as for :func:`load_state_dict`.
        state: the ``state_dict``.
        checked: {head of the entries in ``state``: connections} whose places were checked already. These tensors start with
            their connections, and ``state`` is not read for them.
    """
    by_name = {(c.module_name, c.tensor_name): c for c in candidates(module)}
    chosen, counts, records, kinds = [], {}, {}, {}
    known: dict[str, Connections] = {}
    begun: set[str] = set()
    for key in state:
        if not key.endswith(".0." + FORMAT_KEY):
            continue
        head = key.removesuffix("0." + FORMAT_KEY)
        module_name, _, tensor_name = ("." + head.removesuffix(".")).rpartition(".parametrizations.")
        module_name = module_name.removeprefix(".")
        candidate = by_name.get((module_name, tensor_name))
        shape, count = tuple(state[head + "0.shape"].tolist()), wanted_by_record(state, head)
        kind = kind_of_record(state, head)
        name = f"{module_name}.{tensor_name}" if module_name else tensor_name
        if candidate is None:
            raise ValueError(
                f"The checkpoint has connections for `{name}`, but {type(module).__name__} has no such weight. Expected a "
                f"checkpoint of this model; its weights are: {', '.join(c.name for c in by_name.values()) or 'none'}."
            )
        if candidate.shape != shape:
            raise ValueError(f"`{name}`: expected a weight of shape {candidate.shape}, found {shape} in the checkpoint.")
        if candidate.slots is not None:
            if not isinstance(candidate.slots, kind):
                raise ValueError(
                    f"`{name}` is converted for another method: expected {type(candidate.slots).__name__}, found "
                    f"{kind.__name__} in the checkpoint. Load into a dense model (densify(module) first)."
                )
            if not candidate.slots.may_have(count):
                raise ValueError(
                    f"`{name}` is converted with K = {candidate.slots.wanted}, found {count} in the checkpoint. Load into "
                    "a dense model (densify(module) first), or convert with the recorded connectivity."
                )
            continue
        chosen.append(candidate)
        counts[candidate.name], kinds[candidate.name] = count, kind
        records[candidate.name] = int(state[head + "0.index"])
        if head in checked:
            known[candidate.name] = checked[head]
            begun.add(head)
    if chosen:
        chosen.sort(key=lambda candidate: records[candidate.name])
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

        def begin(candidate: Candidate, *args: Any, **options: Any) -> Any:
            if candidate.name in known:
                assert candidate.parameter is not None
                dtype, device = candidate.parameter.dtype, options["device"]
                found = known[candidate.name]
                return found.theta.to(device, dtype), found.slots(dtype, device)
            return STARTS[kinds[candidate.name]](candidate, *args, **options)

        new = convert(module, chosen, counts, init="deepr", seed=0, compute="auto", begin=begin)
        for names in shared_by_record(state):
            joined = [converted for converted in new if converted.name in names]
            if joined:
                sharing.join(joined)
    try:
        _load_rest(module, state, [head for head in checked if head in begun])
    except RuntimeError:
        if chosen and not any(tensor.device.type == "meta" for tensor in before.values()):
            # The tensors are looked up again: one that joined a shared theta has new slots since its conversion.
            for converted in [one for one in converted_tensors(module) if one.name in counts]:
                remove(converted)
            module.load_state_dict(before)
        raise
    return module


def _load_rest(module: nn.Module, state: dict[str, Any], begun: list[str]) -> None:
    """Call ``module.load_state_dict`` for everything except the tensors that started with their checked connections."""
    own = {key for head in begun for key in state if key.startswith(head)}
    result = module.load_state_dict({key: value for key, value in state.items() if key not in own}, strict=False)
    if own != set(result.missing_keys) or result.unexpected_keys:
        module.load_state_dict(state)


def _is_sparse_file(given: Any) -> bool:
    return isinstance(given, (str, PathLike)) and Path(given).suffix == ".safetensors"


def _open(path: str | PathLike[str]) -> container.Contents:
    contents = container.read(Path(path))
    with container.about(Path(path)):
        sparse_file.check(contents)
    return contents


def _read(path: str | PathLike[str]) -> Mapping[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {file}.")
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{file}: expected a state_dict or a Lightning checkpoint, found {type(loaded).__name__}.")
    return loaded


def save_sparse(
    module: nn.Module,
    path: str | PathLike[str],
    *,
    architecture: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    **metadata: Any,
) -> Path:
    """Write a module as a sparse file: K values and K places for each converted weight, every other tensor unchanged.

    ``docs/format.md`` describes the file. ``zoo.save`` is an alias of this function.

    The same module and metadata give the same bytes. The file has the connections in the order of their places. A network that
    is loaded from it has the same weights, signs and exceptions, and continues the draws after the same step. It numbers its
    slots anew, so its further births are other draws from the same distribution. (Lightning's checkpoint, with the optimizer's
    state, continues exactly.)

    A tensor with a theta for every potential connection (soft-DEEP R, pruning, l1-shrinkage) is written as K slots, with its
    active connections: the file loads as an ordinary sparse network. (To continue its training, save its ``state_dict``.)

    Args:
        module: a module with converted weights, all values finite.
        path: the file to write, ``.safetensors``; :func:`load_state_dict` and :func:`lightning_deepr.zoo.load` read it.
        architecture: the name by which the zoo builds the network; None: recognized if it is one of
            :mod:`lightning_deepr.models`.
        arguments: the arguments of the architecture; None: recognized.
        metadata: JSON values to record in the file. The zoo's own models have ``algorithm``, ``hyperparameters``, ``seeds``,
            ``metrics``, ``data``, ``recipe`` and ``license``.

    Returns:
        the path.

    Raises:
        ValueError: a value is not finite, the metadata is not JSON or has a name that :func:`lightning_deepr.zoo.info` uses,
            or the architecture is not known or is not that of this module.

    Example::

        >>> import tempfile
        >>> from lightning_deepr import load_state_dict, sparsify
        >>> net = sparsify(nn.Linear(100, 10), 0.05)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     again = load_state_dict(nn.Linear(100, 10), save_sparse(net, f"{folder}/net.safetensors", license="MIT"))
        >>> torch.equal(again.weight + 0, net.weight + 0)
        True
    """
    taken = sorted(RESERVED & metadata.keys())
    if taken:
        raise ValueError(f"metadata: expected names that zoo.info does not fill in itself, found {', '.join(taken)}.")
    known, own = architectures.recognize(module)
    if architecture is not None and (architecture != known or (arguments is not None and dict(arguments) != own)):
        raise ValueError(
            f"architecture: expected {known!r} with {own}, which is what this {type(module).__name__} is, found "
            f"{architecture!r} with {dict(arguments or {})}. Leave both out; a network that the zoo does not know is loaded "
            "with module=."
        )
    if architecture is None and arguments is not None:
        raise ValueError(f"arguments: expected them with `architecture`, found {dict(arguments)} alone.")
    record, tensors = sparse_file.contents_of(module, known, own, metadata)
    container.write(Path(path), container.pack(record, tensors))
    return Path(path)


def report_of_checkpoint(path_or_dict: str | PathLike[str] | Mapping[str, Any]) -> ConnectivityReport:
    """Report the connectivity that a sparse checkpoint records, without building its model.

    Args:
        path_or_dict: as for :func:`load_state_dict`.

    Raises:
        ValueError: the checkpoint has no sparse tensor.
    """
    if _is_sparse_file(path_or_dict):
        rows = rows_of(_open(path_or_dict))  # type: ignore[arg-type]
    else:
        state = _read(path_or_dict) if isinstance(path_or_dict, (str, PathLike)) else path_or_dict
        rows = _rows(state.get("state_dict", state))
    if not rows:
        raise ValueError("expected a sparse checkpoint, found one without a converted tensor.")
    return ConnectivityReport([{"l1": None, "lr_scale": None, **row, "compute": "-"} for row in rows], {})


def _rows(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for key in state:
        if key.endswith(".0." + FORMAT_KEY):
            head = key.removesuffix("0." + FORMAT_KEY)
            shape, count = tuple(state[head + "0.shape"].tolist()), active_by_record(state, head)
            total = math.prod(shape)
            name = head.removesuffix(".").replace("parametrizations.", "")
            rows.append({"name": name, "shape": shape, "total": total, "active": count, "connectivity": count / total})
    return rows


def load_contents(contents: Contents, module: nn.Module | None = None) -> nn.Module:
    """Load a checked file into a module; None: build the network that the file names."""
    state, found = sparse_file.state_of(contents)
    if module is None:
        record = contents.record
        module = architectures.build(record["architecture"], record["arguments"])
        _refuse_misfit(module, contents)
        types = {value.dtype for value in state.values() if value.is_floating_point()}
        if len(types) == 1:
            module.to(types.pop())
        # The module takes the dense tensors themselves: nothing is initialized, and the global generator is not used.
        module.load_state_dict({name: state[name] for name in sparse_file.dense_names(contents)}, strict=False, assign=True)
    return load_checked(module, state, found)


def _refuse_misfit(module: nn.Module, contents: Contents) -> None:
    """Compare a file's names and shapes with those of the network that it names, before anything is allocated."""
    own = module.state_dict()
    expected = {name: tuple(value.shape) for name, value in own.items()}
    found = {name: contents.pieces[name].shape for name in sparse_file.dense_names(contents)}
    found.update({name: tuple(entry["shape"]) for name, entry in contents.record["sparse"].items()})
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise FormatError(
                f"`{name[:80]}`: {type(module).__name__} with the recorded arguments has {_shape(expected.get(name))}, the "
                f"file has {_shape(found.get(name))}. Expected the file of such a network; give another one with module=."
            )
    for name in sparse_file.dense_names(contents):
        wanted, dtype = own[name].dtype, contents.pieces[name].dtype
        if wanted != dtype and not (wanted.is_floating_point and dtype.is_floating_point):
            raise FormatError(f"`{name}`: expected {wanted}, as {type(module).__name__} has it, found {dtype}.")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else f"shape {shape}"


def rows_of(contents: Contents) -> list[dict[str, Any]]:
    """List the connectivity of each tensor, in the order of conversion."""
    return [
        {
            "name": name,
            "shape": tuple(entry["shape"]),
            "total": entry["total"],
            "active": entry["active"],
            "connectivity": entry["active"] / entry["total"],
            **({"l1": entry["l1"]} if "l1" in entry else {}),
        }
        for name, entry in sorted(contents.record["sparse"].items(), key=lambda item: item[1]["index"])
    ]
