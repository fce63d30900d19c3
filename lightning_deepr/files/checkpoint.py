"""Write a network as a sparse file, and load a sparse file or a ``state_dict`` with connections."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_deepr.conversion import adapting, sharing, tied
from lightning_deepr.conversion.convert import convert
from lightning_deepr.conversion.report import ConnectivityReport
from lightning_deepr.conversion.selection import Candidate
from lightning_deepr.conversion.start import STARTS
from lightning_deepr.files import architectures, container, pickles, sparse_file
from lightning_deepr.files.container import Contents
from lightning_deepr.files.fitting import entries_of, put_back, refuse_misfits, refuse_no_state, without_heads, without_marks
from lightning_deepr.files.gaps import FormatError
from lightning_deepr.files.records import active_by_record, kind_of_record, shared_by_record, wanted_by_record
from lightning_deepr.files.sparse_file import Connections
from lightning_deepr.weights import precision
from lightning_deepr.weights.base import BASE_KEY, FORMAT_KEY
from lightning_deepr.weights.names import join, renamed, split_head, unwrapped, without_root_wrapper, without_wrappers

# the names that zoo.info fills in from the file itself
RESERVED = frozenset(
    {"architecture", "arguments", "bytes", "connectivity", "dense_parameters", "digest", "file", "format_version", "name"}
    | {"package_version", "sha256"}
)


def load_state_dict(module: nn.Module, path_or_dict: str | PathLike[str] | Mapping[str, Any]) -> nn.Module:
    """Load a sparse checkpoint into a module: convert its dense weights as recorded, then load.

    Args:
        module: a module of the checkpoint's architecture; tensors that are converted already must have the recorded K.
        path_or_dict: a ``state_dict``, a Lightning checkpoint (its ``state_dict`` is used), or a path to one of them
            (``.ckpt``, ``.pt``, ``.pth``; loaded with ``weights_only=True``), or to a sparse file (``.safetensors``,
            :func:`save_sparse`). The content of a file decides, not its name. The prefixes that ``torch.compile``, DDP, Fabric
            and FSDP put into names may be in the module, in the checkpoint, in both or in neither.

    Returns:
        the module itself.

    Raises:
        ValueError: the file is not a checkpoint, or names layers or shapes that the module does not have.
        RuntimeError: keys are missing or left over (the message is torch's).

    After an error the module is as it was, unless it is on the meta device.
    """
    if _is_sparse_file(path_or_dict):
        return load_sparse_file(module, path_or_dict)  # type: ignore[arg-type]
    state = read_state(path_or_dict) if isinstance(path_or_dict, (str, PathLike)) else path_or_dict
    return load_checked(module, state.get("state_dict", state), {})


def load_sparse_file(module: nn.Module, path: str | PathLike[str]) -> nn.Module:
    """Do what :func:`load_state_dict` does, for a sparse file alone: any other file is refused and never unpickled.

    Raises:
        FormatError: (a ValueError) it is another file, damaged, or does not fit.
        FileNotFoundError: there is no such file.
    """
    contents = _open(path)
    with container.about(Path(path)):
        return load_contents(contents, module)


def load_checked(module: nn.Module, state: Mapping[str, Any], checked: Mapping[str, Connections]) -> nn.Module:
    """Do what :func:`load_state_dict` does, for a ``state_dict``.

    Args:
        module: as for :func:`load_state_dict`.
        state: the ``state_dict``.
        checked: {head of the entries in ``state``: connections} whose places were checked already. These tensors start with
            their connections, and ``state`` is not read for them.
    """
    refuse_no_state(state)
    state = without_root_wrapper(without_marks(state), module)
    entries = entries_of(module, state)
    chosen, counts, kinds = [], {}, {}
    known: dict[str, Connections] = {}
    begun: dict[str, tuple[str, ...]] = {}
    upon: set[str] = set()
    for head, candidate in entries.items():
        count, kind, name = wanted_by_record(state, head), kind_of_record(state, head), candidate.name
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
        if head + "0." + BASE_KEY in state:
            upon.add(name)
        chosen.append(candidate)
        counts[name], kinds[name] = count, kind
        if head in checked:
            known[name] = checked[head]
            begun[head] = (name, *candidate.aliases)
    refuse_misfits(module, state, entries)
    with put_back(module):
        if chosen:
            position = {candidate.name: int(state[head + "0.index"]) for head, candidate in entries.items()}
            if upon:
                chosen = adapting.once(chosen)
            else:
                # a sparse file has a tied tensor under the first of its names alone
                chosen = tied.as_one(module, chosen, is_free=lambda name: not _has(state, name))
                others = {candidate.name: candidate.aliases for candidate in chosen if candidate.is_whole}
                begun = {head: (found[0], *others.get(found[0], found[1:])) for head, found in begun.items()}
            chosen.sort(key=lambda candidate: position[candidate.name])

            def begin(candidate: Candidate, *args: Any, **options: Any) -> Any:
                if candidate.name in known:
                    assert candidate.parameter is not None
                    dtype, device = candidate.parameter.dtype, options["device"]
                    found = known[candidate.name]
                    return found.theta.to(device, precision.kept(dtype)), found.slots(dtype, device)
                if candidate.name in upon:
                    return adapting.difference_start(candidate, *args, **{**options, "init": "module"})
                return STARTS[kinds[candidate.name]](candidate, *args, **options)

            new = convert(module, chosen, counts, init="deepr", seed=0, compute="auto", begin=begin, upon=upon)
            for heads in shared_by_record(state):
                names = {entries[head].name for head in heads if head in entries}
                joined = [converted for converted in new if converted.name in names]
                if joined:
                    sharing.join(joined)
        _load_rest(module, state, begun)
    return module


def _load_rest(module: nn.Module, state: Mapping[str, Any], begun: Mapping[str, tuple[str, ...]]) -> None:
    """Call ``module.load_state_dict`` for everything except the tensors that started with their checked connections.

    Args:
        module: the converted module.
        state: the whole ``state_dict``.
        begun: {head of the entries in ``state``: the names} of those tensors.
    """
    result = module.load_state_dict(renamed(without_heads(state, set(begun)), module), strict=False)
    mine = {name for names in begun.values() for name in names}
    missing = [split_head(without_wrappers(key)) for key in result.missing_keys]
    if result.unexpected_keys or not all(parts is not None and join(*parts[:2]) in mine for parts in missing):
        module.load_state_dict(renamed(state, module))


def _is_sparse_file(given: Any) -> bool:
    """Tell whether a path leads to a sparse file; the content decides, not the name.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: it is neither a sparse file nor one of torch.
    """
    if not isinstance(given, (str, PathLike)):
        return False
    with container.about(Path(given)):
        return container.kind_of(Path(given)) == "sparse"


def _open(path: str | PathLike[str]) -> container.Contents:
    contents = container.read(Path(path))
    with container.about(Path(path)):
        sparse_file.check(contents)
    return contents


def read_state(path: str | PathLike[str]) -> Mapping[str, Any]:
    """Read a checkpoint of torch or Lightning, without unpickling code.

    Raises:
        ValueError: it is something else.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:  # torch.load looks at the suffix of a path
            try:
                loaded = torch.load(stream, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                stream.seek(0)
                try:
                    loaded = pickles.read(stream)
                except Exception:
                    raise error from None
                if not isinstance(loaded, Mapping) or not _is_plain(loaded.get("state_dict")):
                    raise error from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{file}: expected a checkpoint of tensors and Python's own types, as torch.load(weights_only=True) reads it, "
            f"found a file that it refuses: {error}"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{file}: expected a state_dict or a Lightning checkpoint, found {type(loaded).__name__}.")
    return loaded


def _is_plain(state: Any) -> bool:
    """Whether a ``state_dict`` that was read with placeholders has none."""
    return isinstance(state, Mapping) and not any(isinstance(value, pickles.Placeholder) for value in state.values())


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
    refuse_reserved(metadata)
    known, own = architectures.recognize(unwrapped(module))
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


def refuse_reserved(metadata: Mapping[str, Any]) -> None:
    """Raise a ValueError if the metadata have a name that ``zoo.info`` fills in itself."""
    taken = sorted(RESERVED & metadata.keys())
    if taken:
        raise ValueError(f"metadata: expected names that zoo.info does not fill in itself, found {', '.join(taken)}.")


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
        state = read_state(path_or_dict) if isinstance(path_or_dict, (str, PathLike)) else path_or_dict
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
            name = without_wrappers(head.removesuffix(".").replace("parametrizations.", ""))
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
        module.load_state_dict(without_heads(state, set(found)), strict=False, assign=True)
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


def _has(state: Mapping[str, Any], name: str) -> bool:
    """Tell whether a checkpoint has a weight under this name, dense or converted."""
    owner, _, tensor_name = name.rpartition(".")
    return name in state or join(owner, f"parametrizations.{tensor_name}.original") in state
