"""Where connections may be: a mask, a band, blocks, a neighbourhood on a grid, no self-connections, or a function.

These are what a user gives as ``candidates=``. :func:`lightning_deepr.algorithm.allowed.bind` fits them to a weight.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_deepr.algorithm.units import Units


class Candidates:
    """Where the connections of a weight may be. Combine them with ``&``: a place has to be allowed by all.

    Rows are output units and columns input units of a layer. The gates of an LSTM, a GRU or an RNN are one matrix each, and so
    are the groups of a convolution; a kernel's positions go with their pair of channels.

    Example::

        >>> NoSelf() & Band(3)
        Both(parts=(NoSelf(), Band(width=3)))
    """

    def __and__(self, other: Any) -> Both:
        return Both((*_parts(self), *_parts(as_candidates(other))))

    def __rand__(self, other: Any) -> Both:
        return Both((*_parts(as_candidates(other)), *_parts(self)))

    def problem(self, units: Units) -> str | None:
        """Say why these candidates do not fit a layout, or return None: the end of a sentence after the tensor's name."""
        return None


class Rule(Candidates, ABC):
    """Candidates that follow from the two units of a place, so that nothing is kept for them."""

    @abstractmethod
    def permits(self, units: Units, row: Tensor, column: Tensor) -> Tensor:
        """Tell which pairs of units (int64, any shape) may be connected: bool."""


@dataclass(frozen=True)
class Both(Candidates):
    """The places that all parts allow; ``a & b`` makes it."""

    parts: tuple[Candidates, ...]


@dataclass(frozen=True)
class Band(Rule):
    """A band around the diagonal: row r is connected to the columns at most ``width`` away from it.

    In a matrix that is not square, the diagonal runs from corner to corner: the middle of row r is column
    ``(2 r + 1) * columns // (2 * rows)``.

    Args:
        width: the columns on either side, at least 0.

    Example::

        >>> import torch
        >>> from lightning_deepr import sparsify
        >>> net = sparsify(torch.nn.Linear(6, 6), 10, candidates=Band(1))
        >>> row, column = net.weight.detach().nonzero().unbind(1)
        >>> int((row - column).abs().max())
        1
    """

    width: int

    def __post_init__(self) -> None:
        _check_whole("Band: width", self.width, 0)

    def permits(self, units: Units, row: Tensor, column: Tensor) -> Tensor:
        middle = (2 * row + 1) * units.columns // (2 * units.rows)
        return (column - middle).abs() <= self.width


@dataclass(frozen=True)
class Blocks(Rule):
    """Blocks along the diagonal: rows and columns are cut into ``number`` pieces each, and piece i is connected to piece i.

    Pieces differ by at most one unit if the number does not divide the size.

    Args:
        number: the number of blocks, at least 1.
    """

    number: int

    def __post_init__(self) -> None:
        _check_whole("Blocks: number", self.number, 1)

    def problem(self, units: Units) -> str | None:
        least = min(units.rows, units.columns)
        if self.number > least:
            return f"Blocks: expected at most {least} blocks in a matrix of {units.rows} x {units.columns}, found {self.number}"
        return None

    def permits(self, units: Units, row: Tensor, column: Tensor) -> Tensor:
        return row * self.number // units.rows == column * self.number // units.columns


@dataclass(frozen=True)
class NoSelf(Rule):
    """No unit is connected to itself: everything but the diagonal of a square matrix."""

    def problem(self, units: Units) -> str | None:
        if units.rows != units.columns:
            return (
                f"NoSelf: expected as many outputs as inputs, found a matrix of {units.rows} x {units.columns}, whose outputs "
                "are other units than its inputs"
            )
        return None

    def permits(self, units: Units, row: Tensor, column: Tensor) -> Tensor:
        return row != column


@dataclass(frozen=True)
class Local(Rule):
    """Neighbours on a two-dimensional grid: a unit is connected to input units within a distance.

    Inputs are numbered like a flattened image: row by row, and channel after channel if there are more inputs than points of
    the grid. The same holds for the outputs.

    Args:
        grid: (height, width) of the grid of the input units; their number is a multiple of height * width.
        radius: the largest Euclidean distance, in points of the input grid; from 0 on.
        outputs: (height, width) of the grid of the output units, laid over the whole input grid. None: the same grid.

    Example::

        >>> import torch
        >>> from lightning_deepr import sparsify
        >>> layer = torch.nn.Linear(28 * 28, 14 * 14)  # each unit sees a disc of the image
        >>> net = sparsify(layer, 2000, candidates=Local((28, 28), 3, outputs=(14, 14)))
    """

    grid: tuple[int, int]
    radius: float
    outputs: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for what, grid in (("grid", self.grid), ("outputs", self.outputs)):
            if grid is None and what == "outputs":
                continue
            if not isinstance(grid, Sequence) or len(grid) != 2 or not all(_is_whole(n) and n >= 1 for n in grid):
                raise ValueError(f"Local: {what}: expected (height, width), two whole numbers from 1 on, found {grid!r}.")
            object.__setattr__(self, what, tuple(grid))  # YAML gives lists
        if isinstance(self.radius, bool) or not isinstance(self.radius, (int, float)) or not 0 <= self.radius < 1 << 20:
            raise ValueError(f"Local: radius: expected a number from 0 on, found {self.radius!r}.")

    @property
    def reach(self) -> int:
        """The largest difference along one axis."""
        return int(self.radius)

    @property
    def squared(self) -> int:
        """The largest squared distance, a whole number as the squared distances are."""
        return int(self.radius * self.radius)

    def problem(self, units: Units) -> str | None:
        (height, width), (high, wide) = self.grid, self.outputs or self.grid
        if units.columns % (height * width):
            return f"Local: expected a multiple of {height} x {width} = {height * width} inputs, found {units.columns}"
        if units.rows % (high * wide):
            return (
                f"Local: expected a multiple of {high} x {wide} = {high * wide} outputs, found {units.rows}: give the grid of "
                "the outputs, Local(grid, radius, outputs=(height, width))"
            )
        return None

    def permits(self, units: Units, row: Tensor, column: Tensor) -> Tensor:
        return near(self.grid, self.outputs or self.grid, self.squared, row, column)


class Mask(Candidates):
    """The places where a bool tensor is True. ``candidates=mask`` is the same.

    Args:
        mask: bool, in the weight's shape. For several matrices in one tensor (gates, groups) also in the shape of one, and for
            a convolution also [out, in], without the kernel.
    """

    def __init__(self, mask: Tensor) -> None:
        if isinstance(mask, np.ndarray):
            mask = torch.from_numpy(mask)
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"candidates: expected a mask of dtype bool (True: may be connected), found {found}.")
        self.mask = mask

    def __repr__(self) -> str:
        return f"Mask({' x '.join(map(str, self.mask.shape))})"


class Where(Candidates):
    """The places for which a function is True. ``candidates=function`` is the same.

    Args:
        function: takes index tensors (rows, columns; for a convolution out, in and one for each dimension of the kernel), all
            int64 of one shape, and returns a bool tensor of that shape. It has to give the same answers at each call. It is
            asked once for every place, when the network is converted.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def __repr__(self) -> str:
        return f"Where({getattr(self.function, '__qualname__', self.function)})"

    def answers(self, units: Units, places: Tensor) -> Tensor:
        """Ask the function about places.

        Raises:
            ValueError: it returns something else than a bool tensor of the indices' shape.
        """
        answer = self.function(*units.split(places), *units.positions(places))
        if not isinstance(answer, Tensor) or answer.dtype is not torch.bool or answer.shape != places.shape:
            found = (
                f"{answer.dtype} of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
            )
            raise ValueError(
                f"expected a bool tensor of shape {tuple(places.shape)}, that of the indices, from {self!r}, found {found}"
            )
        return answer


def near(grid: tuple[int, int], outputs: tuple[int, int], squared: int, row: Tensor, column: Tensor) -> Tensor:
    """Tell which pairs of units on two grids are near each other (see :class:`Local`): bool."""
    (height, width), (high, wide) = grid, outputs
    y, x = row % (high * wide) // wide, row % wide
    down = column % (height * width) // width - (2 * y + 1) * height // (2 * high)
    across = column % width - (2 * x + 1) * width // (2 * wide)
    return down * down + across * across <= squared


def as_candidates(value: Any, argument: str = "candidates") -> Candidates:
    """Read what a user gives as candidates of a tensor: a form, a bool mask or a function.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, Candidates):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        try:
            return Mask(value)  # type: ignore[arg-type]
        except TypeError as error:
            raise TypeError(str(error).replace("candidates", argument, 1)) from error
    if callable(value) and not isinstance(value, type):
        return Where(value)
    raise TypeError(
        f"{argument}: expected a bool mask, Band(width), Blocks(number), NoSelf(), Local(grid, radius), a function of (rows, "
        f"columns), several of them with &, or a dict of these by pattern, found {value!r}."
    )


def _parts(value: Candidates) -> tuple[Candidates, ...]:
    return value.parts if isinstance(value, Both) else (value,)


def parts_of(value: Any) -> tuple[Candidates, ...]:
    """List the parts of what a user gives as candidates of a tensor."""
    return _parts(as_candidates(value))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_whole(what: str, value: Any, least: int) -> None:
    if not _is_whole(value) or value < least:
        raise ValueError(f"{what}: expected a whole number from {least} on, found {value!r}.")
