"""Algorithm 1 of "Deep Rewiring" (Bellec, Kappel, Maass, Legenstein, ICLR 2018) on plain tensors.

    for every active k:   theta_k <- theta_k - eta * dE/dtheta_k - eta * alpha + sqrt(2 * eta * T) * nu_k
                          if theta_k < 0: connection k becomes dormant
    while fewer than K are active:  choose a dormant k' uniformly at random, activate it, theta_k' <- 0

The gradient step belongs to the optimizer, whichever it is; what follows it is here, line by line. Only active connections
are stored: a tensor of N weights has K *slots*, and slot i holds theta[i] and the place (flat index into the weight) that it
stands for. Going dormant and choosing another place is one act, called a rebirth: the slot gets a new place, theta 0 and the
constant sign of the new place, so that exactly K connections are active after every step.

No module and no Lightning here; every function takes the tensors of a whole network at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_deepr.algorithm import randomness


class SlotTensor(Protocol):
    """What rewiring has to know of one sparse tensor (see :class:`lightning_deepr.weights.k_slots.KSlots`)."""

    places: Tensor  # int64 [K], unique: where each slot's connection is
    signs: Tensor  # [K], +-1: the constant sign of each slot's place
    born: Tensor  # int64 [K]: the step at which each slot was reborn last
    total: int  # N, the number of potential connections
    index: int  # the tensor's place in the order of conversion; it keeps the draws of tensors apart

    def signs_at(self, places: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Layout:
    """The slots of several tensors laid end to end, so that one operation serves the whole network.

    "Global" numbers count over all tensors of the layout: global slots (K of them) and global places (N of them).
    """

    slot_starts: Tensor  # int64 [tensors], first global slot of each
    place_starts: Tensor  # int64 [tensors], first global place of each
    totals: Tensor  # int64 [tensors]
    counter_starts: Tensor  # int64 [tensors], counter of slot 0 minus its global slot

    @classmethod
    def of(cls, tensors: Sequence[SlotTensor]) -> Layout:
        slot_starts, place_starts, slot, place = [], [], 0, 0
        for tensor in tensors:
            slot_starts.append(slot)
            place_starts.append(place)
            slot, place = slot + tensor.places.numel(), place + tensor.total
        if place > randomness.LARGEST:
            raise ValueError(f"The layers have {place} potential connections in all, expected at most 2**63 - 1.")
        device = tensors[0].places.device
        counter_starts = [(t.index << randomness.SLOT_BITS) - s for t, s in zip(tensors, slot_starts, strict=True)]
        columns = [slot_starts, place_starts, [t.total for t in tensors], counter_starts]
        return cls(*torch.tensor(columns, device=device))


def shrink(thetas: list[Tensor], decrements: Sequence[float | Tensor]) -> None:
    """theta <- theta - eta * alpha, the L1 prior, in place (``decrements`` holds eta * alpha of each tensor)."""
    for theta, decrement in zip(thetas, decrements, strict=True):
        if isinstance(decrement, Tensor) or decrement != 0.0:
            theta.sub_(decrement)


def diffuse(
    thetas: list[Tensor], scales: Sequence[float | Tensor], tensors: Sequence[SlotTensor], seed: int, step: int
) -> None:
    """theta <- theta + sqrt(2 * eta * T) * nu, nu ~ N(0, 1), in place (``scales`` holds the roots)."""
    stream = randomness.key(seed, randomness.NOISE, step)
    for theta, scale, tensor in zip(thetas, scales, tensors, strict=True):
        if isinstance(scale, Tensor) or scale != 0.0:
            slots = torch.arange(theta.numel(), device=theta.device)
            nu = randomness.normal(stream, randomness.counters(tensor.index, slots))
            theta.add_((nu * scale).to(theta.dtype))


def dormant_slots(thetas: Sequence[Tensor]) -> list[Tensor]:
    """The slots whose connection has gone dormant: theta < 0. (theta = 0 is active.)

    Returns:
        int64 [R_i] for each tensor, ascending.
    """
    if len(thetas) == 1:
        return [(thetas[0] < 0).nonzero().view(-1)]
    # one search over all tensors: most of its cost is the call
    dormant = (torch.cat([theta.detach() for theta in thetas]) < 0).nonzero().view(-1)
    if dormant.numel() == 0:
        return [dormant] * len(thetas)
    found, start, position = [], 0, 0
    ends = torch.tensor([theta.numel() for theta in thetas]).cumsum(0)
    cuts = torch.searchsorted(dormant, ends.to(dormant.device)).tolist()
    for theta, cut in zip(thetas, cuts, strict=True):
        found.append(dormant[position:cut] - start)
        start, position = start + theta.numel(), cut
    return found


def keep_active(thetas: Sequence[Tensor]) -> None:
    """In a step without rewiring theta < 0 becomes 0: the connection stays active, with its place and its sign."""
    for theta in thetas:
        theta.clamp_(min=0)


def reactivate(
    thetas: Sequence[Tensor], tensors: Sequence[SlotTensor], dormant: Sequence[Tensor], seed: int, step: int
) -> list[Tensor]:
    """Activate as many dormant places as connections have gone dormant, uniformly at random, at theta 0.

    Args:
        thetas: K-vectors, written in place: 0 at the reborn slots.
        tensors: their places, signs and births, written in place.
        dormant: from :func:`dormant_slots`.
        seed: the seed of all draws.
        step: the number of this step; with ``seed`` it is the whole random state.

    Returns:
        the new places, int64 [R_i] for each tensor, in the order of ``dormant``.
    """
    reborn = new_places(tensors, dormant, seed, step)
    for theta, tensor, slots, places in zip(thetas, tensors, dormant, reborn, strict=True):
        if slots.numel():
            start_anew([(theta, 0.0)], slots)
            move(tensor, slots, places, step)
    return reborn


def start_anew(values: Iterable[tuple[Tensor, float]], slots: Tensor) -> None:
    """A newborn starts at theta 0, with the state that the optimizer starts with.

    Args:
        values: theta with 0, and each state tensor of its shape with its starting value; written in place.
        slots: int64 [R], the reborn ones.
    """
    for value, start in values:
        value.index_fill_(0, slots if slots.device == value.device else slots.to(value.device), start)


def move(tensor: SlotTensor, slots: Tensor, places: Tensor, step: int) -> None:
    """Slots stand for other places from now on; the sign is that of the place."""
    tensor.places.index_copy_(0, slots, places)
    tensor.signs.index_copy_(0, slots, tensor.signs_at(places))
    tensor.born.index_fill_(0, slots, step)


def new_places(tensors: Sequence[SlotTensor], dormant: Sequence[Tensor], seed: int, step: int) -> list[Tensor]:
    """A place for every dormant slot, uniform over *all* dormant places of its tensor and without replacement.

    The connections that have just gone dormant are candidates like any other. A place is drawn and rejected while it is
    taken, which costs O(R) draws because at most half of the places can be; a denser tensor (2 K > N) lists its dormant
    places, which are fewer than its slots. Both are exact, and both end at any density.

    Args:
        tensors: with the places that are taken.
        dormant: from :func:`dormant_slots`.
        seed: the seed of all draws.
        step: the number of this step.

    Returns:
        int64 [R_i] for each tensor, in the order of ``dormant``.
    """
    reborn: list[Tensor] = list(dormant)
    rejecting = [i for i, slots in enumerate(dormant) if slots.numel() and 2 * tensors[i].places.numel() <= tensors[i].total]
    listing = [i for i, slots in enumerate(dormant) if slots.numel() and 2 * tensors[i].places.numel() > tensors[i].total]
    if rejecting:
        found = draw_by_rejection([tensors[i] for i in rejecting], [dormant[i] for i in rejecting], seed, step)
        for i, places in zip(rejecting, found, strict=True):
            reborn[i] = places
    for i in listing:
        reborn[i] = draw_from_list(tensors[i], dormant[i], seed, step)
    return reborn


def draw_by_rejection(tensors: Sequence[SlotTensor], dormant: Sequence[Tensor], seed: int, step: int) -> list[Tensor]:
    """New places for the dormant slots of tensors that are at most half full (see :func:`reactivate`)."""
    layout = Layout.of(tensors)
    device = layout.totals.device
    counts = [slots.numel() for slots in dormant]
    owner = torch.repeat_interleave(torch.arange(len(tensors), device=device), torch.tensor(counts, device=device))
    slots = torch.cat(list(dormant)) + layout.slot_starts[owner]
    taken = torch.cat([tensor.places + start for tensor, start in zip(tensors, layout.place_starts.tolist(), strict=True)])
    taken[slots] = -1  # what has gone dormant in this step is free again
    taken = ascending(taken)
    chosen = first_free(
        lambda attempt: randomness.key(seed, randomness.BIRTH, step, attempt),
        slots + layout.counter_starts[owner],
        layout.totals[owner],
        layout.place_starts[owner],
        taken,
    )
    return list((chosen - layout.place_starts[owner]).split(counts))


def first_free(stream_key, counters: Tensor, totals: Tensor, starts: Tensor, taken: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """For each counter the first of its draws that is free.

    In round 0, 1, 2, ... every slot that has no place yet draws one. Draws are judged in the order (round, slot): each is a
    fresh uniform draw, and is accepted unless an active connection or an earlier draw has the place. That is what sampling
    without replacement is; the order in which the slots take part does not depend on the draws still to come.

    Args:
        stream_key: function of the attempt (round) that gives its key.
        counters: int64 [R].
        totals: int64 [R], the number of places of the slot's tensor.
        starts: int64 [R], its first global place.
        taken: int64 [A], sorted: the global places of active connections. Entries of -1 are ignored.

    Returns:
        int64 [R], global places.
    """
    chosen = torch.empty_like(counters)
    pending: Tensor | None = None
    newly_taken = taken[:0]
    attempt = 0
    while pending is None or pending.numel():
        ask, n, start = (counters, totals, starts) if pending is None else (counters[pending], totals[pending], starts[pending])
        draw = randomness.uniform_places(stream_key(attempt), ask, n)
        # equal draws: the stable sort keeps the order of the slots, and the first of each run comes first
        place, order = torch.where(draw >= 0, draw + start, -1).sort(stable=True)
        free = (place >= 0) & ~contains(taken, place) & ~contains(newly_taken, place)
        free[1:] &= place[1:] != place[:-1]
        slots = order if pending is None else pending[order]
        chosen[slots[free]] = place[free]
        newly_taken = torch.cat([newly_taken, place[free]]).sort().values if attempt else place[free]
        pending = slots[~free].sort().values
        attempt += 1
    return chosen


def ascending(values: Tensor) -> Tensor:
    """Sorted. On the CPU NumPy's sort of int64 is several times faster than torch's."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy()))
    return values.sort().values


def contains(ordered: Tensor, values: Tensor) -> Tensor:
    """Whether each value is in a sorted tensor."""
    if ordered.numel() == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    return ordered[torch.searchsorted(ordered, values).clamp_(max=ordered.numel() - 1)] == values


def draw_from_list(tensor: SlotTensor, dormant: Tensor, seed: int, step: int) -> Tensor:
    """New places for the dormant slots of a tensor more than half full: shuffle its dormant places, take the first R."""
    active = torch.zeros(tensor.total, dtype=torch.bool, device=dormant.device)
    active[tensor.places] = True
    active[tensor.places[dormant]] = False
    candidates = (~active).nonzero().view(-1)
    return shuffled(randomness.key(seed, randomness.BIRTH, step, 0), tensor.index, candidates)[: dormant.numel()]


def shuffled(stream_key: int, index: int, places: Tensor) -> Tensor:
    """A uniformly random order of places: sorted by a hash of each."""
    return places[randomness.bits(stream_key, randomness.counters(index, places)).argsort(stable=True)]


def random_places(total: int, count: int, index: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """K of N places, uniformly at random without replacement: the connectivity that a tensor starts with.

    Args:
        total: N.
        count: K, at most N.
        index: the tensor's place in the order of conversion.
        seed: the seed of all draws.
        device: where the result lies; the places are the same on every device.

    Returns:
        int64 [K]; O(K) time and memory, whatever N is.
    """
    stream = randomness.key(seed, randomness.START_PLACES)
    if 2 * count > total:
        return shuffled(stream, index, torch.arange(total, device=device))[:count].contiguous()
    slots = torch.arange(count, device=device)
    whole = torch.full_like(slots, total)
    return first_free(
        lambda attempt: randomness.key(seed, randomness.START_PLACES, attempt),
        randomness.counters(index, slots),
        whole,
        torch.zeros_like(slots),
        slots[:0],
    )
