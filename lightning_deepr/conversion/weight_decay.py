"""Parameter groups for weight decay: converted weights decay as they did when they were dense."""

from __future__ import annotations

import math
import numbers
from typing import Any

from torch import nn

from lightning_deepr.weights.find import converted_tensors

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm)


def decay_groups(model: nn.Module, weight_decay: float, **options: Any) -> list[dict[str, Any]]:
    """Make the parameter groups of an optimizer: weights decay, biases and norms do not.

    The usual rule, "what has two or more dimensions decays", misses converted weights: theta is a vector of K values. (A rule
    by the name ``.weight`` misses them, too.) Here converted weights decay, and so do dense parameters of two or more
    dimensions that are no bias and belong to no norm.

    Args:
        model: the network, converted.
        weight_decay: the weight decay of weights, at least 0.
        **options: further options of both groups, for example ``lr``.

    Returns:
        the groups with at least one parameter, at most two; frozen parameters are left out, shared ones are listed once.

    Raises:
        TypeError, ValueError: ``weight_decay`` is no number or below 0, an option is named like what is filled in here, or the
            model has nothing to train.

    Example::

        >>> import torch
        >>> from lightning_deepr import decay_groups, sparsify
        >>> net = sparsify(nn.Sequential(nn.Linear(100, 50), nn.LayerNorm(50), nn.Linear(50, 10)), 0.1)
        >>> optimizer = torch.optim.AdamW(decay_groups(net, 0.05), lr=1e-3)
        >>> [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
        [(0.05, 2), (0.0, 4)]
    """
    if isinstance(weight_decay, bool) or not isinstance(weight_decay, numbers.Real):
        raise TypeError(f"weight_decay: expected a number of at least 0, found {weight_decay!r}.")
    if not 0 <= float(weight_decay) < math.inf:
        raise ValueError(f"weight_decay: expected a number of at least 0, found {weight_decay!r}.")
    if taken := sorted({"params"} & options.keys()):
        raise ValueError(f"decay_groups: expected options of the optimizer, found {taken[0]!r}, which is filled in here.")
    thetas = {id(one.theta) for one in converted_tensors(model)}
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _NORMS) or type(module).__name__.endswith("Norm")
        for parameter in module._parameters.values()
    }
    decays, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        bias = "bias" in name.rpartition(".")[2]
        dense = parameter.ndim >= 2 and not bias and id(parameter) not in norms
        (decays if id(parameter) in thetas or dense else others).append(parameter)
    if not decays and not others:
        raise ValueError(f"decay_groups: {type(model).__name__} has no parameter that requires a gradient.")
    groups: list[dict[str, Any]] = [
        {"params": decays, "weight_decay": float(weight_decay), **options},
        {"params": others, "weight_decay": 0.0, **options},
    ]
    return [group for group in groups if group["params"]]
