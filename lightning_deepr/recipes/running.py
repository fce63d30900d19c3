"""Finding a recipe and running it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

TRAINING = ("fit", "validate", "test", "predict")


def packaged_recipes() -> dict[str, Path]:
    """The recipes that travel with the package, by name."""
    folder = Path(str(resources.files("lightning_deepr.recipes.data")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> str:
    """A path as it is; a bare name finds the packaged recipe.

    Raises:
        SystemExit: neither a file nor a recipe; lists the recipes.
    """
    if Path(name).is_file():
        return name
    recipes = packaged_recipes()
    stem = Path(name).name.removesuffix(".yaml")
    # "recipes/mnist.yaml" is the packaged recipe too where there is no such folder
    if stem in recipes and Path(name).parent.as_posix() in (".", "recipes"):
        return str(recipes[stem])
    raise SystemExit(f"lightning-deepr: no file {name!r}, and no recipe of that name. Recipes: {', '.join(recipes)}.")


def with_packaged_recipes(arguments: Sequence[str]) -> list[str]:
    """The arguments with each ``--config NAME`` made a path."""
    result = list(arguments)
    for i, argument in enumerate(result):
        if argument in ("--config", "-c") and i + 1 < len(result):
            result[i + 1] = find_recipe(result[i + 1])
        elif argument.startswith("--config="):
            result[i] = "--config=" + find_recipe(argument.removeprefix("--config="))
    return result


def refuse_unknown_methods(arguments: Sequence[str]) -> None:
    """A bare name of a method (``--sparsity SET``) has to be one of the family.

    Raises:
        SystemExit: it is not; lists the family.
    """
    from lightning_deepr.methods import METHODS as methods

    given = [(*argument.split("=", 1), *after)[:2] for argument, *after in zip(arguments, [*arguments[1:], ""], strict=True)]
    for option, value in given:
        if option in ("--sparsity", "--sparsity.class_path") and value.isidentifier() and value not in (*methods, "null"):
            raise SystemExit(f"lightning-deepr: no method {value!r}. Methods: {', '.join(methods)}.")


def train(arguments: Sequence[str], run: bool = True) -> LightningCLI:
    """``fit``, ``validate``, ``test`` and ``predict`` are LightningCLI's: any value of a recipe can be overridden.

    Args:
        arguments: of the command line. The recipe's ``sparsity`` is the sparse-training callback (``--sparsity.connectivity .05``);
            ``--sparsity SET`` takes another one, with those of the recipe's settings that it has, too.
        run: False (without a subcommand among the arguments) makes model, data and trainer only.
    """
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    import lightning_deepr.methods  # noqa: F401 (a class that is loaded can be named without its module: --sparsity SET)
    from lightning_deepr.training.callback import SparseTraining

    class RecipeCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            # A key of its own: items of the list trainer.callbacks can't be overridden on the command line.
            parser.add_subclass_arguments(SparseTraining, "sparsity", fail_untyped=False, required=False)
            # one --seed_everything for start, order of the data and rewiring
            parser.link_arguments("seed_everything", "sparsity.init_args.seed", compute_fn=_seed)

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            sparsity = self._get(self.config_init, "sparsity")
            listed = self._get(self.config_init, "trainer")["callbacks"] or []
            listed = listed if isinstance(listed, list) else [listed]
            # first: an averaging callback has to copy the converted network
            return super().instantiate_trainer(callbacks=[*([sparsity] if sparsity else []), *listed], **kwargs)

        def after_fit(self) -> None:
            self.trainer.test(self.model, datamodule=self.datamodule)

    # batches in memory need no workers, a recipe without validation is meant, and the third is Lightning's own affair
    for harmless in (
        ".*does not have many workers.*",
        "Total length of `list` across ranks is zero.*",
        ".*treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", harmless)
    refuse_unknown_methods(arguments)
    sys.argv[1:] = with_packaged_recipes(arguments)  # LightningCLI warns when it is given arguments of its own
    return RecipeCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        run=run,
    )


def _seed(seed_everything: bool | int | None) -> int:
    return seed_everything if isinstance(seed_everything, int) and not isinstance(seed_everything, bool) else 0


def data_of_recipe(info: Mapping[str, Any], folder: str = "") -> Iterable[Any]:
    """The test batches of the recipe that trained a model.

    Args:
        info: what the model's file records.
        folder: of the data, where the recipe's data has one; "": the recipe's own.

    A recipe and its overrides can name any class: of what a file records, only the name of a packaged recipe is taken and plain settings of its data.

    Raises:
        ValueError: no recipe is recorded, or none that is packaged.
    """
    from lightning_deepr.recipes.running import packaged_recipes, train

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

    from lightning_deepr.recipes.running import packaged_recipes

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
