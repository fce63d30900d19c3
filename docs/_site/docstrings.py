"""Docstrings for the reference, an extension of griffe: as ``help()`` shows them, in the form that mkdocstrings reads.

A callback's docstring gets the arguments of its bases when the class is made, so the one of the running class is taken. And
``Example::``, ``:func:`name` `` become Markdown.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import griffe


def to_markdown(text: str) -> str:
    """Write what is reStructuredText in a docstring as Markdown."""
    text = re.sub(r":(?:class|func|meth|mod|data|attr|obj):`~?(?:[\w.]+\.)?([\w]+)`", r"`\1`", text)
    return re.sub(r"^( *)Example::?$", r"\1Examples:", text, flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Give every object of the package its docstring in Markdown, and classes the one that they have when they run."""

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        if obj.docstring is None or not obj.path.startswith("lightning_deepr."):
            return
        if obj.is_class and obj.path.startswith("lightning_deepr.methods."):
            found = getattr(importlib.import_module(obj.module.path), obj.name, None)
            obj.docstring.value = inspect.getdoc(found) or obj.docstring.value
        obj.docstring.value = to_markdown(obj.docstring.value)
