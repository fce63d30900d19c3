"""theta whole on every rank beside a network that FSDP shards: theta has K values, so there is little to shard.

FSDP leaves out the parameters that it is told to ignore, and then nobody averages their gradients. :func:`replicate` does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deepr.weights import ranks
from lightning_deepr.weights.find import Converted, converted_tensors


def replicate(net: nn.Module, process_group: Any = None) -> set[nn.Parameter]:
    """Keep theta of every converted tensor whole on all ranks, and average its gradient over them. All ranks have to call it.

    Call it after the conversion, and give what it returns to FSDP. All ranks take theta and the connections of rank 0. At the
    end of each backward pass one all-reduce averages the gradients of all thetas, as FSDP does for its own parameters: before
    clipping, GradScaler and the optimizer see them. A rank that did not reach a layer counts with 0. Averaging is repeated in
    each backward pass of an accumulation, which gives the same mean.

    Without a process group of several ranks nothing is communicated.

    Args:
        net: a network with converted tensors.
        process_group: the ranks that train with different data; None: all. Give it if FSDP's mesh has fewer ranks.

    Returns:
        the parameters theta: ``fully_shard(..., ignored_params=...)`` (FSDP2), or ``FSDP(..., ignored_states=...)`` (FSDP1,
        with ``use_orig_params=True``).

    Raises:
        ValueError: nothing is converted, or a theta is sharded already.
        RuntimeError: the ranks converted different layers or numbers of connections.

    Example::

        >>> from lightning_deepr import DeepR, sparsify
        >>> net = sparsify(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 5)), 0.1)
        >>> thetas = replicate(net)  # then: fully_shard(net, mesh=mesh, ignored_params=thetas)
        >>> sorted(theta.numel() for theta in thetas)
        [99, 138]
        >>> rewiring = DeepR().attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
    """
    tensors = list(converted_tensors(net))
    if not tensors:
        raise ValueError(
            f"replicate expects a converted network, found {type(net).__name__} without a converted tensor. Call "
            "`sparsify(net, connectivity)` first, then replicate, then FSDP."
        )
    thetas = {one.theta for one in tensors}
    for one in tensors:
        if type(one.theta) is not nn.Parameter or one.theta.numel() == 0 or _is_dtensor(one.theta):
            raise ValueError(
                f"`{one.name}`: theta: expected a plain parameter, found a {type(one.theta).__name__}: it is sharded already. "
                "Call replicate before fully_shard or FSDP, and give them what it returns (ignored_params, ignored_states)."
            )
    if not ranks.is_distributed():
        return thetas
    group: Any = torch.distributed.group.WORLD if process_group is None else process_group
    _refuse_other_mesh(net, group)
    tensors = [one for one in tensors if not one.slots.is_block]
    if torch.distributed.get_world_size(group) > 1 and tensors and not is_replicated(tensors):
        ranks.agree(tensors, group, take=True)
        source = torch.distributed.get_global_rank(group, 0)
        mean = GradientMean(tensors, group)
        for theta in mean.thetas():
            torch.distributed.broadcast(theta.detach(), src=source, group=group)
        mean.begin()
    return thetas


def ensure(net: nn.Module, tensors: Sequence[Converted]) -> None:
    """Replicate the thetas of a network that FSDP shards, if nobody has asked for it: their gradients would differ."""
    if tensors and _is_sharded(net) and not is_replicated(tensors) and ranks.ddp_of(net, tensors) is None:
        replicate(net)


def is_replicated(tensors: Iterable[Converted]) -> bool:
    """Whether the gradients of all these tensors are averaged by :func:`replicate`."""
    return all(one.slots.replicated is not None or one.slots.is_block for one in tensors)


def _is_sharded(net: nn.Module) -> bool:
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(part, (FSDPModule, FullyShardedDataParallel)) for part in net.modules())


def _is_dtensor(value: Tensor) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(value, tensor.DTensor)


def _refuse_other_mesh(net: nn.Module, group: Any) -> None:
    size = torch.distributed.get_world_size(group)
    for name, parameter in net.named_parameters():
        if _is_dtensor(parameter) and (found := parameter.device_mesh.size()) != size:  # type: ignore[attr-defined]
            raise ValueError(
                f"`{name}` is sharded over {found} ranks, but theta would be averaged over {size}: expected one group of "
                "ranks. Call replicate(net, process_group) with the group that gets different data, before attach."
            )


class GradientMean:
    """The mean of theta's gradients over the ranks, at the end of each backward pass, in one all-reduce per dtype and device.

    Args:
        tensors: the converted tensors.
        group: the process group.
    """

    def __init__(self, tensors: Sequence[Converted], group: Any) -> None:
        self.tensors, self.group = tensors, group
        self.size = torch.distributed.get_world_size(group)
        self.is_due = False

    def thetas(self) -> list[nn.Parameter]:
        return list({id(one.theta): one.theta for one in self.tensors}.values())

    def begin(self) -> None:
        """Register the hooks."""
        for theta in self.thetas():
            trainable = theta.requires_grad
            theta.requires_grad_(True)  # torch requires this to register a hook
            theta.register_post_accumulate_grad_hook(self._note)
            theta.requires_grad_(trainable)
        for one in self.tensors:
            one.slots.replicated = self

    def _note(self, _: Tensor) -> None:
        if not self.is_due:
            self.is_due = True
            # torch's way (DDP's and FSDP's, too) to be called when the whole backward pass is over
            torch.autograd.Variable._execution_engine.queue_callback(self._average)  # type: ignore[attr-defined]

    @torch.no_grad()
    def _average(self) -> None:
        self.is_due = False
        kinds: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for theta in self.thetas():
            if theta.requires_grad:
                kinds.setdefault((theta.dtype, theta.device), []).append(theta)
        for thetas in kinds.values():
            parts = [torch.zeros_like(theta) if theta.grad is None else theta.grad for theta in thetas]
            there = torch.tensor([theta.grad is not None for theta in thetas], dtype=parts[0].dtype, device=parts[0].device)
            flat = torch.cat([*(part.reshape(-1) for part in parts), there])
            torch.distributed.all_reduce(flat, group=self.group)
            *sums, reached = flat.split([*(theta.numel() for theta in thetas), len(thetas)])
            for theta, total, count in zip(thetas, sums, reached.tolist(), strict=True):
                if count:  # a rank that did not reach this theta takes the step of the others, too
                    mean = total.div_(self.size).view_as(theta)
                    theta.grad = mean.clone() if theta.grad is None else theta.grad.copy_(mean)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy's thetas have no hooks

    def __reduce__(self) -> Any:
        return type(None), ()
