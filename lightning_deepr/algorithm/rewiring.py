"""Algorithm 1 of "Deep Rewiring" (Bellec, Kappel, Maass, Legenstein, ICLR 2018) on plain tensors.

    for every active k:   theta_k <- theta_k - eta * dE/dtheta_k - eta * alpha + sqrt(2 * eta * T) * nu_k
                          if theta_k < 0: connection k becomes dormant
    while fewer than K are active:  choose a dormant k' uniformly at random, activate it, theta_k' <- 0

Any optimizer does the gradient step; this module has the other lines. Only active connections are stored: a tensor of N weights
has K *slots*, and slot i holds theta[i] and the place (flat index into the weight) of its connection. A rebirth combines the
last two lines: the slot of a connection that goes dormant gets a new place, theta 0 and the constant sign of the new place. So
exactly K connections are active after every step.

This module uses neither nn.Module nor Lightning. Most functions take the tensors of a whole network at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lightning_deepr.algorithm import randomness
from lightning_deepr.algorithm.allowed import Allowed


class SlotTensor(Protocol):
    """The attributes of one sparse tensor that rewiring uses (see :class:`lightning_deepr.weights.k_slots.KSlots`)."""

    places: Tensor  # int64 [K], unique: the place of each slot's connection
    signs: Tensor  # [K], +-1: the constant sign of each slot's place
    born: Tensor  # int64 [K]: the step of each slot's last rebirth
    total: int  # N, the number of potential connections
    index: int  # the tensor's position in the order of conversion; it makes the draws of tensors differ
    stays: bool  # whether no slot ever moves: a tensor that began with K = N
    ranked: bool  # whether newborns get the drawn places by rank
    allowed: Allowed | None  # the places where connections may be; None: everywhere

    def signs_at(self, places: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Layout:
    """The slots of several tensors in one sequence, so that one operation serves the whole network.

    "Global" numbers count over all tensors of the layout: K global slots and N global places in all.
    """

    slot_starts: Tensor  # int64 [tensors], the first global slot of each tensor
    place_starts: Tensor  # int64 [tensors], the first global place of each tensor
    totals: Tensor  # int64 [tensors], N of each tensor
    counter_starts: Tensor  # int64 [tensors], the counter of slot 0 minus its global slot

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
    """Apply the L1 prior in place: theta <- theta - eta * alpha (``decrements`` holds eta * alpha of each tensor)."""
    for theta, decrement in zip(thetas, decrements, strict=True):
        if isinstance(decrement, Tensor) or decrement != 0.0:
            theta.sub_(decrement)


def diffuse(
    thetas: list[Tensor], scales: Sequence[float | Tensor], tensors: Sequence[SlotTensor], seed: int, step: int
) -> None:
    """Add noise in place: theta <- theta + sqrt(2 * eta * T) * nu, nu ~ N(0, 1) (``scales`` holds the roots)."""
    stream = randomness.key(seed, randomness.NOISE, step)
    for theta, scale, tensor in zip(thetas, scales, tensors, strict=True):
        if isinstance(scale, Tensor) or scale != 0.0:
            slots = torch.arange(theta.numel(), device=theta.device)
            nu = randomness.normal(stream, randomness.counters(tensor.index, slots))
            theta.add_((nu * scale).to(theta.dtype))


def dormant_slots(thetas: Sequence[Tensor]) -> list[Tensor]:
    """Find the slots whose connection has gone dormant: theta < 0. (A connection with theta = 0 is active.)

    Returns:
        int64 [R_i] for each tensor, ascending.
    """
    if len(thetas) == 1:
        return [(thetas[0] < 0).nonzero().view(-1)]
    # one search over all tensors: the call itself costs most of the time
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
    """Set theta < 0 to 0, for a step without rewiring: the connection stays active, with its place and its sign."""
    for theta in thetas:
        theta.clamp_(min=0)


def reactivate(
    thetas: Sequence[Tensor], tensors: Sequence[SlotTensor], dormant: Sequence[Tensor], seed: int, step: int
) -> list[Tensor]:
    """Activate one dormant place, drawn uniformly, at theta 0 for each connection that has gone dormant.

    Args:
        thetas: the K-vectors; this function writes 0 at the reborn slots, in place.
        tensors: the tensors; this function writes their places, signs and births in place.
        dormant: the result of :func:`dormant_slots`.
        seed: the seed of all draws.
        step: the number of this step. ``seed`` and ``step`` are the whole random state.

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
    """Start newborns at theta 0, with the optimizer's starting state.

    Args:
        values: pairs of a tensor and its starting value: theta with 0, and each state tensor of theta's shape; written in
            place.
        slots: int64 [R], the reborn slots.
    """
    for value, start in values:
        value.index_fill_(0, slots if slots.device == value.device else slots.to(value.device), start)


def move(tensor: SlotTensor, slots: Tensor, places: Tensor, step: int) -> None:
    """Give slots new places and the signs of these places, and record the step of their birth."""
    tensor.places.index_copy_(0, slots, places)
    tensor.signs.index_copy_(0, slots, tensor.signs_at(places))
    tensor.born.index_fill_(0, slots, step)


def new_places(tensors: Sequence[SlotTensor], dormant: Sequence[Tensor], seed: int, step: int) -> list[Tensor]:
    """Draw a place for every dormant slot, uniformly from *all* dormant places of its tensor and without replacement.

    The places of the connections that have just gone dormant are candidates, too. For a tensor with 2 K <= N, a draw is
    rejected and repeated if its place is taken. This costs O(R) draws, since at most half of the places are taken. A denser
    tensor lists its dormant places, which are fewer than its slots (:func:`rejects`). Both ways are exact and terminate at any
    density.

    Where K = N, the dormant places are those of the dormant slots, and each slot keeps its own: which of them gets which place
    makes no difference to the network, and nothing moves. (What an older version has saved goes on with a list.)

    Dormant slots are alike: which of them gets which of the drawn places makes no difference to the network. A tensor that
    began with its slots in the order of their places gives the lowest place to the first dormant slot, and so on
    (:func:`by_rank`). So a place stays near to those of the slots around it.

    A tensor whose places are restricted draws from the allowed ones in the same two ways, with their number in the place of N.

    Args:
        tensors: the tensors with their present places.
        dormant: the result of :func:`dormant_slots`.
        seed: the seed of all draws.
        step: the number of this step.

    Returns:
        int64 [R_i] for each tensor, in the order of ``dormant``.
    """
    reborn: list[Tensor] = list(dormant)
    restricted = [i for i, slots in enumerate(dormant) if tensors[i].allowed is not None and slots.numel()]
    unrestricted = [i for i, slots in enumerate(dormant) if tensors[i].allowed is None and slots.numel()]
    rejecting = [i for i in unrestricted if rejects(tensors[i])]
    listing = [i for i in unrestricted if not rejects(tensors[i])]
    if rejecting:
        found = draw_by_rejection([tensors[i] for i in rejecting], [dormant[i] for i in rejecting], seed, step)
        for i, places in zip(rejecting, found, strict=True):
            reborn[i] = places
    for i in listing:
        reborn[i] = draw_from_list(tensors[i], dormant[i], seed, step)
    for i in restricted:
        reborn[i] = draw_allowed(tensors[i], dormant[i], seed, step)
    return [by_rank(slots, places) if t.ranked else places for t, slots, places in zip(tensors, dormant, reborn, strict=True)]


def rejects(tensor: SlotTensor) -> bool:
    """Whether births of a tensor are drawn by rejection, and not from a list. With places by rank, up to three quarters."""
    taken, total = tensor.places.numel(), tensor.total
    return 4 * taken <= 3 * total if tensor.ranked else 2 * taken <= total


def by_rank(slots: Tensor, places: Tensor) -> Tensor:
    """Give the lowest place to the lowest slot, and so on. Returns the places in the order of ``slots``."""
    return torch.empty_like(places).index_copy_(0, slots.argsort(), ascending(places))


def draw_by_rejection(tensors: Sequence[SlotTensor], dormant: Sequence[Tensor], seed: int, step: int) -> list[Tensor]:
    """Draw new places for the dormant slots of tensors that are at most half full (see :func:`new_places`)."""
    layout = Layout.of(tensors)
    device = layout.totals.device
    counts = [slots.numel() for slots in dormant]
    owner = torch.repeat_interleave(torch.arange(len(tensors), device=device), torch.tensor(counts, device=device))
    slots = torch.cat(list(dormant)) + layout.slot_starts[owner]
    taken = torch.cat([tensor.places + start for tensor, start in zip(tensors, layout.place_starts.tolist(), strict=True)])
    taken[slots] = -1  # the places of connections that went dormant in this step are free again
    taken = ascending(taken)
    chosen = first_free(
        lambda attempt: randomness.key(seed, randomness.BIRTH, step, attempt),
        slots + layout.counter_starts[owner],
        layout.totals[owner],
        layout.place_starts[owner],
        taken,
    )
    return list((chosen - layout.place_starts[owner]).split(counts))


def draw_allowed(tensor: SlotTensor, dormant: Tensor, seed: int, step: int) -> Tensor:
    """Draw new places for the dormant slots of a tensor whose places are restricted (see :func:`new_places`)."""
    allowed = tensor.allowed
    assert allowed is not None
    if tensor.stays:
        return tensor.places[dormant]
    taken = tensor.places.clone()
    taken[dormant] = -1  # the places of connections that went dormant in this step are free again
    taken = ascending(taken)
    if 2 * tensor.places.numel() <= allowed.count:
        return first_free_allowed(
            lambda attempt: randomness.key(seed, randomness.BIRTH, step, attempt),
            randomness.counters(tensor.index, dormant),
            allowed,
            taken,
        )
    free = allowed.places(dormant.device)
    free = free[~contains(taken, free)]
    return shuffled(randomness.key(seed, randomness.BIRTH, step, 0), tensor.index, free)[: dormant.numel()]


def first_free_allowed(stream_key: Callable[[int], int], counters: Tensor, allowed: Allowed, taken: Tensor) -> Tensor:
    """Do what :func:`first_free` does, for one tensor whose places are restricted."""
    zeros = torch.zeros_like(counters)

    def draw(key: int, ask: Tensor, _: Tensor) -> Tensor:
        return allowed.draw(randomness.bits(key, ask))

    return first_free(stream_key, counters, zeros, zeros, taken, draw)


def first_free(
    stream_key: Callable[[int], int],
    counters: Tensor,
    totals: Tensor,
    starts: Tensor,
    taken: Tensor,
    draw_places: Callable[[int, Tensor, Tensor], Tensor] = randomness.uniform_places,
) -> Tensor:
    """Find the first free draw of each counter.

    In round 0, 1, 2, ... every slot without a place draws one. Draws are accepted or rejected in the order (round, slot). Each
    is a fresh uniform draw, accepted unless an active connection or an earlier accepted draw has the place. This is sampling
    without replacement, because the order of the slots does not depend on later draws.

    Args:
        stream_key: a function from the attempt (round) to its key.
        counters: int64 [R], the counter of each slot.
        totals: int64 [R], the number of places of each slot's tensor.
        starts: int64 [R], the first global place of each slot's tensor.
        taken: int64 [A], sorted: the global places of active connections. Entries of -1 are ignored.
        draw_places: the function that draws: it takes a key, counters and totals.

    Returns:
        int64 [R], global places.
    """
    chosen = torch.empty_like(counters)
    pending: Tensor | None = None
    newly_taken = taken[:0]
    attempt = 0
    while pending is None or pending.numel():
        ask, n, start = (counters, totals, starts) if pending is None else (counters[pending], totals[pending], starts[pending])
        draw = draw_places(stream_key(attempt), ask, n)
        # equal draws: the stable sort keeps the order of the slots, and the first draw of each run wins
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
    """Sort a tensor. On the CPU, NumPy sorts int64 several times faster than torch."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy()))
    return values.sort().values


def contains(ordered: Tensor, values: Tensor) -> Tensor:
    """Whether each value is in a sorted tensor."""
    if ordered.numel() == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    return ordered[torch.searchsorted(ordered, values).clamp_(max=ordered.numel() - 1)] == values


def draw_from_list(tensor: SlotTensor, dormant: Tensor, seed: int, step: int) -> Tensor:
    """Draw new places for the dormant slots of a tensor that is more than half full: shuffle its dormant places, take R."""
    if tensor.stays:
        return tensor.places[dormant]
    active = torch.zeros(tensor.total, dtype=torch.bool, device=dormant.device)
    active[tensor.places] = True
    active[tensor.places[dormant]] = False
    candidates = (~active).nonzero().view(-1)
    return shuffled(randomness.key(seed, randomness.BIRTH, step, 0), tensor.index, candidates)[: dormant.numel()]


def shuffled(stream_key: int, index: int, places: Tensor) -> Tensor:
    """Put places in a uniformly random order: sort them by their hashes."""
    return places[randomness.bits(stream_key, randomness.counters(index, places)).argsort(stable=True)]


def random_places(
    total: int,
    count: int,
    index: int,
    seed: int,
    device: torch.device | str = "cpu",
    allowed: Allowed | None = None,
) -> Tensor:
    """Draw K of N places, uniformly and without replacement: the starting connectivity of a tensor.

    Args:
        total: N, the number of places.
        count: K, at most N.
        index: the tensor's position in the order of conversion.
        seed: the seed of all draws.
        device: the device of the result; the places are the same on every device.
        allowed: the places to draw from; None: all of them.

    Returns:
        int64 [K], in O(K) time and memory for any N. Where K = N, they are in ascending order.
    """
    if count == total:
        return torch.arange(total, device=device)
    stream = randomness.key(seed, randomness.START_PLACES)
    if allowed is not None:
        if 2 * count > allowed.count:
            return shuffled(stream, index, allowed.places(device))[:count].contiguous()
        slots = torch.arange(count, device=device)
        return first_free_allowed(
            lambda attempt: randomness.key(seed, randomness.START_PLACES, attempt),
            randomness.counters(index, slots),
            allowed,
            slots[:0],
        )
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
