"""The first places, values and signs of a converted weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_deepr import kernels
from lightning_deepr.algorithm import randomness
from lightning_deepr.algorithm.allowed import Allowed
from lightning_deepr.algorithm.rewiring import ascending, random_places
from lightning_deepr.algorithm.signs import SignTable
from lightning_deepr.conversion.connectivities import Given
from lightning_deepr.conversion.selection import Candidate
from lightning_deepr.weights import precision
from lightning_deepr.weights.base import Notice, Parametrization
from lightning_deepr.weights.dense_theta import MaskedTheta, SoftTheta
from lightning_deepr.weights.k_slots import KSlots

INITS = ("module", "largest", "deepr")
RANKED_FROM = 1 << 13  # connections; a smaller weight stays in a core's cache
RANKED_UP_TO = 16  # places per connection


def start(
    candidate: Candidate,
    count: int,
    index: int,
    *,
    init: str,
    seed: int,
    notice: Notice,
    device: torch.device,
    places: Tensor | None = None,
    given: Given | None = None,
    allowed: Allowed | None = None,
    sign_table: SignTable | None = None,
) -> tuple[Tensor, KSlots]:
    """Make the theta and the K slots that a tensor starts with.

    Args:
        candidate: the tensor, still dense (it may be on the meta device, except for ``init="largest"``).
        count: K, the number of connections.
        index: the tensor's position in the order of conversion.
        init: "module": random places, the module's own |w| there times sqrt(N / K), so that the layer's output keeps the
            variance that its author gave it, and hashed signs. "deepr": random places and |N(0, 1)| / sqrt(dense fan-in), the
            paper's. "largest": the K largest |w| with their own signs (a pretrained network).
        seed: the seed of places, signs and values.
        notice: the object that all tensors of one conversion share.
        device: the device of the result.
        places: int64 [K], all different; None: random places, or with ``init="largest"`` those of the largest |w|.
        given: the places that the user gives, in the stead of ``places``. Those of the weights that are not 0 keep these values
            and signs under ``init="module"``, too.
        allowed: the places where connections may be; None: everywhere.
        sign_table: the signs of the places; None: their hashes.

    Returns:
        theta [K] and its :class:`KSlots`.
    """
    weight = candidate.parameter
    assert weight is not None
    shape = torch.Size(candidate.shape)
    sign_seed = randomness.key(seed, randomness.SIGN, index) & randomness.LARGEST
    exceptions = None
    on_meta = weight.device.type == "meta"
    rules: Any = {"allowed": allowed, "sign_table": sign_table}
    if given is not None:
        places = given.places.to(device)
    if places is not None:
        refuse_elsewhere(candidate.name, places, allowed)
    if init == "largest" or (init == "module" and given is not None and given.own):
        if on_meta:
            raise ValueError(
                f'`{candidate.name}` is on the meta device and has no values: init="largest" needs a trained layer.'
            )
        flat = weight.detach().to(device).reshape(-1)
        if not bool(torch.isfinite(flat).all()):
            raise ValueError(f'`{candidate.name}` holds values that are not finite: init="largest" needs a trained layer.')
        if places is None and allowed is not None:
            among = allowed.places(device)
            places = among[flat[among].abs().topk(count, sorted=False).indices].sort().values
        elif places is None:
            places = flat.abs().topk(count, sorted=False).indices.sort().values
        values = flat[places].to(precision.kept(weight.dtype))
        if sign_table is not None:
            refuse_other_signs(candidate.name, values, places, sign_table, init)
        else:
            hashed = randomness.signs_of(sign_seed, places, values.dtype)
            # These are never forgotten, so that a connection that comes back has its own sign again.
            exceptions = places[(values != 0) & (values.sign() != hashed)].sort().values
        theta = values.abs()
    else:
        if places is None:
            places = first_places(candidate.total, count, index, seed, device, allowed)
            if keeps_order(count, candidate.total, allowed):
                places = ascending(places)
        if init == "deepr":
            numbers = torch.arange(count, device=device)
            deviate = randomness.normal(randomness.key(seed, randomness.START_THETA), randomness.counters(index, numbers))
            theta = deviate.abs() / math.sqrt(candidate.kind.fan_in(candidate.module, candidate.shape))
        else:
            own = (
                own_magnitudes(candidate, places, index, seed)
                if on_meta
                else weight.detach().reshape(-1)[places.to(weight.device)]
            )
            theta = own.abs().to(device, precision.kept(own.dtype)) * math.sqrt(candidate.total / count)
        theta = theta.to(precision.kept(weight.dtype))
        if sign_table is not None:
            theta = theta * sign_table.scales_of(places, theta.dtype)
    slots = KSlots(shape, places, index, sign_seed, exceptions, weight.dtype, notice, **rules)
    slots.stays = slots.rests = slots.in_place_order
    slots.ranked = not slots.stays and keeps_order(count, candidate.total, allowed) and bool((places.diff() > 0).all())
    return theta, slots


def keeps_order(count: int, total: int, allowed: Allowed | None) -> bool:
    """Tell whether a new tensor begins with its slots in the order of their places, and gives newborns places by rank.

    Dense compute then reads and writes a weight nearly from its beginning to its end. Sparser tensors compute sparsely.
    """
    return allowed is None and count >= RANKED_FROM and total <= RANKED_UP_TO * count


def refuse_elsewhere(name: str, places: Tensor, allowed: Allowed | None) -> None:
    """Refuse places that a tensor's candidates do not allow."""
    if allowed is None or bool((inside := allowed.contains(places)).all()):
        return
    outside = places[~inside]
    raise ValueError(
        f"`{name}`: expected {places.numel()} places among those that {allowed.text} allows, found {outside.numel()} elsewhere "
        f"(the first: {int(outside[0])}). Leave them out, or give candidates that allow them."
    )


def refuse_other_signs(name: str, values: Tensor, places: Tensor, table: SignTable, init: str) -> None:
    """Refuse weights that keep their signs, where a table has others."""
    wrong = int(((values != 0) & (values.sign() != table.signs_of(places, values.dtype))).sum())
    if wrong:
        own = 'init="largest"' if init == "largest" else 'connectivity="nonzero"'
        raise ValueError(
            f"`{name}`: {own} keeps the weights' own signs, and signs={table!r} has the opposite one at {wrong} of "
            f'{places.numel()} connections. Say which wins: signs="place" keeps the weights; init="deepr" (or '
            'init="module" with a number of connections) starts anew with the given signs; or give signs that agree.'
        )


def own_magnitudes(candidate: Candidate, places: Tensor, index: int, seed: int) -> Tensor:
    """Draw values whose magnitudes follow torch's ``reset_parameters``, for a layer on the meta device."""
    kind, module = candidate.kind, candidate.module
    if kind.weight_bound is None:
        raise ValueError(
            f"`{candidate.name}` is on the meta device, and how {type(module).__name__} starts its weight is not known: "
            'expected init="deepr", found "module".'
        )
    bound = kind.weight_bound(module, candidate.shape)
    slots = torch.arange(places.numel(), device=places.device)
    stream, counters = randomness.key(seed, randomness.START_THETA), randomness.counters(index, slots)
    if kind.normal:
        return randomness.normal(stream, counters) * bound
    uniform = (randomness.bits(stream, counters) >> 11).bitwise_and_((1 << 53) - 1).double() * 2.0**-53
    return uniform * bound


def refuse_given(candidate: Candidate, given: Given | None) -> None:
    """Refuse places that are given for a method that has a theta for every place."""
    if given is not None:
        raise ValueError(
            f"`{candidate.name}`: this method has a theta for every place and finds its connections: expected a number of "
            "connections, found places. Give a float or an int; candidates= says where connections may be."
        )


def soft_start(
    candidate: Candidate,
    count: int,
    index: int,
    *,
    init: str,
    seed: int,
    notice: Notice,
    device: torch.device,
    given: Given | None = None,
) -> tuple[Tensor, SoftTheta]:
    """Make the theta [shape] and the parametrization that soft-DEEP R starts with.

    Exactly ``count`` connections are active: those of :func:`lightning_deepr.conversion.start.start`. The dormant ones are
    uniform on [-1, 0), see :class:`SoftTheta`.
    """
    refuse_given(candidate, given)
    values, slots = start(candidate, count, index, init=init, seed=seed, notice=notice, device=device)
    stream = randomness.key(seed, randomness.START_THETA, 1)
    draw = randomness.bits(stream, randomness.counters(index, torch.arange(candidate.total, device=device)))
    theta = -((draw >> 40).bitwise_and_((1 << 24) - 1) + 1).to(values.dtype) * 2.0**-24
    theta[slots.places] = values
    made = SoftTheta(slots.shape, count, index, slots.sign_seed, slots.exceptions, slots.weight_dtype, notice)
    return theta.view(slots.shape), made


def dense_start(
    candidate: Candidate,
    count: int,
    index: int,
    *,
    init: str,
    seed: int,
    notice: Notice,
    device: torch.device,
    given: Given | None = None,
    allowed: Allowed | None = None,
) -> tuple[Tensor, MaskedTheta]:
    """Take a dense weight from its module, for a method that leaves ``count`` of its connections at the end.

    With ``init="deepr"``, and for a layer on the meta device, which has no values yet, the weight starts like K slots with
    K = N.
    """
    refuse_given(candidate, given)
    weight = candidate.parameter
    assert weight is not None
    shape = torch.Size(candidate.shape)
    sign_seed = randomness.key(seed, randomness.SIGN, index) & randomness.LARGEST
    if init != "deepr" and weight.device.type != "meta":
        theta = weight.detach().to(device, precision.kept(weight.dtype), copy=True).contiguous()
    else:
        values, slots = start(candidate, candidate.total, index, init=init, seed=seed, notice=notice, device=device)
        theta = torch.empty_like(values).index_copy_(0, slots.places, values * slots.signs).view(shape)
    none = torch.empty(0, dtype=torch.long, device=device)
    made = MaskedTheta(shape, count, index, sign_seed, none, weight.dtype, notice)
    if allowed is not None:
        made.restrict(allowed, theta)
    return theta, made


def first_places(
    total: int,
    count: int,
    index: int,
    seed: int,
    device: torch.device | str = "cpu",
    allowed: Allowed | None = None,
) -> Tensor:
    """Draw the places of :func:`lightning_deepr.algorithm.rewiring.random_places`, with a compiled kernel if there is one."""
    if allowed is not None:
        return random_places(total, count, index, seed, device, allowed)
    if 2 * count <= total and torch.device(device).type == "cpu" and kernels.available():
        return kernels.random_places(total, count, index, seed)
    return random_places(total, count, index, seed, device)


STARTS: dict[type[Parametrization], Any] = {KSlots: start, SoftTheta: soft_start, MaskedTheta: dense_start}
