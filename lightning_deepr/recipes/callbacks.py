"""Callbacks of the recipes: tables, a picture, a moving average, a sparse checkpoint."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_deepr._needed import needed
from lightning_deepr.conversion.convert import connections
from lightning_deepr.conversion.report import connectivity_report
from lightning_deepr.files.checkpoint import save_sparse
from lightning_deepr.packages.classes import Callback, WeightAveraging
from lightning_deepr.packages.messages import rank_zero_info, rank_zero_only
from lightning_deepr.packages.names import is_a
from lightning_deepr.weights.find import converted_tensors

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class ConnectivityTable(Callback):
    """Prints the connectivity table before and after training."""

    @rank_zero_only
    def _print(self, when: str, trainer: Trainer, module: nn.Module) -> None:
        newborn = {c.name: int((c.theta.detach() == 0).sum()) for c in converted_tensors(module)}
        if not newborn:  # --sparsity null
            say(trainer, f"\nNothing is sparse {when} training: all weights are dense.\n")
            return
        zeros = ", ".join(f"{name} {count}" for name, count in newborn.items())
        table = f"Connectivity {when} training\n{connectivity_report(module)}"
        say(trainer, f"\n{table}\n{textwrap.fill(f'connections at exactly 0: {zeros}', 80)}\n")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print("before", trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print("after", trainer, pl_module)


class ConnectivityPicture(Callback):
    """Draws a PNG with the number of connections of every input before and after training, laid out as the input image.

    Args:
        filename: path of the picture.
        tensor: name of a linear layer's weight [out, in].
        grid: rows and columns of the input image.
    """

    def __init__(
        self, filename: str = "connectivity.png", tensor: str = "net.fc1.weight", grid: tuple[int, int] = (28, 28)
    ) -> None:
        self.filename, self.tensor, self.grid = filename, tensor, tuple(grid)
        self._before: Tensor | None = None
        self.written: Path | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not connections(pl_module):  # --sparsity null
            rank_zero_info("ConnectivityPicture: the network has no converted tensor, nothing is drawn.")
            return
        self._before = inputs_per_pixel(pl_module, self.tensor, self.grid)

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._before is None:
            return
        after = inputs_per_pixel(pl_module, self.tensor, self.grid)
        path = _in_run(self.filename, trainer)
        draw(self._before, after, self.tensor, path)
        self.written = path
        say(trainer, f"picture: {path}")


def inputs_per_pixel(module: nn.Module, tensor: str, grid: tuple[int, ...]) -> Tensor:
    """Count the connections of each input: int64 of shape ``grid``.

    Raises:
        ValueError: ``tensor`` is not converted, or its inputs do not fit the grid.
    """
    found = connections(module)
    if tensor not in found:
        raise ValueError(f"ConnectivityPicture: expected one of {', '.join(found) or 'no tensor at all'}, found {tensor!r}.")
    (_, inputs), places, _ = found[tensor]
    if grid[0] * grid[1] != inputs:
        raise ValueError(
            f"ConnectivityPicture: {tensor} has {inputs} inputs, which do not fit a grid of {grid[0]} x {grid[1]}."
        )
    return torch.bincount(places % inputs, minlength=inputs).view(grid[0], grid[1]).cpu()


def draw(before: Tensor, after: Tensor, tensor: str, path: Path) -> None:
    """Draw two maps side by side on one scale.

    Args:
        before, after: int64 [rows, columns], connections per input.
        tensor: name for the colour bar.
        path: the PNG to write.
    """
    agg, shapes = needed("matplotlib.backends.backend_agg", "matplotlib.figure", purpose="A picture")
    figure = shapes.Figure(figsize=(9, 4.2), layout="constrained")
    agg.FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    highest = max(int(before.max()), int(after.max()), 1)
    for axis, counts, title in zip(axes, (before, after), ("before training", "after training"), strict=True):
        picture = axis.imshow(counts.numpy(), cmap="magma", vmin=0, vmax=highest)
        axis.set_title(f"{title}: {int(counts.sum()):,} connections, {int((counts == 0).sum())} inputs with none")
        axis.title.set_fontsize(10)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(picture, ax=axes, label=f"connections per input pixel ({tensor})", shrink=0.9)
    figure.savefig(path, dpi=130)


class RampedEMA(WeightAveraging):
    """Lightning's ``WeightAveraging`` with TensorFlow's moving average: decay min(``decay``, (1 + n) / (10 + n)) at update n.

    Args:
        decay: upper limit of the decay, from 0 to below 1.

    Example::

        >>> RampedEMA(0.999)._kwargs["avg_fn"](torch.zeros(1), torch.ones(1), torch.tensor(0))
        tensor([0.9000])
    """

    def __init__(self, decay: float = 0.9999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: expected a number from 0 to below 1, found {decay}.")

        def average(averaged: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
            n = int(updates)
            return averaged.lerp(current, 1 - min(decay, (1 + n) / (10 + n)))

        super().__init__(use_buffers=False, avg_fn=average)


class SparseCheckpoint(Callback):
    """Writes the trained network as K-sized safetensors, which :func:`lightning_deepr.load_state_dict` loads.

    Args:
        filename: path of the checkpoint.
        submodule: the part of the LightningModule to write ("net"), or "" for all of it.
    """

    def __init__(self, filename: str = "sparse.safetensors", submodule: str = "net") -> None:
        self.filename, self.submodule = filename, submodule
        self.recipe = ""  # its name, if the command line knows it
        self.written: Path | None = None

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        part = pl_module.get_submodule(self.submodule) if self.submodule else pl_module
        path = _in_run(self.filename, trainer)
        record: dict[str, Any] = {"hyperparameters": _plain(dict(pl_module.hparams)), "steps": trainer.global_step}
        if self.submodule:
            record["submodule"] = self.submodule
        if self.recipe:
            record["recipe"] = self.recipe
        self.written = save_sparse(part, path, **record)
        say(trainer, f"sparse checkpoint: {path} ({path.stat().st_size:,} bytes)")


def _in_run(filename: str, trainer: Trainer) -> Path:
    """Return a file's path, in the Trainer's ``default_root_dir`` if only its name is given; its folder is made."""
    path = Path(filename)
    if path.parent == Path() and not filename.startswith("."):
        path = Path(trainer.default_root_dir) / path
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def say(trainer: Trainer, text: str) -> None:
    """Print a text above the progress bar, if one is shown: it would break the bar's line."""
    if is_a(getattr(trainer, "progress_bar_callback", None), "callbacks.progress.tqdm_progress", "TQDMProgressBar"):
        from tqdm import tqdm  # Lightning's bars are of this class

        tqdm.write(text)
    else:
        print(text)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, (int, float, str, bool, type(None)))}
