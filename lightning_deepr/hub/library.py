"""What this package uses of ``huggingface_hub``; without that library, one line says what to install."""

from __future__ import annotations

from lightning_deepr._needed import needed

try:
    from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, PyTorchModelHubMixin, constants, errors, hf_hub_download
    from huggingface_hub.hub_mixin import DEFAULT_MODEL_CARD
except ImportError:
    needed("huggingface_hub", purpose="The Hugging Face Hub")
    raise

__all__ = [
    "DEFAULT_MODEL_CARD",
    "CommitOperationAdd",
    "HfApi",
    "ModelCard",
    "PyTorchModelHubMixin",
    "constants",
    "errors",
    "hf_hub_download",
]
