"""Helpers for the tests of SET, RigL and fixed random connectivity."""

from __future__ import annotations

from torch import nn

from tests.helpers import layers

ALWAYS = {"drop_fraction": 0.4, "rewire_every_n_steps": 1, "rewire_until": None}
EVERY_OTHER = {**ALWAYS, "rewire_every_n_steps": 2}


def dense_twin(plain: nn.Module, sparse: nn.Module) -> nn.Module:
    """Make the same network with ordinary dense weights."""
    for name, value in sparse.named_parameters():
        if ".original" not in name and not name.startswith("parametrizations"):
            plain.get_parameter(name).data.copy_(value.data)
    return layers.set_dense(plain, sparse)
