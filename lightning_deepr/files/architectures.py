"""The networks that a file can name, built from recorded arguments without values for their weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_deepr.files.gaps import FormatError


@dataclass(frozen=True)
class Architecture:
    """A network of :mod:`lightning_deepr.models`.

    Attributes:
        cls: the name of the class in that module.
        arguments_of: a function that returns the arguments of a network.
        limits: {argument: (type, lowest value, highest value)}; a file with other values is refused.
    """

    cls: str
    arguments_of: Callable[[Any], dict[str, Any]]
    limits: Mapping[str, tuple[type, float, float]] = field(default_factory=dict)

    def kind(self) -> type[nn.Module]:
        """Import the class."""
        found: type[nn.Module] = getattr(importlib.import_module("lightning_deepr.models"), self.cls)
        return found


ARCHITECTURES = {
    "lenet300_100": Architecture("LeNet300100", lambda net: {"bias": net.fc1.bias is not None}, {"bias": (bool, 0, 1)}),
    "cifar10_cnn": Architecture("CIFAR10CNN", lambda net: {}),
    "timit_blstm": Architecture(
        "BLSTMClassifier",
        lambda net: {
            "inputs": net.lstm.input_size,
            "hidden": net.lstm.hidden_size,
            "classes": net.head.out_features,
            "layers": net.lstm.num_layers,
            "dropout": net.dropout.p,
        },
        {
            "inputs": (int, 1, 1 << 16),
            "hidden": (int, 1, 1 << 16),
            "classes": (int, 1, 1 << 16),
            "layers": (int, 1, 64),
            "dropout": (float, 0, 1),
        },
    ),
    "char_transformer": Architecture(
        "CharTransformer",
        lambda net: {
            "characters": net.characters.num_embeddings,
            "width": net.characters.embedding_dim,
            "layers": len(net.layers),
            "heads": net.layers[0].attention.heads if len(net.layers) else 1,
            "context": net.context,
            "dropout": net.dropout.p,
        },
        {
            "characters": (int, 1, 1 << 20),
            "width": (int, 1, 1 << 16),
            "layers": (int, 0, 64),
            "heads": (int, 1, 1 << 10),
            "context": (int, 1, 1 << 20),
            "dropout": (float, 0, 1),
        },
    ),
}


def _within(value: Any, kind: Any, low: float, high: float) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind) and low <= value <= high


def recognize(module: nn.Module) -> tuple[str | None, dict[str, Any]]:
    """Find the name and the arguments that a file can record for a network; (None, {}) if it is none of the known ones."""
    for name, architecture in ARCHITECTURES.items():
        if type(module) is architecture.kind():
            return name, architecture.arguments_of(module)
    return None, {}


def build(name: str | None, arguments: Mapping[str, Any]) -> nn.Module:
    """Build a network with its parameters on the meta device, so that no memory of a weight's size is allocated.

    Args:
        name: a key of ``ARCHITECTURES``.
        arguments: the recorded arguments of the network.

    Raises:
        FormatError: the name is not known (the message says what to do), the network has no such argument, or the value of an
            argument is beyond its limits.
    """
    if name is None or name not in ARCHITECTURES:
        found = "the file names none" if name is None else f"found {name[:80]!r}"
        raise FormatError(
            f"architecture: expected one of {', '.join(ARCHITECTURES)}, {found}. Give the network yourself: "
            "zoo.load(path, module=Net()). Code is never loaded from a file."
        )
    limits = ARCHITECTURES[name].limits
    for key, value in arguments.items():
        if key not in limits or not _within(value, *limits[key]):
            known = ", ".join(
                f"{argument} ({limit[0].__name__}, {limit[1]} to {limit[2]})" for argument, limit in limits.items()
            )
            raise FormatError(f"{name}: expected among its arguments {known or 'none'}, found {key[:80]} = {str(value)[:80]}.")
    with _EmptyIsMeta():
        try:
            return ARCHITECTURES[name].kind()(**arguments)
        except ValueError as error:  # each is within its limits, but they do not fit each other
            raise FormatError(f"{name}: its arguments: {error}") from error


class _EmptyIsMeta(TorchFunctionMode):
    """Let ``torch.empty`` make meta tensors: parameters go to the meta device, and buffers, which are computed, get values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **{**kwargs, "device": "meta"}) if func is torch.empty else func(*args, **kwargs)
