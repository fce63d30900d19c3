"""Give values to layers on the meta device, without building a dense weight for converted tensors."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_deepr.conversion.kinds import kind_of
from lightning_deepr.conversion.selection import Candidate


def on_meta(module: nn.Module) -> bool:
    """Tell whether a parameter or buffer of the module itself is on the meta device."""
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return any(tensor is not None and tensor.device.type == "meta" for tensor in tensors)


def refuse_unmaterializable(root: nn.Module, chosen: list[Candidate]) -> None:
    """Refuse a module on the meta device that is not converted and has no ``reset_parameters``."""
    becoming = {id(candidate.module) for candidate in chosen}
    for name, module in root.named_modules():
        if not on_meta(module) or id(module) in becoming or parametrize.is_parametrized(module):
            continue
        if not hasattr(module, "reset_parameters"):
            raise ValueError(
                f"`{name}` ({type(module).__name__}) is on the meta device and has no reset_parameters: expected a layer that "
                "can be materialized. Build it on a real device."
            )


def materialize(root: nn.Module, seed: int, device: torch.device | str | None) -> None:
    """Give values to what is still on the meta device after the conversion: biases, norm layers and unconverted weights.

    An unconverted module gets memory on the device, and its own ``reset_parameters`` fills it. A reset of a converted module
    would build the dense weight, so its other parameters are drawn within the bounds of its kind.

    Args:
        root: the network after the conversion.
        seed: the seed of the values in converted modules.
        device: the device of the new tensors; None: the CPU.
    """
    target = torch.device(device) if device is not None else torch.device("cpu")
    for module in root.modules():
        if not on_meta(module):
            continue
        converted = parametrize.is_parametrized(module)
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                if tensor is not None and tensor.device.type == "meta":
                    empty = torch.empty_like(tensor, device=target)
                    own[key] = (
                        nn.Parameter(empty, tensor.requires_grad)  # type: ignore[assignment]
                        if isinstance(tensor, nn.Parameter)
                        # a buffer
                        else empty
                    )
        if not converted:
            module.reset_parameters()  # type: ignore[operator]
            continue
        shape = tuple(next(iter(module.parametrizations.values()))[0].shape)  # type: ignore[union-attr, operator]
        kind = kind_of(type(module))
        with torch.no_grad():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if kind.weight_bound is not None and kind.takes(name):  # a weight that is not converted
                    bound = kind.weight_bound(module, tuple(parameter.shape))
                else:
                    bound = kind.bias_bound(module, shape)
                generator = torch.Generator(parameter.device).manual_seed(seed)
                parameter.copy_(torch.rand(parameter.shape, generator=generator, device=parameter.device) * (2 * bound) - bound)
