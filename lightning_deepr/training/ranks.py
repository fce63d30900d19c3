"""The callback's part in distributed runs: what has to be equal on all ranks, and the optional check that it stays so.

Ranks that start alike and take the same steps stay alike without a word (see :mod:`lightning_deepr.weights.ranks`). What could
set them apart later is outside of this package: a rank that leaves a step out, a broken gradient hook, memory errors.
``check_ranks_every_n_steps`` compares them while they train.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_deepr.training import guards
from lightning_deepr.training.run import Run, Runs
from lightning_deepr.weights import ranks, replicated

if TYPE_CHECKING:
    from lightning_deepr.training.tracked import TrackedTensor

# arguments that need not be equal: what a network is converted into is compared by itself, the others change no connection
_OWN = (
    *("seed", "connectivity", "target_modules", "exclude_modules", "distribution", "init", "compute"),
    *("check_invariants", "log_every_n_steps", "log_statistics"),
)
# How long a check waits for the others. They come to it together, from the all-reduce of one backward pass, unless one of them
# left out a step: it would wait there for the rank that waits here.
PATIENCE = timedelta(minutes=5)
_COUNTS = ("streak", "warned", "steps", "reborn", "newborn_deaths")


class SameOnAllRanks:
    """The part of a callback that keeps the ranks of a distributed run together."""

    tracked: list[TrackedTensor]
    total_steps: float | None
    seed: Any
    check_ranks_every_n_steps: int | None
    _runs: Runs
    _rank_check: RankCheck | None = None

    # -- at the start -----------------------------------------------------------------------------------------------------

    def _compare_ranks(self, net: nn.Module, strategy: Any = None) -> None:
        """Compare the ranks where there is a process group, before the first step.

        Args:
            net: the network, with its wrappers.
            strategy: Lightning's strategy, if there is one.

        Raises:
            RuntimeError: the ranks would train different networks.
        """
        every = self.check_ranks_every_n_steps
        if every == 0:
            return
        tensors = [tensor.converted for tensor in self.tracked]
        if not ranks.is_distributed():
            if getattr(strategy, "world_size", 1) > 1:  # XLA has no process group of torch
                here = SimpleNamespace(world_size=strategy.world_size, global_rank=strategy.global_rank, strategy=strategy)
                guards.refuse_unequal_ranks(here, self.tracked)
            return
        replicated.ensure(net, tensors)
        group, is_ddp = ranks.group_of(net, tensors)
        if group is None:
            return
        if not is_ddp:
            tensors = [one for one in tensors if not one.slots.is_block]  # each rank has blocks of its own
        ranks.agree(tensors, group, take=is_ddp or replicated.is_replicated(tensors))
        if every is None and guards.is_unknown(strategy):
            every = guards.watch_unknown(strategy, self)
        if every is not None:
            self._rank_check = RankCheck(every, group, {id(one.slots) for one in tensors})

    def rank_terms(self) -> dict[str, Any]:
        """Return what has to be equal on all ranks. Only ``seed`` and ``total_steps`` may be taken from rank 0."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {
            "class": type(self).__name__,
            **{name: _text(value) for name, value in settings.items() if name not in _OWN},
            "steps": {tensor.name: tensor.step for tensor in self.tracked if not tensor.weight.is_block},
            "seed": self.seed,
            "total_steps": self.total_steps,
        }

    def take_rank_terms(self, terms: dict[str, Any]) -> None:
        """Take rank 0's seed and length of the training."""
        self.seed, self.total_steps = terms["seed"], terms["total_steps"]

    # -- after uneven data ------------------------------------------------------------------------------------------------

    def rank_state(self) -> dict[str, Any]:
        """Return the steps, the counts and the optimizer's state of theta, for a rank that stood still."""
        self._settle()  # type: ignore[attr-defined]
        return {
            tensor.name: {
                "step": tensor.step,
                "counts": {name: getattr(tensor.turnover, name) for name in _COUNTS},
                "steering": None if tensor.steering is None else tensor.steering.state(),
                "optimizer": [_to_cpu(dict(optimizer.state.get(tensor.theta, {}))) for optimizer in self._keepers(tensor)],
            }
            for tensor in self.tracked
        }

    def take_rank_state(self, state: dict[str, Any]) -> None:
        """Take what :meth:`rank_state` of another rank returned."""
        self._settle()  # type: ignore[attr-defined]
        for tensor in self.tracked:
            entry = state[tensor.name]
            tensor.step = entry["step"]
            for name, value in entry["counts"].items():
                setattr(tensor.turnover, name, value)
            if tensor.steering is not None and entry["steering"] is not None:
                tensor.steering.load(entry["steering"])
            for optimizer, found in zip(self._keepers(tensor), entry["optimizer"], strict=True):
                if found or tensor.theta in optimizer.state:
                    _take_optimizer_state(optimizer, tensor.theta, found)

    def _keepers(self, tensor: TrackedTensor) -> list[Optimizer]:
        """List the optimizers at work that hold a tensor's theta, in the order in which they were attached."""
        found = []
        for run in self._runs:
            optimizer = run.optimizer()
            if optimizer is None:
                continue
            for one, group in run.matched(optimizer, self.tracked):
                if one is tensor:
                    found.append(run.keeper(optimizer, group, tensor.theta)[0])
        return found


def _text(value: Any) -> str:
    """Write an argument so that it reads the same in every process: a function by its name."""
    if isinstance(value, dict):
        return repr({key: _text(one) for key, one in value.items()})
    if callable(value) and not dataclasses.is_dataclass(value):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    return repr(value)


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _to_cpu(one) for key, one in value.items()}
    return type(value)(map(_to_cpu, value)) if type(value) in (list, tuple) else value


def _take_optimizer_state(optimizer: Optimizer, theta: Tensor, found: dict[str, Any]) -> None:
    own = optimizer.state[theta]
    for name in set(own) - set(found):
        del own[name]
    for name, value in found.items():
        there = own.get(name)
        if isinstance(value, Tensor) and isinstance(there, Tensor) and there.shape == value.shape:
            there.copy_(value)
        elif isinstance(value, Tensor):
            own[name] = value.to(theta.device) if value.shape == theta.shape else value.clone()
        else:
            own[name] = value


# -- while they train ----------


class RankCheck:
    """The check of ``check_ranks_every_n_steps``: all ranks compare their theta and places, by 32 bytes per tensor.

    It has a process group of its own, so that it can't mix with the all-reduce of gradients if a rank leaves a step out.

    Args:
        every: the number of steps of an optimizer between two checks.
        group: the group of the ranks that train one network.
        wanted: the ids of the parametrizations to compare.
    """

    def __init__(self, every: int, group: Any, wanted: set[int]) -> None:
        distributed = torch.distributed
        backend = "gloo" if distributed.is_gloo_available() else None
        members = distributed.get_process_group_ranks(group)
        self.group: Any = distributed.new_group(members, timeout=PATIENCE, backend=backend, use_local_synchronization=True)
        self.every, self.wanted = every, wanted

    def after_step(self, run: Run, tensors: Sequence[TrackedTensor]) -> None:
        """Count a step of an optimizer, and compare the ranks if it is due.

        Raises:
            RuntimeError: on every rank, with the first rank, step and tensor that differ.
        """
        run.rank_steps += 1
        if run.rank_steps % self.every:
            return
        mine = [tensor for tensor in tensors if id(tensor.weight) in self.wanted]
        sums = torch.tensor([_sums(tensor) for tensor in mine]).reshape(-1)
        both = torch.cat([sums, -sums])
        try:
            torch.distributed.all_reduce(both, op=torch.distributed.ReduceOp.MAX, group=self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"check_ranks_every_n_steps: after {run.rank_steps} steps a rank did not answer: it died, or it left out a "
                f"step that the others took. ({error})"
            ) from error
        if torch.equal(both[: len(sums)], -both[len(sums) :]):
            return
        everyone: list[Any] = [None] * torch.distributed.get_world_size(self.group)
        torch.distributed.all_gather_object(everyone, [(t.step, *_sums(t)) for t in mine], group=self.group)
        raise RuntimeError(_difference([tensor.name for tensor in mine], everyone))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a process group can't be copied; the copy of a callback begins anew

    def __reduce__(self) -> Any:
        return type(None), ()


def _sums(tensor: TrackedTensor) -> tuple[int, int]:
    slots = tensor.weight
    placing = sum(ranks.checksum(getattr(slots, name)) for name in slots.placing)
    return (placing + 7919 * tensor.step) & (1 << 62) - 1, ranks.checksum(slots.own(tensor.theta.detach()))


def _difference(names: Sequence[str], everyone: Sequence[Sequence[tuple[int, int, int]]]) -> str:
    """Name the first tensor that differs, and the first rank that has another one than most."""
    for position, name in enumerate(names):
        found = [rank[position] for rank in everyone]
        usual = max(found, key=lambda one: (found.count(one), one == found[0]))
        for rank, one in enumerate(found):
            if one == usual:
                continue
            reference = found.index(usual)
            what = "steps" if one[0] != usual[0] else ("places" if one[1] != usual[1] else "theta")
            return (
                f"`{name}`, rank {rank}, step {one[0]}: its {what} differ{'s' if what == 'theta' else ''} from rank "
                f"{reference}'s (step {usual[0]}): expected equal values on all ranks. A rank left out a step or took one "
                "alone, or its gradients were not averaged. Start again from the last checkpoint, and look for what one rank "
                "does without the others."
            )
    raise AssertionError("no rank differs")
