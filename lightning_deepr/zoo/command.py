"""``lightning-deepr zoo list|info|verify|publish|pull``."""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_deepr import zoo
from lightning_deepr.report import ConnectivityReport

COLUMNS = ("name", "connections", "connectivity", "metric", "bytes")


def run(arguments: Sequence[str]) -> None:
    """The command; errors end it with their message.

    Raises:
        SystemExit: bad arguments, no such model, or a model that is not as recorded.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-deepr zoo", description="Sparse models: the zoo's, and files that zoo.save wrote."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("list", help="the models of the zoo")
    command.add_argument("pattern", nargs="?", default="*", help="shell wildcards, as in 'lenet300_100.*'")
    command = commands.add_parser("info", help="what is known of a model")
    command.add_argument("model", help="a name of the zoo, or a file")
    command.add_argument("--json", action="store_true", help="all of it, as JSON")
    command = commands.add_parser("verify", help="whether models are what they say")
    command.add_argument("models", nargs="*", help="names of the zoo, or files; none: the whole zoo")
    command.add_argument(
        "--data",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="measure the recorded metric, too, on the test set of the recorded recipe, in this folder (none given: where the recipe has it)",
    )
    commands.add_parser("publish", help="put a model on the Hugging Face Hub", add_help=False)
    commands.add_parser("pull", help="get a model's file from the Hugging Face Hub", add_help=False)
    if arguments and arguments[0] in ("publish", "pull"):
        from lightning_deepr import hub_commands

        {"publish": hub_commands.publish, "pull": hub_commands.pull}[arguments[0]](arguments[1:])
        return
    given = parser.parse_args(arguments)
    try:
        if given.command == "list":
            print(listing(zoo.list_models(given.pattern)))
        elif given.command == "info":
            found = zoo.info(given.model)
            print(json.dumps(found, indent=2) if given.json else describe(found))
        else:
            verify(*_models_and_folder(given.models, given.data))
    except (OSError, ValueError, RuntimeError) as error:
        raise SystemExit(f"lightning-deepr zoo {given.command}: {error}") from error


def _models_and_folder(models: list[str], data: str | None) -> tuple[list[str], str | None]:
    """``--data MODEL``, too: what names a model is none of the data's folders."""
    if data and (data in zoo.list_models() or Path(data).is_file()):
        models, data = [*models, data], ""
    return models or zoo.list_models(), data


def verify(models: Sequence[str], folder: str | None) -> None:
    """Verify each, with data where a folder is given ("": the recipe's); a failure does not keep the others from being looked at."""
    failures = []
    for model in models:
        try:
            print(zoo.verify(model, None if folder is None else data_of_recipe(zoo.info(model), folder)))
        except (OSError, ValueError, RuntimeError) as error:
            failures.append(f"{model}: {error}".replace("--data.root", "--data"))  # the recipes' name for it
    if failures:
        raise ValueError("\n".join(failures))
    print(f"{len(models)} models are as recorded." if models else "There are no models in the zoo.")


def data_of_recipe(info: Mapping[str, Any], folder: str = "") -> Iterable[Any]:
    """The test batches of the recipe that trained a model.

    Args:
        info: what the model's file records.
        folder: of the data, where the recipe's data has one; "": the recipe's own.

    A recipe and its overrides can name any class: of what a file records, only the name of a packaged recipe is taken and plain settings of its data.

    Raises:
        ValueError: no recipe is recorded, or none that is packaged.
    """
    from lightning_deepr.cli import packaged_recipes, train

    recipe = info.get("recipe")
    name, overrides = (recipe.get("name"), recipe.get("overrides")) if isinstance(recipe, Mapping) else (recipe, None)
    recipes = packaged_recipes()
    if not isinstance(name, str) or name not in recipes:
        found = "none" if name is None else repr(name)[:80]
        raise ValueError(
            f"{info['name']}: expected `recipe` among what is recorded, one of {', '.join(recipes)}, found {found}: its test set is not known. In "
            "Python: zoo.verify(name, data)."
        )
    root = [f"--data.root={folder}"] if folder and has_root(name) else []
    with quiet():
        data = train(["--config", name, *settings_of_data(overrides), *root, "--trainer.logger", "false"], run=False).datamodule
    data.prepare_data()
    data.setup("test")
    return data.test_dataloader()


def has_root(recipe: str) -> bool:
    """Whether the data of a packaged recipe is in a folder that somebody has to name."""
    import yaml  # type: ignore[import-untyped]

    from lightning_deepr.cli import packaged_recipes

    return "root" in yaml.safe_load(packaged_recipes()[recipe].read_text(encoding="utf-8"))["data"].get("init_args", {})


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's words on seeds and devices, which a test set has nothing to do with."""
    import lightning.pytorch  # noqa: F401 (sets the levels)

    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def settings_of_data(overrides: Any) -> list[str]:
    """Those overrides that set a number or a word of the recipe's data.

    Args:
        overrides: of a file: {"data.classes": 39} or ["--data.classes", "39"] or ["--data.classes=39"]; anything else is passed over.

    Example::

        >>> settings_of_data(["--data.classes", "39", "--data.class_path=os.system", "--model.lr", "0.1", "--data.root", "/etc"])
        ['--data.classes=39']
    """
    if isinstance(overrides, Mapping):
        words = [f"--{key}={value}" for key, value in overrides.items()]
    else:
        words = [str(word) for word in overrides] if isinstance(overrides, (list, tuple)) else []
    joined = [
        f"{word}={after}" if "=" not in word and not after.startswith("--") else word
        for word, after in zip(words, [*words[1:], ""], strict=False)  # (no words: none after)
    ]
    return [word for word in joined if re.fullmatch(r"--data\.(?!class_path|init_args|dict_kwargs)[a-z_]+=[\w.+-]+", word)]


def listing(names: Sequence[str]) -> str:
    """A table of models."""
    rows = []
    for name in names:
        info = zoo.info(name)
        connectivity = info["connectivity"]
        metrics = info.get("metrics")
        metric = next((text for text in map(_metric, metrics.items()) if text), "-") if isinstance(metrics, Mapping) else "-"
        rows.append((name, f"{connectivity['active']:,}", f"{connectivity['connectivity']:.2%}", metric, f"{info['bytes']:,}"))
    if not rows:
        return (
            "no model of that name. lightning-deepr zoo list shows all."
            if zoo.list_models()
            else "There are no models in the zoo."
        )
    widths = [max(len(row[i]) for row in [COLUMNS, *rows]) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(w) if i in (0, 3) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in [COLUMNS, *rows]
    ]
    return "\n".join([lines[0].rstrip(), "-" * (sum(widths) + 2 * (len(widths) - 1)), *(line.rstrip() for line in lines[1:])])


def _metric(item: tuple[str, Any]) -> str:
    name, value = item
    value = value.get("value") if isinstance(value, Mapping) else value
    return f"{name} {value:.4g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else ""


def describe(info: Mapping[str, Any]) -> str:
    """What is known of a model, as text."""
    rows = [{**row, "l1": None, "compute": "-"} for row in info["connectivity"]["rows"]]
    lines = [f"{info['name']}", "", str(ConnectivityReport(rows, info["connectivity"]["left_out"])), ""]
    own = [key for key in info if key not in ("name", "connectivity")]
    width = max(map(len, own))
    for key in own:
        value = info[key]
        if isinstance(value, Mapping) and value:
            lines.append(f"{key}:")
            inner = max(len(str(name)) for name in value)
            lines += [f"  {str(name).ljust(inner)}  {_text(content)}" for name, content in value.items()]
        elif value not in ({}, None):
            lines.append(f"{key.ljust(width)}  {_text(value)}")
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else json.dumps(value)
