"""The state of a converted network: its thetas and slots, everything that a training determines, and its invariants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_deepr.weights.find import converted_tensors
from lightning_deepr.weights.k_slots import KSlots
from tests.helpers import oracle
from tests.helpers.regression import SEED


def thetas(net: nn.Module) -> list[nn.Parameter]:
    return [converted.theta for converted in converted_tensors(net)]


def all_slots(net: nn.Module) -> list[KSlots]:
    return [converted.slots for converted in converted_tensors(net)]


def theta_of(module: nn.Module, name: str) -> nn.Parameter:
    """Return theta of a tensor, by its documented parameter name."""
    owner, _, tensor = name.rpartition(".")
    prefix = f"{owner}." if owner else ""
    return module.get_parameter(f"{prefix}parametrizations.{tensor}.original")


def slots_by_name(module: nn.Module) -> dict[str, KSlots]:
    return {converted.name: converted.slots for converted in converted_tensors(module)}


def state_of(net: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Tensor]:
    """Return everything that a training determines, without names (the Trainer and a plain loop use different names)."""
    values = [p.detach().clone() for p in net.parameters()]
    for slots in all_slots(net):
        values += [slots.places.clone(), slots.signs.clone(), slots.born.clone()]
    if optimizer is not None:
        for parameter in net.parameters():
            state: Mapping[str, Any] = optimizer.state.get(parameter, {})
            values += [value.clone() for _, value in sorted(state.items()) if isinstance(value, Tensor)]
    return values


def assert_equal_states(first: list[Tensor], second: list[Tensor]) -> None:
    """Compare two states bit for bit."""
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def assert_connected(module: nn.Module, counts: dict[str, int] | None = None) -> None:
    """Check the invariants of every converted tensor between two steps."""
    found = slots_by_name(module)
    assert found, "nothing is converted"
    for name, slots in found.items():
        theta = theta_of(module, name).detach()
        places = slots.places
        assert places.dtype == torch.int64 and places.shape == theta.shape, name
        assert places.unique().numel() == places.numel(), f"{name}: two slots are at one place"
        assert int(places.min()) >= 0 and int(places.max()) < slots.shape.numel(), f"{name}: a place lies outside"
        assert bool((theta >= 0).all()), f"{name}: theta < 0"
        assert torch.equal(slots.signs, slots.signs_at(places)), f"{name}: a sign is not its place's"
        if counts is not None:
            assert places.numel() == counts[name], f"{name}: K was not held"


def oracle_of(net: nn.Module, seed: int = SEED) -> oracle.Network:
    """Make the slow network with the same start as a converted one. It draws its own places."""
    found = list(converted_tensors(net))
    tensors = [oracle.Tensor(c.slots.total, i, seed, c.theta.detach().clone().numpy()) for i, c in enumerate(found)]
    return oracle.Network(tensors, seed)
