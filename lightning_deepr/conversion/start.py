"""The first places, values and signs of a converted weight."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_deepr import kernels
from lightning_deepr.algorithm import randomness
from lightning_deepr.algorithm.rewiring import random_places
from lightning_deepr.conversion.selection import Candidate
from lightning_deepr.weights.base import Notice, Parametrization
from lightning_deepr.weights.dense_theta import MaskedTheta, SoftTheta
from lightning_deepr.weights.k_slots import KSlots

INITS = ("module", "largest", "deepr")


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

    Returns:
        theta [K] and its :class:`KSlots`.
    """
    weight = candidate.parameter
    assert weight is not None
    shape = torch.Size(candidate.shape)
    sign_seed = randomness.key(seed, randomness.SIGN, index) & randomness.LARGEST
    exceptions = None
    on_meta = weight.device.type == "meta"
    if init == "largest":
        if on_meta:
            raise ValueError(
                f'`{candidate.name}` is on the meta device and has no values: init="largest" needs a trained layer.'
            )
        flat = weight.detach().to(device).reshape(-1)
        if not bool(torch.isfinite(flat).all()):
            raise ValueError(f'`{candidate.name}` holds values that are not finite: init="largest" needs a trained layer.')
        if places is None:
            places = flat.abs().topk(count, sorted=False).indices.sort().values
        values = flat[places]
        hashed = randomness.signs_of(sign_seed, places, values.dtype)
        # These are never forgotten, so that a connection that comes back has its own sign again.
        exceptions = places[(values != 0) & (values.sign() != hashed)].clone()
        theta = values.abs()
    else:
        if places is None:
            places = first_places(candidate.total, count, index, seed, device)
        if init == "deepr":
            slots = torch.arange(count, device=device)
            deviate = randomness.normal(randomness.key(seed, randomness.START_THETA), randomness.counters(index, slots))
            theta = deviate.abs() / math.sqrt(candidate.kind.fan_in(candidate.module, candidate.shape))
        else:
            own = (
                own_magnitudes(candidate, places, index, seed)
                if on_meta
                else weight.detach().reshape(-1)[places.to(weight.device)]
            )
            theta = own.abs().to(device) * math.sqrt(candidate.total / count)
        theta = theta.to(weight.dtype)
    return theta, KSlots(shape, places, index, sign_seed, exceptions, weight.dtype, notice)


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


def soft_start(
    candidate: Candidate, count: int, index: int, *, init: str, seed: int, notice: Notice, device: torch.device
) -> tuple[Tensor, SoftTheta]:
    """Make the theta [shape] and the parametrization that soft-DEEP R starts with.

    Exactly ``count`` connections are active: those of :func:`lightning_deepr.conversion.start.start`. The dormant ones are
    uniform on [-1, 0), see :class:`SoftTheta`.
    """
    values, slots = start(candidate, count, index, init=init, seed=seed, notice=notice, device=device)
    stream = randomness.key(seed, randomness.START_THETA, 1)
    draw = randomness.bits(stream, randomness.counters(index, torch.arange(candidate.total, device=device)))
    theta = -((draw >> 40).bitwise_and_((1 << 24) - 1) + 1).to(values.dtype) * 2.0**-24
    theta[slots.places] = values
    made = SoftTheta(slots.shape, count, index, slots.sign_seed, slots.exceptions, values.dtype, notice)
    return theta.view(slots.shape), made


def dense_start(
    candidate: Candidate, count: int, index: int, *, init: str, seed: int, notice: Notice, device: torch.device
) -> tuple[Tensor, MaskedTheta]:
    """Take a dense weight from its module, for a method that leaves ``count`` of its connections at the end.

    With ``init="deepr"``, and for a layer on the meta device, which has no values yet, the weight starts like K slots with
    K = N.
    """
    weight = candidate.parameter
    assert weight is not None
    shape = torch.Size(candidate.shape)
    sign_seed = randomness.key(seed, randomness.SIGN, index) & randomness.LARGEST
    if init != "deepr" and weight.device.type != "meta":
        theta = weight.detach().to(device, copy=True).contiguous()
    else:
        values, slots = start(candidate, candidate.total, index, init=init, seed=seed, notice=notice, device=device)
        theta = torch.empty_like(values).index_copy_(0, slots.places, values * slots.signs).view(shape)
    none = torch.empty(0, dtype=torch.long, device=device)
    return theta, MaskedTheta(shape, count, index, sign_seed, none, theta.dtype, notice)


def first_places(total: int, count: int, index: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw the places of :func:`lightning_deepr.algorithm.rewiring.random_places`, with a compiled kernel if there is one."""
    if 2 * count <= total and torch.device(device).type == "cpu" and kernels.available():
        return kernels.random_places(total, count, index, seed)
    return random_places(total, count, index, seed, device)


STARTS: dict[type[Parametrization], Any] = {KSlots: start, SoftTheta: soft_start, MaskedTheta: dense_start}
