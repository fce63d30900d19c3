"""Uneven data: ranks that have run out of it get the connections of those that went on (torch's ``Join``).

A rank without data stands still while the others step and rewire. When all are done, DDP gives every rank the parameters of the
last one. This module gives it the places, the steps of the callback and the optimizer's state of the converted tensors, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.join import JoinHook

from lightning_deepr.weights import ranks
from lightning_deepr.weights.find import converted_tensors


class JoinedConnections:
    """The ``join_hook`` of a DDP around converted tensors: DDP's own, and then the connections.

    Args:
        ddp: the DistributedDataParallel.
    """

    def __init__(self, ddp: nn.parallel.DistributedDataParallel) -> None:
        self.ddp = ddp

    def __call__(self, **options: Any) -> JoinHook:
        own: JoinHook = type(self.ddp).join_hook(self.ddp, **options)
        return _Hook(own, self.ddp)


class _Hook(JoinHook):
    def __init__(self, own: JoinHook, ddp: nn.parallel.DistributedDataParallel) -> None:
        self.own, self.ddp = own, ddp

    def main_hook(self) -> None:
        self.own.main_hook()

    def post_hook(self, is_last_joiner: bool) -> None:
        self.own.post_hook(is_last_joiner)
        distributed = torch.distributed
        group: Any = self.ddp.process_group
        rank, size = distributed.get_rank(group), distributed.get_world_size(group)
        last: list[Any] = [None] * size
        distributed.all_gather_object(last, is_last_joiner, group=group)
        source = max((number for number, is_last in enumerate(last) if is_last), default=0)
        take_from(self.ddp, source, rank, group)


def take_from(net: nn.Module, source: int, rank: int, group: Any) -> None:
    """Give all ranks the connections of one of them, with the callback's steps and the optimizer's state of theta.

    Args:
        net: the network.
        source: the rank within the group whose connections are taken.
        rank: this rank within the group.
        group: the process group.
    """
    tensors = list(converted_tensors(net))
    owners = [owner for owner in ranks.owners(tensors) if hasattr(owner, "rank_state")]
    found: list[Any] = [None]
    if rank == source:
        found = [(ranks.state_of(tensors), [owner.rank_state() for owner in owners])]
    torch.distributed.broadcast_object_list(found, src=torch.distributed.get_global_rank(group, source), group=group)
    if rank != source:
        states, callbacks = found[0]
        ranks.load(tensors, states)
        for owner, state in zip(owners, callbacks, strict=True):
            owner.take_rank_state(state)
