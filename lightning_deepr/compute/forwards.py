"""The forward passes of converted ``nn.Linear`` and ``nn.Conv2d`` layers: sparse, or by the transient dense weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_deepr import kernels
from lightning_deepr.compute import choice, conv
from lightning_deepr.compute.sparse import linear, quick_linear
from lightning_deepr.compute.weight import SparseWeight


def take_over(module: nn.Module) -> None:
    """Give a layer whose weight has just been parametrized, and whose class is its own, the forward pass that fits it."""
    own: Any = type(module)
    for plain, forward in _FORWARDS.items():
        if own.forward is plain.forward:
            own.forward = forward


def give_back(module: nn.Module) -> None:
    """After a conversion was undone: a class that stays, since the bias is parametrized too, runs as its author wrote it."""
    own: Any = type(module)
    if own.__dict__.get("forward") in _FORWARDS.values():
        del own.forward


def linear_forward(self: Any, input: Tensor) -> Tensor:
    """``nn.Linear.forward`` of a converted layer: sparse, or with the transient weight."""
    holder = self._modules["parametrizations"]._modules["weight"]
    slots, theta = holder._modules["0"], holder._parameters.get("original")
    if len(holder._modules) == 1 and theta is not None and slots.uses_sparse(input):
        theta, bias = slots.own(theta), _bias_of(self)
        if not torch.compiler.is_dynamo_compiling():
            y = quick_linear(input, theta, bias, slots)
            if y is not None:
                return y
        return linear(input, theta, bias, slots)
    return F.linear(input, _built(self.weight), self.bias)


def conv2d_forward(self: Any, input: Tensor) -> Tensor:
    """``nn.Conv2d.forward`` of a converted layer: sparse, or with the transient weight."""
    holder = self._modules["parametrizations"]._modules["weight"]
    slots, theta = holder._modules["0"], holder._parameters.get("original")
    ready = not torch.compiler.is_dynamo_compiling() or slots.order is not None  # made with the kernels, if there are any
    if ready and len(holder._modules) == 1 and theta is not None and conv.suits(self, input):

        def prefers(x: Tensor) -> bool:
            around = conv.padding_of(self)
            pixels = conv.output_size(x.shape[2:], self.kernel_size, self.stride, around, self.dilation)
            size_in, size_out = x.shape[2] * x.shape[3], pixels[0] * pixels[1]
            return kernels.available() and choice.prefers_sparse_conv(slots.shape, slots.count, x.shape[0], size_in, size_out)

        if slots.uses_sparse(input, prefers):
            return conv.conv2d(input, slots.own(theta), _bias_of(self), slots, self.stride, self.padding, self.dilation)
    result: Tensor = self._conv_forward(input, _built(self.weight), self.bias)
    return result


def _bias_of(module: Any) -> Tensor | None:
    bias = module._parameters.get("bias", False)
    return module.bias if bias is False else bias  # parametrized itself


def _built(weight: Tensor) -> Tensor:
    return weight.build() if type(weight) is SparseWeight else weight


_FORWARDS: dict[Any, Any] = {nn.Linear: linear_forward, nn.Conv2d: conv2d_forward}
