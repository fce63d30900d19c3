"""Ranks that train one network have to start with the same connections: they draw alike, and never communicate about it.

:func:`agree` compares the ranks of a process group once. It runs when DistributedDataParallel is made around a converted
network (:mod:`lightning_deepr.weights.ddp`), and when a callback begins. DDP gives every rank the parameters of rank 0; the
places, which are no parameters, are taken from rank 0 at the same moment.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deepr import _version
from lightning_deepr.algorithm import randomness
from lightning_deepr.weights.find import Converted

APART = "If each rank trains a network (or a part of one) of its own, give the callback check_ranks_every_n_steps=0."
_PIECE = 1 << 20  # entries that are hashed at once

# a parametrization -> the DDP that was made around its module
_wrapped: weakref.WeakKeyDictionary[Any, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def is_distributed() -> bool:
    """Whether there is a process group with more than one rank."""
    distributed = sys.modules.get("torch.distributed")
    return (
        distributed is not None
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


# -- the group of the ranks that train one network ----------


def note_ddp(tensors: Iterable[Converted], ddp: nn.Module) -> None:
    """Record the DDP that was made around converted tensors. (`attach` may get the network inside of it.)"""
    for one in tensors:
        _wrapped[one.slots] = weakref.ref(ddp)


def ddp_of(net: nn.Module, tensors: Iterable[Converted]) -> nn.Module | None:
    """Return the DDP in or around a network that averages the gradients of its converted tensors, or None."""
    mine = list(tensors)
    for one in mine:
        found = _wrapped.get(one.slots)
        if found is not None and (ddp := found()) is not None:
            return ddp
    holders = {id(one.holder) for one in mine}
    for part in net.modules():
        if isinstance(part, nn.parallel.DistributedDataParallel) and any(id(inner) in holders for inner in part.modules()):
            return part
    return None


def group_of(net: nn.Module, tensors: Iterable[Converted]) -> tuple[Any, bool]:
    """Return the process group whose ranks train a network together, and whether it is DDP's (else the default one).

    None: there is no group with more than one rank.
    """
    if not is_distributed():
        return None, False
    ddp = ddp_of(net, tensors)
    group: Any = torch.distributed.group.WORLD if ddp is None else ddp.process_group
    return (group if torch.distributed.get_world_size(group) > 1 else None), ddp is not None


# -- what is compared ----------


def agree(tensors: Sequence[Converted], group: Any, *, take: bool) -> None:
    """Compare the converted tensors, and the callbacks at work on them, over the ranks of a group. All ranks have to call it.

    Args:
        tensors: the converted tensors of this rank.
        group: the process group.
        take: whether other connections and seeds than rank 0's are replaced by rank 0's, which is said once. What can't be
            replaced is always refused.

    Raises:
        RuntimeError: on every rank, with the same words: which rank and tensor differs, what was expected, found and what to
            do.
    """
    distributed = torch.distributed
    if distributed.get_world_size(group) <= 1:
        return
    mine = {"version": _version.__version__, "tensors": [_of_tensor(one) for one in tensors], "callbacks": _callbacks(tensors)}
    everyone: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(everyone, mine, group=group)
    problem = _refusal(everyone)
    if problem is not None:
        raise RuntimeError(problem)
    first = everyone[0]
    others = [one["name"] for one in first["tensors"] if len({_sums(rank, one["name"]) for rank in everyone}) > 1]
    free = [[{key: one[key] for key in ("seed", "total_steps")} for one in rank["callbacks"]] for rank in everyone]
    seeds = any(one != free[0] for one in free)
    if not (others or seeds):
        return
    ranks = [
        rank
        for rank, one in enumerate(everyone)
        if free[rank] != free[0] or any(_sums(one, name) != _sums(first, name) for name in others)
    ]
    if not take:
        raise RuntimeError(_unequal(others, ranks, free))
    source = distributed.get_global_rank(group, 0)
    is_first = distributed.get_rank(group) == 0
    found: list[Any] = [state_of(tensors, set(others)) if is_first else None]
    distributed.broadcast_object_list(found, src=source, group=group)
    if not is_first:
        load(tensors, found[0])
        for callback, terms in zip(owners(tensors), free[0], strict=True):
            callback.take_rank_terms(terms)
    else:
        what = ([f"The connections of {_listed(others)}"] if others else []) + (
            ["the callback's seed or length"] if seeds else []
        )
        warnings.warn(
            f"{' and '.join(what)} differed on rank {_numbers(ranks)} from rank 0 ({_seeds(free, ranks)}): all ranks take "
            "those of rank 0, as DistributedDataParallel takes its parameters. The same seed and weights on every rank avoid "
            "this.",
            stacklevel=2,
        )


def _of_tensor(one: Converted) -> dict[str, Any]:
    state: dict[str, Any] = {}
    one.slots._save_to_state_dict(state, "", False)
    slots = one.slots
    return {
        "name": one.name,
        "kind": type(slots).__name__,
        "shape": tuple(slots.shape),
        "connections": slots.wanted,
        "dtype": str(slots.weight_dtype),
        "sums": {
            key: checksum(value) for key, value in state.items() if key not in _NOT_COMPARED and isinstance(value, Tensor)
        },
    }


_NOT_COMPARED = ("pool", "fingerprint", "weight")  # the number of a pool counts the pools of its process


def _sums(rank: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    return tuple(sorted(next(one for one in rank["tensors"] if one["name"] == name)["sums"].items()))


def checksum(values: Tensor) -> int:
    """Hash a tensor into an integer below 2**62. The order of its values matters; it takes O(1) memory."""
    values = values.detach().reshape(-1)
    if values.is_floating_point():
        values = values.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    total = values.numel()
    for start in range(0, values.numel(), _PIECE):
        piece = values[start : start + _PIECE].long()
        numbers = torch.arange(start, start + piece.numel(), device=piece.device)
        total += int(randomness.bits(randomness.key(0, 1), piece * 31 + numbers).sum())
    return total & (1 << 62) - 1


def owners(tensors: Sequence[Converted]) -> list[Any]:
    """List the callbacks at work on some tensors, each once, in the order of the tensors."""
    return list({id(owner): owner for one in tensors if (owner := one.slots.owner()) is not None}.values())


def _callbacks(tensors: Sequence[Converted]) -> list[dict[str, Any]]:
    return [owner.rank_terms() for owner in owners(tensors) if hasattr(owner, "rank_terms")]


# -- refusals ----------


def _refusal(everyone: Sequence[dict[str, Any]]) -> str | None:
    """Say what differs that can't be replaced, or return None. Every rank comes to the same words."""
    first = everyone[0]
    for rank, other in enumerate(everyone):
        if other["version"] != first["version"]:
            return (
                f"Rank {rank} runs lightning-deepr {other['version']}, rank 0 {first['version']}: expected one version on all "
                "ranks, since its draws decide the connections. Install the same one everywhere."
            )
    for rank, other in enumerate(everyone):
        names, theirs = ([one["name"] for one in each["tensors"]] for each in (first, other))
        if names != theirs:
            return (
                f"The converted tensors differ between the ranks: expected {_listed(names) or 'none'} as on rank 0, found "
                f"{_listed(theirs) or 'none'} on rank {rank}. Convert the same layers, in the same order, on every rank. "
                f"{APART}"
            )
        for one, two in zip(first["tensors"], other["tensors"], strict=True):
            for what in ("kind", "shape", "connections", "dtype"):
                if one[what] != two[what]:
                    return (
                        f"`{one['name']}`: expected the same {what} on every rank, found {one[what]} on rank 0 and {two[what]} "
                        f"on rank {rank}. Convert with the same connectivity, distribution and scope on every rank. {APART}"
                    )
        mine, theirs = first["callbacks"], other["callbacks"]
        if len(mine) != len(theirs):
            return (
                f"{len(mine)} callbacks are at work on the network of rank 0, {len(theirs)} on that of rank {rank}: a rank "
                "that does not rewire computes with other connections. Attach the same callbacks on every rank, or on none "
                f"before the network is wrapped. {APART}"
            )
        for one, two in zip(mine, theirs, strict=True):
            for what in sorted(one.keys() | two.keys() - {"seed", "total_steps"}):
                if what not in ("seed", "total_steps") and one.get(what) != two.get(what):
                    return (
                        f"The callback's {what}: expected the same on every rank, found {one.get(what)} on rank 0 and "
                        f"{two.get(what)} on rank {rank}. Its steps and settings decide when and how a rank rewires: load the "
                        f"same checkpoint and give the same arguments on every rank. {APART}"
                    )
    return None


def _unequal(names: Sequence[str], ranks: Sequence[int], free: Sequence[Any]) -> str:
    which = f"{_listed(names)} has other connections" if names else "The callback has another seed or length"
    return (
        f"{which} on rank {_numbers(ranks)} than on rank 0 ({_seeds(free, ranks)}): expected the same seed and the same "
        f'weights (for init="largest") on every rank. Load the weights first, or wrap the network in DistributedDataParallel '
        f"before the callback is attached: all ranks then take rank 0's connections. {APART}"
    )


def _seeds(free: Sequence[Sequence[Mapping[str, Any]]], ranks: Sequence[int]) -> str:
    shown = [f"rank {rank}: {[(one['seed'], one['total_steps']) for one in free[rank]]}" for rank in (0, *ranks[:2])]
    return "seed and total steps of the callbacks: " + ", ".join(shown) if free[0] else "no callback yet"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _numbers(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:5])) + (", ..." if len(ranks) > 5 else "")


# -- taking over ----------


def state_of(tensors: Iterable[Converted], names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """Return what a checkpoint has of the connections of some tensors, on the CPU: places, births, signs.

    Args:
        tensors: the tensors.
        names: those that are wanted; None: all.
    """
    wanted = None if names is None else set(names)
    found: dict[str, dict[str, Any]] = {}
    for one in tensors:
        if wanted is None or one.name in wanted:
            state: dict[str, Any] = {}
            one.slots._save_to_state_dict(state, "", False)
            found[one.name] = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in state.items()}
    return found


def load(tensors: Iterable[Converted], states: Mapping[str, Mapping[str, Any]]) -> None:
    """Give tensors the connections of another rank.

    Raises:
        RuntimeError: they do not fit.
    """
    for one in tensors:
        if one.name in states:
            errors: list[str] = []
            one.slots._load_from_state_dict(dict(states[one.name]), "", {}, True, errors, [], errors)
            if errors:
                raise RuntimeError(f"`{one.name}`: the connections of another rank do not fit. {errors[0]}")
