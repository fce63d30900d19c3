"""Imports the libraries that only a part of the package needs, or says in one line which is missing and what to do."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

EXPORT = "'lightning-deepr[export]'"
"""What ``pip install`` gets for the exports."""


def needed(*modules: str, purpose: str, install: str = "") -> list[ModuleType]:
    """Import optional modules.

    Args:
        modules: their names.
        purpose: what needs them, the beginning of the message: "A picture", "to_onnx".
        install: what ``pip install`` gets; "": the modules' own names.

    Returns:
        the modules.

    Raises:
        ImportError: a module is missing, or can't be imported; the message names it and says how to install it.

    Example::

        >>> needed("no_such_module", purpose="A picture")
        Traceback (most recent call last):
        ImportError: A picture needs no_such_module, not installed here: pip install no_such_module
    """
    found, absent, broken = [], [], {}
    cause: ImportError | None = None
    for name in modules:
        try:
            found.append(importlib.import_module(name))
        except ImportError as error:
            cause, top = error, name.partition(".")[0]
            if isinstance(error, ModuleNotFoundError) and (error.name or top).partition(".")[0] == top:
                absent.append(name if importlib.util.find_spec(top) else top)
            else:
                broken[name] = error
    if cause is not None:
        command = "pip install " + (install or " ".join(dict.fromkeys(name.partition(".")[0] for name in modules)))
        if absent:
            raise ImportError(f"{purpose} needs {', '.join(dict.fromkeys(absent))}, not installed here: {command}") from cause
        told = "; ".join(f"{name}, which is installed but can't be imported ({error})" for name, error in broken.items())
        raise ImportError(f"{purpose} needs {told}: {command}") from cause
    return found
