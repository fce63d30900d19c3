"""Stack the states of several converted networks, for an ensemble that ``torch.func.vmap`` computes at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_deepr.weights.base import Parametrization


def stack_module_state(models: Sequence[nn.Module]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stack the parameters, buffers and connections of networks, as ``torch.func.stack_module_state`` does without connections.

    Args:
        models: networks of one architecture; each weight is converted with the same K in all of them, or in none.

    Returns:
        {name: parameters [networks, ...]} and {name: buffers [networks, ...]}, for ``torch.func.functional_call``. Places and
        signs are among the buffers.

    Raises:
        ValueError: there is no network, they differ in their kinds of layers, names, shapes or K, some are in training mode and
            some are not, or layers share one theta.

    Example::

        >>> from torch.func import functional_call, vmap
        >>> from lightning_deepr import sparsify
        >>> networks = [sparsify(nn.Sequential(nn.Linear(9, 8), nn.ReLU()), 0.3, seed=seed) for seed in range(3)]
        >>> parameters, buffers = stack_module_state(networks)
        >>> x = torch.randn(5, 9)
        >>> y = vmap(lambda p, b: functional_call(networks[0], (p, b), (x,)))(parameters, buffers)
        >>> torch.allclose(y, torch.stack([network(x) for network in networks]), atol=1e-6)
        True
    """
    models = list(models)
    if not models:
        raise ValueError("stack_module_state: expected at least one network, found none.")
    if len({model.training for model in models}) > 1:
        raise ValueError("stack_module_state: expected all networks in training mode or all in eval mode, found both.")
    layers = [{name: type_before_parametrizations(part) for name, part in model.named_modules()} for model in models]
    for other in layers[1:]:
        for name in sorted(layers[0].keys() | other.keys()):
            if layers[0].get(name) is not other.get(name):
                found = [getattr(one.get(name), "__name__", "nothing") for one in (layers[0], other)]
                raise ValueError(
                    f"stack_module_state: expected networks of one architecture, found {' and '.join(found)} at `{name}`."
                )
    parameters = {name: _stacked(name, models, "parameter") for name, _ in models[0].named_parameters()}
    buffers = {name: _stacked(name, models, "buffer") for name, _ in models[0].named_buffers()}
    for name, part in models[0].named_modules():
        if isinstance(part, Parametrization):
            if part.shares:
                raise ValueError(
                    f'stack_module_state: `{name}` shares its theta with other layers (scope="global"): expected one each.'
                )
            for tensor in part.placing:
                found_tensors = [getattr(model.get_submodule(name), tensor) for model in models]
                buffers[f"{name}.{tensor}"] = _stack(f"{name}.{tensor}", found_tensors)
    return parameters, buffers


def _stacked(name: str, models: Sequence[nn.Module], kind: str) -> Tensor:
    tensors: list[Tensor] = []
    for model in models:
        owner, _, last = name.rpartition(".")
        own = getattr(model.get_submodule(owner), f"_{kind}s").get(last)
        if own is None:
            raise ValueError(f"stack_module_state: expected a {kind} `{name}` in every network, found one without it.")
        tensors.append(own.detach())
    return _stack(name, tensors).requires_grad_(kind == "parameter" and models[0].get_parameter(name).requires_grad)


def _stack(name: str, tensors: list[Tensor]) -> Tensor:
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(
            f"stack_module_state: `{name}`: expected one shape in all networks, found {', '.join(map(str, sorted(shapes)))}. "
            "Convert all of them with the same number of connections."
        )
    return torch.stack(tensors)
