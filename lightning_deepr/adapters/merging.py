"""Merge an adapter into the frozen weights, and take it out again bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_deepr.adapters.adapter import adapted_tensors
from lightning_deepr.adapters.installing import refuse_work
from lightning_deepr.weights import ranks


def merge(net: nn.Module) -> nn.Module:
    """Write the difference into the frozen weights, in place: a pass then costs what the pretrained network's does.

    The K overwritten values are kept for :func:`unmerge`. A merged network is for inference. Its ``state_dict`` has the frozen
    weights as they were. ``densify(copy.deepcopy(net))`` is a merged network without anything of this package.

    Args:
        net: an adapted network.

    Returns:
        the network itself.

    Raises:
        ValueError: there is no adapter.
        RuntimeError: it is merged already, a callback is at work on it, or it is under DDP or ``torch.compile``.

    Example::

        >>> from lightning_deepr import adapt
        >>> net = merge(adapt(nn.Linear(100, 10), 0.05))
        >>> unmerge(net).parametrizations.weight[0].is_merged
        False
    """
    adapted = adapted_tensors(net)
    _refuse(net, "merge")
    for one, slots in adapted:
        if slots.is_merged:
            raise RuntimeError(f"merge: `{one.name}` is merged already: expected an adapter apart from its weights.")
    with torch.no_grad():
        for one, slots in adapted:
            base, theta = slots.base, slots.own(one.theta.detach())
            kept = base.take(slots.places)
            _write(base, slots.places, (kept.to(theta.dtype) + theta * slots.signs).to(base.dtype))
            slots.merged_over = kept
    return net


def unmerge(net: nn.Module) -> nn.Module:
    """Undo :func:`merge`: the frozen weights are what they were, bit for bit.

    Returns:
        the network itself.

    Raises:
        ValueError: there is no adapter.
        RuntimeError: it is not merged.
    """
    adapted = adapted_tensors(net)
    _refuse(net, "unmerge")
    for one, slots in adapted:
        if slots.merged_over is None:
            raise RuntimeError(f"unmerge: `{one.name}` is not merged: expected a network after merge(net).")
    with torch.no_grad():
        for _, slots in adapted:
            assert slots.merged_over is not None
            _write(slots.base, slots.places, slots.merged_over)
            slots.merged_over = None
    return net


def _write(base: Tensor, places: Tensor, values: Tensor) -> None:
    """Set the entries of ``base`` at flat ``places``, as ``Tensor.put_`` does.

    ``put_`` raises under ``torch.use_deterministic_algorithms``, also where each place occurs once.
    """
    if base.is_contiguous():
        base.view(-1)[places] = values
    else:
        base[torch.unravel_index(places, base.shape)] = values


def _refuse(net: nn.Module, what: str) -> None:
    refuse_work(net)
    if ranks.ddp_of(net, [one for one, _ in adapted_tensors(net)]) is not None:
        raise RuntimeError(
            f"{what}: the network is within DistributedDataParallel, whose ranks would have different weights if only some "
            f"call this. Expected the plain network: {what} it before it is wrapped, or in a process of its own."
        )
    for name, part in net.named_modules():
        if type(part).__name__ == "OptimizedModule" or part._compiled_call_impl is not None:
            raise RuntimeError(
                f"{what}: `{name or type(part).__name__}` is compiled: a compiled graph may hold the weights as they are. "
                f"Expected the plain network: {what} it before torch.compile, or compile it again."
            )
