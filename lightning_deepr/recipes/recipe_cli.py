"""The LightningCLI that runs a recipe: a run's folder, sparse training as ``--sparsity``, short messages on wrong arguments."""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lightning_deepr.files import container, sparse_file
from lightning_deepr.files.checkpoint import load_state_dict
from lightning_deepr.packages.messages import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning_deepr.packages.names import Package
from lightning_deepr.recipes import run_folders
from lightning_deepr.recipes.recipe_arguments import Given
from lightning_deepr.recipes.refusals import is_refusal, refuse, refuse_parsed, refuse_value
from lightning_deepr.recipes.run_log import RunLog, names_of_run
from lightning_deepr.training.callback import SparseTraining
from lightning_deepr.training.guarded_loggers import drop_unusable, guard

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningCLI

_OUT = "Folder of the run. Everything that the recipe writes moves there; a second run in the same place gets DIR/run_2."
_RESUME = "Go on with an interrupted run: its folder, which has its configuration and its last checkpoint."


def cli_class(package: Package, given: Given) -> type[LightningCLI]:
    """Make the class for one command line.

    Args:
        package: the package whose LightningCLI is the base.
        given: the command line.
    """
    _LightningCLI: Any = package.get("cli", "LightningCLI")

    class RecipeCLI(_LightningCLI):
        folder: Path | None = None  # of the run
        is_claimed = False

        def init_parser(self, **kwargs: Any) -> Any:
            parser = super().init_parser(**kwargs)
            parser.error = functools.partial(self._refuse, parser)
            return parser

        @staticmethod
        def _refuse(parser: Any, message: str, *args: Any) -> NoReturn:
            refuse_parsed(message, parser, given.command)

        def parse_arguments(self, parser: Any, args: Any) -> None:
            # LightningCLI's own method warns if sys.argv has arguments as well. Here ``args`` always decides.
            assert isinstance(args, list)
            self.config = parser.parse_args(args)

        def add_arguments_to_parser(self, parser: Any) -> None:
            # "sparsity" is a separate key because the command line can't override items of the list trainer.callbacks.
            parser.add_subclass_arguments(SparseTraining, "sparsity", fail_untyped=False, required=False)
            parser.add_argument("--out", type=str | None, default=None, metavar="DIR", help=_OUT)
            parser.add_argument("--resume", type=str | None, default=None, metavar="DIR", help=_RESUME)

        # -- where the run goes -------------------------------------------------------------------------------------------

        @property
        def part(self) -> Any:
            """The configuration of the subcommand."""
            return self.config[given.command] if given.command else self.config

        def before_instantiate_classes(self) -> None:
            part = self.part
            if given.command in ("validate", "test", "predict"):
                self._refuse_no_checkpoint(part)
            if given.weights is not None:
                part.sparsity = None  # the file's connections are taken as they are
            root = part.out or part.trainer.default_root_dir
            if root is not None:
                self.folder = Path(self._folder(part, root))
                moved_to = str(self.folder)
                run_folders.moved(part.trainer, given.root, moved_to)
                part.trainer.default_root_dir = moved_to
            part.out = None
            if part.trainer.enable_progress_bar is False and isinstance(part.trainer.callbacks, list):
                part.trainer.callbacks = [one for one in part.trainer.callbacks if not one.class_path.endswith("ProgressBar")]
            self._name_loggers(part)
            if self.is_claimed:
                self._save_config(part)

        @staticmethod
        def _refuse_no_checkpoint(part: Any) -> None:
            if given.weights is None and part.ckpt_path is None:
                refuse(
                    "expected a checkpoint, found none: the network would be untrained.",
                    f"Give a run's folder or its sparse file: lightning-deepr {given.command} runs/mnist_quickstart",
                    "or a checkpoint of Lightning: --ckpt_path PATH.",
                    command=given.command,
                )

        def _folder(self, part: Any, root: str) -> str | Path:
            """Choose the folder; ``fit`` takes it for itself alone."""
            if given.run is not None and not given.placed:
                if given.command == "fit" and given.run.record:
                    run_folders.update(given.run.folder, status="running")
                return given.run.folder
            if given.command != "fit":
                return root
            if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
                return os.environ.get(run_folders.VARIABLE, root)
            command = shlex.join(["lightning-deepr", *given.arguments])
            try:
                folder = run_folders.claim(root, {"recipe": given.recipe, "command": command, "status": "running"})
            except ValueError as error:
                raise SystemExit(f"lightning-deepr fit: {error}") from error
            self.is_claimed = True
            os.environ[run_folders.VARIABLE] = str(folder)
            rank_zero_info(f"This run's folder: {folder}")
            return folder

        def _save_config(self, part: Any) -> None:
            assert self.folder is not None
            checkpoint, part.ckpt_path = part.ckpt_path, None
            try:
                self._parser(given.command).save(part, str(self.folder / run_folders.CONFIG), skip_none=False, overwrite=True)
            finally:
                part.ckpt_path = checkpoint

        @staticmethod
        def _name_loggers(part: Any) -> None:
            """Name the run in wandb after its settings; leave wandb out where it is not installed."""
            loggers = part.trainer.logger
            entries = loggers if isinstance(loggers, list) else [loggers] if hasattr(loggers, "class_path") else []
            of_wandb = [one for one in entries if str(getattr(one, "class_path", "")).endswith("WandbLogger")]
            if of_wandb and not _is_installed("wandb"):
                rank_zero_warn("wandb is not installed: this run does not log to it (`pip install wandb`).")
                kept = [one for one in entries if one not in of_wandb]
                part.trainer.logger = kept or False
                return
            for one in of_wandb:
                if one.class_path.startswith("lightning_deepr."):
                    for key, value in names_of_run(given.recipe, part).items():
                        if one.init_args.get(key) is None:
                            one.init_args[key] = value

        # -- the training -------------------------------------------------------------------------------------------------

        def instantiate_classes(self) -> None:
            try:
                super().instantiate_classes()
            except BaseException as error:
                if self.is_claimed and self.folder is not None:  # nothing has begun
                    run_folders.release(self.folder)
                if given.command and isinstance(error, ValueError) and is_refusal(error, "jsonargparse"):
                    refuse_value(str(error), given.command)
                raise

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            sparsity = self._get(self.config_init, "sparsity")
            listed = self._get(self.config_init, "trainer")["callbacks"] or []
            listed = listed if isinstance(listed, list) else [listed]
            log = [RunLog(recipe=given.recipe, folder=self.folder)] if given.command == "fit" else []
            # The sparsity callback comes first, so that an averaging callback copies the converted network. RunLog comes last:
            # it shows what the others have written.
            trainer = super().instantiate_trainer(callbacks=[*([sparsity] if sparsity else []), *listed, *log], **kwargs)
            if given.command:
                drop_unusable(trainer)
                guard(trainer)
            return trainer

        def _run_subcommand(self, subcommand: str) -> None:
            if given.weights is not None:
                _load_weights(self.model, given.weights)
            try:
                super()._run_subcommand(subcommand)
            except BaseException:
                self.note(status="interrupted")
                raise

        def after_fit(self) -> None:
            fitted = _numbers(self.trainer)
            guard(self.trainer)
            self.trainer.test(self.model, datamodule=self.datamodule)
            self.note(status="finished", steps=self.trainer.global_step, metrics={**fitted, **_numbers(self.trainer)})

        @rank_zero_only
        def note(self, **entries: Any) -> None:
            """Write into the run's record."""
            if self.folder is None or given.command != "fit" or not (self.folder / run_folders.RECORD).is_file():
                return
            try:
                run_folders.update(self.folder, **entries)
            except OSError as error:
                rank_zero_warn(f"{self.folder / run_folders.RECORD} could not be written: {error}")

    return RecipeCLI


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # sys.modules[name] is None
        return False


def _load_weights(model: Any, path: Path) -> None:
    """Load a sparse file into the LightningModule, or into the part of it that the file holds (``net``)."""
    contents = container.read(path)
    part = contents.record["metadata"].get("submodule")
    if not isinstance(part, str):
        own = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
        is_whole = {*contents.record["sparse"], *sparse_file.dense_names(contents)} <= own
        part = "" if is_whole or not hasattr(model, "net") else "net"
    load_state_dict(model.get_submodule(part), path)


def _numbers(trainer: Any) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items()}
