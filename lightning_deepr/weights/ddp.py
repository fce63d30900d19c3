"""Notice every DistributedDataParallel that is made around a converted network."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_deepr.weights import ranks
from lightning_deepr.weights.find import converted_tensors

_registered: list[Any] = []


def watch_for_ddp() -> None:
    """Register a torch hook that reports every new DDP. The first conversion of a weight calls this."""
    if not _registered:
        _registered.append(nn.modules.module.register_module_module_registration_hook(_at_wrapping))


def _at_wrapping(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    # DDP's constructor runs on all ranks at once, and then gives all of them the parameters of rank 0: the time to compare
    if name != "module" or module is None or not isinstance(parent, nn.parallel.DistributedDataParallel):
        return
    tensors = list(converted_tensors(module))
    group = vars(parent).get("process_group")
    if not tensors or group is None:
        return
    from lightning_deepr.weights.joining import JoinedConnections  # needs a torch with torch.distributed

    ranks.note_ddp(tensors, parent)
    parent.join_hook = JoinedConnections(parent)  # type: ignore[method-assign, assignment]
    ranks.agree(tensors, group, take=True)
