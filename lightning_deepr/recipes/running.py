"""Finds and runs recipes."""

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
    ".*does not have many workers.*",  # batches in memory need no workers
    "Total length of `list` across ranks is zero.*",  # some recipes have no validation on purpose
    ".*treespec, LeafSpec.*",  # a warning about code inside Lightning
)


def packaged_recipes() -> dict[str, Path]:
    """Return the paths of the recipes that come with the package, by name."""
    folder = Path(str(resources.files("lightning_deepr.recipes.data")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> str:
    """Return the path of a recipe.

    Args:
        name: the path of an existing file, or the name of a packaged recipe.

    Raises:
        SystemExit: ``name`` is neither. The message lists the recipes.
    """
    if Path(name).is_file():
        return name
    recipes = packaged_recipes()
    stem = Path(name).name.removesuffix(".yaml")
    # "recipes/mnist.yaml" also names the packaged recipe if the folder does not exist.
    if stem in recipes and Path(name).parent.as_posix() in (".", "recipes"):
        return str(recipes[stem])
    raise SystemExit(f"lightning-deepr: no file {name!r}, and no recipe of that name. Recipes: {', '.join(recipes)}.")


def _with_packaged_recipes(arguments: Sequence[str]) -> list[str]:
    """Replace the name in each ``--config NAME`` by the recipe's path."""
    result = list(arguments)
    for i, argument in enumerate(result):
        if argument in ("--config", "-c") and i + 1 < len(result):
            result[i + 1] = find_recipe(result[i + 1])
        elif argument.startswith("--config="):
            result[i] = "--config=" + find_recipe(argument.removeprefix("--config="))
    return result


def _refuse_unknown_methods(arguments: Sequence[str]) -> None:
    """Check that a bare name in ``--sparsity NAME`` is one of the methods.

    Raises:
        SystemExit: the name is unknown. The message lists the methods.
    """
    from lightning_deepr.methods import METHODS as methods

    given = [(*argument.split("=", 1), *after)[:2] for argument, *after in zip(arguments, [*arguments[1:], ""], strict=True)]
    for option, value in given:
        if option in ("--sparsity", "--sparsity.class_path") and value.isidentifier() and value not in (*methods, "null"):
            raise SystemExit(f"lightning-deepr: no method {value!r}. Methods: {', '.join(methods)}.")


def train(arguments: Sequence[str], run: bool = True) -> LightningCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` by LightningCLI; the arguments can override any value of a recipe.

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
        SystemExit: a recipe or method is unknown, or LightningCLI refuses the arguments. The message names them.
    """
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

    import lightning_deepr.methods  # noqa: F401 (jsonargparse finds loaded classes by their bare names: --sparsity SET)
    from lightning_deepr.training.callback import SparseTraining

    class RecipeCLI(LightningCLI):
        def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
            # LightningCLI's own method warns if sys.argv has arguments as well. Here ``args`` always decides.
            assert isinstance(args, list)
            self.config = parser.parse_args(args)

        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            # "sparsity" is a separate key because the command line can't override items of the list trainer.callbacks.
            parser.add_subclass_arguments(SparseTraining, "sparsity", fail_untyped=False, required=False)
            # One --seed_everything seeds the start, the order of the data and the rewiring.
            parser.link_arguments("seed_everything", "sparsity.init_args.seed", compute_fn=_seed)

        def instantiate_trainer(self, **kwargs: Any) -> Trainer:
            sparsity = self._get(self.config_init, "sparsity")
            listed = self._get(self.config_init, "trainer")["callbacks"] or []
            listed = listed if isinstance(listed, list) else [listed]
            # The sparsity callback comes first, so that an averaging callback copies the converted network.
            return super().instantiate_trainer(callbacks=[*([sparsity] if sparsity else []), *listed], **kwargs)

        def after_fit(self) -> None:
            self.trainer.test(self.model, datamodule=self.datamodule)

    _refuse_unknown_methods(arguments)
    given = _with_packaged_recipes(arguments)
    # The imports above install Lightning's own filters, which therefore outlast this block.
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
        made = train(["--config", name, *_settings_of_data(overrides), *root, "--trainer.logger=false", unseeded], run=False)
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
    """Select the overrides that set a number or a word of the recipe's data.

    Args:
        overrides: the overrides in a file: {"data.classes": 39} or ["--data.classes", "39"] or ["--data.classes=39"]; anything
            else is ignored.

    Example::

        >>> _settings_of_data(["--data.classes", "39", "--data.class_path=os.system", "--model.lr", "1", "--data.root", "/etc"])
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
