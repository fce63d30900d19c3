"""Reads wandb's offline file, without wandb's own reader: blocks of 32 KiB with records, as LevelDB's log has them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

BLOCK, HEADER = 32 * 1024, 7  # a record's header: checksum, length, type (1: whole, 2: first, 3: middle, 4: last)


@dataclass
class Offline:
    """What an offline run has recorded."""

    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: list[Any] = field(default_factory=list)
    used: list[Any] = field(default_factory=list)
    metrics: list[Any] = field(default_factory=list)
    run: Any = None


def records(path: Path) -> Iterator[bytes]:
    content = path.read_bytes()
    assert content[:4] == b":W&B", content[:7]
    at, parts = HEADER, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block is filled up
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if kind == 0:
            at += BLOCK - at % BLOCK
            continue
        parts += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):
            yield parts
            parts = b""


def read(folder: Path) -> Offline:
    """Read the one offline run below a folder."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (path,) = folder.rglob("*.wandb")
    found = Offline()
    for data in records(path):
        record = pb.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            _update(found.config, record.run.config.update)
        elif kind == "config":
            _update(found.config, record.config.update)
        elif kind == "summary":
            _update(found.summary, record.summary.update)
            for item in record.summary.remove:
                found.summary.pop(_key(item), None)
        elif kind == "history":
            found.history.append({_key(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "use_artifact":
            found.used.append(record.use_artifact)
        elif kind == "metric":
            found.metrics.append(record.metric)
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            found.artifacts.append(record.request.log_artifact.artifact)
    return found


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _update(into: dict[str, Any], items: Any) -> None:
    for item in items:
        keys = list(item.nested_key) or [item.key]
        at = into
        for key in keys[:-1]:
            at = at.setdefault(key, {})
        at[keys[-1]] = json.loads(item.value_json)
