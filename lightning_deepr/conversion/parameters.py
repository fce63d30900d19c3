"""How many of all parameters of a network stayed dense, and why."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_deepr.conversion.barred import COMPLEX, EMPTY, LAZY, SHARDED, is_bias
from lightning_deepr.conversion.selection import Candidate, candidates
from lightning_deepr.weights.base import Parametrization
from lightning_deepr.weights.find import converted_tensors
from lightning_deepr.weights.names import paths_of

VECTOR = "bias or norm"  # and every other parameter of fewer than two dimensions
TIED = "tied"
NOT_SELECTED = "excluded or not named"
_REASONS = {  # a part of Candidate.left_out: the reason under which its parameters are counted
    "tied": TIED,
    "torchmetrics.Metric": "metric",
    "another parametrization": "another parametrization",
    "not a known kind": "unknown kind of layer",
    "converted only when named": "only when named",
    "no tensor of a plain": "reparametrized by others",
    "requires_grad=False": "frozen",
    LAZY: "lazy",
    COMPLEX: "complex",
    EMPTY: "empty",
    SHARDED: "sharded",
}


def count_parameters(root: nn.Module) -> tuple[int, dict[str, int]]:
    """Count the parameters of a network as if it were dense, and those that are dense, by reason.

    Args:
        root: a network with or without converted tensors. A converted tensor counts with its N places, and a parameter that is
            reached by several names counts once. A lazy parameter has no size yet and counts as 0.

    Returns:
        the number of all parameters, and {reason: number of dense parameters}, the largest first.
    """
    ours = {id(converted.theta) for converted in converted_tensors(root)}
    listed = {(candidate.module, candidate.tensor_name): candidate for candidate in candidates(root)}
    holders: dict[int, int] = {}
    found: dict[int, tuple[str, int]] = {}
    for module in paths_of(root):
        if isinstance(module, Parametrization):
            continue  # a frozen weight that is adapted: it counts with its places
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in ours:
                continue
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
            size = 0 if is_lazy(parameter) else parameter.numel()
            dimensions = 0 if is_lazy(parameter) else parameter.dim()
            if isinstance(module, parametrize.ParametrizationList):
                reason = "another parametrization" if dimensions >= 2 else VECTOR
            else:
                reason = _reason(listed.get((module, name)), name, dimensions)
            found.setdefault(id(parameter), (reason, size))
    dense: dict[str, int] = {}
    for identity, (reason, size) in found.items():
        reason = TIED if holders[identity] > 1 else reason
        dense[reason] = dense.get(reason, 0) + size
    everything = sum(dense.values()) + sum({one.slots: one.slots.total for one in converted_tensors(root)}.values())
    return everything, dict(sorted(dense.items(), key=lambda item: (-item[1], item[0])))


def count_adapted(root: nn.Module) -> dict[str, int] | None:
    """Count the adapted, the frozen and the trained parameters of an adapted network; None: it has no adapted weight."""
    adapted = sum(one.slots.total for one in converted_tensors(root) if one.slots.adapts)
    if not adapted:
        return None
    sizes = [(0 if is_lazy(one) else one.numel(), one.requires_grad) for one in root.parameters()]
    return {
        "adapted": adapted,
        "frozen": sum(size for size, trained in sizes if not trained),
        "trainable": sum(size for size, trained in sizes if trained),
    }


def _reason(candidate: Candidate | None, name: str, dimensions: int) -> str:
    if candidate is None:
        return VECTOR if dimensions < 2 or is_bias(name) else "no real numbers"
    if candidate.by_own_name:
        return VECTOR if is_bias(name) else "no weight by its name"
    if not candidate.left_out:
        return NOT_SELECTED
    return next((reason for part, reason in _REASONS.items() if part in candidate.left_out), candidate.left_out)
