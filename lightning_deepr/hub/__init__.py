"""The Hugging Face Hub: a file from it, checked; a folder to it in one commit; cards; a mixin for classes of one's own.

A model goes to the Hub with ``zoo.publish`` and comes from it with ``zoo.load(..., source="hub")``. Two names here are aliases: ``hub.publish`` is
``zoo.publish``, and ``hub.load(repo_id)`` is ``zoo.load(repo_id, source="hub")``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_deepr._lazy import lazy

if TYPE_CHECKING:
    from lightning_deepr.hub.errors import HubError
    from lightning_deepr.hub.mixin import SparseHubMixin
    from lightning_deepr.hub.transfer import WEIGHTS, Published, download, revision_of

    # `load` and `publish` are missing here: the zoo stands above this folder, and its names are found by strings alone.

__all__ = ["WEIGHTS", "HubError", "Published", "SparseHubMixin", "download", "load", "publish", "revision_of"]

# `huggingface_hub` is imported when it is used; and SparseHubMixin's base class signs up every subclass when it is defined
__getattr__, __dir__ = lazy(
    __name__,
    {
        "HubError": "lightning_deepr.hub.errors",
        "SparseHubMixin": "lightning_deepr.hub.mixin",
        "load": "lightning_deepr.zoo.loading:load_from_hub",
        "publish": "lightning_deepr.zoo.publishing",
        **dict.fromkeys(("WEIGHTS", "Published", "download", "revision_of"), "lightning_deepr.hub.transfer"),
    },
)
