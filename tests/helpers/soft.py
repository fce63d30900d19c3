"""A network under soft-DEEP R."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_deepr import SoftDeepR
from lightning_deepr.weights.find import converted_tensors

SEED, ALPHA, TEMPERATURE = 3, 0.2, 0.01


def soft(connectivity: Any = 0.3, **options: Any) -> SoftDeepR:
    default = {"temperature": TEMPERATURE, "l1": ALPHA, "distribution": "uniform", "seed": SEED, "check_invariants": True}
    return SoftDeepR(connectivity, **{**default, **options})


def thetas(net: nn.Module) -> list[Tensor]:
    return [c.theta.detach() for c in converted_tensors(net)]
