"""What a command line of ``fit``, ``validate``, ``test`` or ``predict`` names: recipes, a run to go on with, a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from lightning_deepr.files import container
from lightning_deepr.recipes import run_folders
from lightning_deepr.recipes.refusals import nearest, refuse
from lightning_deepr.recipes.run_folders import Run

TRAINING = ("fit", "validate", "test", "predict")


def packaged_recipes() -> dict[str, Path]:
    """Return the paths of the recipes that come with the package, by name."""
    folder = Path(str(resources.files("lightning_deepr.recipes.data")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str, command: str = "") -> str:
    """Return the path of a recipe.

    Args:
        name: the path of an existing file, or the name of a packaged recipe.
        command: the subcommand, for the message.

    Raises:
        SystemExit: ``name`` is neither. The message lists the recipes.
    """
    if Path(name).is_file():
        return name
    recipes = packaged_recipes()
    stem = Path(name).name.removesuffix(".yaml")
    # "recipes/mnist.yaml" also names the packaged recipe if the folder does not exist.
    if stem not in recipes or Path(name).parent.as_posix() not in (".", "recipes"):
        near = nearest(stem, recipes)
        near = f"The nearest is {near}." if near else ""
        refuse(f"no file {name!r}, and no recipe of that name.", near, f"Recipes: {', '.join(recipes)}.", command=command)
    return str(recipes[stem])


@dataclass
class Given:
    """A command line, read.

    Attributes:
        command: the subcommand; "": none, only objects are made.
        arguments: what LightningCLI gets.
        recipe: the name of the recipe; "": none is named.
        root: the ``default_root_dir`` that the files of the configuration name; "": none.
        placed: whether the command line itself says where the run goes.
        run: the run that the checkpoint belongs to; None: none.
        weights: a sparse file to test; None: the checkpoint is Lightning's.
    """

    command: str
    arguments: list[str]
    recipe: str = ""
    root: str = ""
    placed: bool = False
    run: Run | None = None
    weights: Path | None = None
    configs: list[str] = field(default_factory=list)


def read(arguments: Sequence[str]) -> Given:
    """Read a command line.

    A run's folder, its sparse file or its checkpoint stands for the configuration, too: ``test runs/mnist``,
    ``test --ckpt_path runs/mnist/checkpoints/last.ckpt``, ``fit --resume runs/mnist``.

    Raises:
        SystemExit: a recipe, a run or a checkpoint that is named does not exist.
    """
    rest = list(arguments)
    command = rest.pop(0) if rest and rest[0] in TRAINING else ""
    given = Given(command, rest)
    of_run = rest.pop(0) if command in TRAINING[1:] and rest and not rest[0].startswith("-") else _take(rest, "--resume")
    checkpoint = of_run or _value(rest, "--ckpt_path")
    given.configs = [find_recipe(name, command) for name in _values(rest, "--config", "-c")]
    given.placed = any(_value(rest, option) is not None for option in ("--out", "--trainer.default_root_dir"))
    if checkpoint is not None and not _is_keyword(checkpoint):
        _take_checkpoint(given, checkpoint, of_run is not None)
    given.arguments = [*([command] if command else []), *given.arguments]
    names = [Path(name).stem for name in given.configs]
    given.recipe = (given.run.record.get("recipe") if given.run else None) or (names[-1] if names else "")
    given.root = next((root for name in reversed(given.configs) if (root := _root_of(name, command))), "")
    return given


def _is_keyword(checkpoint: str) -> bool:
    """Whether Lightning itself looks for the checkpoint: "best", "last", a registry, or an address of another file system."""
    return checkpoint in ("best", "last", "hpc", "null") or ":" in checkpoint


def _take_checkpoint(given: Given, checkpoint: str, is_run: bool) -> None:
    path = Path(checkpoint)
    if not path.exists():
        raise SystemExit(
            f"lightning-deepr {given.command}: expected a run or a checkpoint at {checkpoint!r}, found nothing there."
        )
    try:
        given.run = run_folders.find(path)
    except ValueError as error:
        raise SystemExit(f"lightning-deepr {given.command}: {error}") from error
    if path.is_dir():
        if given.run is None:
            raise SystemExit(
                f"lightning-deepr {given.command}: expected the folder of a run, with {run_folders.RECORD} in it, found "
                f"{checkpoint!r} without one."
            )
        last = given.run.folder / run_folders.LAST
        found = (last if last.is_file() else None) if given.command == "fit" else given.run.checkpoint
        if found is None:
            raise SystemExit(f"lightning-deepr {given.command}: the run in {checkpoint!r} has no checkpoint: expected {last}.")
        path = found
    if given.command != "fit" and _is_sparse(path):
        given.weights = path
    if is_run or given.weights is not None:
        _drop(given.arguments, "--ckpt_path")
        if given.weights is None:
            given.arguments += ["--ckpt_path", str(path)]
    if not given.configs:
        config = given.run.config if given.run is not None else None
        if config is not None:
            _add_config(given, str(config))
        elif given.weights is not None:
            _add_recorded_recipe(given, given.weights)
        else:
            raise SystemExit(
                f"lightning-deepr {given.command}: expected {run_folders.CONFIG} beside {path}, found none. Give --config."
            )


def _add_config(given: Given, config: str) -> None:
    given.configs = [config]
    given.arguments[:0] = ["--config", config]


def _add_recorded_recipe(given: Given, path: Path) -> None:
    """Take the recipe that a sparse file names. Only a packaged one, and plain settings of its data: a file is no code."""
    recorded = container.read(path).record["metadata"].get("recipe")
    name, overrides = (recorded.get("name"), recorded.get("overrides")) if isinstance(recorded, Mapping) else (recorded, None)
    recipes = packaged_recipes()
    if not isinstance(name, str) or name not in recipes:
        raise SystemExit(
            f"lightning-deepr {given.command}: {path} is in no run's folder and names no recipe of the package. Give --config."
        )
    given.arguments[:0] = settings_of_data(overrides)
    _add_config(given, str(recipes[name]))


def _is_sparse(path: Path) -> bool:
    try:
        return path.is_file() and container.kind_of(path) == "sparse"
    except ValueError:
        return False


def _root_of(config: str, command: str) -> str:
    """Return the ``default_root_dir`` that a file of the configuration names."""
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return ""  # LightningCLI says what is wrong
    for part in (content, content.get(command) if isinstance(content, dict) else None):
        trainer = part.get("trainer") if isinstance(part, dict) else None
        root = trainer.get("default_root_dir") if isinstance(trainer, dict) else None
        if isinstance(root, str):
            return root
    return ""


def _values(arguments: Sequence[str], *options: str) -> list[str]:
    """List the values of an option, in the order of the command line."""
    found = []
    for i, argument in enumerate(arguments):
        for option in options:
            if argument == option and i + 1 < len(arguments):
                found.append(arguments[i + 1])
            elif argument.startswith(f"{option}="):
                found.append(argument.partition("=")[2])
    return found


def _value(arguments: Sequence[str], option: str) -> str | None:
    found = _values(arguments, option)
    return found[-1] if found else None


def _drop(arguments: list[str], option: str) -> None:
    i = 0
    while i < len(arguments):
        if arguments[i] == option:
            del arguments[i : i + 2]
        elif arguments[i].startswith(f"{option}="):
            del arguments[i]
        else:
            i += 1


def _take(arguments: list[str], option: str) -> str | None:
    found = _value(arguments, option)
    _drop(arguments, option)
    return found


def with_packaged_recipes(arguments: Sequence[str]) -> list[str]:
    """Replace the name in each ``--config NAME`` by the recipe's path."""
    result = list(arguments)
    for i, argument in enumerate(result):
        if argument in ("--config", "-c") and i + 1 < len(result):
            result[i + 1] = find_recipe(result[i + 1])
        elif argument.startswith("--config="):
            result[i] = "--config=" + find_recipe(argument.removeprefix("--config="))
    return result


def settings_of_data(overrides: Any) -> list[str]:
    """Select the overrides that set a number or a word of the recipe's data.

    Args:
        overrides: the overrides in a file: {"data.classes": 39} or ["--data.classes", "39"] or ["--data.classes=39"]; anything
            else is ignored.

    Example::

        >>> settings_of_data(["--data.classes", "39", "--data.class_path=os.system", "--model.lr", "1", "--data.root", "/etc"])
        ['--data.classes=39']
    """
    if isinstance(overrides, Mapping):
        words = [f"--{key}={value}" for key, value in overrides.items()]
    else:
        words = [str(word) for word in overrides] if isinstance(overrides, (list, tuple)) else []
    joined = [
        f"{word}={after}" if "=" not in word and not after.startswith("--") else word
        for word, after in zip(words, [*words[1:], ""], strict=False)  # the second list is longer if there are no words
    ]
    return [word for word in joined if re.fullmatch(r"--data\.(?!class_path|init_args|dict_kwargs)[a-z_]+=[\w.+-]+", word)]
