"""The contents of a sparse file: signed values and places of the connections, all other tensors, and a record in JSON.

A connection's value is its weight. The magnitude is theta. The sign bit of the float is the connection's constant sign, also if
theta is 0 (-0.0). Connections are in the order of their places. ``docs/format.md`` describes the file.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_deepr._version import __version__
from lightning_deepr.algorithm.allowed import LISTED, WORDS, Allowed
from lightning_deepr.algorithm.randomness import LARGEST, signs_of
from lightning_deepr.algorithm.signs import SignTable
from lightning_deepr.conversion.report import connectivity_report
from lightning_deepr.files import gaps
from lightning_deepr.files.container import Contents, Piece, whole_numbers
from lightning_deepr.files.gaps import FormatError
from lightning_deepr.weights import rules
from lightning_deepr.weights.base import FORMAT_KEY, FORMAT_VERSION, Parametrization
from lightning_deepr.weights.dense_theta import DenseTheta, SoftTheta
from lightning_deepr.weights.find import converted_tensors
from lightning_deepr.weights.k_slots import KSlots
from lightning_deepr.weights.names import join
from lightning_deepr.weights.outside import outside, refuse_stacked

_SPARSE_KEYS = {"shape", "total", "active", "bits", "index", "sign_seed", "last_birth"}
_EXCEPTION_KEYS = {"exceptions", "exception_bits"}  # only if there are exceptions
_RULE_KEYS = {"l1"}  # only if alpha was steered
_CANDIDATE_KEYS = {"candidates", "candidate_items", "candidate_bits"}  # only if connections may not be everywhere
_TABLE_KEYS = {"sign_table"}  # only if signs are not hashed
_MOST_FORMS = 64
_LONGEST_RULE = 500  # characters
_RECORD_KEYS = {"architecture", "arguments", "connectivity", "left_out", "metadata", "package_version", "sparse"}


class Connections(NamedTuple):
    """The connections of one tensor, in the order of their places."""

    shape: tuple[int, ...]
    places: Tensor  # int64 [K]
    values: Tensor  # [K], signed
    exceptions: Tensor  # int64, sorted: all places with the opposite of the hashed sign
    number: int  # the tensor's position in the order of conversion
    sign_seed: int
    last_birth: int
    l1: str | None = None  # the target that steered alpha, and the last alpha
    allowed: Allowed | None = None  # where connections may be
    sign_table: SignTable | None = None  # the signs of the places, if they are not hashed

    @property
    def theta(self) -> Tensor:
        return self.values.abs()

    def slots(self, dtype: torch.dtype, device: torch.device) -> KSlots:
        """Make K slots with these connections."""
        slots = KSlots(
            torch.Size(self.shape),
            self.places.to(device),
            self.number,
            self.sign_seed,
            self.exceptions.to(device),
            dtype,
            allowed=self.allowed,
            sign_table=self.sign_table,
        )
        slots.born.fill_(self.last_birth)
        slots.l1_rule = self.l1
        return slots


# -- writing ----------------------------------------------------------------------------------------------------------------


def contents_of(
    module: nn.Module, architecture: str | None, arguments: dict[str, Any], metadata: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Collect the record and the tensors of a module's file.

    Raises:
        ValueError: an entry of the module's ``state_dict`` is not a tensor, or has a value that is not finite.
    """
    for converted in converted_tensors(module):
        refuse_stacked(converted, "save_sparse")
        if converted.slots.adapts:
            raise ValueError(
                f"save_sparse: `{converted.name}` is a difference to a frozen weight: expected sparse weights. "
                "`lightning_deepr.save_adapter(net, path)` writes the difference alone."
            )
    rest = outside(module)
    tensors, versions = rest.values, rest.versions()
    sparse: dict[str, Any] = {}
    streams_of: dict[str, Tensor] = {}
    for converted in converted_tensors(module):
        name = converted.name
        refuse_infinite(name, converted.slots.narrowed(converted.theta.detach()))
        found = connections_of(converted.slots, converted.theta.detach())
        sparse[name], streams = encoded(found)
        streams_of.update({f"{name}.{key}": value for key, value in streams.items()})
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"`{name}`: expected a tensor in the module's state_dict, found {type(value).__name__}.")
        if name in streams_of:
            raise ValueError(f"`{name}`: expected another name for this tensor; the file keeps connections under it.")
        refuse_infinite(name, value)
    tensors.update(streams_of)
    report = connectivity_report(module)
    record = {
        "architecture": architecture,
        "arguments": arguments,
        "connectivity": {
            "active": sum(entry["active"] for entry in sparse.values()),
            "total": sum(entry["total"] for entry in sparse.values()),
        },
        "left_out": report.left_out,
        "metadata": metadata,
        "package_version": __version__,
        "sparse": sparse,
    }
    if versions:
        record["versions"] = versions
    return record, tensors


def refuse_infinite(name: str, value: Tensor) -> None:
    """Refuse values that are not finite, which a file can't hold."""
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(
            f"`{name}` holds NaN or infinity: expected finite values. A buffer that needs them can't be part of a file: "
            "register it with persistent=False."
        )


def connections_of(slots: Parametrization, theta: Tensor) -> Connections:
    """List the active connections of a tensor, in the order of their places, on the CPU."""
    if isinstance(slots, KSlots):
        places, own, signs = slots.places, slots.own(theta), slots.signs
        # A weight that passed through zero (trained without rewiring, or with free signs) keeps its present sign.
        values = torch.where(own == 0, torch.copysign(torch.zeros_like(own), signs), own * signs)
        exceptions = slots.exceptions
    elif isinstance(slots, SoftTheta) and bool((theta >= 0).any()):
        places = (theta >= 0).reshape(-1).nonzero().view(-1)
        values = torch.copysign(theta.reshape(-1)[places].abs(), slots.signs.reshape(-1)[places])
        exceptions = slots.exceptions
    else:
        assert isinstance(slots, DenseTheta)
        magnitudes, made = slots.as_slots(theta)
        places, values, exceptions = made.places, torch.copysign(magnitudes, made.signs), made.exceptions
    order = torch.argsort(places)
    return Connections(
        tuple(slots.shape),
        places[order].cpu(),
        (values[order] if slots.adapts else slots.narrowed(values[order])).cpu(),
        exceptions.cpu(),
        slots.index,
        slots.sign_seed,
        slots.last_birth(),
        slots.l1_rule,
        slots.allowed,
        slots.sign_table,
    )


def encoded(found: Connections) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write connections as an entry of the record and as tensors of the file."""
    places = found.places.numpy()
    bits = gaps.best_width(places)
    entry: dict[str, Any] = {
        "shape": list(found.shape),
        "total": math.prod(found.shape),
        "active": places.size,
        "bits": bits,
        "index": found.number,
        "sign_seed": found.sign_seed,
        "last_birth": found.last_birth,
    }
    if found.l1 is not None:
        entry["l1"] = found.l1[:_LONGEST_RULE]
    streams = {"values": found.values, "gaps": _stream(gaps.encode(places, bits))}
    # The sign bit shows an exception at an active place. Exceptions at dormant places need an entry of their own.
    dormant = np.setdiff1d(found.exceptions.numpy(), places)
    if dormant.size:
        entry["exceptions"], entry["exception_bits"] = int(dormant.size), gaps.best_width(dormant)
        streams["exceptions"] = _stream(gaps.encode(dormant, entry["exception_bits"]))
    if found.allowed is not None:
        entry["candidates"], items = found.allowed.record(lists=True)
        if found.allowed.is_list:
            entry["candidate_items"], entry["candidate_bits"] = items.numel(), gaps.best_width(items.numpy())
            streams["candidates"] = _stream(gaps.encode(items.numpy(), entry["candidate_bits"]))
        else:
            entry["candidate_items"], entry["candidate_bits"] = items.numel(), 64
            if items.numel():
                streams["candidates"] = items.contiguous().view(torch.uint8).clone()
    if found.sign_table is not None:
        entry["sign_table"], bits_of_table = found.sign_table.record()
        streams["signs"] = bits_of_table.contiguous().view(torch.uint8).clone()
    return entry, streams


def _stream(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


# -- reading ----------------------------------------------------------------------------------------------------------------


def check(contents: Contents) -> None:
    """Check that the record and the tensors agree, without decoding the places.

    Raises:
        FormatError: they disagree.
    """
    record, pieces = contents.record, contents.pieces
    if "adapter" in record:
        raise FormatError(
            "expected a sparse network, found an adapter, which is a difference to a pretrained one: "
            "`lightning_deepr.load_adapter(net, path)` loads it."
        )
    if set(record) - {"versions"} != _RECORD_KEYS:
        raise FormatError(f"record: expected {', '.join(sorted(_RECORD_KEYS))}, found {', '.join(sorted(record))[:200]}.")
    for key in _RECORD_KEYS - {"architecture", "package_version"}:
        if not isinstance(record[key], dict):
            raise FormatError(f"record: `{key}`: expected an object, found {type(record[key]).__name__}.")
    versions = record.get("versions", {})
    if not isinstance(versions, dict) or not all(type(version) is int for version in versions.values()):
        raise FormatError("record: `versions`: expected an object of whole numbers.")
    if not isinstance(record["architecture"], (str, type(None))) or not isinstance(record["package_version"], str):
        raise FormatError("record: `architecture` and `package_version`: expected text.")
    sums = {"active": 0, "total": 0}
    for name, entry in record["sparse"].items():
        check_entry(name, entry, pieces)
        sums = {key: sums[key] + entry[key] for key in sums}
    if record["connectivity"] != sums:
        raise FormatError(
            f"connectivity: expected {sums}, the sums over the tensors, found {str(record['connectivity'])[:80]}."
        )
    for name in dense_names(contents):
        if ".parametrizations." in f".{name}" and (
            FORMAT_KEY in name or any(name.startswith(_head(n)) for n in record["sparse"])
        ):
            raise FormatError(f"`{name[:80]}`: expected a dense tensor, found a part of a converted one.")


def check_entry(name: str, entry: Any, pieces: dict[str, Piece]) -> None:
    """Check that an entry of the record and its tensors agree, without decoding the places."""
    keys = set(entry) if isinstance(entry, dict) else set()
    whole = all(group <= keys or not group & keys for group in (_EXCEPTION_KEYS, _CANDIDATE_KEYS))
    if not whole or keys - _RULE_KEYS - _EXCEPTION_KEYS - _CANDIDATE_KEYS - _TABLE_KEYS != _SPARSE_KEYS:
        raise FormatError(f"`{name[:80]}`: expected {', '.join(sorted(_SPARSE_KEYS))}, found {', '.join(sorted(keys))[:200]}.")
    shape = whole_numbers(entry["shape"], f"`{name}`: shape")
    if "l1" in keys and not (isinstance(entry["l1"], str) and len(entry["l1"]) <= _LONGEST_RULE):
        raise FormatError(
            f"`{name[:80]}`: l1: expected text of at most {_LONGEST_RULE} characters, found {str(entry['l1'])[:80]}."
        )
    for key in ("candidates", "sign_table"):
        most, found = 6 + WORDS * _MOST_FORMS, entry.get(key, [])
        if not isinstance(found, list) or len(found) > most or not all(type(n) is int and 0 <= n <= LARGEST for n in found):
            raise FormatError(f"`{name[:80]}`: {key}: expected at most {most} whole numbers, found {str(found)[:80]}.")
    for key in keys - {"shape", "l1", "candidates", "sign_table"}:
        low = {"last_birth": -1, "active": 1, "bits": 1, "exception_bits": 1, "exceptions": 1}.get(key, 0)
        high = {
            "bits": gaps.WIDEST,
            "exception_bits": gaps.WIDEST,
            "candidate_bits": 64,
            "index": (1 << 23) - 1,
            "last_birth": LARGEST - 1,
        }.get(key, LARGEST)
        if type(entry[key]) is not int or not low <= entry[key] <= high:
            raise FormatError(f"`{name}`: {key}: expected a whole number from {low} to {high}, found {str(entry[key])[:80]}.")
    total, active = math.prod(shape), entry["active"]
    if entry["total"] != total or active > total or entry.get("exceptions", 0) > total - active:
        raise FormatError(
            f"`{name}`: expected K <= N = {total} (and exceptions among the other places), found K = {active}, "
            f"N = {entry['total']}."
        )
    values, stream = _piece(pieces, f"{name}.values"), _piece(pieces, f"{name}.gaps")
    if not values.dtype.is_floating_point or values.shape != (active,):
        raise FormatError(f"`{name}.values`: expected {active} floats, found {values.dtype} of shape {values.shape}.")
    streams = [(stream, active, entry["bits"])]
    if "exceptions" in entry:
        streams.append((_piece(pieces, f"{name}.exceptions"), entry["exceptions"], entry["exception_bits"]))
    if entry.get("candidate_items"):
        streams.append((_piece(pieces, f"{name}.candidates"), entry["candidate_items"], entry["candidate_bits"]))
    if "sign_table" in entry:
        streams.append((_piece(pieces, f"{name}.signs"), (entry["sign_table"] or [0])[-1], 1))
    for piece, count, bits in streams:
        if piece.dtype != torch.uint8 or len(piece.shape) != 1 or 8 * piece.numel < count * bits:
            raise FormatError(f"`{name}`: expected at least {count} units of {bits} bits as U8, found shape {piece.shape}.")


def _piece(pieces: dict[str, Piece], name: str) -> Piece:
    if name not in pieces:
        raise FormatError(f"expected a tensor `{name[:120]}`, found none.")
    return pieces[name]


def dense_names(contents: Contents) -> list[str]:
    """List the tensors of the file that are not part of a sparse tensor."""
    own = {f"{name}.{key}" for name, entry in contents.record["sparse"].items() for key in names_of_streams(entry)}
    return [name for name in contents.pieces if name not in own]


def names_of_streams(entry: dict[str, Any]) -> tuple[str, ...]:
    """List the ends of the names of an entry's tensors."""
    found = ["values", "gaps"]
    found += ["exceptions"] if "exceptions" in entry else []
    found += ["candidates"] if entry.get("candidate_items") else []
    return (*found, "signs") if "sign_table" in entry else tuple(found)


def all_connections(contents: Contents) -> Iterator[tuple[str, Connections]]:
    """Yield every sparse tensor's name and connections, in the order of conversion.

    Raises:
        FormatError: the places do not agree with the record.
    """
    for name, entry in sorted(contents.record["sparse"].items(), key=lambda item: item[1]["index"]):
        try:
            yield name, decoded(name, entry, contents.pieces)
        except FormatError as error:
            raise FormatError(f"`{name}`: {error}") from error


def decoded(name: str, entry: dict[str, Any], pieces: dict[str, Piece]) -> Connections:
    """Read the connections of an entry that was checked.

    Raises:
        FormatError: the places do not agree with it.
    """
    total = entry["total"]
    places = torch.from_numpy(gaps.decode(pieces[f"{name}.gaps"].data, entry["active"], entry["bits"], total=total))
    values = pieces[f"{name}.values"].tensor()
    allowed, table = _rules(name, entry, pieces)
    if allowed is not None and not bool(allowed.contains(places).all()):
        raise FormatError(f"expected places among {allowed!r}, found others.")
    hashed = signs_of(entry["sign_seed"], places, torch.float32) < 0 if table is None else table.are_negative(places)
    exceptions = places[torch.signbit(values) != hashed]
    if "exceptions" in entry:
        stream, count = pieces[f"{name}.exceptions"].data, entry["exceptions"]
        dormant = gaps.decode(stream, count, entry["exception_bits"], total=total)
        if np.isin(dormant, places.numpy(), assume_unique=True).any():
            raise FormatError("expected exceptions of dormant places only, found an active one.")
        exceptions = torch.cat([exceptions, torch.from_numpy(dormant)]).sort().values
    return Connections(
        tuple(entry["shape"]),
        places,
        values,
        exceptions,
        entry["index"],
        entry["sign_seed"],
        entry["last_birth"],
        entry.get("l1"),
        allowed,
        table,
    )


def _rules(name: str, entry: dict[str, Any], pieces: dict[str, Piece]) -> tuple[Allowed | None, SignTable | None]:
    """Read where the connections of a tensor may be, and its table of signs."""
    allowed = table = None
    try:
        if "candidates" in entry:
            count, items = entry["candidate_items"], torch.empty(0, dtype=torch.long)
            if count and LISTED in entry["candidates"][6::WORDS]:
                data = pieces[f"{name}.candidates"].data
                items = torch.from_numpy(gaps.decode(data, count, entry["candidate_bits"], total=entry["total"]))
            elif count:
                items = _words(pieces[f"{name}.candidates"])
            allowed = Allowed.of_record(entry["candidates"], items, entry["total"])
        if "sign_table" in entry:
            table = SignTable.of_record(entry["sign_table"], _words(pieces[f"{name}.signs"]), entry["total"])
    except ValueError as error:
        raise FormatError(str(error)) from error
    return allowed, table


def _words(piece: Piece) -> Tensor:
    found = piece.tensor()
    if found.numel() % 8:
        raise ValueError(f"expected words of 8 bytes, found {found.numel()} bytes")
    return found.clone().view(torch.int64)


def state_of(contents: Contents) -> tuple[dict[str, Tensor], dict[str, Connections]]:
    """Turn a file into the ``state_dict`` of a converted module and {head: connections}.

    The head is the beginning of the names of a tensor's entries in the ``state_dict``.
    """
    state: OrderedDict[str, Tensor] = OrderedDict((name, contents.pieces[name].tensor()) for name in dense_names(contents))
    state._metadata = metadata_of(contents)  # type: ignore[attr-defined]
    heads = {}
    for name, found in all_connections(contents):
        head = _head(name)
        heads[head] = found
        state[head + "original"] = found.theta
        state[head + "0." + FORMAT_KEY] = torch.tensor(FORMAT_VERSION)
        state[head + "0.places"] = found.places
        state[head + "0.born"] = torch.full_like(found.places, found.last_birth)
        state[head + "0.sign_exceptions"] = found.exceptions
        state[head + "0.sign_seed"] = torch.tensor(found.sign_seed)
        state[head + "0.index"] = torch.tensor(found.number)
        state[head + "0.shape"] = torch.tensor(found.shape, dtype=torch.long)
        rules.save(found.allowed, found.sign_table, state, head + "0.")
    return state, heads


def metadata_of(contents: Contents) -> OrderedDict[str, dict[str, Any]]:
    """Return what torch calls the ``_metadata`` of a ``state_dict``: the versions of the modules."""
    versions = contents.record.get("versions", {})
    paths = {""}
    for name in contents.pieces:
        path = name
        while path:
            path = path.rpartition(".")[0]
            paths.add(path)
    return OrderedDict((path, {"version": versions.get(path, 1)}) for path in sorted(paths | versions.keys()))


def _head(name: str) -> str:
    """Return the head of a tensor's entries in a ``state_dict``: "fc1.weight" -> "fc1.parametrizations.weight."."""
    module, _, tensor = name.rpartition(".")
    return join(module, f"parametrizations.{tensor}.")
