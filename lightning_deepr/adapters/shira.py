"""Export an adapter for PEFT, as a SHiRA adapter (sparse values at fixed places): PEFT loads it without this package."""

from __future__ import annotations

import json
import math
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_deepr.adapters.adapter import adapted_tensors, adapter_of
from lightning_deepr.weights.names import unwrapped

_HEAD = "base_model.model."


def save_shira(net: nn.Module, folder: str | PathLike[str], *, base_model: str | None = None) -> Path:
    """Write the adapter of a network as PEFT writes a SHiRA adapter.

    ``peft.PeftModel.from_pretrained(pretrained, folder)`` loads it. PEFT has ``r * (rows + columns)`` values for every linear
    layer, with one r for the network. What a layer has fewer is filled up with zeros at unused places. A value takes 12 bytes
    there.

    Args:
        net: an adapted network; only ``nn.Linear`` layers may be adapted.
        folder: the folder to write: ``adapter_config.json`` and ``adapter_model.safetensors``.
        base_model: the name or the path of the pretrained network, for ``adapter_config.json``.

    Returns:
        the folder.

    Raises:
        ValueError: another kind of layer is adapted, a layer is too small for the common r, or a single tensor of a layer (a
            bias) was trained beside the adapter, which SHiRA has no place for.
    """
    net = unwrapped(net)
    adapter, rank, targets = adapter_of(net), 1, []
    for one, slots in adapted_tensors(net):
        kind = type_before_parametrizations(one.module)
        if not issubclass(kind, nn.Linear) or one.tensor_name != "weight":
            raise ValueError(f"save_shira: `{one.name}` belongs to a {kind.__name__}: PEFT's SHiRA expects nn.Linear.")
        rank = max(rank, math.ceil(slots.count / (slots.rows + slots.columns)))
        targets.append(one.name.removesuffix(".weight"))
    tensors: dict[str, Tensor] = {}
    for name, found in adapter.tensors.items():
        rows, columns = found.shape
        count = rank * (rows + columns)
        if count > rows * columns:
            raise ValueError(
                f"save_shira: `{name}` has {rows * columns:,} places, and PEFT's r = {rank}, which the largest connectivity "
                f"needs, gives it {count:,} values. Adapt this layer with fewer connections elsewhere, or leave it out."
            )
        places, values = _filled(found.places, found.values, count, rows * columns)
        module = _HEAD + name.removesuffix(".weight")
        tensors[f"{module}.shira_weight"] = values
        tensors[f"{module}.shira_indices"] = torch.stack([places // columns, places % columns]).int()
    saved = _modules_to_save(net, adapter.others)
    for name, value in adapter.others.items():
        tensors[_HEAD + name] = value
    config: dict[str, Any] = {
        "peft_type": "SHIRA", "r": rank, "mask_type": "random", "random_seed": 0, "target_modules": targets,
        "fan_in_fan_out": False, "init_weights": True, "inference_mode": True, "modules_to_save": saved or None,
        "base_model_name_or_path": base_model, "task_type": None,
    }  # fmt: skip
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("save_shira needs safetensors: `pip install safetensors`.") from error
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return path


def _filled(places: Tensor, values: Tensor, count: int, total: int) -> tuple[Tensor, Tensor]:
    """Fill up connections with zeros at the first unused places."""
    missing = count - places.numel()
    first = torch.arange(min(total, count))
    unused = first[~torch.isin(first, places)][:missing]
    return torch.cat([places, unused]), torch.cat([values, values.new_zeros(missing)])


def _modules_to_save(net: nn.Module, others: dict[str, Tensor]) -> list[str]:
    """List the modules all of whose tensors were trained beside the adapter."""
    found = []
    for owner in {name.rpartition(".")[0] for name in others}:
        module = net.get_submodule(owner)
        own = {*(name for name, _ in module.named_parameters()), *(name for name, _ in module.named_buffers())}
        trained = {name.removeprefix(f"{owner}.") for name in others if name.rpartition(".")[0] == owner}
        if own != trained or not owner:
            raise ValueError(
                f"save_shira: {', '.join(f'`{name}`' for name in sorted(others)[:3])} was trained beside the adapter: PEFT's "
                "SHiRA expects whole layers (a head), not single tensors of a layer. Train without them, or merge the adapter."
            )
        found.append(owner)
    return sorted(found)
