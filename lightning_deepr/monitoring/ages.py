"""How old connections are."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_deepr.weights.find import Converted, converted_tensors
from lightning_deepr.weights.k_slots import KSlots


def ages(module: nn.Module, step: int | None = None) -> dict[str, Tensor]:
    """Return how many steps each connection has lived through since its birth.

    A connection that was born in the last step has the age 0. Connections of the start count from the first step on.

    Args:
        module: a converted network.
        step: the number of steps of the training. None: a callback at work knows it; otherwise the last step in which any
            connection of the network was born counts as the last one.

    Returns:
        {tensor name: int64 [K], in the order of the slots, as in :func:`lightning_deepr.connections`}. Tensors with a theta for
        every place (soft-DEEP R, pruning) keep no births and are left out.

    Raises:
        ValueError: the network has no converted tensor with births, or ``step`` comes before a birth.

    Example::

        >>> import torch
        >>> from lightning_deepr import DeepR, sparsify
        >>> net = sparsify(nn.Linear(100, 10), 0.05)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> rewiring = DeepR().attach(net, optimizer)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     net(torch.ones(4, 100)).square().sum().backward()
        ...     optimizer.step()
        >>> ages(net)["weight"].shape, int(ages(net)["weight"].max()) <= 3
        (torch.Size([50]), True)
    """
    found = [converted for converted in converted_tensors(module) if isinstance(converted.slots, KSlots)]
    if not found:
        raise ValueError(
            f"ages: expected a network with K slots per tensor (sparsify, DeepR, SET, RigL), found {type(module).__name__} "
            "without one."
        )
    last = max(converted.slots.last_birth() for converted in found)
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step <= last):
        raise ValueError(
            f"ages: step: expected an int of at least {last + 1}, as connections were born in step {last}, found {step!r}."
        )
    return {one.name: (_steps_of(one, last) if step is None else step) - 1 - _births(one) for one in found}


def _births(converted: Converted) -> Tensor:
    assert isinstance(converted.slots, KSlots)
    return converted.slots.born


def _steps_of(converted: Converted, last: int) -> int:
    owner = converted.slots.owner()
    known = [tensor.step for tensor in getattr(owner, "tracked", ()) if tensor.weight is converted.slots]
    return max([*known, last + 1])
