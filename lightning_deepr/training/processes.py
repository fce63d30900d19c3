"""Networks in shared memory (``net.share_memory()``), which forked processes read or train beside this one.

theta, places and signs are shared. What is not: the order of the connections that sparse compute keeps, so that such a network
computes densely (``KSlots.moved``), and what a callback knows of the connections, so that one process rewires them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from lightning_deepr.training.tracked import TrackedTensor
from lightning_deepr.weights.find import Converted


def _lies_shared(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and type(tensor.data) is Tensor and tensor.is_shared()


def refuse_shared(tensors: Iterable[Converted]) -> None:
    """Refuse thetas in shared memory whose places are not there, too.

    Raises:
        ValueError: the message names the tensor and says what to do.
    """
    for name, _, _, slots in tensors:
        holder = slots.holder_of_theta()
        if holder is None or not _lies_shared(holder.original):
            continue
        if slots.shares:
            raise ValueError(
                f'`{name}`: expected memory of this process, found theta in shared memory: with scope="global" a rewiring '
                'gives each layer new tensors of places, which other processes do not see. Use scope="layer", or no '
                "share_memory()."
            )
        if not _lies_shared(getattr(slots, "places", slots.signs)):
            raise ValueError(
                f"`{name}`: expected theta and its places in one kind of memory, found theta in shared memory and places that "
                "other processes do not see. Call `net.share_memory()` on the network, not on its parameters."
            )


def refuse_other_process(tensors: Iterable[TrackedTensor], method: str) -> None:
    """Refuse to rewire a network in shared memory in a forked process: another one rewires it, and neither would know.

    Raises:
        RuntimeError: a theta lies in shared memory.
    """
    for tensor in tensors:
        if _lies_shared(tensor.converted.theta):
            raise RuntimeError(
                f"`{tensor.name}` lies in shared memory, and {method} was attached in another process: expected one process "
                "that rewires, found a step in a process that was forked from it. Let the others compute gradients or "
                "outputs, and step here; or give each process a network of its own (DistributedDataParallel)."
            )
