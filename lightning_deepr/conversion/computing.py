"""What a converted layer computes with: its connections, or a weight that is built for each pass."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_deepr.weights.find import Converted, stacked_upon


def computes(converted: Converted) -> str:
    """Return "sparse" or "dense" (connections are stored, and each forward pass builds the weight).

    A layer that runs its author's forward computes sparsely if that passes the weight to ``F.linear``, and with a built weight
    if it computes with a function of the weight. Before its first pass this is not known, and the guess of the conversion
    holds.
    """
    slots = converted.slots
    if stacked_upon(converted.holder):
        return "dense"
    if slots.layer.runs_own(converted.module) and slots.used:
        return "dense" if slots.used == "dense" else slots.compute
    return slots.compute


def tell_own_forwards(chosen: Sequence[Any], policy: str) -> None:
    """Warn once of layers that can't compute sparsely because their classes bring a forward of their own.

    Args:
        chosen: the tensors (:class:`lightning_deepr.conversion.selection.Candidate`) that will be converted.
        policy: "auto" | "dense" | "sparse" | "tune".
    """
    names = [f"`{one.name}` ({type(one.module).__name__})" for one in chosen if policy != "dense" and _builds(one)]
    if names:
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(
            f"{listed}: these layers have a forward of their own, which computes with values of the weight. Their connections "
            'are stored sparsely and rewired, but each forward pass builds the dense weight (compute="dense").',
            stacklevel=4,
        )


def warn_of_ddp(root: nn.Module, chosen: Sequence[Any]) -> None:
    """Warn if DDP is around tensors that will be converted: it sums the gradients of the old parameters, not of theta."""
    mine = {one.module for one in chosen}
    for part in root.modules():
        if isinstance(part, nn.parallel.DistributedDataParallel) and not mine.isdisjoint(part.modules()):
            warnings.warn(
                "A weight within DistributedDataParallel is converted: its new parameter, theta, is not known to DDP, so its "
                "gradients would differ between the ranks. Convert (or load) first, then wrap the network in DDP; for "
                "evaluation alone this does not matter.",
                stacklevel=4,
            )
            return


def _builds(one: Any) -> bool:
    """Tell whether a layer of a kind with a sparse forward brings another one. (A linear one may pass its weight on.)"""
    record = one.kind.compute
    module: nn.Module = one.module
    if record.forward is None or one.kind.linear or one.tensor_name != "weight":
        return False
    plain: Any = next((kind for kind in type(module).__mro__ if kind in one.kind.classes), None)
    return plain is not None and (type(module).forward is not plain.forward or "forward" in vars(module))
