"""Read the entries of a ``state_dict`` that describe a converted tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_deepr.weights.base import SHARING_KEY, Parametrization
from lightning_deepr.weights.dense_theta import MaskedTheta, SoftTheta
from lightning_deepr.weights.k_slots import KSlots


def kind_of_record(state: Mapping[str, Any], head: str) -> type[Parametrization]:
    """Find the class of the parametrization that wrote the entries under ``head``."""
    if head + "0.theta_min" in state:
        return SoftTheta
    return MaskedTheta if head + "0.mask" in state else KSlots


def wanted_by_record(state: Mapping[str, Any], head: str) -> int:
    """Read the K that the user asked for."""
    if kind_of_record(state, head) is KSlots:
        return int(state[head + "0.places"].numel())
    return int(state[head + "0.wanted"])


def active_by_record(state: Mapping[str, Any], head: str) -> int:
    """Count the active connections."""
    kind = kind_of_record(state, head)
    if kind is KSlots:
        return int(state[head + "0.places"].numel())
    theta: Tensor = state[head + "original"]
    if kind is SoftTheta:
        return int((theta >= 0).sum())
    mask: Tensor = state[head + "0.mask"]
    return int((mask if bool(state[head + "0.fixed"]) else mask & (theta != 0)).sum())


def shared_by_record(state: Mapping[str, Any]) -> list[set[str]]:
    """List the heads of the entries of tensors that share a theta, one set for each shared theta."""
    found: dict[int, set[str]] = {}
    end = "0." + SHARING_KEY
    for key, value in state.items():
        if key.endswith("." + end) and "parametrizations." in key:
            found.setdefault(int(value[0]), set()).add(key.removesuffix(end))
    return list(found.values())
