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
    """Count the inputs of one output, for a layer whose weight has the outputs as its first dimension."""
    return max(math.prod(shape[1:]), 1)


def fan_in_bound(module: nn.Module, shape: Shape) -> float:
    """Compute the bound of ``kaiming_uniform_(weight, a=sqrt(5))``, with which torch starts linear layers and convolutions."""
    return 1 / math.sqrt(max(math.prod(shape[1:]), 1))


def _accepts(module: nn.Module) -> str:
    return ""


@dataclass(frozen=True)
class Kind:
    """What the conversion knows about a kind of layer.

    The functions take the module and the shape of its weight; ``refuses`` takes the module alone.

    Args:
        classes: the layer's classes. A subclass has the kind of its nearest base class that has one.
        weights: a regular expression (``re.fullmatch``) for the names of the tensors that "all" takes.
        only_when_named: True if "all" leaves the layer out.
        linear: True if "all-linear" takes the layer.
        fan_in: a function that returns the number of inputs of one output of the dense layer; ``init="deepr"`` divides by its
            square root.
        weight_bound: a function that returns b, if the layer's own ``reset_parameters`` draws its weight uniformly from
            [-b, b]. A layer on the meta device starts with it, since its dense weight is never built. None: the bound is
            unknown, and such a layer needs ``init="deepr"``.
        normal: True if ``reset_parameters`` draws the weight from a normal distribution with the standard deviation
            ``weight_bound``.
        bias_bound: a function that returns the same bound b for the other parameters of a layer on the meta device.
        refuses: a function that returns "", or why this module can't be converted: the end of a sentence that begins with the
            tensor's name.
        compute: the way in which the layer computes from a converted weight. The default builds the weight for each forward
            pass, except that ``F.linear`` with a two-dimensional weight computes sparsely.
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
        """Tell whether "all" takes a tensor of this name."""
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
    # the output projection of attention: its bias starts at 0
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
"""The kind of every layer without a record: "all" takes none of its tensors, a name takes any of them."""

_torch: dict[type, Kind] = {one: kind for kind in KINDS for one in kind.classes}
_registered: dict[type, Kind] = {}


def register_kind(kind: Kind) -> None:
    """Register a kind of layer.

    Layers that are converted already do not change. A later record of a class replaces an earlier one.

    Args:
        kind: the record of the new kind.

    Raises:
        TypeError: ``kind`` is not a record, or one of its classes is not an ``nn.Module``.
        ValueError: the record names no class or one of torch's that has a record, or ``weights`` is not a regular expression.

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
                f"register_kind: {one.__name__} has a record already. Expected a class of your own: derive it from "
                f"{one.__name__} and register that."
            )
    try:
        re.compile(kind.weights)
    except re.error as error:
        raise ValueError(f"register_kind: weights={kind.weights!r} is no regular expression ({error}).") from error
    _registered.update((one, kind) for one in kind.classes)


def kind_of(layer: type[nn.Module]) -> Kind:
    """Find the record of a class of layers: that of its nearest base class that has one, or :data:`OTHER`."""
    for one in layer.__mro__:
        kind = _registered.get(one) or _torch.get(one)
        if kind is not None:
            return kind
    return OTHER
