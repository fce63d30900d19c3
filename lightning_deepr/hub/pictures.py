"""A picture of the connections of a network. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_deepr._needed import needed

_CELLS = 96  # the most cells per side
_IMAGES = {784: (28, 28)}  # {number of inputs of a first layer: size of the image that they are the pixels of}


def counts(shape: tuple[int, ...], places: Tensor, cells: int = _CELLS) -> tuple[np.ndarray, tuple[int, int]]:
    """Count the connections in each cell of a grid over a weight, rows (outputs) by columns (everything else).

    Args:
        shape: the shape of the weight.
        places: int64 [K], flat indices into the weight.
        cells: the most cells per side of the grid.

    Returns:
        the connections per cell as int64 [rows, columns] with at most ``cells`` of each, and the size of a cell in rows and
        columns.

    Example::

        >>> counts((4, 6), torch.tensor([0, 1, 23]), cells=2)[0].tolist()
        [[2, 0], [0, 1]]
    """
    rows = shape[0]
    columns = math.prod(shape[1:])
    tall, wide = -(-rows // cells), -(-columns // cells)
    grid = (-(-rows // tall), -(-columns // wide))
    place = places.cpu()
    cell = (place // columns // tall) * grid[1] + place % columns // wide
    return torch.bincount(cell, minlength=grid[0] * grid[1]).view(grid).numpy(), (tall, wide)


def _shares(shape: tuple[int, ...], places: Tensor) -> np.ndarray:
    """Compute the connectivity of each cell. Cells at the edges may be smaller than the others."""
    found, (tall, wide) = counts(shape, places)
    heights = np.minimum(tall, shape[0] - tall * np.arange(found.shape[0]))
    widths = np.minimum(wide, math.prod(shape[1:]) - wide * np.arange(found.shape[1]))
    return found / np.outer(heights, widths)


def per_input(shape: tuple[int, ...], places: Tensor) -> np.ndarray | None:
    """Count the connections of each input, as an image; None: the inputs are not the pixels of an image."""
    if len(shape) != 2 or shape[1] not in _IMAGES:
        return None
    return torch.bincount(places.cpu() % shape[1], minlength=shape[1]).view(_IMAGES[shape[1]]).numpy()


def draw(connections: Mapping[str, tuple[Any, Tensor, Tensor]], path: str | PathLike[str], title: str = "") -> Path:
    """Draw the pattern of each tensor, and the connections per pixel if the inputs are an image.

    Args:
        connections: the result of :func:`lightning_deepr.connections`: {name: (shape, places int64 [K], values [K])}.
        path: the PNG to write.
        title: the title of the figure.

    Returns:
        the path.

    Raises:
        ValueError: there is no tensor.
        ImportError: matplotlib is missing.
    """
    if not connections:
        raise ValueError("expected at least one sparse tensor to draw, found none.")
    first = next(iter(connections.values()))
    image = per_input(tuple(first[0]), first[1])
    panels = len(connections) + (image is not None)
    across = min(panels, 4)
    down = -(-panels // across)
    agg, shapes = needed("matplotlib.backends.backend_agg", "matplotlib.figure", purpose="A picture")
    figure = shapes.Figure(figsize=(3.3 * across, 3.1 * down + 0.3 * bool(title)), layout="constrained")
    agg.FigureCanvasAgg(figure)
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    if image is not None:
        axis = axes.pop(0)
        shown = axis.imshow(image, cmap="magma", vmin=0)
        axis.set_title(f"connections per pixel\n{int((image == 0).sum())} pixels with none", fontsize=8)
        figure.colorbar(shown, ax=axis, shrink=0.8)
    for name, (shape, places, _) in connections.items():
        axis = axes.pop(0)
        shape = tuple(shape)
        shown = axis.imshow(_shares(shape, places), cmap="magma", vmin=0, aspect="auto", interpolation="nearest")
        axis.set_title(
            f"{name}\n{places.numel():,} of {math.prod(shape):,} ({places.numel() / math.prod(shape):.2%})", fontsize=8
        )
        axis.set_ylabel("outputs", fontsize=7)
        axis.set_xlabel("inputs" if len(shape) == 2 else "inputs x kernel", fontsize=7)
        figure.colorbar(shown, ax=axis, shrink=0.8)
    for axis in axes:
        axis.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10)
    path = Path(path)
    # The file has no date and no version, so that the same network gives the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path
