"""Read the tensors of a checkpoint whose hyperparameters hold what ``torch.load(weights_only=True)`` refuses.

``save_hyperparameters()`` writes a ``Path``, a class or an object of a user's class into a Lightning checkpoint as it is.
Nothing of that is needed to load a network. So names that torch does not allow become placeholders: no module is imported and
no code of the file runs.
"""

from __future__ import annotations

import pickle
import types
from typing import Any, BinaryIO

import torch
from torch._weights_only_unpickler import _get_allowed_globals, _get_user_allowed_globals


class Placeholder:
    """Stands for an object, or a class, that was not read."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = {**_get_allowed_globals(), **_get_user_allowed_globals()}
        return allowed.get(f"{module}.{name}", Placeholder)


def read(stream: BinaryIO) -> Any:
    """Read a checkpoint as torch does, with placeholders for what it would refuse.

    Args:
        stream: the open file, of ``torch.save``.
    """
    reader = types.SimpleNamespace(Unpickler=_Unpickler, load=lambda *args, **kwargs: _Unpickler(*args, **kwargs).load())
    reader.__name__ = __name__
    return torch.load(stream, map_location="cpu", pickle_module=reader, weights_only=False)
