"""Finds and runs recipes."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lightning_deepr._needed import needed
from lightning_deepr.packages.names import in_use
from lightning_deepr.recipes import recipe_arguments, run_folders
from lightning_deepr.recipes.recipe_arguments import (
    TRAINING,
    find_recipe,
    packaged_recipes,
    settings_of_data,
    with_packaged_recipes,
)
from lightning_deepr.recipes.recipe_cli import cli_class
from lightning_deepr.recipes.refusals import nearest, refuse

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

__all__ = ["TRAINING", "data_of_recipe", "find_recipe", "has_root", "packaged_recipes", "quiet", "train"]

_HARMLESS = (
    ".*does not have many workers.*",  # batches in memory need no workers
    "Total length of `list` across ranks is zero.*",  # some recipes have no validation on purpose
    ".*treespec, LeafSpec.*",  # a warning about code inside Lightning
)


def _refuse_unknown_methods(arguments: Sequence[str], command: str) -> None:
    """Check that a bare name in ``--sparsity NAME`` is one of the methods.

    Raises:
        SystemExit: the name is unknown. The message lists the methods.
    """
    from lightning_deepr.methods import METHODS as methods

    given = [(*argument.split("=", 1), *after)[:2] for argument, *after in zip(arguments, [*arguments[1:], ""], strict=True)]
    for option, value in given:
        if option in ("--sparsity", "--sparsity.class_path") and value.isidentifier() and value not in (*methods, "null"):
            near = nearest(value, methods)
            refuse(
                f"no method {value!r}. Methods: {', '.join(methods)}.",
                f"The nearest is {near}." if near else "",
                "null trains the dense network.",
                command=command,
            )


def train(arguments: Sequence[str], run: bool = True) -> LightningCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` by LightningCLI; the arguments can override any value of a recipe.

    ``fit`` takes a folder for the run (:mod:`lightning_deepr.recipes.run_folders`): ``--out DIR``, or
    ``trainer.default_root_dir``. Everything that the recipe writes moves there, and a second run in the same place gets a
    folder of its own. ``--resume DIR`` goes on with a run; ``test DIR`` tests it.

    One ``--seed_everything`` seeds the start, the order of the data and the rewiring; ``--sparsity.seed`` overrides it.
    The LightningCLI is that of ``lightning`` or ``pytorch_lightning``, see :func:`lightning_deepr.packages.names.in_use`.

    The function neither reads nor changes ``sys.argv``, and it filters warnings only while it runs. LightningCLI seeds the
    global generators, as ``seed_everything`` does, unless ``--seed_everything=false`` is among the arguments.

    Args:
        arguments: arguments of the command line. The recipe's ``sparsity`` is the sparse-training callback
            (``--sparsity.connectivity .05``). ``--sparsity SET`` chooses another callback, which keeps those settings of the
            recipe that it has as well.
        run: whether to run a subcommand. False, for arguments without a subcommand, only makes model, data and trainer.

    Returns:
        the LightningCLI, with ``model``, ``datamodule``, ``trainer`` and ``config``.

    Raises:
        SystemExit: with status 2, the arguments are wrong: an unknown recipe, method, key or value, or a test without a
            checkpoint. With status 1, a run or a checkpoint that is named can't be read. The message has what is nearest.
        ImportError: jsonargparse is missing.
    """
    needed("jsonargparse", purpose="A recipe", install="'jsonargparse[signatures]'")
    import lightning_deepr.methods  # noqa: F401 (jsonargparse finds loaded classes by their bare names: --sparsity SET)

    package = in_use()
    module, data = (package.get("", name) for name in ("LightningModule", "LightningDataModule"))
    given = recipe_arguments.read(arguments)
    _refuse_unknown_methods(arguments, given.command)
    told = os.environ.get(run_folders.VARIABLE)
    # The imports above install Lightning's own filters, which therefore outlast this block.
    with warnings.catch_warnings():
        for message in _HARMLESS:
            warnings.filterwarnings("ignore", message)
        try:
            return cli_class(package, given)(
                module,
                data,
                args=with_packaged_recipes(given.arguments),
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,  # the run's folder has its configuration from the beginning
                run=run,
            )
        finally:
            if told is None:
                os.environ.pop(run_folders.VARIABLE, None)


def data_of_recipe(info: Mapping[str, Any], folder: str = "") -> Iterable[Any]:
    """Make the test batches of the recipe that trained a model.

    A recipe and its overrides can name any class. From a file's record the function therefore uses only the name of a packaged
    recipe and plain settings of its data. It does not change the global generators or the seed that ``seed_everything`` left.

    Args:
        info: the record of the model's file (``zoo.info``).
        folder: folder of the data, for a recipe with a data folder; "": the recipe's own folder.

    Raises:
        ValueError: the file records no packaged recipe.
    """
    recipe = info.get("recipe")
    name, overrides = (recipe.get("name"), recipe.get("overrides")) if isinstance(recipe, Mapping) else (recipe, None)
    recipes = packaged_recipes()
    if not isinstance(name, str) or name not in recipes:
        found = "none" if name is None else repr(name)[:80]
        raise ValueError(
            f"{info['name']}: expected a recorded `recipe`, one of {', '.join(recipes)}, found {found}: "
            "its test set is not known. Give the test set in Python: zoo.verify(name, data)."
        )
    root = [f"--data.root={folder}"] if folder and has_root(name) else []
    unseeded = "--seed_everything=false"  # a test set needs no seed, and the caller's seed stays
    with quiet(), torch.random.fork_rng():  # LightningCLI also makes the recipe's network, which draws its weights
        made = train(["--config", name, *settings_of_data(overrides), *root, "--trainer.logger=false", unseeded], run=False)
    data = made.datamodule
    data.prepare_data()
    data.setup("test")
    return data.test_dataloader()


def has_root(recipe: str) -> bool:
    """Whether the data of a packaged recipe has a folder to set (``data.root``)."""
    import yaml  # type: ignore[import-untyped]

    return "root" in yaml.safe_load(packaged_recipes()[recipe].read_text(encoding="utf-8"))["data"].get("init_args", {})


@contextmanager
def quiet() -> Iterator[None]:
    """A context that silences Lightning's messages on seeds and devices, which do not matter for a test set."""
    package = in_use()
    package.get("", "Trainer")  # the import sets the levels
    loggers = [logging.getLogger(name) for name in (package.trainer, package.fabric)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
