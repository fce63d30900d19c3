"""Where a converted weight starts: its first places, values and signs."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_deepr import randomness
from lightning_deepr.connections import KSlots, Notice
from lightning_deepr.rewiring import random_places
from lightning_deepr.selection import Candidate

INITS = ("module", "largest", "deepr")


def start(
    candidate: Candidate, count: int, index: int, *, init: str, seed: int, notice: Notice, device: torch.device
) -> tuple[Tensor, KSlots]:
    """theta and the K slots with which a tensor begins.

    Args:
        candidate: the tensor, still dense (it may be on the meta device, except for ``init="largest"``).
        count: K.
        index: its place in the order of conversion.
        init: "module": random places, the module's own |w| there times sqrt(N / K), so that the layer's output keeps the
            variance that its author gave it, and hashed signs. "deepr": random places and |N(0, 1)| / sqrt(dense fan-in), the
            paper's. "largest": the K largest |w| with their own signs (a pretrained network).
        seed: of places, signs and values.
        notice: shared by the tensors of one conversion.
        device: where the result lies.

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
        places = flat.abs().topk(count, sorted=False).indices.sort().values
        values = flat[places]
        hashed = randomness.signs_of(sign_seed, places, values.dtype)
        # kept for good, so that a connection that comes back has its own sign again
        exceptions = places[(values != 0) & (values.sign() != hashed)].clone()
        theta = values.abs()
    else:
        places = random_places(candidate.total, count, index, seed, device)
        if init == "deepr":
            slots = torch.arange(count, device=device)
            deviate = randomness.normal(randomness.key(seed, randomness.START_THETA), randomness.counters(index, slots))
            theta = deviate.abs() / math.sqrt(fan_in(candidate))
        else:
            own = (
                _own_magnitudes(candidate, places, index, seed)
                if on_meta
                else weight.detach().reshape(-1)[places.to(weight.device)]
            )
            theta = own.abs().to(device) * math.sqrt(candidate.total / count)
        theta = theta.to(weight.dtype)
    return theta, KSlots(shape, places, index, sign_seed, exceptions, weight.dtype, notice)


def fan_in(candidate: Candidate) -> int:
    """How many inputs an output of the dense layer sums over."""
    module, shape = candidate.module, candidate.shape
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return 1  # a lookup sums over nothing
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return max(shape[0] // module.groups * math.prod(shape[2:]), 1)
    return max(math.prod(shape[1:]), 1)


def _own_magnitudes(candidate: Candidate, places: Tensor, index: int, seed: int) -> Tensor:
    """What torch's own ``reset_parameters`` would put at these places, for a layer that has no values yet."""
    module, slots = candidate.module, torch.arange(places.numel(), device=places.device)
    stream, counters = randomness.key(seed, randomness.START_THETA), randomness.counters(index, slots)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return randomness.normal(stream, counters)
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)):
        bound = 1 / math.sqrt(max(math.prod(candidate.shape[1:]), 1))
        if isinstance(module, nn.Bilinear):
            bound = 1 / math.sqrt(candidate.shape[1])
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        bound = 1 / math.sqrt(module.hidden_size)
    elif isinstance(module, nn.MultiheadAttention):
        bound = math.sqrt(6 / (candidate.shape[0] + candidate.shape[1]))
    else:
        raise ValueError(
            f"`{candidate.name}` is on the meta device and {type(module).__name__} is no kind whose start is known: "
            'expected init="deepr", found "module".'
        )
    uniform = (randomness.bits(stream, counters) >> 11).bitwise_and_((1 << 53) - 1).double() * 2.0**-53
    return uniform * bound
