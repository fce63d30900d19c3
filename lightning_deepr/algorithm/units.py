"""What the flat places of a weight stand for: output and input units, positions of a kernel, one of several matrices.

A *place* is a flat index into the weight. Here a weight is ``groups`` matrices of one size (gates of an LSTM, groups of a
convolution, experts), and each entry of a matrix has ``inner`` positions of a kernel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Units(NamedTuple):
    """The layout of a weight: ``place = ((group * majors + major) * minors + minor) * inner + position``.

    Args:
        groups: the number of matrices.
        majors, minors: the sizes of a matrix in the order of the memory. Rows (output units) are the majors and columns (input
            units) the minors, unless ``transposed``.
        inner: the positions of the kernel; 1 for a matrix.
        transposed: whether the input units come first in the memory (transposed convolutions, embeddings).
        grouped: whether each matrix has input units of its own (groups of a convolution); gates and experts share theirs.
        kernel: the sizes of the kernel; their product is ``inner``.

    Example::

        >>> units = Units(1, 10, 100)  # nn.Linear(100, 10)
        >>> units.rows, units.columns, units.total
        (10, 100, 1000)
    """

    groups: int
    majors: int
    minors: int
    inner: int = 1
    transposed: bool = False
    grouped: bool = False
    kernel: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """The number of output units of a matrix."""
        return self.minors if self.transposed else self.majors

    @property
    def columns(self) -> int:
        """The number of input units of a matrix."""
        return self.majors if self.transposed else self.minors

    @property
    def total(self) -> int:
        """N, the number of places."""
        return self.groups * self.majors * self.minors * self.inner

    def split(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row and the column of each place within its matrix, int64."""
        entry = places // self.inner
        minor, major = entry % self.minors, entry // self.minors % self.majors
        return (minor, major) if self.transposed else (major, minor)

    def positions(self, places: Tensor) -> tuple[Tensor, ...]:
        """Return the indices within the kernel of each place, one tensor for each dimension of the kernel."""
        rest, found = places % self.inner, []
        for size in reversed(self.kernel):
            found.append(rest % size)
            rest = rest // size
        return tuple(reversed(found))

    def join(self, group: Tensor, row: Tensor, column: Tensor, position: Tensor) -> Tensor:
        """Return the places of rows and columns of some matrices."""
        major, minor = (column, row) if self.transposed else (row, column)
        return ((group * self.majors + major) * self.minors + minor) * self.inner + position

    @property
    def input_rule(self) -> tuple[int, int, int]:
        """Three numbers (inner, length, block) that give a place's input unit.

        It is ``place // inner % length + length * (place // block)``.
        """
        inner = self.inner * self.minors if self.transposed else self.inner
        length = self.columns
        return inner, length, (self.majors * self.minors * self.inner if self.grouped else max(self.total, 1))

    @property
    def inputs(self) -> int:
        """The number of input units of the whole weight."""
        return self.columns * (self.groups if self.grouped else 1)


def matrix_units(shape: tuple[int, ...]) -> Units:
    """Read a weight as matrices [outputs, inputs]; dimensions before these number matrices that share their inputs."""
    return Units(math.prod(shape[:-2]), shape[-2], shape[-1])


def whole(units: Units, first: int, end: int, device: torch.device | str = "cpu") -> Tensor:
    """List the places from ``first`` to ``end - 1``."""
    return torch.arange(first, min(end, units.total), device=device)
