"""Layers that are created sparse."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_deepr.conversion.convert import sparsify


class SparseLinear(nn.Linear):
    """A linear layer that is sparse from its construction on: its dense weight never exists.

    It is an ``nn.Linear`` on the meta device, converted by :func:`lightning_deepr.sparsify`. A callback keeps its connections
    and rewires them.

    Args:
        in_features, out_features, bias, dtype: as for ``nn.Linear``.
        connectivity: float in (0, 1] (a fraction of in_features * out_features) or int (the number of connections K).
        init: "module" (magnitudes as ``nn.Linear`` would draw them, times sqrt(N / K)) or "deepr".
        seed: the seed of places, signs and values. None: PyTorch's global generator draws it, so that every layer has its own.
        compute: "sparse" | "auto" | "dense".
        device: the device of the layer; None: the CPU.
        candidates, signs: as for :func:`lightning_deepr.sparsify`.

    Example::

        >>> layer = SparseLinear(1_000_000, 1_000_000, connectivity=5_000)
        >>> layer.weight.shape, layer(torch.zeros(2, 1_000_000)).shape
        (torch.Size([1000000, 1000000]), torch.Size([2, 1000000]))
        >>> sum(p.numel() for p in layer.parameters()) - layer.bias.numel()
        5000
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        connectivity: int | float,
        bias: bool = True,
        *,
        init: str = "module",
        seed: int | None = None,
        compute: str = "sparse",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        candidates: Any = None,
        signs: Any = "place",
    ) -> None:
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        if seed is None:
            seed = int(torch.randint(2**31 - 1, (), device="cpu"))
        sparsify(
            self,
            connectivity,
            init=init,
            seed=seed,
            compute=compute,
            device=device or "cpu",
            candidates=candidates,
            signs=signs,
        )
