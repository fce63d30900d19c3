"""The kinds of layers that can be converted."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

from lightning_deepr.algorithm import randomness
from lightning_deepr.compute import recurrent

KINDS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Embedding,
    nn.EmbeddingBag,
)


ONLY_WHEN_NAMED = (nn.Embedding, nn.EmbeddingBag)


WEIGHTS = re.compile(r"weight|weight_(ih|hh|hr)(_l\d+(_reverse)?)?|(in|[qkv])_proj_weight")


def fan_in(module: nn.Module, shape: tuple[int, ...]) -> int:
    """How many inputs an output of the dense layer sums over."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return 1  # a lookup sums over nothing
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return max(shape[0] // module.groups * math.prod(shape[2:]), 1)
    return max(math.prod(shape[1:]), 1)


def own_magnitudes(module: nn.Module, shape: tuple[int, ...], name: str, places: Tensor, index: int, seed: int) -> Tensor:
    """What torch's own ``reset_parameters`` would put at these places, for a layer that has no values yet."""
    slots = torch.arange(places.numel(), device=places.device)
    stream, counters = randomness.key(seed, randomness.START_THETA), randomness.counters(index, slots)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return randomness.normal(stream, counters)
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear)):
        bound = 1 / math.sqrt(max(math.prod(shape[1:]), 1))
        if isinstance(module, nn.Bilinear):
            bound = 1 / math.sqrt(shape[1])
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        bound = 1 / math.sqrt(module.hidden_size)
    elif isinstance(module, nn.MultiheadAttention):
        bound = math.sqrt(6 / (shape[0] + shape[1]))
    else:
        raise ValueError(
            f"`{name}` is on the meta device and {type(module).__name__} is no kind whose start is known: "
            'expected init="deepr", found "module".'
        )
    uniform = (randomness.bits(stream, counters) >> 11).bitwise_and_((1 << 53) - 1).double() * 2.0**-53
    return uniform * bound


def has_sparse_compute(module: nn.Module, tensor_name: str, shape: tuple[int, ...]) -> bool:
    """Whether sparse compute may take a tensor: one of a convolution, an LSTM or a GRU, or a matrix that its module gives to ``F.linear``."""
    if isinstance(module, nn.RNNBase):
        return recurrent.capable(module, tensor_name)
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    if len(shape) != 2 or isinstance(module, (nn.RNNCellBase, nn.MultiheadAttention)):
        return False
    return isinstance(module, nn.Linear) or not type(module).__module__.startswith("torch.nn")
