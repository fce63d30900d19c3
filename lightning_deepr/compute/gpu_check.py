"""The check of the Triton kernels of sparse linear layers, which runs before their first use on a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_deepr.algorithm import rewiring
from lightning_deepr.algorithm.randomness import signs_of
from lightning_deepr.compute.slots import SparseSlots
from lightning_deepr.kernels.gpu import gate

SEED = 7
# rows, columns, connections, batch
LAYERS = [(30, 40, 300, 20), (5, 200, 700, 3), (64, 3, 1, 1), (40, 50, 200, 130)]


@dataclass(eq=False)
class Layer:
    """The facts about a weight [rows, columns] that the kernels read."""

    rows: int
    columns: int
    places: Tensor  # int64 [K]
    signs: Tensor  # [K]


def multiplies(theta: Tensor, slots: SparseSlots) -> bool:
    """Tell whether the Triton kernels compute a linear layer with this theta and these slots."""
    return gate.admits("sparse linear layers", theta, slots, linear_differs)


def linear_differs(device: torch.device, dtype: torch.dtype) -> str | None:
    """Compare the three products of sparse linear layers with dense ones.

    Returns:
        a description of the first difference beyond rounding, or None.
    """
    from lightning_deepr.compute import sparse_gpu

    eps = torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(0)
    for rows, columns, count, batch in LAYERS:
        places = rewiring.random_places(rows * columns, count, 0, SEED)
        slots = Layer(rows, columns, places.to(device), signs_of(SEED, places, dtype).to(device))

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        x, theta, dy = draw(batch, columns).requires_grad_(), draw(count).requires_grad_(), draw(batch, rows)
        with torch.enable_grad():
            y = sparse_gpu.linear(x, theta, None, slots)
            dx, dtheta = torch.autograd.grad(y, (x, theta), dy)
        wide, steep = x.detach().double(), dy.double()
        weight = torch.zeros(rows * columns, dtype=torch.double, device=device)
        weight = weight.index_copy(0, slots.places, (theta.detach() * slots.signs).double()).view(rows, columns)
        by_place = steep.t() @ wide
        sampled = by_place.reshape(-1)[slots.places] * slots.signs.double()
        for name, found, expected in (
            ("output", y, wide @ weight.t()),
            ("input gradient", dx, steep @ weight),
            ("theta gradient", dtheta, sampled),
        ):
            off = float((found.detach().double() - expected).abs().max()) if found.numel() else 0.0
            scale = float(expected.abs().max()) if found.numel() else 0.0
            if not off <= 8 * eps * max(scale, 1.0):
                return (
                    f"{count} connections of {columns} x {rows}, batch {batch}: the {name} differs by {off:.3g} of {scale:.3g}"
                )
    return None
