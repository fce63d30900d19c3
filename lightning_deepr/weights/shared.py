"""One K for a whole network: the layers share one theta, and connections move from layer to layer.

theta is one parameter of K slots, sorted by layer. Every layer registers it (``<layer>.parametrizations.<tensor>.original`` is
the same object everywhere), so an optimizer has one parameter, and its identity and shape never change. Each layer has
:class:`SharedSlots` with its own places, signs and births, and gets its piece of theta from the :class:`Pool`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_deepr import kernels
from lightning_deepr.algorithm import newborns, shared_rewiring
from lightning_deepr.algorithm.newborns import State
from lightning_deepr.algorithm.shared_rewiring import Geometry
from lightning_deepr.weights import copies
from lightning_deepr.weights.base import FORMAT_KEY, SHARING_KEY, Parametrization
from lightning_deepr.weights.k_slots import KSlots


class Tally(NamedTuple):
    """The numbers of births and deaths of each layer in one step."""

    births: list[int]
    deaths: list[int]
    newborn_deaths: list[int]


class SharedSlots(KSlots):
    """The slots of one layer in a shared theta. Their number changes from step to step; the length of theta never does.

    :func:`lightning_deepr.conversion.sharing.join` makes them from the K slots of each layer.
    """

    pool: Pool  # the pool of the layers that share the theta
    position: int  # the layer's position in the pool
    budget: int  # the layer's number of connections at the start: N_l * p_l

    @classmethod
    def of(cls, slots: KSlots) -> SharedSlots:
        """Make a member of a :class:`Pool` from the slots of a layer. Do not use ``slots`` afterwards."""
        if isinstance(slots, SharedSlots):
            return slots
        shared = cls.__new__(cls)
        vars(shared).update(vars(slots))  # all attributes: births, order, owner, averages, hooks, ...
        shared.budget = slots.count
        shared.stays = shared.rests = shared.ranked = False  # its K changes
        return shared

    def shared_with(self) -> list[tuple[Parametrization, str]]:
        return list(zip(self.pool.members, self.pool.names, strict=True))

    @property
    def wanted(self) -> int:
        """The constant number of connections: K of all layers together."""
        return self.pool.count

    @property
    def places_per_connection(self) -> float:
        return sum(member.total for member in self.pool.members) / self.pool.count

    def may_have(self, count: int) -> bool:
        return True  # only the total has to fit, and loading checks it

    def own(self, theta: Tensor) -> Tensor:
        return self.pool.piece(theta, self)

    def holder_of_theta(self) -> parametrize.ParametrizationList | None:
        # in a deep copy only the first layer knows its own
        return next((holder for member in self.pool.members if (holder := member.holder()) is not None), None)

    def problem(
        self,
        theta: Tensor,
        born: Tensor,
        states: Iterable[tuple[str, Tensor, float]],
        *,
        least: int = 0,
        signed: bool = False,
    ) -> str | None:
        pool, sizes = self.pool, [one.count for one in self.pool.members]
        if not (theta.numel() == sum(sizes) == pool.count and sizes == pool.counts):
            return f"expected {pool.count} slots in all, found theta of {theta.numel()} and places of {sizes}"
        # a layer that starts with fewer waits for births: nothing moves to it while nothing dies
        served = [n for n, one in zip(pool.births, pool.members, strict=False) if n and one.count > min(least, one.total)]
        if self.count < min(least, self.total) and served:
            return (
                f"expected at least {min(least, self.total)} connections before other layers get births, found {self.count} "
                f"and births of {served}"
            )
        return super().problem(theta, born, states, signed=signed)

    # -- copying, saving, loading -----------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedSlots:
        replica = SharedSlots.of(super().__deepcopy__(memo))
        memo[id(self)] = replica  # before the pool is copied, which copies its other members
        replica.position, replica.budget = self.position, self.budget
        replica.pool = copy.deepcopy(self.pool, memo)
        copies.note_copy(replica, self, memo)  # again: the copy of a KSlots has become another object
        return replica

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if prefix + FORMAT_KEY in destination:
            destination[prefix + SHARING_KEY] = self.pool.record(self.position)

    def take_over(self, record: dict[str, Tensor]) -> None:
        # new tensors: the layer's number of connections may have changed
        self.places = record["places"].detach().to(self.places.device, copy=True)
        self.born = record["born"].detach().to(self.born.device, copy=True)
        self.signs = self.signs_at(self.places)
        self.places_changed()
        self.ask_again()
        self.pool.loaded(self, record[SHARING_KEY])
        self.note_load(record["places"], moved=True)

    def _count_refusal(self, record: dict[str, Tensor]) -> str | None:
        return self.pool.refusal(self, record[SHARING_KEY])


class Pool:
    """The layers that share one theta.

    Args:
        members: the layers, in the order of their pieces of theta.
        names: the names of the layers, for messages.
        number: the pool's number, which identifies it in a checkpoint if a network has several pools.
    """

    def __init__(self, members: Sequence[SharedSlots], names: Sequence[str], number: int) -> None:
        self.members, self.names, self.number = list(members), list(names), number
        self.counts = [member.count for member in self.members]
        self.count = sum(self.counts)  # K: theta's length, which never changes
        for position, member in enumerate(self.members):
            member.pool, member.position = self, position
        self.births: list[int] = []  # of each layer in the last step that moved connections, until the next step
        self._reset()

    def _reset(self) -> None:
        self._unloaded: set[int] = set()  # the layers that a checkpoint has not loaded yet, while it is being loaded
        self._changes = 0  # number of changes of the counts
        self._pieces: tuple[Any, ...] | None = None
        self._geometry: tuple[Any, Geometry] | None = None

    @property
    def budgets(self) -> list[int]:
        """The number of connections of each layer at the start. The rule "budget" chooses a newborn's layer by it."""
        return [member.budget for member in self.members]

    # -- pieces of theta --------------------------------------------------------------------------------------------------

    def piece(self, theta: Tensor, member: SharedSlots) -> Tensor:
        """Return a layer's part of theta, a view.

        One ``split`` serves all layers, so the backward pass assembles theta's gradient once, in O(K). The split is repeated
        after every step and whenever theta has changed.
        """
        position = member.position
        if torch.compiler.is_dynamo_compiling():
            return theta.narrow(0, sum(self.counts[:position]), self.counts[position])
        if (
            type(theta) is not nn.Parameter
            or not theta.requires_grad
            or not torch.is_grad_enabled()
            or torch._C._len_torch_dispatch_stack() != 0
            or torch._C._functorch.peek_interpreter_stack() is not None
        ):
            self._check_size(theta)
            return theta.narrow(0, sum(self.counts[:position]), self.counts[position])
        now = (theta._version, theta.data_ptr(), self._changes, theta.dtype)
        kept = self._pieces
        if kept is None or kept[0] is not theta or kept[1] != now:
            self._check_size(theta)
            kept = self._pieces = (theta, now, theta.split(self.counts))
        part: Tensor = kept[2][position]
        return part

    def _check_size(self, theta: Tensor) -> None:
        if theta.numel() != sum(self.counts):
            missing = ", ".join(f"`{self.names[i]}`" for i in sorted(self._unloaded))
            raise RuntimeError(
                f"These layers share one theta: expected {sum(self.counts)} slots for {', '.join(self.names)}, found "
                f"{theta.numel()}." + (f" A checkpoint was loaded in part: load {missing}, too." if missing else "")
            )

    # -- the records of all slots -----------------------------------------------------------------------------------------

    def whole(self, name: str) -> Tensor:
        """Concatenate an attribute of all layers: "places", "signs" or "born"."""
        return torch.cat([getattr(member, name) for member in self.members])

    def geometry(self) -> Geometry:
        members = self.members
        now = (members[0].places.device, [(m.index, m.sign_seed, m.allowed) for m in members])
        if self._geometry is None or self._geometry[0] != now:
            self._geometry = now, Geometry.of(members, [m.sign_seed for m in members], self.budgets)
        return self._geometry[1]

    def put(self, places: Tensor, signs: Tensor, born: Tensor, counts: Sequence[int]) -> None:
        """Give each layer its part of new places, signs and births."""
        # a later backward pass through the old connections would be wrong, dense or sparse: make autograd refuse it
        old = [member.places for member in self.members]
        old += [member.order.buffer for member in self.members if member.order is not None]
        torch.autograd.graph.increment_version([tensor for tensor in old if not tensor.is_inference()])
        self.counts = list(counts)
        self._changes += 1
        parts = places.split(self.counts), signs.split(self.counts), born.split(self.counts)
        for member, *part in zip(self.members, *parts, strict=True):
            vars(member).update(zip(("places", "signs", "born"), part, strict=True))  # a module's setattr is slow
            member.places_changed()
            member.ask_again()  # the dense/sparse decision must not depend on earlier counts: a resume would be inexact

    # -- one step ---------------------------------------------------------------------------------------------------------

    def rewire(
        self,
        theta: Tensor,
        grad: Tensor | None,
        states: Iterable[State],
        *,
        rule: str,
        least: int,
        newborn_since: int,
        seed: int,
        step: int,
    ) -> Tally | None:
        """Rewire in place after L1 and noise: drop connections with theta < 0, create as many, and move the survivors' slots.

        Args:
            theta: [K], detached.
            grad: theta's gradient; newborns get 0.
            states: the optimizer's state tensors. An averaged one has the mean of the newborn's layer.
            rule, least, newborn_since, seed, step: see :func:`lightning_deepr.algorithm.shared_rewiring.plan`.

        Returns:
            the numbers of each layer, or None if no connection has gone dormant.
        """
        self.settle()
        averages = [(pool, value) for pool, value in self._averages() if pool.count == self.count]
        values = [State("theta", theta, 0.0), *states, *(State("average", value, 0.0) for _, value in averages)]
        if grad is not None:
            values.append(State("gradient", grad, 0.0))
        ruled = any(member.allowed is not None or member.sign_table is not None for member in self.members)
        if (
            not ruled
            and self.count < 1 << 30
            and all(one.value.dtype in kernels.TYPES and kernels.suits(one.value) for one in values)
        ):
            found = self._rewire_by_kernel(theta, values, rule, least, newborn_since, seed, step)
        else:
            found = self._rewire(theta, values, rule, least, newborn_since, seed, step)
        if found is not None:
            for average, _ in averages:
                average._take(self)
            copies.places_moved(list(self.members))
        return found

    def _rewire_by_kernel(
        self, theta: Tensor, values: Sequence[State], rule: str, least: int, newborn_since: int, seed: int, step: int
    ) -> Tally | None:
        from lightning_deepr.kernels.cpu import shared_rewire

        number, options = shared_rewiring.RULES.index(rule), {"least": least, "newborn_since": newborn_since}
        found = shared_rewire.rewire(self.members, self.budgets, theta, values, rule=number, seed=seed, step=step, **options)
        if found is None:
            return None
        self.put(found.places, found.signs, found.born, found.counts)
        return Tally(found.births, found.deaths, found.newborn_deaths)

    def _rewire(
        self, theta: Tensor, values: Sequence[State], rule: str, least: int, newborn_since: int, seed: int, step: int
    ) -> Tally | None:
        places, born, geometry = self.whole("places"), self.whole("born"), self.geometry()
        moves = shared_rewiring.plan(
            self.members,
            geometry,
            theta,
            places,
            born,
            rule=rule,
            least=least,
            newborn_since=newborn_since,
            seed=seed,
            step=step,
        )
        if moves is None:
            return None
        source = moves.source
        for one in values:
            one.value.copy_(one.value[source.to(one.value.device)])
        newborns.start_newborns([one for one in values if not one.averaged], moves.born)
        averaged = [one for one in values if one.averaged]
        if averaged:
            for owner, part in enumerate(theta.split(moves.counts)):
                births = torch.arange(part.numel() - moves.births[owner], part.numel(), device=theta.device)
                pieces = [one._replace(value=one.value.split(moves.counts)[owner]) for one in averaged]
                newborns.start_newborns(pieces, births)
        signs = self.whole("signs")[source]
        exceptions = [member.exceptions for member in self.members]
        newborn = shared_rewiring.signs_at(geometry, moves.owners, moves.places, exceptions, signs.dtype)
        for layer, member in enumerate(self.members):
            if member.sign_table is not None:
                mine = moves.owners == layer
                newborn[mine] = member.signs_at(moves.places[mine], signs.dtype)
        signs[moves.born] = newborn
        places = places[source].index_copy_(0, moves.born, moves.places)
        self.put(places, signs, born[source].index_fill_(0, moves.born, step), moves.counts)
        return Tally(moves.births, moves.deaths, moves.newborn_deaths)

    # -- loading ----------------------------------------------------------------------------------------------------------

    def record(self, position: int) -> Tensor:
        """Return the checkpoint's record of a layer, beside its connections."""
        return torch.tensor([self.number, position, len(self.members), self.count, self.members[position].budget])

    def refusal(self, member: SharedSlots, record: Tensor) -> str | None:
        """Say why a layer's recorded position in a pool does not fit, or return None."""
        _, position, layers, count, _ = record.tolist()
        if count != self.count:
            return (
                f"expected K = {self.count} connections in all, found {count}: give the connectivity of the checkpoint, "
                "or convert as recorded with `lightning_deepr.load_state_dict(module, checkpoint)`."
            )
        if (position, layers) != (member.position, len(self.members)):
            return (
                f"expected layer {member.position + 1} of {len(self.members)} that share one K ({', '.join(self.names)}), "
                f"found layer {position + 1} of {layers}: convert the same layers as in the run that wrote the checkpoint."
            )
        return None

    def loaded(self, member: SharedSlots, record: Tensor) -> None:
        """Note that a layer has loaded other connections. Its count may have changed."""
        if not self._unloaded:
            self._unloaded = set(range(len(self.members)))
        self._unloaded.discard(member.position)
        member.budget = int(record[4])
        self.counts[member.position] = member.count
        self._changes += 1
        self._geometry = None
        if not self._unloaded:
            self.realign_averages()

    def settle(self) -> None:
        """End a partial load when training continues: layers that were not loaded keep their connections."""
        if self._unloaded:
            self._unloaded = set()
            self.realign_averages()

    # -- averages ---------------------------------------------------------------------------------------------------------

    def _averages(self) -> list[tuple[Pool, Tensor]]:
        """List the pools of averaged copies (see :func:`lightning_deepr.weights.averages.follow`), each with its theta."""
        found: dict[int, tuple[Pool, Tensor]] = {}
        for member in self.members:
            for holder in member.averages:
                copied = holder[0]
                if isinstance(copied, SharedSlots) and len(copied.pool.members) == len(self.members):
                    found[id(copied.pool)] = copied.pool, holder.original.detach()
        return list(found.values())

    def _take(self, other: Pool) -> None:
        """Copy the connections of another pool."""
        first = self.members[0]
        self.put(
            other.whole("places").to(first.places.device, copy=True),
            other.whole("signs").to(first.signs, copy=True),
            other.whole("born").to(first.born.device, copy=True),
            other.counts,
        )

    def realign_averages(self) -> None:
        """Align averages with loaded connections: the average of a place that it did not have restarts at 0."""
        for average, theta in self._averages():
            device = theta.device
            sizes = [member.total for member in self.members]
            starts = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))], device=device)

            def numbered(pool: Pool, starts: Tensor = starts, device: torch.device = device) -> Tensor:
                owners = torch.repeat_interleave(torch.tensor(pool.counts, device=device))
                return pool.whole("places").to(device) + starts[owners]

            mine, theirs = numbered(self), numbered(average)
            signs, kept = self.whole("signs").to(theta), average.whole("signs").to(theta)
            ordered, order = theirs.sort()
            at = torch.searchsorted(ordered, mine).clamp_(max=ordered.numel() - 1)
            slot = order[at]
            there = (ordered[at] == mine) & (kept[slot] == signs)
            theta.copy_(torch.where(there, theta[slot], 0.0))
            for member, own in zip(average.members, self.members, strict=True):
                member.sign_seed, member.exceptions = own.sign_seed, own.exceptions.to(member.exceptions.device)
                member.take_rules(own)
                member.budget = own.budget
            average._geometry = None
            average._take(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Pool:
        replica = object.__new__(Pool)
        memo[id(self)] = replica
        replica.names, replica.number = list(self.names), self.number
        replica.counts, replica.count, replica.births = list(self.counts), self.count, []
        replica._reset()
        replica._unloaded = set(self._unloaded)
        replica.members = [copy.deepcopy(member, memo) for member in self.members]
        return replica
