"""The kinds of layers that can be converted: one record per kind.

A new kind is one :class:`Kind`, given to :func:`register_kind`. ``docs/extending.md`` shows a complete one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_deepr.compute import forwards, rnn_module
from lightning_deepr.compute.layer import DENSE, READ, LayerCompute, Shape

Size = Callable[[Any, Shape], float]


def dense_fan_in(module: nn.Module, shape: Shape) -> int:
    """The inputs of an output of a layer whose weight's first dimension counts the outputs."""
    return max(math.prod(shape[1:]), 1)


def fan_in_bound(module: nn.Module, shape: Shape) -> float:
    """What ``kaiming_uniform_(weight, a=sqrt(5))``, the start of torch's linear layers and convolutions, comes to."""
    return 1 / math.sqrt(max(math.prod(shape[1:]), 1))


def _accepts(module: nn.Module) -> str:
    return ""


@dataclass(frozen=True)
class Kind:
    """What the conversion has to know about a kind of layer.

    Functions are called with the module and the shape of its weight.

    Args:
        classes: the layer's classes. A subclass is of the kind of its nearest class that has one.
        weights: regular expression (``re.fullmatch``) for the names of the tensors that "all" takes.
        only_when_named: whether "all" leaves the layer out.
        linear: whether "all-linear" takes it.
        fan_in: how many inputs an output of the dense layer sums over; ``init="deepr"`` divides by its root.
        weight_bound: b, where the layer's own ``reset_parameters`` draws its weight uniformly from [-b, b]: the start of a layer
            on the meta device, whose dense weight is never built. None: unknown, and such a layer needs ``init="deepr"``.
        normal: the weight is drawn from a normal distribution, with ``weight_bound`` as its standard deviation.
        bias_bound: b, in the same way, for the other parameters of a layer on the meta device.
        refuses: why this module can't be converted (the end of a sentence that begins with the tensor's name), or "".
        compute: how the layer computes from a converted weight. The default builds the weight for each forward pass, except
            that ``F.linear`` with a two-dimensional weight computes sparsely.
    """

    classes: tuple[type[nn.Module], ...]
    weights: str = "weight"
    only_when_named: bool = False
    linear: bool = False
    fan_in: Callable[[Any, Shape], int] = dense_fan_in
    weight_bound: Size | None = None
    normal: bool = False
    bias_bound: Size = fan_in_bound
    refuses: Callable[[Any], str] = _accepts
    compute: LayerCompute = READ

    def takes(self, tensor_name: str) -> bool:
        """Whether "all" takes a tensor of this name."""
        return re.fullmatch(self.weights, tensor_name) is not None


def _transposed_fan_in(module: Any, shape: Shape) -> int:
    return max(shape[0] // module.groups * math.prod(shape[2:]), 1)


def _bilinear_bound(module: nn.Module, shape: Shape) -> float:
    return 1 / math.sqrt(shape[1])


def _hidden_bound(module: Any, shape: Shape) -> float:
    return 1 / math.sqrt(module.hidden_size)


def _xavier_bound(module: nn.Module, shape: Shape) -> float:
    return math.sqrt(6 / (shape[0] + shape[1]))


def _zero(module: nn.Module, shape: Shape) -> float:
    return 0.0


def _one(module: nn.Module, shape: Shape) -> int:
    return 1


def _sparse_gradients(module: Any) -> str:
    if not module.sparse:
        return ""
    return (
        "has sparse=True, whose gradient is a sparse tensor: expected sparse=False (the gradient of a converted weight has K "
        "entries anyway)."
    )


KINDS = (
    Kind((nn.Linear,), linear=True, weight_bound=fan_in_bound, compute=forwards.LINEAR),
    # (attention sets its output's bias to 0)
    Kind(
        (nn.modules.linear.NonDynamicallyQuantizableLinear,),
        linear=True,
        weight_bound=fan_in_bound,
        bias_bound=_zero,
        compute=forwards.LINEAR,
    ),
    Kind((nn.Bilinear,), weight_bound=_bilinear_bound, bias_bound=_bilinear_bound, compute=DENSE),
    Kind((nn.modules.conv._ConvNd,), weight_bound=fan_in_bound, compute=DENSE),
    Kind((nn.Conv2d,), weight_bound=fan_in_bound, compute=forwards.CONV2D),
    Kind((nn.modules.conv._ConvTransposeNd,), fan_in=_transposed_fan_in, weight_bound=fan_in_bound, compute=DENSE),
    Kind(
        (nn.RNNBase,),
        weights=r"weight_(ih|hh|hr)_l\d+(_reverse)?",
        weight_bound=_hidden_bound,
        bias_bound=_hidden_bound,
        compute=rnn_module.RECURRENT,
    ),
    Kind((nn.RNNCellBase,), weights="weight_(ih|hh)", weight_bound=_hidden_bound, bias_bound=_hidden_bound, compute=DENSE),
    Kind(
        (nn.MultiheadAttention,), weights="(in|[qkv])_proj_weight", weight_bound=_xavier_bound, bias_bound=_zero, compute=DENSE
    ),
    Kind(
        (nn.Embedding, nn.EmbeddingBag),
        only_when_named=True,
        fan_in=_one,  # a lookup sums over nothing
        weight_bound=_one,
        normal=True,
        refuses=_sparse_gradients,
        compute=DENSE,
    ),
)
"""The layers of torch."""

OTHER = Kind((), weights="(?!)")
"""A layer of no kind that is known: "all" takes nothing of it, a name takes any tensor."""

_torch: dict[type, Kind] = {one: kind for kind in KINDS for one in kind.classes}
_registered: dict[type, Kind] = {}


def register_kind(kind: Kind) -> None:
    """Make a kind of layer known; layers that are converted already stay as they are. A later record of a class replaces an earlier one.

    Args:
        kind: its record.

    Raises:
        TypeError: no record, or a class that is no ``nn.Module``.
        ValueError: no class, a class of torch's that has a record, or a regular expression that is none.

    Example::

        >>> import torch
        >>> class Distances(nn.Module):
        ...     def __init__(self) -> None:
        ...         super().__init__()
        ...         self.weight = nn.Parameter(0.2 * torch.rand(30, 20) - 0.1)
        ...     def forward(self, x: torch.Tensor) -> torch.Tensor:
        ...         return torch.cdist(x, self.weight)
        >>> register_kind(Kind((Distances,), weight_bound=lambda module, shape: 0.1))
        >>> from lightning_deepr import sparsify
        >>> int((sparsify(Distances(), 60).weight != 0).sum())
        60
    """
    if not isinstance(kind, Kind):
        raise TypeError(f"register_kind: expected a Kind(...), found {kind!r}.")
    if not isinstance(kind.classes, tuple) or not all(
        isinstance(one, type) and issubclass(one, nn.Module) for one in kind.classes
    ):
        raise TypeError(f"register_kind: expected classes to be a tuple of classes of nn.Module, found {kind.classes!r}.")
    if not kind.classes:
        raise ValueError("register_kind: expected at least one class, found none.")
    for one in kind.classes:
        if one in _torch:
            raise ValueError(
                f"register_kind: {one.__name__} has a record already. Expected a class of your own: derive it from {one.__name__} "
                "and register that."
            )
    try:
        re.compile(kind.weights)
    except re.error as error:
        raise ValueError(f"register_kind: weights={kind.weights!r} is no regular expression ({error}).") from error
    _registered.update((one, kind) for one in kind.classes)


def kind_of(layer: type[nn.Module]) -> Kind:
    """The record of a class of layers: that of its nearest class that has one, or :data:`OTHER`."""
    for one in layer.__mro__:
        kind = _registered.get(one) or _torch.get(one)
        if kind is not None:
            return kind
    return OTHER
