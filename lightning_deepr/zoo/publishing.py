"""Publishes a model on the Hugging Face Hub: weights, config.json, card, picture, recipe."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_deepr.files.checkpoint import save_sparse
from lightning_deepr.hub import cards, evaluations
from lightning_deepr.hub.cards import PICTURE
from lightning_deepr.zoo.describing import describe
from lightning_deepr.zoo.loading import connections_of, path_of
from lightning_deepr.zoo.registry import list_models

if TYPE_CHECKING:
    from lightning_deepr.hub.transfer import Published

WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_README = "README.md"
# The keys of config.json. The weights' file has all of them, too.
_IN_CONFIG = ("architecture", "arguments", "format_version", "package_version", "connectivity", "algorithm", "license")


@dataclass(frozen=True)
class _Staged:
    """The files to publish.

    Attributes:
        info: record of the model, from ``zoo.info``.
        files: name in the repository -> path.
    """

    info: dict[str, Any]
    files: dict[str, Path]


def publish(
    model: str | PathLike[str] | nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    parent_commit: str | None = None,
    create_pr: bool = False,
    card: bool | str | PathLike[str] = True,
    picture: bool = True,
    recipe: str | PathLike[str] | None = None,
    token: str | bool | None = None,
    **metadata: Any,
) -> Published:
    """Publish a sparse model: create the repository or update it, in one commit. ``hub.publish`` is an alias of this function.

    The function writes ``model.safetensors``, ``config.json``, ``README.md`` (the model card, with evaluation metadata),
    ``.eval_results/lightning-deepr.yaml`` (for a data set of the Hub), ``connectivity.png`` and, if known, the recipe's YAML.
    It keeps other files of the repository and does not upload unchanged files again.

    Args:
        model: a name of the zoo, the path of a file that ``zoo.save`` wrote, or a module with converted weights.
        repo_id: ``owner/name``, or a bare name for a repository of the token's user.
        private: whether a new repository is private; None: the owner's settings decide. It has no effect on an existing one.
        revision: the branch to write to, created if it is missing; None: the main branch.
        commit_message: the message of the commit; None: a line with the model's name.
        parent_commit: the commit at which the branch must be; the Hub refuses the update otherwise.
        create_pr: whether to open a pull request instead, for a repository of somebody else.
        card: True writes a model card, False keeps the repository's README.md, a path is a card of your own.
        picture: whether to draw the connectivity (needs matplotlib).
        recipe: path of the YAML to publish with the model; None: the packaged recipe that the file's metadata names.
        token: the Hub's access token; None: the one of ``hf auth login`` or HF_TOKEN.
        metadata: metadata for ``zoo.save``, with a module only.

    Returns:
        url, revision (commit hash) and sha256.

    Raises:
        HubError: the Hub refused, with ``reason`` and advice.
        ValueError: the file is damaged or is not a sparse model; nothing is uploaded.

    Example::

        >>> publish("lenet300_100.deepr_1pct_mnist", "me/lenet_1pct", private=True).revision  # doctest: +SKIP
        '5503434ddd753f426f4b38109466949a1217c2bb'
    """
    from lightning_deepr.hub import transfer

    with tempfile.TemporaryDirectory() as folder:
        staged = _stage(model, Path(folder), repo_id=repo_id, card=card, picture=picture, recipe=recipe, metadata=metadata)
        return transfer.upload(
            staged.files,
            repo_id,
            title=staged.info["name"],
            private=private,
            revision=revision,
            commit_message=commit_message,
            parent_commit=parent_commit,
            create_pr=create_pr,
            token=token,
        )


def _stage(
    model: str | PathLike[str] | nn.Module,
    folder: Path,
    *,
    repo_id: str,
    card: bool | str | PathLike[str] = True,
    picture: bool = True,
    recipe: str | PathLike[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> _Staged:
    """Write all files of a model repository into a folder; see :func:`publish` for the arguments.

    Raises:
        ValueError: the file is damaged or is not a sparse model, or metadata was given for a file, which has its own metadata.
        FileNotFoundError: there is no such file, card or recipe.
    """
    weights = folder / WEIGHTS
    if isinstance(model, nn.Module):
        save_sparse(model, weights, **dict(metadata or {}))
        info = describe(weights)
    else:
        if metadata:
            raise ValueError(
                f"expected metadata ({', '.join(metadata)}) with a module only, found it with the file {model!s}, "
                "which has its own. Write the file anew with zoo.save."
            )
        info = describe(model)
        shutil.copyfile(path_of(model), weights)
    if not isinstance(model, str) or model not in list_models():  # the repository's name says more than a file's name
        info["name"] = repo_id.rpartition("/")[2]
    files = {WEIGHTS: weights, _CONFIG: folder / _CONFIG}
    config = {"library_name": "lightning-deepr", **{key: info[key] for key in _IN_CONFIG if info.get(key) is not None}}
    config["sha256"] = info["sha256"]
    own = getattr(model, "_hub_mixin_config", None)
    if isinstance(own, dict):  # a SparseHubMixin: the values that its from_pretrained needs take precedence
        config.update(own)
    files[_CONFIG].write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    yaml = _recipe(info, recipe)
    if yaml is not None:
        files[yaml.name] = yaml
    if found := evaluations.evaluations(info):
        results = folder / "eval_results.yaml"
        results.write_text(evaluations.text(found), encoding="utf-8")
        files[f"{evaluations.FOLDER}/lightning-deepr.yaml"] = results
    if picture:
        from lightning_deepr.hub.pictures import draw

        files[PICTURE] = draw(connections_of(weights), folder / PICTURE, title=info["name"])
    if card is True:
        files[_README] = folder / _README
        text = cards.card(info, repo_id=repo_id, picture=PICTURE if picture else None, recipe=yaml.name if yaml else None)
        files[_README].write_text(text, encoding="utf-8")
    elif card is not False:
        files[_README] = _existing(card, "card")
    return _Staged(info, files)


def _recipe(info: Mapping[str, Any], given: str | PathLike[str] | None) -> Path | None:
    """Return the given YAML, or the packaged recipe that the file names; None if there is neither."""
    if given is not None:
        return _existing(given, "recipe")
    recorded = info.get("recipe")
    name = str(recorded.get("name", "")) if isinstance(recorded, Mapping) else str(recorded or "")
    stem = Path(name).name.removesuffix(".yaml")
    packaged = Path(str(resources.files("lightning_deepr.recipes.data"))) / f"{stem}.yaml"
    return packaged if stem and packaged.is_file() else None


def _existing(path: str | PathLike[str], what: str) -> Path:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{what}: expected a file, found none at {file}.")
    return file
