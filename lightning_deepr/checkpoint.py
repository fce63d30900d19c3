"""Sparse checkpoints: K values and K places for a converted weight; written as safetensors, loaded as recorded."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_deepr.connections import FORMAT_KEY, remove
from lightning_deepr.conversion import convert
from lightning_deepr.report import ConnectivityReport, connectivity_report
from lightning_deepr.selection import candidates


def load_state_dict(module: nn.Module, path_or_dict: str | PathLike[str] | Mapping[str, Any]) -> nn.Module:
    """Load a sparse checkpoint into a module that still is dense: converts as recorded, then loads.

    Args:
        module: of the architecture of the checkpoint; tensors that are converted already must have the recorded K.
        path_or_dict: a ``state_dict``, a Lightning checkpoint (its ``state_dict`` is taken), or a path to one of them as
            ``.ckpt``, ``.pt``, ``.pth`` (loaded with ``weights_only=True``) or ``.safetensors``.

    Returns:
        the module itself.

    Raises:
        ValueError: the file is no checkpoint, or names layers or shapes that the module does not have.
        RuntimeError: keys that are missing or left over (torch's own message). A module that was dense is unchanged then, too.
    """
    state = _read(path_or_dict) if isinstance(path_or_dict, (str, PathLike)) else path_or_dict
    state = dict(state.get("state_dict", state))
    by_name = {(c.module_name, c.tensor_name): c for c in candidates(module)}
    chosen, counts, records = [], {}, {}
    for key in state:
        if not key.endswith(".0." + FORMAT_KEY):
            continue
        head = key.removesuffix("0." + FORMAT_KEY)
        module_name, _, tensor_name = ("." + head.removesuffix(".")).rpartition(".parametrizations.")
        module_name = module_name.removeprefix(".")
        candidate = by_name.get((module_name, tensor_name))
        shape, places = tuple(state[head + "0.shape"].tolist()), state[head + "0.places"]
        name = f"{module_name}.{tensor_name}" if module_name else tensor_name
        if candidate is None:
            raise ValueError(
                f"The checkpoint has connections for `{name}`, but {type(module).__name__} has no such weight. Expected a "
                f"checkpoint of this model; its weights are: {', '.join(c.name for c in by_name.values()) or 'none'}."
            )
        if candidate.shape != shape:
            raise ValueError(f"`{name}`: expected a weight of shape {candidate.shape}, found {shape} in the checkpoint.")
        if candidate.slots is not None:
            if candidate.slots.count != places.numel():
                raise ValueError(
                    f"`{name}` is converted with K = {candidate.slots.count}, found {places.numel()} in the checkpoint. Load into "
                    "a dense model (densify(module) first), or convert with the recorded connectivity."
                )
            continue
        chosen.append(candidate)
        counts[candidate.name] = places.numel()
        records[candidate.name] = int(state[head + "0.index"])
    if chosen:
        chosen.sort(key=lambda candidate: records[candidate.name])
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        new = convert(module, chosen, counts, init="deepr", seed=0, compute="auto")
    try:
        module.load_state_dict(state)
    except RuntimeError:
        if chosen and not any(tensor.device.type == "meta" for tensor in before.values()):
            for converted in new:
                remove(converted)
            module.load_state_dict(before)
        raise
    return module


def _read(path: str | PathLike[str]) -> Mapping[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {file}.")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{file}: expected a state_dict or a Lightning checkpoint, found {type(loaded).__name__}.")
    return loaded


def save_sparse(module: nn.Module, path: str | PathLike[str], **metadata: Any) -> Path:
    """Write a module's ``state_dict`` (K-sized for converted weights) as safetensors, with the recorded connectivity.

    Args:
        module: a module with converted weights.
        path: of the file to write; :func:`load_state_dict` reads it.
        metadata: JSON values to put beside it.

    Returns:
        the path.
    """
    from safetensors.torch import save_file

    record = {"format": "lightning-deepr", "connectivity": connectivity_report(module).to_dict(), **metadata}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, path, metadata={name: json.dumps(value) for name, value in record.items()})
    return Path(path)


def report_of_checkpoint(path_or_dict: str | PathLike[str] | Mapping[str, Any]) -> ConnectivityReport:
    """The connectivity that a sparse checkpoint records, read without its model.

    Args:
        path_or_dict: as for :func:`load_state_dict`.

    Raises:
        ValueError: the checkpoint has no sparse tensor.
    """
    state = _read(path_or_dict) if isinstance(path_or_dict, (str, PathLike)) else path_or_dict
    state = state.get("state_dict", state)
    rows = []
    for key in state:
        if key.endswith(".0." + FORMAT_KEY):
            head = key.removesuffix("0." + FORMAT_KEY)
            shape, count = tuple(state[head + "0.shape"].tolist()), state[head + "0.places"].numel()
            total = math.prod(shape)
            rows.append(
                {
                    "name": head.removesuffix(".").replace("parametrizations.", ""),
                    "shape": shape,
                    "total": total,
                    "active": count,
                    "connectivity": count / total,
                    "l1": None,
                    "compute": "-",
                }
            )
    if not rows:
        raise ValueError("expected a sparse checkpoint, found one without a converted tensor.")
    return ConnectivityReport(rows, {})
