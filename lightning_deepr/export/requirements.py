"""The optional dependencies of the exports."""

from __future__ import annotations

import importlib
from types import ModuleType


def needed(*modules: str, purpose: str) -> list[ModuleType]:
    """Import optional modules.

    Raises:
        ImportError: a module is missing; the message names it and the extra that installs it.
    """
    found, missing = [], []
    for name in modules:
        try:
            found.append(importlib.import_module(name))
        except ImportError:
            missing.append(name)
    if missing:
        raise ImportError(f"{purpose} needs {', '.join(missing)}, not installed here: pip install 'lightning-deepr[export]'.")
    return found
