"""What a notebook shows of a converted network: its connectivity, and its layers below."""

from __future__ import annotations

import html
import weakref
from typing import Any

from torch import nn

from lightning_deepr.conversion.report import connectivity_report

NAME = "_repr_html_"


class View:
    """The method ``_repr_html_`` of one network. A class can't have it: it is the user's, or torch's."""

    def __init__(self, network: nn.Module) -> None:
        self._network = weakref.ref(network)

    def __call__(self) -> str | None:
        network = self._network()
        if network is None:
            return None  # IPython then shows the ordinary text
        layers = html.escape(repr(network))
        return (
            f"<b>{html.escape(type(network).__name__)}</b>{connectivity_report(network)._repr_html_()}"
            f"<details><summary>layers</summary><pre>{layers}</pre></details>"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> View:
        network = self._network()
        return self if network is None else View(memo.get(id(network), network))  # a copy of the network shows itself

    def __reduce__(self) -> Any:
        return View, (self._network(),)


def show(network: nn.Module) -> None:
    """Let a notebook show a converted network, unless its class has a ``_repr_html_`` of its own."""
    if not hasattr(network, NAME):
        vars(network)[NAME] = View(network)


def hide(module: nn.Module) -> None:
    """Undo :func:`show` in a module and its parts."""
    for part in module.modules():
        if isinstance(vars(part).get(NAME), View):
            del vars(part)[NAME]
