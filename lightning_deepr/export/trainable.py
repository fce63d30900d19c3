"""Read what training in C starts from: the layers of a feed-forward network with their slots, signs and draws."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_deepr.export.feed_forward import LinearLayer, read_layers
from lightning_deepr.weights.find import Converted, converted_tensors
from lightning_deepr.weights.k_slots import KSlots
from lightning_deepr.weights.names import unwrapped

MOST_UNITS = 65_535
_ADVICE = (
    "Only chains of linear layers and ReLU are trained in C: export the part of the network that is one (--submodule), or "
    "train this network in PyTorch."
)


@dataclass
class TrainableLayer:
    """A layer as the C program trains it.

    A sparse layer has K slots: theta, the flat place and the sign of each. A dense layer has ``weight`` and nothing to rewire.
    """

    name: str
    rows: int
    columns: int
    relu: bool
    bias: np.ndarray | None  # float32 [rows]
    weight: np.ndarray | None = None  # float32 [rows, columns] of a dense layer
    theta: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))  # float32 [K]
    places: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # int64 [K], flat
    negative: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # bool [K]
    exceptions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # int64 [E], sorted
    index: int = 0  # the tensor's number, on which its draws depend
    sign_seed: int = 0
    first_step: int = 0  # the number of the next step

    @property
    def is_sparse(self) -> bool:
        return self.weight is None

    @property
    def total(self) -> int:
        """N."""
        return self.rows * self.columns

    @property
    def count(self) -> int:
        """The number of weights that are stored: K, or N in a dense layer."""
        return len(self.theta) if self.is_sparse else self.total


def read_trainable(module: nn.Module) -> list[TrainableLayer]:
    """List the layers of a network that C can train.

    Args:
        module: a network in which at least one linear layer is converted to K slots; its other layers are trained dense.

    Raises:
        ValueError: a layer can't be trained in C; the message names it and says what to do.
    """
    for one in converted_tensors(module):
        if one.slots.adapts:
            raise ValueError(
                f"to_c(train=True): `{one.name}` is a difference to a frozen weight, which C does not train: expected sparse "
                "weights. to_c_header exports the merged network."
            )
    for name, part in unwrapped(module).named_modules():
        if part._parameters and "parametrizations" not in name.split(".") and not isinstance(part, nn.Linear):
            kind = type_before_parametrizations(part).__name__
            raise ValueError(f"to_c(train=True): expected linear layers and ReLU, found `{name or kind}` ({kind}). {_ADVICE}")
    try:
        chain = read_layers(module)
    except ValueError as error:
        text = str(error).replace("to_c_header:", "to_c(train=True):").replace(" to_onnx exports other networks;", "")
        raise ValueError(f"{text.rstrip('.')}. {_ADVICE}") from error
    found = {one.name: one for one in converted_tensors(unwrapped(module))}
    layers = [_layer(layer, found.get(f"{layer.name}.weight".removeprefix(".")), module) for layer in chain]
    if not any(layer.is_sparse for layer in layers):
        raise ValueError(
            "to_c(train=True): expected at least one sparse layer, found none: convert the network first, "
            "net = sparsify(net, connectivity)."
        )
    if layers[-1].relu:
        raise ValueError(
            f"to_c(train=True): expected logits from the last layer, found a ReLU after `{layers[-1].name}`: leave it out."
        )
    return layers


def _layer(layer: LinearLayer, converted: Converted | None, module: nn.Module) -> TrainableLayer:
    name = layer.name or type(module).__name__
    for what, size in (("rows", layer.rows), ("columns", layer.columns)):
        if size > MOST_UNITS:
            raise ValueError(
                f"to_c(train=True): `{name}` has {size:,} {what}, expected at most {MOST_UNITS:,}: a place is packed into 32 "
                "bits. Use a smaller layer."
            )
    made = TrainableLayer(name, layer.rows, layer.columns, layer.relu, layer.bias)
    if converted is None:
        made.weight = layer.dense()
        return made
    slots = converted.slots
    _refuse(name, slots)
    assert isinstance(slots, KSlots)
    theta = slots.own(converted.theta.detach()).cpu().float()
    if bool((theta < 0).any()):
        raise ValueError(
            f"to_c(train=True): expected theta >= 0 in `{name}`, found {int((theta < 0).sum())} connections below: a method "
            'with free signs has trained it. Start from its weights: sparsify(densify(net), "nonzero").'
        )
    made.theta, made.places = theta.numpy(), slots.places.cpu().numpy()
    made.negative = (slots.signs_at(slots.places, torch.float32) < 0).cpu().numpy()
    made.exceptions = slots.exceptions.cpu().numpy()
    made.index, made.sign_seed, made.first_step = slots.index, slots.sign_seed, 1 + slots.last_birth()
    return made


def _refuse(name: str, slots: object) -> None:
    """Refuse weights that Algorithm 1 on K slots does not train, or that C has no rule for."""
    found = None
    if not isinstance(slots, KSlots):
        found = f'a theta for every place ({type(slots).__name__}): sparsify(densify(net), "nonzero") makes slots of it'
    elif slots.shares:
        found = 'a theta that it shares with other layers (scope="global"): sparsify(densify(net), "nonzero") parts them'
    elif slots.allowed is not None:
        found = "places that are restricted (candidates): C draws from all places"
    elif slots.sign_table is not None:
        found = "signs by a table (Dale's law, or given): C computes signs from the place"
    if found:
        raise ValueError(f"to_c(train=True): `{name}` has {found}.")
