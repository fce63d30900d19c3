"""Several networks in one: theta stacked for ``torch.func.vmap``. Then the places have to be stacked, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch

from lightning_deepr.compute.eager import transforms


def is_stacked(theta: Tensor, slots: Any) -> bool:
    """Tell whether ``vmap`` maps over a weight's theta or places, so that the dense weight of each network has to be built.

    Args:
        theta: the parameter, as a forward pass finds it.
        slots: its :class:`lightning_deepr.weights.base.Parametrization`.

    Raises:
        RuntimeError: ``vmap`` maps over theta, but not over the places and signs: each network but one would compute with the
            places of another.
    """
    if not in_transform():
        return False
    mapped = _levels(theta)
    fixed = [name for name in slots.placing if not mapped <= _levels(getattr(slots, name))]
    if mapped and (fixed or slots.shares):
        fixed = fixed or ["pool"]
        raise RuntimeError(
            f"torch.func.vmap maps over theta of a converted weight (shape {tuple(slots.shape)}), but not over its "
            f"{' and '.join(fixed)}: expected both, or every network would compute with the {fixed[0]} of one of them. "
            "Stack the networks by lightning_deepr.weights.stack.stack_module_state(networks) instead of torch.func's. "
            "Variants of one network: stack_module_state([network] * n), and replace theta in the result."
            + (' A network with scope="global" can\'t be stacked.' if slots.shares else "")
        )
    return bool(mapped) or any(_levels(getattr(slots, name)) for name in slots.placing)


def in_transform() -> bool:
    """Tell whether a transform of ``torch.func`` runs. ``torch.compile`` asks while it traces, within the transform."""
    return transforms() is not None


# what `torch.compiler.assume_constant_result` sets; the decorator imports torch's whole compiler
in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _levels(tensor: Tensor) -> set[int]:
    """Return the levels of the ``vmap`` calls that map over a tensor."""
    if torch.compiler.is_dynamo_compiling():
        return {0} if _functorch.is_batchedtensor(tensor) else set()  # a tracer can't look any deeper
    found = set()
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            found.add(_functorch.maybe_get_level(tensor))
        tensor = _functorch.get_unwrapped(tensor)
    return found
