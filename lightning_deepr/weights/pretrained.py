"""``save_pretrained`` of a converted network (transformers, PEFT, diffusers) saves dense weights beside the connections.

``from_pretrained`` builds the network anew, dense, and skips names that it does not know: a file of connections alone would
leave the weights as they were drawn, with no error. So what ``save_pretrained`` writes has the dense weight, too, under its own
name, and the file loads without this package. A converted network finds its connections in it, and does not need the weight.
PEFT only ever loads adapters into layers that it has just made: its files have the dense weight alone. So have those of an
adapted network, as the merged weight; :func:`lightning_deepr.save_adapter` writes the difference.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

LARGEST = 1 << 34  # bytes of a dense weight
_DEEPEST = 60  # frames: Module.state_dict calls itself for each level of modules
_LIBRARIES = ("transformers", "peft", "diffusers")


def saving() -> str:
    """Return the library whose ``save_pretrained`` asks for the ``state_dict``; "": none does."""
    frame: Any = sys._getframe(1)
    for _ in range(_DEEPEST):
        if frame is None:
            return ""
        if frame.f_code.co_name == "save_pretrained":
            library = str(frame.f_globals.get("__name__", "")).partition(".")[0]
            return library if library in _LIBRARIES else ""
        frame = frame.f_back
    return ""


def add_dense_weight(slots: Any, destination: dict[str, Any], prefix: str) -> None:
    """Add the dense weight to a ``state_dict`` that ``save_pretrained`` asks for.

    Args:
        slots: the parametrization.
        destination: the ``state_dict``, with theta.
        prefix: that of the parametrization, ``layer.parametrizations.weight.0.``.

    Raises:
        RuntimeError: the weight would take more than 16 GiB.
    """
    head = prefix.removesuffix("0.")
    theta = destination.get(head + "original")
    library = saving() if theta is not None else ""
    if theta is None or not library:
        return
    if slots.total * slots.weight_dtype.itemsize > LARGEST:
        raise RuntimeError(
            f"save_pretrained: `{slots.name}` of shape {tuple(slots.shape)} would take more than 16 GiB as the dense weight "
            "that `from_pretrained` expects. `lightning_deepr.save_sparse(module, path)` writes the connections alone."
        )
    path, _, tensor_name = head.removesuffix(".").rpartition("parametrizations.")
    with torch.no_grad():
        destination[path + tensor_name] = slots.whole(theta.detach())
    if library == "peft" or slots.adapts:  # (with a base, the file would have every weight twice)
        for name in [name for name in destination if name.startswith(head)]:
            del destination[name]
