"""The file around a sparse model: safetensors with one canonical form, read with limits that hold before anything is allocated.

The reader here does not use the safetensors library, which checks neither a digest nor whether values are finite. That library
reads the files that are written here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_deepr.files.gaps import LARGEST_TOTAL, FormatError

_LARGEST_HEADER = 1 << 22  # bytes; parsed JSON can take thirty times as much memory
_LARGEST_FILE = 1 << 40  # bytes
# The file begins with the header's length (8 bytes) and these bytes. Then come the 64 hex digits of the sha256 over all other
# bytes.
HEAD = b'{"__metadata__":{"sha256":"'
DIGEST = slice(8 + len(HEAD), 8 + len(HEAD) + 64)
_KEYS = ["sha256", "format", "version", "record"]  # the keys of the metadata
FORMAT, VERSION = "lightning-deepr", 1

DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Piece(NamedTuple):
    """A tensor in the file, as a view of its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: memoryview

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def tensor(self) -> Tensor:
        """Copy the bytes into a tensor."""
        if self.numel == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(bytearray(self.data), dtype=self.dtype).view(self.shape)


class Contents(NamedTuple):
    """The contents of a file after the check of its digest, header and sizes."""

    record: dict[str, Any]
    pieces: dict[str, Piece]
    digest: str  # the sha256 that the file states, over all bytes but its own digits
    sha256: str  # the sha256 of the whole file
    size: int  # bytes


def pack(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Make the bytes of a file. The same contents give the same bytes.

    Args:
        record: JSON values.
        tensors: {name: tensor}.

    Raises:
        ValueError: JSON cannot hold a value, the format has no such dtype, or the header is too large.
    """
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in host.items():
        if tensor.dtype not in _NAMES:
            raise ValueError(f"`{name}`: expected one of {', '.join(map(str, _NAMES))}, found {tensor.dtype}.")
    try:
        text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"metadata: expected JSON values (finite numbers, text, lists, dicts with text as keys), found another: {error}."
        ) from error
    names = sorted(host, key=lambda name: (-host[name].element_size(), name))  # large elements first: every tensor is aligned
    entries: dict[str, Any] = {}
    end = 0
    for name in names:
        begin, end = end, end + host[name].numel() * host[name].element_size()
        entries[name] = {"dtype": _NAMES[host[name].dtype], "shape": list(host[name].shape), "data_offsets": [begin, end]}
    metadata = {"sha256": "0" * 64, "format": FORMAT, "version": str(VERSION), "record": text}
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > _LARGEST_HEADER:
        raise ValueError(
            f"The file's header takes {len(header):,} bytes: expected at most {_LARGEST_HEADER:,}. Give less metadata."
        )
    file = bytearray(struct.pack("<Q", len(header)) + header)
    for name in names:
        file += _bytes(host[name])
    return bytes(sign(file))


def sign(file: bytearray) -> bytearray:
    """Write the digest into its place in the file."""
    file[DIGEST] = _digest_of(file).encode()
    return file


def _digest_of(file: bytes | bytearray | memoryview) -> str:
    """Compute the sha256 over all bytes of a file except the 64 digits of the digest itself."""
    view = memoryview(file)
    digest = hashlib.sha256(view[: DIGEST.start])
    digest.update(view[DIGEST.stop :])
    return digest.hexdigest()


def write(path: Path, content: bytes) -> None:
    """Write a file completely or not at all: an interrupted write leaves the previous file."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read(path: Path) -> Contents:
    """Read a file and check it. :mod:`lightning_deepr.files.sparse_file` checks what it says about connections.

    Raises:
        FormatError: something is wrong with the file; the message begins with its path.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    if path.stat().st_size > _LARGEST_FILE:
        raise FormatError(f"{path}: expected at most 1 TiB, found {path.stat().st_size:,} bytes.")
    with about(path):
        return unpack(path.read_bytes())


def kind_of(path: Path) -> str:
    """Find out what a file is by its first bytes: "sparse" (of this package) or "torch" (of ``torch.save``).

    Raises:
        FormatError: it is neither; the message says what it seems to be.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    with path.open("rb") as file:
        start = file.read(DIGEST.stop)
    if start[8 : DIGEST.start] == HEAD:
        return "sparse"
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return "torch"
    size = path.stat().st_size
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    found = _guess(start, length, size)
    raise FormatError(
        "expected a file of lightning-deepr (safetensors whose header begins with "
        f"`{HEAD.decode()}`) or one of torch.save, found {found}."
    )


class about:
    """A context that puts the file's path in front of the message of a :class:`FormatError`."""

    def __init__(self, path: Path | str) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, FormatError) and not str(error).startswith(f"{self.path}: "):
            raise FormatError(f"{self.path}: {error}") from error


def unpack(file: bytes) -> Contents:
    """Check the bytes of a file, and return its contents as views of them.

    Raises:
        FormatError: something is wrong with the file.
    """
    length = struct.unpack("<Q", file[:8])[0] if len(file) >= 8 else 0
    if len(file) < DIGEST.stop or length > len(file) - 8 or file[8 : DIGEST.start] != HEAD:
        raise FormatError(
            f"expected a file of lightning-deepr (safetensors whose header begins with `{HEAD.decode()}`), found "
            f"{_guess(file, length, len(file))}."
        )
    if length > _LARGEST_HEADER:
        raise FormatError(f"expected a header of at most {_LARGEST_HEADER:,} bytes, found {length:,}.")
    stated, found = file[DIGEST].decode("latin-1"), _digest_of(file)
    if stated != found:
        raise FormatError(
            f"expected the sha256 {stated!r} that the file states, found {found!r}: it is damaged, or was changed. Get it "
            "again."
        )
    header = _json(file[8 : 8 + length], "header")
    metadata = header.pop("__metadata__")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("metadata: expected text values.")
    if metadata.get("format") != FORMAT:
        raise FormatError(f"format: expected {FORMAT!r}, found {_short(metadata.get('format'))}.")
    version = metadata.get("version", "")
    if version != str(VERSION):
        later = version.isdecimal() and len(version) < 10 and int(version) > VERSION
        advice = "The file is newer than this package: update lightning-deepr." if later else "The file is damaged."
        raise FormatError(f"format version: expected {VERSION}, found {_short(version)}. {advice}")
    if sorted(metadata) != sorted(_KEYS):
        raise FormatError(f"metadata: expected {', '.join(_KEYS)}, found {_short(sorted(metadata))}.")
    record = _json(metadata["record"].encode("utf-8", "surrogatepass"), "record")
    return Contents(
        record, dict(_pieces(header, memoryview(file)[8 + length :])), stated, hashlib.sha256(file).hexdigest(), len(file)
    )


def _pieces(header: Mapping[str, Any], data: memoryview) -> Iterator[tuple[str, Piece]]:
    end = 0
    for name, entry in header.items():
        if not isinstance(entry, dict) or sorted(entry) != ["data_offsets", "dtype", "shape"]:
            raise FormatError(f"`{_short(name)}`: expected data_offsets, dtype and shape.")
        dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise FormatError(f"`{name}`: dtype: expected one of {', '.join(DTYPES)}, found {_short(entry['dtype'])}.")
        shape, offsets = whole_numbers(entry["shape"], f"`{name}`: shape"), entry["data_offsets"]
        size = math.prod(shape) * dtype.itemsize
        if offsets != [end, end + size] or end + size > len(data):
            raise FormatError(
                f"`{name}`: expected {size} bytes from {end} on (tensors lie end to end, {len(data)} bytes in all), found "
                f"{_short(offsets)}."
            )
        piece = Piece(dtype, shape, data[end : end + size])
        _check_values(name, piece)
        yield name, piece
        end += size
    if end != len(data):
        raise FormatError(f"expected {end} bytes of data, found {len(data)}.")


def _check_values(name: str, piece: Piece) -> None:
    if piece.dtype == torch.bool and piece.numel and np.frombuffer(piece.data, np.uint8).max() > 1:
        raise FormatError(f"`{name}`: expected only 0 and 1 in a BOOL tensor, found other bytes.")
    if piece.dtype.is_floating_point:
        for begin in range(0, len(piece.data), 1 << 22):
            part = torch.frombuffer(bytearray(piece.data[begin : begin + (1 << 22)]), dtype=piece.dtype)
            if not bool(torch.isfinite(part).all()):
                raise FormatError(f"`{name}`: expected finite values, found NaN or infinity.")


def whole_numbers(value: Any, what: str) -> tuple[int, ...]:
    """Check a shape: at most 16 sizes from 0 on, and N at most 2^48.

    Raises:
        FormatError: ``value`` is not such a shape.
    """
    if (
        not isinstance(value, list)
        or len(value) > 16
        or not all(type(size) is int and 0 <= size <= LARGEST_TOTAL for size in value)
    ):
        raise FormatError(f"{what}: expected a list of at most 16 sizes from 0 to 2^48, found {_short(value)}.")
    if math.prod(value) > LARGEST_TOTAL:
        raise FormatError(f"{what}: expected at most 2^48 elements, found {_short(value)}.")
    return tuple(value)


def _json(text: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what}: expected JSON, found something else: {_short(str(error))}.") from error
    if not isinstance(value, dict):
        raise FormatError(f"{what}: expected a JSON object, found {type(value).__name__}.")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _guess(file: bytes, length: int, size: int) -> str:
    """Guess what a foreign file is, from its first bytes, for the message that refuses it."""
    if file[:4] == b"PK\x03\x04" or file[:2] in (b"\x80\x02", b"\x80\x04"):
        return "a pickle or a zip file, as torch.save writes: load_state_dict(module, path) reads those"
    if file[:9].startswith(b"version h"):
        return "a pointer of Git LFS: `git lfs pull` gets the file itself"
    if 2 <= length <= size - 8 and file[8:9] == b"{":
        return "another safetensors file (for dense weights: safetensors.torch.load_file, and load_state_dict of the result)"
    return f"{size:,} bytes that are something else, or cut off"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
