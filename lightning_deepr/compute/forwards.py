"""The forward passes of converted ``nn.Linear`` and ``nn.Conv2d`` layers: sparse, or with the transient dense weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_deepr.compute import choice, conv, dense_linear, upon_base_linear
from lightning_deepr.compute.eager import needs_operators
from lightning_deepr.compute.layer import Shape, Slots, dense_dtype, matrix, slots_and_theta, with_forward
from lightning_deepr.compute.sparse import linear, quick_linear
from lightning_deepr.compute.transient import quick_weight
from lightning_deepr.compute.weight import SparseWeight


def linear_forward(self: Any, input: Tensor) -> Tensor:
    """Replace ``nn.Linear.forward`` in a converted layer: compute sparsely, or with the transient weight."""
    found = slots_and_theta(self)
    if found is not None:
        slots, theta = found
        is_eager = not torch.compiler.is_dynamo_compiling()
        if slots.adapts and is_eager and slots.may_sum:
            y = upon_base_linear.quick_linear(input, slots.own(theta), _bias_of(self), slots)
            if y is not None:
                return y
        if slots.uses_sparse(input, self):
            part, bias = slots.own(theta), _bias_of(self)
            if is_eager:
                y = quick_linear(input, part, bias, slots)
                if y is not None:
                    return y
            return linear(input, part, bias, slots)
        if is_eager and slots.is_simple_dense:
            part, bias = slots.own(theta), _bias_of(self)
            y = dense_linear.quick_linear(input, part, bias, slots)
            if y is not None:
                return y
            weight = quick_weight(input, part, slots)
            if weight is not None:
                return F.linear(input, weight, bias)
    return F.linear(input, _built(self.weight), self.bias)


LINEAR = with_forward(nn.Linear, linear_forward, capable=matrix)


def conv2d_forward(self: Any, input: Tensor) -> Tensor:
    """Replace ``nn.Conv2d.forward`` in a converted layer: compute sparsely, or with the transient weight."""
    found = slots_and_theta(self)
    if found is not None and isinstance(input, Tensor):  # torch.fx records with proxies
        slots, theta = found
        is_eager = not torch.compiler.is_dynamo_compiling()
        if (
            (not is_eager or not needs_operators(convolution=True) or slots.is_large)
            and conv.suits(self, input)
            and slots.uses_sparse(input, self)
            # Dynamo can't trace the making of an order. The conversion makes one if there are kernels; without it, run dense.
            and (is_eager or slots.order is not None)
        ):
            return conv.conv2d(input, slots.own(theta), _bias_of(self), slots, self.stride, self.padding, self.dilation)
        if is_eager:
            weight = quick_weight(input, slots.own(theta), slots)
            if weight is not None:
                y: Tensor = self._conv_forward(input, weight, _bias_of(self))
                return y
    result: Tensor = self._conv_forward(input, _built(self.weight), self.bias)
    return result


def _conv2d_capable(module: Any, tensor_name: str, shape: Shape) -> bool:
    kind: Any = type_before_parametrizations(module)
    own = (
        kind.forward is not nn.Conv2d.forward or kind._conv_forward is not nn.Conv2d._conv_forward or "forward" in vars(module)
    )
    return module.groups == 1 and module.padding_mode == "zeros" and not own


def _conv2d_guess(slots: Slots) -> bool:
    return choice.prefers_sparse_conv_at_all(slots.count / slots.total)


def _conv2d_prefers(slots: Slots, module: Any, x: Tensor) -> bool:
    around = conv.padding_of(module)
    pixels = conv.output_size(x.shape[2:], module.kernel_size, module.stride, around, module.dilation)
    size_in, size_out = x.shape[2] * x.shape[3], pixels[0] * pixels[1]
    stretch = conv.stretch_of(x.shape[2:], module.kernel_size, around)
    return choice.prefers_sparse_conv(slots.shape, slots.count, x.shape[0], size_in, size_out, stretch, dense_dtype(slots, x))


CONV2D = with_forward(nn.Conv2d, conv2d_forward, capable=_conv2d_capable, guess=_conv2d_guess, prefers=_conv2d_prefers)


def _bias_of(module: Any) -> Tensor | None:
    bias = module._parameters.get("bias", False)
    return module.bias if bias is False else bias  # missing: the bias is parametrized, too


def _built(weight: Tensor) -> Tensor:
    return weight.build() if type(weight) is SparseWeight else weight
