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

from lightning_deepr import global_scope
from lightning_deepr.connections import KSlots, converted_tensors, remove
from lightning_deepr.conversion import convert
from lightning_deepr.dense_theta import STARTS, DenseTheta, active_by_record, kind_of_record, wanted_by_record
from lightning_deepr.parametrization import FORMAT_KEY
from lightning_deepr.report import ConnectivityReport, connectivity_report
from lightning_deepr.selection import Candidate, candidates


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
    chosen, counts, records, kinds = [], {}, {}, {}
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
                    f"`{name}` is converted for another method: expected {type(candidate.slots).__name__}, found {kind.__name__} in the "
                    "checkpoint. Load into a dense model (densify(module) first)."
                )
            shares = isinstance(candidate.slots, KSlots) and candidate.slots.pool is not None  # it is the total that has to fit
            if not shares and candidate.slots.wanted != count:
                raise ValueError(
                    f"`{name}` is converted with K = {candidate.slots.wanted}, found {count} in the checkpoint. Load into "
                    "a dense model (densify(module) first), or convert with the recorded connectivity."
                )
            continue
        chosen.append(candidate)
        counts[candidate.name], kinds[candidate.name] = count, kind
        records[candidate.name] = int(state[head + "0.index"])
    if chosen:
        chosen.sort(key=lambda candidate: records[candidate.name])
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}

        def begin(candidate: Candidate, *args: Any, **options: Any) -> Any:
            return STARTS[kinds[candidate.name]](candidate, *args, **options)

        new = convert(module, chosen, counts, init="deepr", seed=0, compute="auto", begin=begin)
        for positions in _shared(state).values():
            joined = [converted for converted in new if converted.name in positions]
            if joined:
                global_scope.join(sorted(joined, key=lambda converted: positions[converted.name]))
    try:
        module.load_state_dict(state)
    except RuntimeError:
        if chosen and not any(tensor.device.type == "meta" for tensor in before.values()):
            for converted in new:
                remove(converted)
            module.load_state_dict(before)
        raise
    return module


def _shared(state: Mapping[str, Any]) -> dict[int, dict[str, int]]:
    """The tensors that share a theta: number of their pool -> name -> position in it."""
    pools: dict[int, dict[str, int]] = {}
    for key, value in state.items():
        if key.endswith(".0.pool") and "parametrizations." in key:
            number, position = value.tolist()[:2]
            pools.setdefault(number, {})[key.removesuffix(".0.pool").replace("parametrizations.", "")] = position
    return pools


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

    Of a tensor with a theta for every potential connection (soft-DEEP R, pruning, l1-shrinkage) the active connections are
    written, as K slots: what loads is an ordinary sparse network. (To go on training as before, save its ``state_dict``.)

    Args:
        module: a module with converted weights.
        path: of the file to write; :func:`load_state_dict` reads it.
        metadata: JSON values to put beside it.

    Returns:
        the path.
    """
    from safetensors.torch import save_file

    record = {"format": "lightning-deepr", "connectivity": connectivity_report(module).to_dict(), **metadata}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _as_slots(module).items()}
    save_file(tensors, path, metadata={name: json.dumps(value) for name, value in record.items()})
    return Path(path)


def _as_slots(module: nn.Module) -> dict[str, Any]:
    """The ``state_dict`` with K slots for every converted tensor."""
    state = module.state_dict()
    prefixes = {id(submodule): prefix for prefix, submodule in module.named_modules()}
    for converted in converted_tensors(module):
        if isinstance(converted.slots, DenseTheta):
            head = f"{prefixes[id(converted.holder)]}."
            state = {name: value for name, value in state.items() if not name.startswith(head)}
            theta, slots = converted.slots.as_slots(converted.theta.detach())
            state[head + "original"] = theta
            slots._save_to_state_dict(state, head + "0.", keep_vars=False)
        elif converted.slots.pool is not None:  # safetensors has no shared tensors: each layer gets its own piece
            head = f"{prefixes[id(converted.holder)]}."
            state[head + "original"] = converted.slots.own(converted.theta.detach()).clone()
            del state[head + "0.pool"]
            for name in converted.slots.records:  # pieces of one storage
                state[head + "0." + name] = state[head + "0." + name].clone()
    return state


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
            shape, count = tuple(state[head + "0.shape"].tolist()), active_by_record(state, head)
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
