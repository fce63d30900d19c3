"""The files of a model repository: weights, config.json, card, picture, recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from lightning_deepr import zoo
from lightning_deepr.zoo import cards
from lightning_deepr.zoo.cards import PICTURE

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
README = "README.md"
# what config.json says of a model; all of it is in the weights' file, too
IN_CONFIG = ("architecture", "arguments", "format_version", "package_version", "connectivity", "algorithm", "license")


@dataclass(frozen=True)
class Staged:
    """Files to publish: name in the repository -> path."""

    info: dict[str, Any]
    files: dict[str, Path]


def stage(
    model: str | PathLike[str] | nn.Module,
    folder: Path,
    *,
    repo_id: str,
    card: bool | str | PathLike[str] = True,
    picture: bool = True,
    recipe: str | PathLike[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Staged:
    """Put all files of a model repository into a folder; see :func:`lightning_deepr.hub.publish` for the arguments.

    Raises:
        ValueError: the file is damaged or no sparse model; metadata was given for a file, which has its own.
        FileNotFoundError: there is no such file, card or recipe.
    """
    weights = folder / WEIGHTS
    if isinstance(model, nn.Module):
        zoo.save(model, weights, **dict(metadata or {}))
        info = describe(weights)
    else:
        if metadata:
            raise ValueError(
                f"expected metadata ({', '.join(metadata)}) with a module only, found it with the file {model!s}, which has its own. "
                "Write the file anew with zoo.save."
            )
        info = describe(model)
        shutil.copyfile(zoo.path_of(model), weights)
    if not isinstance(model, str) or model not in zoo.list_models():  # the name of a file says little
        info["name"] = repo_id.rpartition("/")[2]
    files = {WEIGHTS: weights, CONFIG: folder / CONFIG}
    config = {"library_name": "lightning-deepr", **{key: info[key] for key in IN_CONFIG if info.get(key) is not None}}
    config["sha256"] = info["sha256"]
    own = getattr(model, "_hub_mixin_config", None)
    if isinstance(own, dict):  # of a SparseHubMixin: what its from_pretrained needs comes first
        config.update(own)
    files[CONFIG].write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    yaml = _recipe(info, recipe)
    if yaml is not None:
        files[yaml.name] = yaml
    if picture:
        from lightning_deepr.zoo.pictures import draw

        files[PICTURE] = draw(zoo.connections_of(weights), folder / PICTURE, title=info["name"])
    if card is True:
        files[README] = folder / README
        text = cards.card(info, repo_id=repo_id, picture=PICTURE if picture else None, recipe=yaml.name if yaml else None)
        files[README].write_text(text, encoding="utf-8")
    elif card is not False:
        files[README] = _existing(card, "card")
    return Staged(info, files)


def describe(model: str | PathLike[str]) -> dict[str, Any]:
    """What a card says of a model: what ``zoo.info`` tells, once ``zoo.verify`` has nothing against it.

    Args:
        model: a name of the zoo or a path.

    Raises:
        ValueError: the file is damaged or no sparse model.
    """
    zoo.verify(model)
    return zoo.info(model)


def _recipe(info: Mapping[str, Any], given: str | PathLike[str] | None) -> Path | None:
    """The YAML that was given, or the packaged one that the file names."""
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
