"""The transient weight of an ordinary call of a small layer, in one autograd node.

``layer.weight`` builds the same weight through the parametrization of torch, the checks for tracers, and the tensor that
refuses writes. A small layer takes less time than that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_deepr import kernels
from lightning_deepr.compute.dense import NARROW, NarrowScatter, Scatter, are_readable
from lightning_deepr.compute.sparse import is_ordinary
from lightning_deepr.kernels import gate

_KERNEL_TYPES = (torch.float32, torch.float64)


def quick_weight(x: Any, theta: Tensor, slots: Any) -> Tensor | None:
    """Build the dense-shaped weight for an ordinary call of the layer; return None if the call is another one.

    Args:
        x: the layer's input.
        theta: [K], the weight's own part.
        slots: the :class:`lightning_deepr.weights.k_slots.KSlots` of the weight.
    """
    if not slots.is_simple_dense:
        return None
    places, signs, narrow = slots.places, slots.signs, slots.narrow
    if (
        slots.compute != "dense"
        or slots.doubt is not None
        or theta.dtype not in _KERNEL_TYPES
        or not is_ordinary(x, theta)
        or not are_readable(theta, signs, places)
        or slots.is_large
        or not kernels.available()
    ):
        return None
    gate.check_values(theta, slots)
    gate.note_finite(slots, None)  # lets go of the last gradient's memory
    if narrow is not None:
        return NarrowScatter.apply(theta, signs, places, slots.shape, narrow) if narrow in NARROW else None
    if slots.stays and slots.in_place_order:
        return (theta * signs).view(slots.shape)
    return Scatter.apply(theta, signs, places, slots.shape)  # type: ignore[no-any-return]
