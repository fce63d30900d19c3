"""Finding a recipe and running it."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

TRAINING = ("fit", "validate", "test", "predict")
_HARMLESS = (
    ".*does not have many workers.*",  # batches in memory need none
    "Total length of `list` across ranks is zero.*",  # a recipe without validation is meant
    ".*treespec, LeafSpec.*",  # Lightning's own affair
)


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


def _with_packaged_recipes(arguments: Sequence[str]) -> list[str]:
    """The arguments with each ``--config NAME`` made a path."""
    result = list(arguments)
    for i, argument in enumerate(result):
        if argument in ("--config", "-c") and i + 1 < len(result):
            result[i + 1] = find_recipe(result[i + 1])
        elif argument.startswith("--config="):
            result[i] = "--config=" + find_recipe(argument.removeprefix("--config="))
    return result


def _refuse_unknown_methods(arguments: Sequence[str]) -> None:
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
    """Run ``fit``, ``validate``, ``test`` or ``predict`` by LightningCLI: any value of a recipe can be overridden.

    What belongs to the process stays as it is: ``sys.argv`` is neither read nor changed, and warnings are filtered only while this function runs.
    (LightningCLI seeds the global generators, as ``seed_everything`` does, unless ``--seed_everything=false`` is among the arguments.)

    Args:
        arguments: of the command line. The recipe's ``sparsity`` is the sparse-training callback (``--sparsity.connectivity .05``);
            ``--sparsity SET`` takes another one, with those of the recipe's settings that it has, too.
        run: False (without a subcommand among the arguments) makes model, data and trainer only.

    Returns:
        the LightningCLI, with ``model``, ``datamodule``, ``trainer`` and ``config``.

    Raises:
        SystemExit: an unknown recipe or method, or arguments that LightningCLI does not take; says which.
    """
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

    import lightning_deepr.methods  # noqa: F401 (a class that is loaded can be named without its module: --sparsity SET)
    from lightning_deepr.training.callback import SparseTraining

    class RecipeCLI(LightningCLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
            # LightningCLI's own also warns when the process has arguments, too. Here it is always these that count.
            assert isinstance(args, list)
            self.config = parser.parse_args(args)

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

    _refuse_unknown_methods(arguments)
    given = _with_packaged_recipes(arguments)
    # Lightning is imported by now: the filters that it installs for the process stay.
    with warnings.catch_warnings():
        for message in _HARMLESS:
            warnings.filterwarnings("ignore", message)
        return RecipeCLI(
            LightningModule,
            LightningDataModule,
            args=given,
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
    The global generators and the seed that ``seed_everything`` left are not touched.

    Raises:
        ValueError: no recipe is recorded, or none that is packaged.
    """
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
    unseeded = "--seed_everything=false"  # a test set has no use for a seed, and the caller keeps the own one
    with quiet(), torch.random.fork_rng():  # the recipe's network is made, too, and draws its weights
        made = train(["--config", name, *_settings_of_data(overrides), *root, "--trainer.logger=false", unseeded], run=False)
    data = made.datamodule
    data.prepare_data()
    data.setup("test")
    return data.test_dataloader()


def has_root(recipe: str) -> bool:
    """Whether the data of a packaged recipe is in a folder that somebody has to name."""
    import yaml  # type: ignore[import-untyped]

    return "root" in yaml.safe_load(packaged_recipes()[recipe].read_text(encoding="utf-8"))["data"].get("init_args", {})


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, Lightning says nothing of seeds and devices: a test set has nothing to do with them."""
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


def _settings_of_data(overrides: Any) -> list[str]:
    """Those overrides that set a number or a word of the recipe's data.

    Args:
        overrides: of a file: {"data.classes": 39} or ["--data.classes", "39"] or ["--data.classes=39"]; anything else is passed over.

    Example::

        >>> _settings_of_data(["--data.classes", "39", "--data.class_path=os.system", "--model.lr", "0.1", "--data.root", "/etc"])
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
