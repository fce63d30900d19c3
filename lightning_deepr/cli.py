"""The command line: ``lightning-deepr fit|validate|test --config NAME|PATH`` ``report CHECKPOINT``, ``zoo list|info|verify``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

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
    from lightning_deepr import CALLBACKS

    methods = [name for name in CALLBACKS if name != "SparseTraining"]
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

    import lightning_deepr
    from lightning_deepr.callback import SparseTraining

    for name in lightning_deepr.CALLBACKS:  # a class that is loaded can be named without its module: --sparsity SET
        getattr(lightning_deepr, name)

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


def report(arguments: Sequence[str]) -> None:
    """``lightning-deepr report CHECKPOINT``: the connectivity of a sparse checkpoint, without its model."""
    parser = argparse.ArgumentParser(prog="lightning-deepr report", description="The connectivity of a sparse checkpoint.")
    parser.add_argument("checkpoint", help="a .ckpt, .pt, .pth or .safetensors file")
    from lightning_deepr.checkpoint import report_of_checkpoint

    try:
        print(report_of_checkpoint(parser.parse_args(arguments).checkpoint))
    except (OSError, ValueError) as error:
        raise SystemExit(f"lightning-deepr report: {error}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the command ``lightning-deepr``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments and arguments[0] in TRAINING:
        train(arguments)
    elif arguments and arguments[0] == "report":
        report(arguments[1:])
    elif arguments and arguments[0] == "export":
        from lightning_deepr.export.command import export

        export(arguments[1:])
    elif arguments and arguments[0] == "zoo":
        from lightning_deepr.zoo.command import run

        run(arguments[1:])
    elif arguments and arguments[0] == "recipes":
        for name, path in packaged_recipes().items():
            print(f"{name:24s} {path.read_text(encoding='utf-8').splitlines()[0].removeprefix('#').strip()}")
    else:
        print(
            "usage: lightning-deepr fit|validate|test --config NAME|PATH [--model.lr 0.1 --sparsity.connectivity 0.05 ...]\n"
            "       lightning-deepr report CHECKPOINT\n"
            "       lightning-deepr zoo list|info|verify|publish|pull ...\n"
            "       lightning-deepr export CHECKPOINT --to dense|csr|onnx|c --out PATH [--module CLASS]\n"
            "       lightning-deepr recipes\n\n"
            f"recipes: {', '.join(packaged_recipes())}"
        )
        if arguments and arguments[0] not in ("-h", "--help"):
            raise SystemExit(
                f"lightning-deepr: expected fit, validate, test, report, zoo, export or recipes, found {arguments[0]!r}."
            )


if __name__ == "__main__":
    main()
