"""``from_pretrained``, ``save_pretrained`` and ``push_to_hub`` for a user's own modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lightning_deepr.files.checkpoint import load_sparse_file, save_sparse
from lightning_deepr.hub.cards import card_of_class
from lightning_deepr.hub.errors import readable
from lightning_deepr.hub.library import DEFAULT_MODEL_CARD, ModelCard, PyTorchModelHubMixin
from lightning_deepr.hub.transfer import WEIGHTS, download
from lightning_deepr.weights.find import converted_tensors

_Own = TypeVar("_Own", bound="SparseHubMixin")


class SparseHubMixin(
    PyTorchModelHubMixin,
    library_name="lightning-deepr",
    tags=["sparse", "deep-r"],
    paper_url="https://arxiv.org/abs/1711.05136",
):
    """The ``PyTorchModelHubMixin`` of ``huggingface_hub`` with a sparse file as weights.

    The file has K values and K places per converted weight. The methods are the same: ``net.save_pretrained(folder)``,
    ``net.push_to_hub("me/net")`` and ``Net.from_pretrained("me/net" or folder)``. ``config.json`` records the arguments of
    ``__init__`` that JSON can hold. It does not hold the class: the user who loads the model needs its code, and nothing from
    the Hub is executed. Unlike that mixin, this one has no fallback to pickled weights, and missing or left over keys are an
    error.

    ``from_pretrained`` builds the dense class with its ``__init__``, then converts it as recorded. It returns the module in
    eval mode; after ``train()``, training under ``DeepR`` continues from there. A module without converted weights can't be
    saved: use ``PyTorchModelHubMixin`` for it.

    Example::

        >>> import tempfile
        >>> from lightning_deepr import sparsify
        >>> class Net(nn.Module, SparseHubMixin):
        ...     def __init__(self, width: int = 30) -> None:
        ...         super().__init__()
        ...         self.fc = nn.Linear(20, width)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = sparsify(Net(width=50), 0.05).save_pretrained(folder)
        ...     Net.from_pretrained(folder).fc.weight.shape
        torch.Size([50, 20])
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        _refuse_dense(self)
        save_sparse(_module(self), save_directory / WEIGHTS, license=self._hub_mixin_info.model_card_data.license)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Make the library's card if the class has a template of its own, else a card with the table of the connectivity."""
        if self._hub_mixin_info.model_card_template != DEFAULT_MODEL_CARD:
            return super().generate_model_card(*args, **kwargs)
        return ModelCard(card_of_class(_module(self), self._hub_mixin_info.model_card_data.to_dict(), **kwargs))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Publish the module. The arguments are those of ``PyTorchModelHubMixin.push_to_hub``.

        Raises:
            HubError: the upload failed; ``reason`` is the cause, and the message says what to do.
        """
        _refuse_dense(self)
        with readable(repo_id, revision=options.get("branch"), publishing=True):
            return super().push_to_hub(repo_id, **options)

    @classmethod
    def from_pretrained(cls: type[_Own], pretrained_model_name_or_path: str | Path, **options: Any) -> _Own:
        """Build the class from ``config.json`` and load its sparse weights.

        The arguments are those of ``PyTorchModelHubMixin.from_pretrained``.

        Raises:
            HubError: the download failed; ``reason`` is the cause, and the message says what to do.
            FileNotFoundError: the folder has no ``model.safetensors``.
            ValueError: the file is damaged or belongs to another architecture.
        """
        if Path(pretrained_model_name_or_path).is_dir():
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        repo_id = str(pretrained_model_name_or_path)
        with readable(repo_id, revision=options.get("revision"), filename="config.json"):
            return super().from_pretrained(repo_id, **options)

    @classmethod
    def _from_pretrained(
        cls: type[_Own],
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str | torch.device = "cpu",
        strict: bool = True,
        **model_kwargs: Any,
    ) -> _Own:
        if not strict:
            raise ValueError(
                "strict=False: expected a file with all of the module's tensors; a sparse file is loaded completely or not at "
                "all."
            )
        if Path(model_id).is_dir():
            file = Path(model_id) / WEIGHTS
        else:
            file = download(
                model_id,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        net = cls(**model_kwargs)
        load_sparse_file(_module(net), file)  # not load_state_dict: no file of the Hub is ever unpickled
        return _module(net).to(map_location).eval()  # type: ignore[return-value]


def _module(net: Any) -> nn.Module:
    if not isinstance(net, nn.Module):
        raise TypeError(f"SparseHubMixin: expected a class of nn.Module beside it, found {type(net).__name__}.")
    return net


def _refuse_dense(net: Any) -> None:
    if not any(True for _ in converted_tensors(_module(net))):
        raise ValueError(
            f"{type(net).__name__} has no converted weight: expected a sparse module. Call sparsify(module, connectivity) or "
            "train it under DeepR first, or derive it from huggingface_hub's PyTorchModelHubMixin for a dense one."
        )
