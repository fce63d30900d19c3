"""One architecture: how to build it with random weights, and what to feed it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Feed:
    """The arguments of one forward pass."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """An architecture.

    Attributes:
        name: package/architecture.
        build: a function that builds the dense network; its weights come from torch's global generator.
        feed: a function that makes the arguments of a forward pass; it is told whether the network is in training mode.
        targets: the layers to convert, ``target_modules``.
    """

    name: str
    build: Callable[[], nn.Module]
    feed: Callable[[bool], Feed]
    targets: str | list[str] = "all"

    @property
    def package(self) -> str:
        return self.name.split("/")[0]

    def network(self) -> nn.Module:
        """Build the dense network; each call gives the same weights."""
        torch.manual_seed(0)
        return self.build()

    def inputs(self, training: bool) -> Feed:
        """Make the arguments; each call gives the same values."""
        torch.manual_seed(1)
        return self.feed(training)


def images(size: int, batch: int = 2, channels: int = 3, frames: int = 0) -> Callable[[bool], Feed]:
    """Feed images [batch, channels, size, size], or videos [batch, channels, frames, size, size]."""
    shape = (batch, channels, *((frames,) if frames else ()), size, size)
    return lambda training: Feed((torch.randn(shape),))
