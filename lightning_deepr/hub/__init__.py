"""The Hugging Face Hub: checked downloads, uploads in one commit, model cards, and a mixin for your own classes.

``zoo.publish`` sends a model to the Hub, and ``zoo.load(..., source="hub")`` gets it from there. Two names here are aliases:
``hub.publish`` is ``zoo.publish``, and ``hub.load(repo_id)`` is ``zoo.load(repo_id, source="hub")``. ``publish_adapter`` and
``load_adapter`` do the same for adapters (``docs/adapters.md``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_deepr._lazy import lazy

if TYPE_CHECKING:
    from lightning_deepr.hub.adapters import load_adapter, publish_adapter
    from lightning_deepr.hub.errors import HubError
    from lightning_deepr.hub.mixin import SparseHubMixin
    from lightning_deepr.hub.transfer import WEIGHTS, Published, download, revision_of

    # `load` and `publish` are not imported here: the zoo is a layer above this one, so only strings may name it.

__all__ = [
    "WEIGHTS",
    "HubError",
    "Published",
    "SparseHubMixin",
    "download",
    "load",
    "load_adapter",
    "publish",
    "publish_adapter",
    "revision_of",
]

# These names are lazy so that `huggingface_hub` is imported only when one of them is used. SparseHubMixin can't import it any
# later, because its base class registers every subclass when it is defined.
__getattr__, __dir__ = lazy(
    __name__,
    {
        "HubError": "lightning_deepr.hub.errors",
        "SparseHubMixin": "lightning_deepr.hub.mixin",
        **dict.fromkeys(("load_adapter", "publish_adapter"), "lightning_deepr.hub.adapters"),
        "load": "lightning_deepr.zoo.loading:load_from_hub",
        "publish": "lightning_deepr.zoo.publishing",
        **dict.fromkeys(("WEIGHTS", "Published", "download", "revision_of"), "lightning_deepr.hub.transfer"),
    },
)
