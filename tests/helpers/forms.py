"""Where connections may be, written out in loops: the reference for candidates, without the package's code."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from lightning_deepr import Band, Blocks, Local, NoSelf

GRID, OUTPUTS = (3, 4), (3, 4)
MASK = torch.rand(12, 12, generator=torch.Generator().manual_seed(1)) < 0.4
FEW = torch.rand(36, 36, generator=torch.Generator().manual_seed(2)) < 0.012


def band(width: int, rows: int, columns: int, r: int, c: int) -> bool:
    middle = math.floor((2 * r + 1) * columns / (2 * rows))
    return middle - width <= c <= middle + width


def blocks(number: int, rows: int, columns: int, r: int, c: int) -> bool:
    return math.floor(r * number / rows) == math.floor(c * number / columns)


def local(radius: float, grid: tuple[int, int], outputs: tuple[int, int], r: int, c: int) -> bool:
    y, x = divmod(r % (outputs[0] * outputs[1]), outputs[1])
    v, u = divmod(c % (grid[0] * grid[1]), grid[1])
    middle_y = math.floor((2 * y + 1) * grid[0] / (2 * outputs[0]))
    middle_x = math.floor((2 * x + 1) * grid[1] / (2 * outputs[1]))
    return math.hypot(v - middle_y, u - middle_x) <= radius + 1e-12


def odd(r: Any, c: Any, *kernel: Any) -> Any:
    return (r + c + sum(kernel)) % 2 == 1


class Form(NamedTuple):
    """Candidates and the rule for a row and a column of a matrix of some size."""

    candidates: Any
    allows: Callable[..., bool]  # rows, columns, row, column, and the position in the kernel
    square: bool = False
    size: int = 12  # of a square matrix on which to try it


FORMS = {
    "band": Form(Band(2), lambda n, m, r, c, *k: band(2, n, m, r, c)),
    "blocks": Form(Blocks(5), lambda n, m, r, c, *k: blocks(5, n, m, r, c)),
    "no self": Form(NoSelf(), lambda n, m, r, c, *k: r != c, True),
    "local": Form(Local(GRID, 1.5), lambda n, m, r, c, *k: local(1.5, GRID, OUTPUTS, r, c)),
    "band, no self": Form(NoSelf() & Band(3), lambda n, m, r, c, *k: r != c and band(3, n, m, r, c), True),
    "band of blocks": Form(Band(2) & Blocks(3), lambda n, m, r, c, *k: band(2, n, m, r, c) and blocks(3, n, m, r, c)),
    "function": Form(odd, lambda n, m, r, c, *k: bool(odd(r, c, *k))),
    "local, function": Form(Local(GRID, 2) & odd, lambda n, m, r, c, *k: local(2, GRID, OUTPUTS, r, c) and bool(odd(r, c, *k))),
    "mask": Form(MASK, lambda n, m, r, c, *k: bool(MASK[r, c]), True),
    "few": Form(FEW, lambda n, m, r, c, *k: bool(FEW[r, c]), True, 36),
}  # fmt: skip


def codes_of(name: str, size: int) -> list[int]:
    """List the place of each code of a square matrix, or -1, as the documentation of the draws says."""
    form, places = FORMS[name], range(size * size)
    allowed = [form.allows(size, size, *divmod(p, size)) for p in places]
    whole = [p if allowed[p] else -1 for p in places]
    if name == "few":
        return [p for p in whole if p >= 0]  # at most one in 8: a list
    if name in ("no self", "function", "local, function", "mask"):
        return whole
    found = []
    for r in range(size):
        if "band" in name:  # a stretch of 2 * width + 1 columns
            width = 3 if "no self" in name else 2
            columns = [r - width + i for i in range(2 * width + 1)]
            if name == "band of blocks":  # the blocks' stretch is shorter
                columns = [4 * (r // 4) + i for i in range(4)]
            columns = [c if 0 <= c < size else None for c in columns]
        elif name == "blocks":
            first = math.ceil(r * 5 // size * size / 5)
            columns = [first + i if first + i < size else None for i in range(math.ceil(size / 5))]
        else:  # a window of 2 * reach + 1 points on either axis
            y, x = divmod(r, GRID[1])
            spots = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            columns = [v * GRID[1] + u if 0 <= v < GRID[0] and 0 <= u < GRID[1] else None for v, u in spots]
        found += [-1 if c is None or not allowed[r * size + c] else r * size + c for c in columns]
    return found


def mask_of(layer: torch.nn.Module, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Say for each index of a layer's weight whether a form allows it, by the layer's own meaning of the index."""
    allows = FORMS[name].allows
    found = np.zeros(shape, bool)
    for index in np.ndindex(*shape):
        if isinstance(layer, torch.nn.modules.conv._ConvTransposeNd):
            inside = shape[0] // layer.groups
            found[index] = allows(shape[1], inside, index[1], index[0] % inside, *index[2:])
        elif isinstance(layer, torch.nn.modules.conv._ConvNd):
            inside = shape[0] // layer.groups
            found[index] = allows(inside, shape[1], index[0] % inside, *index[1:])
        elif isinstance(layer, torch.nn.LSTM):
            found[index] = allows(layer.hidden_size, shape[1], index[0] % layer.hidden_size, index[1])
        elif isinstance(layer, torch.nn.Embedding):
            found[index] = allows(shape[1], shape[0], index[1], index[0])
        else:
            found[index] = allows(*shape, *index)
    return found
