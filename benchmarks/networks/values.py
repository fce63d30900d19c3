"""Tensors in whatever a network returns: find them, compare them, make a loss of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

RELATIVE, ABSOLUTE = 1e-3, 1e-5  # of the largest value of a tensor: float32, summed in another order

GRADIENT = 5e-3  # rounding flips a ReLU near 0: RAFT differs by 2.4e-3 in float32, by 4e-15 in float64


def tensors(value: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in nested outputs, in order. Dataclasses of transformers are mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for key in value:
            yield from tensors(value[key])
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from tensors(part)


def loss_of(output: Any) -> Tensor:
    """Project all outputs that have a gradient on fixed random directions, so that each of their entries has one."""
    generator = torch.Generator().manual_seed(2)
    parts = [
        (part * torch.randn(part.shape, generator=generator).to(part.dtype)).sum() / max(1, part.numel()) ** 0.5
        for part in tensors(output)
        if part.requires_grad and part.is_floating_point()
    ]
    if not parts:
        raise ValueError("expected an output with a gradient, found none")
    return torch.stack(parts).sum()


def difference(found: Sequence[Tensor], expected: Sequence[Tensor], relative: float = RELATIVE) -> str:
    """Compare two lists of tensors: "" if they are equal up to rounding, otherwise the first difference."""
    if len(found) != len(expected):
        return f"{len(found)} tensors instead of {len(expected)}"
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"tensor {number}: {one.dtype} {tuple(one.shape)} instead of {other.dtype} {tuple(other.shape)}"
        one, other = one.detach(), other.detach()
        if not other.is_floating_point():
            if not torch.equal(one, other):
                return f"tensor {number}: other integers"
            continue
        if not torch.equal(one.isfinite(), other.isfinite()):
            return f"tensor {number}: finite at other entries"
        one, other = one.nan_to_num(0.0, 0.0, 0.0), other.nan_to_num(0.0, 0.0, 0.0)
        if other.numel():
            worst, scale = float((one - other).abs().max()), float(other.abs().max())
            if worst > relative * scale + ABSOLUTE * relative / RELATIVE:
                return f"tensor {number}: differs by {worst:.2g}, largest value {scale:.2g}"
    return ""
