"""The value of ``layer.weight`` under sparse compute: a tensor that is built only when an operation needs its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear
from torch.utils._pytree import tree_map

from lightning_deepr.compute import sparse, transposed
from lightning_deepr.compute.read_only import refuse_write, refusing
from lightning_deepr.compute.slots import SparseSlots

# The attributes and functions that do not need the values.
_FREE = {
    getattr(Tensor, name).__get__
    for name in (
        "shape", "dtype", "device", "requires_grad", "layout", "is_cuda", "ndim", "is_leaf", "grad", "grad_fn", "is_meta"
    )
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.ndimension, Tensor.is_floating_point, Tensor.element_size,
     Tensor.stride, Tensor.is_contiguous, Tensor.is_complex, Tensor.__len__, torch.numel, torch.is_floating_point,
     torch.is_complex, torch.is_tensor, Tensor.get_device, Tensor.storage_offset}  # fmt: skip


class SparseWeight(torch.Tensor):
    """A converted weight that is built on demand.

    ``F.linear`` and ``torch.addmm(bias, x, weight)`` compute sparsely with it, and shape, dtype and device need no values. Any
    other operation builds the weight.

    Args:
        theta: [K], the part of theta that belongs to this tensor.
        slots: the :class:`lightning_deepr.weights.k_slots.KSlots` of the tensor.
    """

    refuses_writes = True
    _theta: Tensor
    _slots: SparseSlots

    @staticmethod
    def __new__(cls, theta: Tensor, slots: SparseSlots) -> SparseWeight:
        weight = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, slots.shape, dtype=slots.narrow or theta.dtype, device=theta.device, requires_grad=theta.requires_grad
        )
        weight._theta, weight._slots = theta, slots
        return weight  # type: ignore[no-any-return]

    def build(self) -> Tensor:
        """Build the dense-shaped weight; its gradient flows to theta."""
        return self._slots.weight_of(self._theta)  # type: ignore[no-any-return]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch_linear:
            x, weight, bias = _linear_arguments(*args, **kwargs)
            if isinstance(weight, SparseWeight) and not isinstance(x, SparseWeight):
                weight._slots.used = "sparse"
                return sparse.linear(x, weight._theta, bias, weight._slots)
        if func is torch.addmm and len(args) == 3 and not kwargs and type(args[2]) is SparseWeight:
            bias, x, weight = args
            y = None if isinstance(x, SparseWeight) else transposed.addmm(x, weight._theta, bias, weight._slots)
            if y is not None:
                weight._slots.used = "sparse"
                return y
        if func in _FREE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        refuse_write(func, args, kwargs)
        args, kwargs = tree_map(_read_only, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map(_built, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        dtype = self._slots.narrow or self._theta.dtype
        return f"SparseWeight(shape={tuple(self._slots.shape)}, K={self._slots.count}, dtype={dtype})"


def _linear_arguments(input: Any, weight: Any, bias: Any = None) -> tuple[Any, Any, Any]:
    return input, weight, bias


def _read_only(value: Any) -> Any:
    return refusing(_built(value), value._slots) if isinstance(value, SparseWeight) else value


def _built(value: Any) -> Any:
    if not isinstance(value, SparseWeight):
        return value
    if value._slots.used != "sparse":
        value._slots.used = "dense"
    return value.build()
