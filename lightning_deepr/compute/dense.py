"""Dense compute: scatter the K values into a transient dense weight, and let the layer run as its author wrote it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_deepr import kernels
from lightning_deepr.compute.eager import is_jit_tracing, is_plain, is_recorded
from lightning_deepr.compute.stacked import in_transform
from lightning_deepr.kernels.cpu.buffers import kept

NARROW = (torch.bfloat16, torch.float16)  # dtypes of weights whose theta has float32, for which there are kernels
LARGE = 1 << 13  # from this number of connections on, the kernels save more time than their calls cost


def build_weight(theta: Tensor, signs: Tensor, places: Tensor, shape: torch.Size, narrow: torch.dtype | None = None) -> Tensor:
    """Build the dense-shaped weight: w_k = s_k * theta_k at the K places, exactly 0 elsewhere.

    The value is not clamped, so that the gradient dE/dtheta_k = s_k * dE/dw_k also reaches a connection at theta = 0. The
    backward pass gathers K values from the gradient of the transient weight, and keeps nothing else of it.

    Args:
        theta: [K].
        signs: [K], +-1 in theta's dtype.
        places: int64 [K], unique flat indices.
        shape: the shape of the weight.
        narrow: the dtype of the weight if it has fewer bits than theta.

    Returns:
        a tensor of ``shape`` in theta's dtype, or in ``narrow``.
    """
    if narrow is not None and (narrow not in NARROW or not isinstance(theta, Tensor) or theta.dtype is not torch.float32):
        return _scattered((theta * signs).to(narrow), places, shape)
    if (
        not torch.compiler.is_compiling()
        and isinstance(theta, Tensor)
        and not is_jit_tracing()
        and places.numel() >= LARGE
        and _fits(theta, signs, places)
    ):
        weight: Tensor = (
            Scatter.apply(theta, signs, places, shape)
            if narrow is None
            else NarrowScatter.apply(theta, signs, places, shape, narrow)
        )
        return weight
    values = theta * signs
    return _scattered(values if narrow is None else values.to(narrow), places, shape)


def rounded(theta: Tensor, narrow: torch.dtype) -> Tensor:
    """Round theta to the weight's dtype: sparse compute then multiplies with the values that dense compute has."""
    return theta.to(narrow).to(theta.dtype)


def _scattered(values: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    weight = torch.zeros(shape.numel(), dtype=values.dtype, device=values.device)
    # vmap refuses to write into a tensor that it does not map over, and exporters do not like writing in place
    if in_transform():
        return weight.index_copy(0, places, values).view(shape)
    if not torch.compiler.is_dynamo_compiling() and is_recorded():
        return weight.scatter(0, places, values).view(shape)
    return weight.index_copy_(0, places, values).view(shape)


def _fits(*tensors: Tensor) -> bool:
    """Tell whether the kernels, which take addresses, fit: the tensors are plain, and no mode or transform watches them."""
    theta = tensors[0]
    return (
        theta.dtype in (torch.float32, torch.float64)
        and tensors[1].dtype is theta.dtype
        and all(t.numel() == tensors[1].numel() for t in (theta, *tensors[2:]) if t.dim() == 1)
        and all(t.is_cpu and t.is_contiguous() and type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and is_plain(tensors[1])
        and kernels.available()
    )


def are_readable(theta: Tensor, signs: Tensor, places: Tensor) -> bool:
    """Tell whether a kernel may read the signs and the places of this theta, whoever has exchanged them.

    theta itself is known as an ordinary tensor: plain, contiguous and on the CPU.
    """
    count = theta.numel()
    return (
        type(signs) is Tensor
        and type(places) is Tensor
        and signs.dtype is theta.dtype
        and places.dtype is torch.int64
        and signs.is_cpu
        and places.is_cpu
        and signs.numel() == count
        and places.numel() == count
        and signs.is_contiguous()
        and places.is_contiguous()
        # (a freed storage has the address 0, and so have fake tensors)
        and (not count or bool(theta.data_ptr() and signs.data_ptr() and places.data_ptr()))
    )


def write_weight(theta: Tensor, signs: Tensor, places: Tensor, weight: Tensor) -> None:
    """Write the K values to their places, by a kernel. The arguments are plain CPU tensors of one dtype, float32 or float64."""
    from lightning_deepr.kernels.cpu import scatter

    scatter.run(scatter.scatter_kernel(theta.element_size()), theta, signs, places, weight)


def _reads(gradient: Tensor, signs: Tensor, places: Tensor) -> bool:
    """Tell whether a kernel may read this gradient of a weight that a kernel has written."""
    return is_plain(gradient) and gradient.is_cpu and signs.numel() == places.numel()


class Scatter(torch.autograd.Function):
    """The weight, which is not kept, and the way of its gradient to theta."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, signs: Tensor, places: Tensor, shape: torch.Size) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(signs, places)  # autograd refuses a backward pass after a rewiring
        weight = kept(tuple(shape), theta).zero_()
        write_weight(theta, signs, places, weight)
        return weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        from lightning_deepr.kernels.cpu import scatter

        signs, places = ctx.saved_tensors
        gradient = gradient.contiguous()
        if torch.is_grad_enabled() or gradient.dtype is not signs.dtype or not _reads(gradient, signs, places):
            return gradient.view(-1).index_select(0, places) * signs, None, None, None
        found = torch.empty_like(signs)
        scatter.run(scatter.gather_kernel(signs.element_size()), found, signs, places, gradient)
        return found, None, None, None


def write_narrow_weight(theta: Tensor, signs: Tensor, places: Tensor, weight: Tensor) -> None:
    """Write the K values, rounded, to their places in a bfloat16 or float16 weight. theta and signs have float32."""
    from lightning_deepr.kernels.cpu import scatter

    if weight.dtype is torch.bfloat16:
        scatter.run(scatter.narrow_scatter_kernel(), theta, signs, places, weight)
    else:
        scatter.run(scatter.short_scatter_kernel(), torch.mul(theta, signs).to(weight.dtype), signs, places, weight)


def read_narrow_gradient(gradient: Tensor, signs: Tensor, places: Tensor) -> tuple[Tensor, bool]:
    """Read theta's gradient in float32 from that of a bfloat16 or float16 weight. Also return whether it is known as finite."""
    from lightning_deepr.kernels.cpu import scatter

    if gradient.dtype is torch.bfloat16:
        found = torch.empty_like(signs)
        return found, scatter.run(scatter.narrow_gather_kernel(), found, signs, places, gradient)
    found = torch.empty_like(signs, dtype=gradient.dtype)
    scatter.run(scatter.short_gather_kernel(), found, signs, places, gradient)
    return torch.mul(found, signs), False


class NarrowScatter(torch.autograd.Function):
    """The same with a weight of 16 bits and a float32 theta."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, theta: Tensor, signs: Tensor, places: Tensor, shape: torch.Size, narrow: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(signs, places)
        weight = kept(tuple(shape), theta, narrow).zero_()
        write_narrow_weight(theta, signs, places, weight)
        return weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        signs, places = ctx.saved_tensors
        gradient = gradient.contiguous()
        if torch.is_grad_enabled() or gradient.dtype not in NARROW or not _reads(gradient, signs, places):
            return gradient.view(-1).index_select(0, places).to(signs.dtype) * signs, None, None, None, None
        return read_narrow_gradient(gradient, signs, places)[0], None, None, None, None
