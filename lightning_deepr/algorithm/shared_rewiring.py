"""Algorithm 1 with one K for a whole network, on plain tensors: it decides where each slot goes.

The slots of all layers form one sequence, sorted by layer. In a step, dormant connections leave their layers, and the same
number of connections is born, each in a layer that a rule chooses. So the layers' counts change and their sum does not. In each
layer the survivors come first, in their old order, and the newborns follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_deepr.algorithm import randomness
from lightning_deepr.algorithm.allowed import Allowed, draw_codes
from lightning_deepr.algorithm.rewiring import SlotTensor, ascending, contains, first_free, first_free_allowed, shuffled

RULES = ("budget", "uniform")


@dataclass(frozen=True)
class Geometry:
    """The constant properties of some layers, on their device.

    Args:
        totals: int64 [layers], N of each layer.
        place_starts: int64 [layers], the number of each layer's first place, counted over all layers.
        counter_starts: int64 [layers], the counter of each layer's slot 0.
        sign_offsets: int64 [layers]. The hash of place + offset with key 0 is the hash of the place with the layer's sign seed.
        weights: int64 [layers], the number of connections of each layer at the start (N_l * p_l).
        sizes: the values of ``totals`` as Python integers.
        limits: int64 [layers], the most connections of each layer: the number of its allowed places.
        allowed: where the connections of each layer may be; None: everywhere.
    """

    totals: Tensor
    place_starts: Tensor
    counter_starts: Tensor
    sign_offsets: Tensor
    weights: Tensor
    sizes: tuple[int, ...]
    limits: Tensor
    allowed: tuple[Allowed | None, ...]

    @classmethod
    def of(cls, tensors: Sequence[SlotTensor], sign_seeds: Sequence[int], budgets: Sequence[int]) -> Geometry:
        sizes = [tensor.total for tensor in tensors]
        if sum(sizes) > randomness.LARGEST:
            raise ValueError(f"The layers have {sum(sizes)} potential connections in all, expected at most 2**63 - 1.")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        counters = [tensor.index << randomness.SLOT_BITS for tensor in tensors]
        offsets = [randomness._signed(seed * randomness.INVERSE & randomness.WORD) for seed in sign_seeds]
        device = tensors[0].places.device
        allowed = tuple(tensor.allowed for tensor in tensors)
        limits = [size if one is None else one.count for size, one in zip(sizes, allowed, strict=True)]
        columns = torch.tensor([sizes, starts, counters, offsets, list(budgets), limits], device=device)
        first, second, third, fourth, fifth, last = columns
        return cls(first, second, third, fourth, fifth, tuple(sizes), last, allowed)

    @property
    def restricted(self) -> bool:
        """Whether the places of some layer are restricted."""
        return any(one is not None for one in self.allowed)


@dataclass(frozen=True)
class Moves:
    """The moves of a network's slots in one step.

    Args:
        source: int64 [K]: slot i takes the values of the old slot ``source[i]``; for newborns this is some dormant slot.
        born: int64 [R], ascending: the slots of the newborns.
        owners: int64 [R]: the layers of the newborns.
        places: int64 [R]: the newborns' places within their layers.
        counts: the number of connections of each layer after the step.
        births, deaths, newborn_deaths: the numbers of each layer.
    """

    source: Tensor
    born: Tensor
    owners: Tensor
    places: Tensor
    counts: list[int]
    births: list[int]
    deaths: list[int]
    newborn_deaths: list[int]


def plan(
    tensors: Sequence[SlotTensor],
    geometry: Geometry,
    theta: Tensor,
    places: Tensor,
    born: Tensor,
    *,
    rule: str,
    least: int,
    newborn_since: int,
    seed: int,
    step: int,
) -> Moves | None:
    """Decide where the slots with theta < 0 go.

    Args:
        tensors: the layers, in the order of their slots.
        geometry: the geometry of the layers.
        theta: [K], the shared theta.
        places: int64 [K], the places within the layers.
        born: int64 [K], the step of each slot's last birth.
        rule: the choice of a newborn's layer. "budget": the layer is drawn with probability proportional to
            ``geometry.weights``, then one of its dormant places. "uniform": one of all dormant places of the network. A full
            layer is never chosen.
        least: the least number of connections of a layer. A layer with fewer survivors gets births before the rule applies.
        newborn_since: the first birth step of newborns. A slot that was born then or later dies as a newborn.
        seed, step: the whole random state.

    Returns:
        the moves, or None if no connection has gone dormant.
    """
    dead = theta < 0
    dormant = dead.nonzero().view(-1)
    count = dormant.numel()
    if count == 0:
        return None
    device, layers = theta.device, len(tensors)
    before = torch.tensor([tensor.places.numel() for tensor in tensors], device=device)
    owner = torch.searchsorted(before.cumsum(0), dormant, right=True)
    deaths = torch.bincount(owner, minlength=layers)
    newborn_deaths = torch.bincount(owner[born[dormant] >= newborn_since], minlength=layers)
    alive = before - deaths
    # the survivors' places, counted over all layers
    taken = places + torch.repeat_interleave(geometry.place_starts, before, output_size=places.numel())
    taken[dormant] = -1  # the places of connections that went dormant in this step are free again
    taken = ascending(taken)

    every = torch.arange(layers, device=device)
    short = (geometry.limits.clamp(max=least) - alive).clamp_(min=0)
    first = torch.repeat_interleave(every, short)[:count]
    rest = count - first.numel()
    if rule == "budget":
        room = geometry.limits - alive - torch.bincount(first, minlength=layers)
        chosen = torch.cat([first, draw_layers(geometry.weights, room, rest, seed, step)])
        births = torch.bincount(chosen, minlength=layers)
        new = draw_within(tensors, geometry, alive, births, taken, seed, step)
    else:
        births = torch.bincount(first, minlength=layers)
        new = draw_within(tensors, geometry, alive, births, taken, seed, step)
        if rest:
            new = torch.cat([new, draw_anywhere(geometry, new, taken, rest, seed, step)])
            chosen = torch.searchsorted(geometry.place_starts, new, right=True) - 1
            births, order = torch.bincount(chosen, minlength=layers), chosen.sort(stable=True).indices
            new = new[order]
    owners = torch.repeat_interleave(every, births, output_size=count)
    survivors = (~dead).nonzero().view(-1)
    moved = births.cumsum(0) - births  # births in earlier layers: a layer's survivors move up by this number
    position = torch.arange(survivors.numel(), device=device)
    position += torch.repeat_interleave(moved, alive, output_size=survivors.numel())
    place_of_births = torch.arange(count, device=device) + alive.cumsum(0)[owners]
    source = torch.empty_like(places)
    source[position] = survivors
    source[place_of_births] = dormant
    table = torch.stack([alive + births, births, deaths, newborn_deaths]).tolist()
    return Moves(source, place_of_births, owners, new - geometry.place_starts[owners], *table)


def draw_layers(weights: Tensor, room: Tensor, count: int, seed: int, step: int) -> Tensor:
    """Draw a layer for each birth, with probabilities proportional to weights. A full layer is never chosen.

    Draws are processed in order: a draw is accepted if its layer still has room, and repeated otherwise.

    Args:
        weights: int64 [layers], the weight of each layer.
        room: int64 [layers], the number of dormant places of each layer; the sum is at least ``count``.
        count: R, the number of births.
        seed, step: the random state.

    Returns:
        int64 [R], the layers.
    """
    chosen = torch.empty(count, dtype=torch.long, device=weights.device)
    pending = torch.arange(count, device=weights.device)
    left, attempt = room, 0
    while pending.numel():
        open_ = torch.where(left > 0, weights, 0)
        if int(open_.sum()) == 0:  # every layer with a budget is full
            open_ = left
        ends = open_.cumsum(0)
        draw = randomness.uniform_places(randomness.key(seed, randomness.LAYER, step, attempt), pending, ends[-1])
        layer = torch.searchsorted(ends, draw, right=True)
        asked = torch.bincount(layer, minlength=weights.numel())
        if bool((draw >= 0).all()) and bool((asked <= left).all()):
            chosen[pending] = layer
            break
        # the rank of each draw among the draws of its layer
        ordered, order = torch.where(draw >= 0, layer, weights.numel()).sort(stable=True)
        starts = torch.searchsorted(ordered, torch.arange(weights.numel() + 1, device=weights.device))
        rank = torch.arange(ordered.numel(), device=weights.device) - starts[ordered]
        fits = rank < torch.cat([left, left.new_zeros(1)])[ordered]
        chosen[pending[order[fits]]] = ordered[fits]
        left = left - torch.bincount(ordered[fits], minlength=weights.numel())
        pending = pending[order[~fits]].sort().values
        attempt += 1
    return chosen


def draw_within(
    tensors: Sequence[SlotTensor], geometry: Geometry, alive: Tensor, births: Tensor, taken: Tensor, seed: int, step: int
) -> Tensor:
    """Draw dormant places for the births of each layer, uniformly and without replacement.

    A layer that will be at most half full draws by rejection. A denser layer draws from a list of its dormant places.

    Args:
        tensors, geometry: the layers.
        alive: int64 [layers], the number of survivors of each layer.
        births: int64 [layers], the number of births of each layer.
        taken: int64, sorted: the survivors' places, counted over all layers; -1 is ignored.
        seed, step: the random state.

    Returns:
        int64 [R], the places layer by layer, counted over all layers.
    """
    number, device = births.tolist(), births.device
    owners = torch.repeat_interleave(torch.arange(len(tensors), device=device), births, output_size=sum(number))
    if not sum(number):
        return owners
    dense = (2 * (alive + births) > geometry.limits).tolist()
    slot = torch.arange(owners.numel(), device=device) + (alive - births.cumsum(0) + births)[owners]
    counters = slot + geometry.counter_starts[owners]
    lists = [i for i, (count, full) in enumerate(zip(number, dense, strict=True)) if count and full]

    def reject(these: Tensor) -> Tensor:
        return first_free(
            lambda attempt: randomness.key(seed, randomness.BIRTH, step, attempt),
            counters[these],
            geometry.totals[owners[these]],
            geometry.place_starts[owners[these]],
            taken,
        )

    special = [i for i, one in enumerate(geometry.allowed) if one is not None and number[i] and not dense[i]]
    if not lists and not special:
        return reject(torch.arange(owners.numel(), device=device))
    chosen = torch.empty_like(owners)
    rejecting = (~torch.isin(owners, torch.tensor(lists + special, device=device))).nonzero().view(-1)
    if rejecting.numel():
        chosen[rejecting] = reject(rejecting)
    starts = geometry.place_starts.tolist()
    for i in special:
        one = geometry.allowed[i]
        assert one is not None
        found = first_free_allowed(
            lambda attempt: randomness.key(seed, randomness.BIRTH, step, attempt),
            counters[owners == i],
            one,
            taken_within(taken, starts[i], geometry.sizes[i]),
        )
        chosen[owners == i] = found + starts[i]
    for i in lists:
        free = dormant_places(taken, starts[i], geometry.sizes[i], geometry.allowed[i])
        stream = randomness.key(seed, randomness.BIRTH, step, 0)
        chosen[owners == i] = shuffled(stream, tensors[i].index, free)[: number[i]] + starts[i]
    return chosen


def draw_anywhere(geometry: Geometry, more: Tensor, taken: Tensor, count: int, seed: int, step: int) -> Tensor:
    """Draw dormant places of the whole network, uniformly and without replacement.

    Args:
        geometry: the geometry of the layers.
        more: int64: the places that earlier births of this step have taken.
        taken: int64, sorted: the survivors' places.
        count: the number of places to draw.
        seed, step: the random state.

    Returns:
        int64 [count], the places counted over all layers.
    """
    taken = torch.cat([taken, more]).sort().values if more.numel() else taken
    total = sum(geometry.sizes)
    if geometry.restricted:
        return _draw_anywhere_allowed(geometry, taken, count, seed, step)
    if 2 * taken.numel() > total:
        free = dormant_places(taken, 0, total)
        return shuffled(randomness.key(seed, randomness.LAYER, step, 0), 0, free)[:count]
    births = torch.arange(count, device=taken.device)
    return first_free(
        lambda attempt: randomness.key(seed, randomness.LAYER, step, attempt),
        births,
        torch.full_like(births, total),
        torch.zeros_like(births),
        taken,
    )


def _draw_anywhere_allowed(geometry: Geometry, taken: Tensor, count: int, seed: int, step: int) -> Tensor:
    """Do what :func:`draw_anywhere` does, if the places of some layer are restricted.

    The codes of all layers form one space (see :mod:`.allowed`); those of an unrestricted layer are its places.
    """
    device, starts = taken.device, geometry.place_starts.tolist()
    limit = int(geometry.limits.sum())
    if 2 * taken.numel() > limit:
        layers = zip(starts, geometry.sizes, geometry.allowed, strict=True)
        free = torch.cat([dormant_places(taken, start, size, one) + start for start, size, one in layers])
        return shuffled(randomness.key(seed, randomness.LAYER, step, 0), 0, free)[:count]
    spaces = [size if one is None else one.space for size, one in zip(geometry.sizes, geometry.allowed, strict=True)]
    ends = torch.tensor(spaces, device=device).cumsum(0)

    def decode(codes: Tensor) -> Tensor:
        layer = torch.searchsorted(ends, codes, right=True)
        places = torch.full_like(codes, -1)
        for i, one in enumerate(geometry.allowed):
            mine = layer == i
            own = codes[mine] - (int(ends[i]) - spaces[i])
            found = own if one is None else one.decode(own)
            places[mine] = torch.where(found >= 0, found + starts[i], -1)
        return places

    births = torch.arange(count, device=device)
    zeros = torch.zeros_like(births)
    return first_free(
        lambda attempt: randomness.key(seed, randomness.LAYER, step, attempt),
        births,
        zeros,
        zeros,
        taken,
        lambda key, ask, _: draw_codes(randomness.bits(key, ask), int(ends[-1]), limit, decode),
    )


def taken_within(taken: Tensor, start: int, total: int) -> Tensor:
    """Return the places p in 0 ... total - 1 for which ``start + p`` is taken (int64, ascending)."""
    ends = torch.searchsorted(taken, torch.tensor([start, start + total], device=taken.device)).tolist()
    return taken[ends[0] : ends[1]] - start


def dormant_places(taken: Tensor, start: int, total: int, allowed: Allowed | None = None) -> Tensor:
    """List the places p in 0 ... total - 1 for which ``start + p`` is not taken (int64, ascending), or the allowed of them."""
    if allowed is not None:
        places = allowed.places(taken.device)
        return places[~contains(taken_within(taken, start, total), places)]
    free = torch.ones(total, dtype=torch.bool, device=taken.device)
    free[taken_within(taken, start, total)] = False
    return free.nonzero().view(-1)


def signs_at(geometry: Geometry, owners: Tensor, places: Tensor, exceptions: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Compute the constant signs of places in several layers.

    Args:
        geometry: the geometry of the layers.
        owners: int64 [R], the layer of each place.
        places: int64 [R], the places within their layers.
        exceptions: for each layer, the sorted places whose sign is the opposite of the hash.
        dtype: the dtype of the result.
    """
    hashed = randomness.bits(0, places + geometry.sign_offsets[owners])
    signs = torch.where(hashed < 0, -1.0, 1.0).to(dtype)
    for layer, turned in enumerate(exceptions):
        if turned.numel():
            signs = torch.where((owners == layer) & torch.isin(places, turned), -signs, signs)
    return signs
