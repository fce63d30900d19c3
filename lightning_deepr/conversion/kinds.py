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

from lightning_deepr.algorithm.units import Units, matrix_units
from lightning_deepr.compute import embedding, forwards, rnn_module
from lightning_deepr.compute.layer import DENSE, READ, LayerCompute, Shape

Size = Callable[[Any, Shape], float]


def matrices(module: nn.Module, shape: Shape) -> Shape:
    """Read a weight as matrices [outputs, inputs]. Dimensions before these two number matrices of one size (experts, heads)."""
    return shape[-2:]


def kernels(module: nn.Module, shape: Shape) -> Shape:
    """Read a weight as [outputs, inputs, *kernel], a convolution's."""
    return shape


def matrix_layout(module: nn.Module, shape: Shape) -> Units:
    """Read a weight as matrices [outputs, inputs]; those that are stacked in one tensor share their inputs."""
    return matrix_units(tuple(shape))


def dense_fan_in(module: nn.Module, shape: Shape) -> int:
    """Count the inputs of one output, for a layer whose weight is one or more matrices [outputs, inputs]."""
    return max(shape[-1], 1)


def kernel_fan_in(module: nn.Module, shape: Shape) -> int:
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
            square root. The default reads the weight as matrices [outputs, inputs].
        sizes: a function that returns (outputs, inputs, *kernel) of the matrix or the kernel of which the weight consists, for
            the distributions "erdos_renyi" and "erk". The default, :func:`matrices`, takes the last two dimensions;
            :func:`kernels` is a convolution's.
        weight_bound: a function that returns b, if the layer's own ``reset_parameters`` draws its weight uniformly from
            [-b, b]. A layer on the meta device starts with it, since its dense weight is never built. None: the bound is
            unknown, and such a layer needs ``init="deepr"``.
        normal: True if ``reset_parameters`` draws the weight from a normal distribution with the standard deviation
            ``weight_bound``.
        bias_bound: a function that returns the same bound b for the other parameters of a layer on the meta device.
        refuses: a function that returns "", or why this module can't be converted: the end of a sentence that begins with the
            tensor's name.
        units: a function that returns which output and input unit a place of the weight connects
            (:class:`lightning_deepr.algorithm.units.Units`), for ``candidates=`` and ``signs=``. The default reads the
            weight as matrices [outputs, inputs].
        compute: the way in which the layer computes from a converted weight. The default builds the weight for each forward
            pass, except that ``F.linear`` and ``torch.addmm(bias, x, weight)`` with a matrix compute sparsely.
    """

    classes: tuple[type[nn.Module], ...]
    weights: str = "weight"
    only_when_named: bool = False
    linear: bool = False
    fan_in: Callable[[Any, Shape], int] = dense_fan_in
    sizes: Callable[[Any, Shape], Shape] = matrices
    weight_bound: Size | None = None
    normal: bool = False
    bias_bound: Size = fan_in_bound
    refuses: Callable[[Any], str] = _accepts
    units: Callable[[Any, Shape], Units] = matrix_layout
    compute: LayerCompute = READ

    def takes(self, tensor_name: str) -> bool:
        """Tell whether "all" takes a tensor of this name."""
        return re.fullmatch(self.weights, tensor_name) is not None


def _transposed_fan_in(module: Any, shape: Shape) -> int:
    return max(shape[0] // module.groups * math.prod(shape[2:]), 1)


def _convolution(module: Any, shape: Shape) -> Units:
    kernel = tuple(shape[2:])
    return Units(
        module.groups, shape[0] // module.groups, shape[1], math.prod(kernel), grouped=module.groups > 1, kernel=kernel
    )


def _transposed_convolution(module: Any, shape: Shape) -> Units:
    return _convolution(module, shape)._replace(transposed=True)


def _gates(module: Any, shape: Shape) -> Units:
    gates = max(shape[0] // module.hidden_size, 1)  # a projection of an LSTM has fewer rows than hidden units
    return Units(gates, shape[0] // gates, shape[1])


def _projections(module: Any, shape: Shape) -> Units:
    number = max(shape[0] // module.embed_dim, 1)
    return Units(number, shape[0] // number, shape[1])


def _inputs_first(module: Any, shape: Shape) -> Units:
    return matrix_units(tuple(shape))._replace(transposed=True)


def _pairs(module: Any, shape: Shape) -> Units:
    return Units(1, shape[0], shape[1] * shape[2])


def _bilinear_sizes(module: nn.Module, shape: Shape) -> Shape:
    return shape[0], shape[1] * shape[2]  # an output sums over all pairs of inputs


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


def _unfit_embedding(module: Any) -> str:
    if module.max_norm is not None:
        return (
            f"has max_norm={module.max_norm}, which writes to the weight at each lookup, and the weight is built from its "
            "connections: expected max_norm=None. Limit theta yourself, or leave the layer out."
        )
    if not module.sparse:
        return ""
    return (
        "has sparse=True, whose gradient is a sparse tensor: expected sparse=False (the gradient of a converted weight has K "
        "entries anyway)."
    )


KINDS = (
    Kind((nn.Linear,), linear=True, weight_bound=fan_in_bound, compute=forwards.LINEAR),
    # the output projection of attention, which reads its weight and never calls it; its bias starts at 0
    Kind(
        (nn.modules.linear.NonDynamicallyQuantizableLinear,),
        linear=True,
        weight_bound=fan_in_bound,
        bias_bound=_zero,
        compute=DENSE,
    ),
    Kind(
        (nn.Bilinear,),
        fan_in=kernel_fan_in,
        sizes=_bilinear_sizes,
        units=_pairs,
        weight_bound=_bilinear_bound,
        bias_bound=_bilinear_bound,
        compute=DENSE,
    ),
    *(
        Kind(
            (layer,),
            fan_in=kernel_fan_in,
            sizes=kernels,
            units=_convolution,
            weight_bound=fan_in_bound,
            compute=compute,
        )
        for layer, compute in ((nn.modules.conv._ConvNd, DENSE), (nn.Conv2d, forwards.CONV2D))
    ),
    Kind(
        (nn.modules.conv._ConvTransposeNd,),
        fan_in=_transposed_fan_in,
        sizes=kernels,
        units=_transposed_convolution,
        weight_bound=fan_in_bound,
        compute=DENSE,
    ),
    Kind(
        (nn.RNNBase,),
        weights=r"weight_(ih|hh|hr)_l\d+(_reverse)?",
        units=_gates,
        weight_bound=_hidden_bound,
        bias_bound=_hidden_bound,
        compute=rnn_module.RECURRENT,
    ),
    Kind(
        (nn.RNNCellBase,),
        weights="weight_(ih|hh)",
        units=_gates,
        weight_bound=_hidden_bound,
        bias_bound=_hidden_bound,
        compute=DENSE,
    ),
    Kind(
        (nn.MultiheadAttention,),
        weights="(in|[qkv])_proj_weight",
        units=_projections,
        weight_bound=_xavier_bound,
        bias_bound=_zero,
        compute=DENSE,
    ),
    *(
        Kind(
            (layer,),
            only_when_named=True,
            fan_in=_one,  # a lookup sums over nothing
            weight_bound=_one,
            normal=True,
            units=_inputs_first,
            refuses=_unfit_embedding,
            compute=compute,
        )
        for layer, compute in ((nn.Embedding, embedding.EMBEDDING), (nn.EmbeddingBag, embedding.EMBEDDING_BAG))
    ),
)
"""The layers of torch."""

OTHER = Kind((), weights="(?!)")
"""The kind of every layer without a record: "all" takes none of its tensors, a name takes any of them."""

_named: dict[str, Kind] = {
    # GPT-2's linear layer, whose weight is [inputs, outputs]
    "transformers.pytorch_utils.Conv1D": Kind(
        (), only_when_named=True, fan_in=lambda module, shape: shape[0], weight_bound=lambda module, shape: 0.02, normal=True,
        bias_bound=_zero, units=_inputs_first,
    ),
}  # fmt: skip
"""Layers of other packages, which are not imported here."""

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
        kind = _registered.get(one) or _torch.get(one) or _named.get(f"{one.__module__}.{one.__qualname__}")
        if kind is not None:
            return kind
    return OTHER
