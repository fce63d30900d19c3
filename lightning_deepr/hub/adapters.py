"""Adapters on the Hugging Face Hub: a repository with the file of the difference and a card that names its base."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_deepr._version import __version__
from lightning_deepr.adapters import Adapter, read_adapter, save_adapter
from lightning_deepr.adapters import load_adapter as load_file
from lightning_deepr.hub import cards
from lightning_deepr.hub.cards import LIBRARY, section

if TYPE_CHECKING:
    from lightning_deepr.hub.transfer import Published

ADAPTER = "adapter.safetensors"
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def publish_adapter(
    adapter: nn.Module | Adapter | str | PathLike[str],
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    data: str | Mapping[str, Any] | None = None,
    description: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    parent_commit: str | None = None,
    create_pr: bool = False,
    card: bool = True,
    token: str | bool | None = None,
) -> Published:
    """Publish an adapter: create the repository or update it, in one commit. The pretrained weights are not sent.

    The function writes ``adapter.safetensors``, ``config.json`` and ``README.md``, a card that the Hub lists among the adapters
    of the base model.

    Args:
        adapter: an adapted network, an adapter by itself, or the path of a file of :func:`lightning_deepr.save_adapter`.
        repo_id: ``owner/name``, or a bare name for a repository of the token's user.
        base_model: the pretrained network's repository on the Hub, ``owner/name``; None: it is not on the Hub.
        license: SPDX identifier of the adapter's licence.
        metrics: {name: number, or dict with "value", "mean", "std", "seeds"}.
        data: the name of the data that the adapter was trained on, or a dict with name, split, sha256.
        description: a paragraph for the card.
        private, revision, commit_message, parent_commit, create_pr, token: as for :func:`lightning_deepr.zoo.publish`.
        card: False keeps the repository's README.md.

    Returns:
        url, revision (commit hash) and sha256 of the adapter's file.

    Raises:
        HubError: the Hub refused, with ``reason`` and advice.
        ValueError: there is no adapter, its file is damaged, or ``base_model`` is no name of the Hub; nothing is uploaded.

    Example::

        >>> publish_adapter("mine.safetensors", "me/rotated", base_model="someone/encoder").url  # doctest: +SKIP
        'https://huggingface.co/me/rotated/commit/5503434ddd753f426f4b38109466949a1217c2bb'
    """
    from lightning_deepr.hub import transfer

    if base_model is not None and _ID.fullmatch(base_model) is None:
        raise ValueError(
            f'base_model: expected a repository of the Hub ("owner/name"), or None, found {base_model!r}. What is not on the '
            "Hub belongs into `description`."
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ADAPTER
        if isinstance(adapter, (nn.Module, Adapter)):
            save_adapter(adapter, path)
        else:
            path.write_bytes(Path(adapter).read_bytes())
        found = read_adapter(path)
        info = {"license": license, "metrics": metrics, "data": data, "description": description, "bytes": path.stat().st_size}
        config = {
            "library_name": LIBRARY, "base_model": base_model, "connections": found.count, "package_version": __version__,
        }  # fmt: skip
        files = {ADAPTER: path, "config.json": Path(folder) / "config.json"}
        files["config.json"].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if card:
            files["README.md"] = Path(folder) / "README.md"
            files["README.md"].write_text(adapter_card(found, repo_id, base_model, **info), encoding="utf-8")
        return transfer.upload(
            files,
            repo_id,
            title=repo_id.rpartition("/")[2],
            private=private,
            revision=revision,
            commit_message=commit_message,
            parent_commit=parent_commit,
            create_pr=create_pr,
            token=token,
            weights=ADAPTER,
        )


def load_adapter(net: nn.Module, repo_id: str, *, revision: str | None = None, **options: Any) -> nn.Module:
    """Put an adapter of the Hub upon the network that it belongs to.

    Args:
        net: a network with the pretrained weights.
        repo_id: ``owner/name``.
        revision: a branch, a tag or a whole commit hash; None: the newest commit of the main branch.
        options: ``sha256``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download`` of
            :func:`lightning_deepr.hub.download`.

    Returns:
        the network itself, as :func:`lightning_deepr.load_adapter` returns it.

    Raises:
        HubError: see :func:`lightning_deepr.hub.download`.
        ValueError: the adapter belongs to other weights; nothing is changed.

    Example::

        >>> net = load_adapter(pretrained, "me/rotated", revision="5503434...")  # doctest: +SKIP
    """
    from lightning_deepr.hub import transfer

    return load_file(net, transfer.download(repo_id, revision=revision, filename=ADAPTER, **options))


def adapter_card(adapter: Adapter, repo_id: str, base_model: str | None = None, **info: Any) -> str:
    """Write the card of an adapter.

    Args:
        adapter: the adapter.
        repo_id: its repository on the Hub.
        base_model: that of the pretrained network; None: it is not on the Hub.
        info: license, metrics, data, description and bytes, as far as they are known.

    Returns:
        Markdown with the Hub's metadata at the beginning.
    """
    given = {key: value for key, value in info.items() if value is not None}
    name, data = repo_id.rpartition("/")[2], cards.data_of(given)
    rows: list[dict[str, Any]] = [
        {"name": tensor, "shape": list(one.shape), "total": math.prod(one.shape), "active": one.places.numel()}
        for tensor, one in adapter.tensors.items()
    ]
    total, active = sum(row["total"] for row in rows), adapter.count
    base = f"[`{base_model}`](https://huggingface.co/{base_model})" if base_model else "a pretrained network"
    said = f"A sparse difference to {base}: {active:,} connections in {total:,} weights ({active / total:.2%})"
    said += f", trained on {data['name']}" if data.get("name") else ""
    said += f". The file has {info['bytes']:,} bytes; the pretrained weights are not in it." if "bytes" in given else "."
    data_set = cards.DATA_SETS.get(str(data.get("name")).lower())
    fields = {
        "library_name": LIBRARY,
        "base_model": base_model,
        "base_model_relation": "adapter" if base_model else None,
        "license": cards.licence_of(given),
        "datasets": [data_set] if data_set else None,
        "tags": ["adapter", "sparse", "deep-r", "parameter-efficient-fine-tuning"],
    }
    table = cards.table({"connectivity": {"rows": rows, "total": total, "active": active}})
    digests = "\n".join(f"- `{name}`: `{digest}`" for name, digest in adapter.digests.items())
    parts = [
        cards.front_matter_of({key: value for key, value in fields.items() if value is not None}),
        f"# {name}\n\n{said}" + (f"\n\n{given['description']}" if "description" in given else ""),
        section("Use", _use(repo_id, base_model)),
        section("Connections", table + _beside(adapter)),
        section("Metrics", cards.metrics_table({"metrics": given.get("metrics")})),
        section("Weights that it belongs to", f"Digests of shape, dtype and values; other weights are refused.\n\n{digests}"),
        section("Licence", str(given.get("license", ""))),
        cards.CITATION,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _use(repo_id: str, base_model: str | None) -> str:
    made = f"the pretrained network of `{base_model}`" if base_model else "the pretrained network"
    return f"""Load {made} first, as `net`.

```python
# pip install lightning-deepr
from lightning_deepr import hub
from lightning_deepr.adapters import detach, merge

net = hub.load_adapter(net, "{repo_id}")  # revision="<commit hash>" pins it
net = merge(net)  # optional, for inference: a pass then costs what the pretrained network's does
```

Without `merge`, `detach(net)` gives the pretrained network back. Only safetensors and JSON are read; no code comes from this
repository."""


def _beside(adapter: Adapter) -> str:
    names = sorted(adapter.others)
    listed = ", ".join(f"`{name}`" for name in names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"\n\nBeside it, the file has {listed}." if names else ""
