"""Pictures of a network's connections."""

from __future__ import annotations

import math
from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from lightning_deepr.monitoring.degrees import degrees_of
from lightning_deepr.pictures.figures import figure, finished, image
from lightning_deepr.weights.find import Converted, converted_tensors

Path = str | PathLike[str] | None
_CELLS = 96  # the most cells per side of a matrix
_KERNELS = 12  # the most kernels per side


def _named(module: nn.Module, tensor: str | None, what: str, fits: Callable[[Converted], bool]) -> Converted:
    """Find a converted tensor by its name, or the first one that fits.

    Raises:
        ValueError: there is none.
    """
    found = [one for one in converted_tensors(module) if fits(one)]
    if tensor is not None:
        found = [one for one in found if one.name == tensor]
    if not found:
        names = ", ".join(f"`{one.name}` {tuple(one.slots.shape)}" for one in converted_tensors(module))
        asked = "" if tensor is None else f", found {tensor!r}"
        raise ValueError(
            f"{what}{asked}; {type_before_parametrizations(module).__name__} has {names or 'no converted tensor'}."
        )
    return found[0]


def grid_of(inputs: int) -> tuple[int, ...] | None:
    """Guess the image of which a layer's inputs are the pixels: a square, or a square with three colours; None: neither.

    Example::

        >>> grid_of(784), grid_of(3072), grid_of(39)
        ((28, 28), (3, 32, 32), None)
    """
    side = math.isqrt(inputs)
    if side * side == inputs and side > 1:
        return side, side
    side = math.isqrt(inputs // 3)
    return (3, side, side) if 3 * side * side == inputs and side > 1 else None


def input_counts(module: nn.Module, tensor: str | None = None, grid: tuple[int, ...] | None = None) -> np.ndarray:
    """Count the connections of each input of a linear layer, laid out as the image of its inputs.

    Args:
        module: a converted network.
        tensor: the name of a linear layer's weight; None: the first one.
        grid: rows and columns of the image, or (channels, rows, columns), over which the counts are added. None: a square, or
            a square of three colours.

    Returns:
        int64 [rows, columns].

    Raises:
        ValueError: there is no such tensor, or its inputs do not fit the grid.

    Example::

        >>> from lightning_deepr import sparsify
        >>> counts = input_counts(sparsify(nn.Linear(16, 10), 0.25))
        >>> counts.shape, int(counts.sum())
        ((4, 4), 40)
    """
    one = _named(module, tensor, "input_map: expected the weight of a linear layer", lambda c: len(c.slots.shape) == 2)
    counts = degrees_of(one)[1]
    shape = grid_of(len(counts)) if grid is None else tuple(grid)
    if shape is None or len(shape) not in (2, 3) or math.prod(shape) != len(counts):
        found = f"a grid of {' x '.join(map(str, shape))}" if shape is not None else "no square"
        raise ValueError(
            f"input_map: `{one.name}` has {len(counts)} inputs, which make {found}: expected grid=(rows, columns) or "
            "(channels, rows, columns) whose product is the number of inputs. `pictures.degrees` needs no grid."
        )
    laid_out = counts.reshape(shape)
    return laid_out.sum(0) if len(shape) == 3 else laid_out


def input_map(module: nn.Module, tensor: str | None = None, *, grid: tuple[int, ...] | None = None, path: Path = None) -> Any:
    """Draw how many connections each input has, as an image of the inputs.

    Args:
        module, tensor, grid: see :func:`input_counts`.
        path: the file to write; None: none.

    Returns:
        the figure.

    Raises:
        ValueError: there is no such tensor, or its inputs do not fit the grid.
        ImportError: matplotlib is missing.

    Example::

        >>> from lightning_deepr import sparsify
        >>> made = input_map(sparsify(nn.Linear(784, 300), 0.01))
    """
    counts = input_counts(module, tensor, grid)
    made, (axis,) = figure()
    image(made, axis, counts, f"connections per input\n{int((counts == 0).sum())} of {counts.size} inputs with none", vmin=0)
    return finished(made, path)


def kernels(module: nn.Module, tensor: str | None = None, *, path: Path = None) -> Any:
    """Draw the kernels of a convolution: a row per output channel, a column per input channel, at most 12 of each.

    Dormant places are white; colours are the weights.

    Args:
        module: a converted network.
        tensor: the name of the weight of a convolution with two dimensions; None: the first one.
        path: the file to write; None: none.

    Raises:
        ValueError: there is no such tensor.
        ImportError: matplotlib is missing.

    Example::

        >>> from lightning_deepr import sparsify
        >>> made = kernels(sparsify(nn.Conv2d(3, 8, 5), 0.2))
    """
    one = _named(module, tensor, "kernels: expected the weight of a 2D convolution", lambda c: len(c.slots.shape) == 4)
    outputs, inputs, high, wide = one.slots.shape
    at, values = (tensor.cpu().numpy() for tensor in one.slots.active(one.theta))
    rest, x = np.divmod(at, wide)
    rest, y = np.divmod(rest, high)
    row, column = np.divmod(rest, inputs)
    rows, columns = min(outputs, _KERNELS), min(inputs, _KERNELS)
    picture = np.full((rows * (high + 1) + 1, columns * (wide + 1) + 1), np.nan)
    shown = (row < rows) & (column < columns)
    picture[row[shown] * (high + 1) + 1 + y[shown], column[shown] * (wide + 1) + 1 + x[shown]] = values[shown]
    most = float(np.nanmax(np.abs(picture))) if shown.any() else 1.0
    made, (axis,) = figure(width=5, height=5)
    title = f"{one.name}: {rows} of {outputs} output channels (rows), {columns} of {inputs} input channels"
    image(made, axis, picture, title, cmap="coolwarm", vmin=-most or -1.0, vmax=most or 1.0)
    for line in range(rows + 1):
        axis.axhline(line * (high + 1), color="0.8", linewidth=0.5)
    for line in range(columns + 1):
        axis.axvline(line * (wide + 1), color="0.8", linewidth=0.5)
    return finished(made, path)


def gates(module: nn.Module, tensor: str | None = None, *, path: Path = None) -> Any:
    """Draw where the connections of a recurrent layer's gates are: a panel per gate, the share of places in each cell.

    Args:
        module: a converted network.
        tensor: the name of a recurrent layer's weight; None: the first one.
        path: the file to write; None: none.

    Raises:
        ValueError: there is no such tensor.
        ImportError: matplotlib is missing.

    Example::

        >>> from lightning_deepr import sparsify
        >>> made = gates(sparsify(nn.LSTM(10, 20), 0.1), "weight_hh_l0")
    """
    one = _named(module, tensor, "gates: expected a weight of an LSTM, GRU or RNN", lambda c: isinstance(c.module, nn.RNNBase))
    names = {nn.LSTM: ("input", "forget", "cell", "output"), nn.GRU: ("reset", "update", "new")}
    hidden: Any = one.module.hidden_size
    labels = next((found for kind, found in names.items() if isinstance(one.module, kind)), ("hidden",))
    places = one.slots.active(one.theta)[0].cpu().numpy()
    row, column = np.divmod(places, one.slots.shape[1])
    made, axes = figure(len(labels))
    for number, (axis, label) in enumerate(zip(axes, labels, strict=True)):
        mine = row // hidden == number
        share = cells(row[mine] % hidden, column[mine], hidden, one.slots.shape[1])
        image(made, axis, share, f"{label} gate, {one.name}\n{int(mine.sum()):,} connections", vmin=0, aspect="auto")
        axis.set_ylabel("units", fontsize=7)
        axis.set_xlabel("inputs", fontsize=7)
    return finished(made, path)


def cells(row: np.ndarray, column: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return the share of places with a connection in each cell of a matrix, at most 96 x 96 cells."""
    tall, wide = -(-rows // _CELLS), -(-columns // _CELLS)
    edges = [np.append(np.arange(0, size, step), size) for size, step in ((rows, tall), (columns, wide))]
    counts, _, _ = np.histogram2d(row, column, bins=edges)
    return counts / np.outer(np.diff(edges[0]), np.diff(edges[1]))


def degrees(module: nn.Module, *, path: Path = None) -> Any:
    """Draw how many connections the units of each tensor have: outputs (in-degree) and inputs (out-degree).

    Args:
        module: a converted network.
        path: the file to write; None: none.

    Raises:
        ValueError: nothing is converted.
        ImportError: matplotlib is missing.

    Example::

        >>> from lightning_deepr import sparsify
        >>> made = degrees(sparsify(nn.Linear(784, 300), 0.01))
    """
    found = list(converted_tensors(module))
    if not found:
        raise ValueError(
            f"degrees: expected a converted network, found {type_before_parametrizations(module).__name__} without "
            "a converted tensor."
        )
    made, axes = figure(len(found))
    for axis, one in zip(axes, found, strict=True):
        for counts, label in zip(degrees_of(one), ("in-degree of outputs", "out-degree of inputs"), strict=True):
            sizes = np.bincount(counts)
            axis.step(np.arange(len(sizes)), sizes, where="mid", label=f"{label}, {int(sizes[0])} with none")
        axis.set_title(one.name, fontsize=8)
        axis.set_xlabel("connections", fontsize=7)
        axis.set_ylabel("units", fontsize=7)
        axis.legend(fontsize=6)
    return finished(made, path)
