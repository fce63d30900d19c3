"""The zoo: trained sparse models, each in one safetensors file, loaded in one line.

>>> from lightning_deepr import zoo
>>> isinstance(zoo.list_models(), list)
True

``zoo.save`` is an alias of :func:`lightning_deepr.save_sparse`. The wheel contains the repository's folder ``zoo/`` as
``lightning_deepr.zoo.data``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_deepr._lazy import lazy

if TYPE_CHECKING:
    from lightning_deepr.files.checkpoint import save_sparse as save
    from lightning_deepr.files.gaps import FormatError
    from lightning_deepr.zoo.adapters import list_adapters, load_adapter
    from lightning_deepr.zoo.listing import list_models
    from lightning_deepr.zoo.loading import connections_of, info, load, path_of
    from lightning_deepr.zoo.predicting import Prediction, predict
    from lightning_deepr.zoo.publishing import publish
    from lightning_deepr.zoo.registry import ENTRIES, Entry
    from lightning_deepr.zoo.verification import Verification, verify

__all__ = [
    "ENTRIES",
    "Entry",
    "FormatError",
    "Prediction",
    "Verification",
    "connections_of",
    "info",
    "list_adapters",
    "list_models",
    "load",
    "load_adapter",
    "path_of",
    "predict",
    "publish",
    "save",
    "verify",
]

# Imports happen at first use, so that `import lightning_deepr.zoo` does not load `huggingface_hub` and the readers of files.
__getattr__, __dir__ = lazy(
    __name__,
    {
        **dict.fromkeys(("ENTRIES", "Entry"), "lightning_deepr.zoo.registry"),
        "list_models": "lightning_deepr.zoo.listing",
        **dict.fromkeys(("list_adapters", "load_adapter"), "lightning_deepr.zoo.adapters"),
        **dict.fromkeys(("Prediction", "predict"), "lightning_deepr.zoo.predicting"),
        "FormatError": "lightning_deepr.files.gaps",
        **dict.fromkeys(("Verification", "verify"), "lightning_deepr.zoo.verification"),
        **dict.fromkeys(("connections_of", "info", "load", "path_of"), "lightning_deepr.zoo.loading"),
        "publish": "lightning_deepr.zoo.publishing",
        "save": "lightning_deepr.files.checkpoint:save_sparse",
    },
)
