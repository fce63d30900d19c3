"""The callback that draws pictures during a fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_deepr.packages.classes import Callback
from lightning_deepr.packages.messages import rank_zero_only, rank_zero_warn
from lightning_deepr.pictures import curves, networks
from lightning_deepr.pictures.moving import animation
from lightning_deepr.training.callback import SparseTraining
from lightning_deepr.weights.find import converted_tensors

if TYPE_CHECKING:
    import lightning.pytorch as pl

NAMES = ("input_map", "kernels", "gates", "degrees", "turnover", "alpha", "survival", "animation")


class Pictures(Callback):
    """Draws pictures of the network at the end of a fit, to files and to the loggers' media.

    A picture that a network has no layer for (kernels without a convolution, an input map without a grid) is left out, and one
    line says so if it was asked for by name. Nothing that goes wrong here ends a training.

    Args:
        folder: where the files go; None: ``pictures`` in the Trainer's log folder.
        which: the names of the pictures; None: all that the network and the training have something for.
        tensor: the linear layer of the input map; None: the first one.
        grid: rows and columns of its image; None: a square.
        every_n_steps: the number of steps between two frames of the animation.
        most_frames: the most frames; when there are more, every other one is dropped.

    Raises:
        ValueError: a name is unknown, or a number is not positive.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_deepr import DeepR
        >>> trainer = Trainer(callbacks=[DeepR(0.01), Pictures()], logger=False, enable_checkpointing=False)
    """

    def __init__(
        self,
        folder: str | None = None,
        which: Sequence[str] | None = None,
        tensor: str | None = None,
        grid: tuple[int, ...] | None = None,
        every_n_steps: int = 50,
        most_frames: int = 60,
    ) -> None:
        unknown = [name for name in which or () if name not in NAMES]
        if unknown or isinstance(which, str):
            found = which if isinstance(which, str) else unknown
            raise ValueError(f"Pictures: which: expected a list of {', '.join(NAMES)}, found {found!r}.")
        for name, number in (("every_n_steps", every_n_steps), ("most_frames", most_frames)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 2 - (name == "every_n_steps"):
                raise ValueError(f"Pictures: {name}: expected a positive int (at least 2 frames), found {number!r}.")
        self.folder, self.which, self.tensor, self.grid = folder, which, tensor, grid
        self.every_n_steps, self.most_frames = every_n_steps, most_frames
        self.files: list[Path] = []  # those of the last fit
        self._frames: list[np.ndarray] = []
        self._stride, self._last_step = every_n_steps, -1
        self._told: set[str] = set()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.files, self._frames, self._stride, self._last_step = [], [], self.every_n_steps, -1
        for callback in _methods(trainer):
            callback.keeps_history = True

    @rank_zero_only
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._frame(trainer, pl_module)

    @rank_zero_only
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.global_step % self._stride == 0 and trainer.global_step != self._last_step:
            self._frame(trainer, pl_module)

    def _frame(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.which is not None and "animation" not in self.which:
            return
        self._last_step = trainer.global_step
        try:
            self._frames.append(networks.input_counts(pl_module, self.tensor, self.grid))
        except ValueError as error:
            self._tell("animation", error, asked=self.which is not None)
            return
        if len(self._frames) > self.most_frames:
            self._frames, self._stride = self._frames[::2], 2 * self._stride

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not any(True for _ in converted_tensors(pl_module)):
            self._tell("network", ValueError(f"{type(pl_module).__name__} has no converted tensor"), asked=True)
            return
        folder = (
            Path(self.folder) if self.folder is not None else Path(trainer.log_dir or trainer.default_root_dir) / "pictures"
        )
        for name, draw in self._drawings(trainer, pl_module).items():
            path = folder / (f"{name}.gif" if name == "animation" else f"{name}.png")
            try:
                draw(path)
            except (ValueError, ImportError) as error:  # there is nothing to draw
                self._tell(name, error, asked=self.which is not None or isinstance(error, ImportError))
            except OSError as error:
                self._tell("files", error, asked=True)
            else:
                self.files.append(path)
                self._hand_over(trainer, name, path)

    def _drawings(self, trainer: pl.Trainer, module: Any) -> dict[str, Callable[[Path], Any]]:
        history = [entry for callback in _methods(trainer) for entry in callback.history]
        found: dict[str, Callable[[Path], Any]] = {
            "input_map": lambda path: networks.input_map(module, self.tensor, grid=self.grid, path=path),
            "kernels": lambda path: networks.kernels(module, path=path),
            "gates": lambda path: networks.gates(module, path=path),
            "degrees": lambda path: networks.degrees(module, path=path),
            "turnover": lambda path: curves.turnover(history, path=path),
            "alpha": lambda path: curves.alpha(history, path=path),
            "survival": lambda path: curves.survival(history[-1][1] if history else {}, path=path),
            "animation": lambda path: animation(self._frames, path),
        }
        return {name: draw for name, draw in found.items() if self.which is None or name in self.which}

    def _hand_over(self, trainer: pl.Trainer, name: str, path: Path) -> None:
        """Give a picture to the loggers that take media: wandb, TensorBoard, MLflow."""
        for logger in trainer.loggers:
            try:
                if callable(getattr(logger, "log_image", None)):  # wandb
                    logger.log_image(key=f"pictures/{name}", images=[str(path)])  # type: ignore[attr-defined]
                    continue
                experiment: Any = getattr(logger, "experiment", None)
                if callable(getattr(experiment, "add_image", None)):  # TensorBoard
                    if path.suffix == ".png":
                        experiment.add_image(f"pictures/{name}", _pixels(path), trainer.global_step, dataformats="HWC")
                elif callable(getattr(experiment, "log_artifact", None)):  # MLflow
                    experiment.log_artifact(getattr(logger, "run_id", None), str(path), "pictures")
            except Exception as error:
                self._tell(type(logger).__name__, error, asked=True)

    def _tell(self, what: str, error: Exception, asked: bool) -> None:
        if asked and what not in self._told:
            self._told.add(what)
            rank_zero_warn(f"Pictures: {what}: {type(error).__name__}: {error} The training goes on; this is said once.")


def _methods(trainer: pl.Trainer) -> list[SparseTraining]:
    return [one for one in trainer.callbacks if isinstance(one, SparseTraining)]  # type: ignore[attr-defined]


def _pixels(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"))
