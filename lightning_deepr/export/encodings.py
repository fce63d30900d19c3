"""Encode a layer's connections for C, in arrays of the smallest integers that hold them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightning_deepr.export.feed_forward import LinearLayer

Weights = Literal["float32", "int16", "int8"]
_LEVELS = {"int16": 32767, "int8": 127}
_UNSIGNED = (np.uint8, np.uint16, np.uint32)
ESCAPE = 255  # this byte adds 255 to a gap and continues it


@dataclass
class Encoded:
    """One layer as arrays.

    ``kind`` is "gaps" (uint8 distances between the columns of a row), "columns" (the columns themselves) or "dense" (every
    weight, no places).
    """

    layer: LinearLayer
    kind: Literal["gaps", "columns", "dense"]
    counts: np.ndarray | None  # the number of connections of each row
    places: np.ndarray | None
    values: np.ndarray
    scale: float | None  # for quantized values: weight = scale * value
    rounding: float  # the largest difference between a stored weight and the network's

    @property
    def size(self) -> int:
        """The bytes of all arrays and the scale."""
        arrays = (self.counts, self.places, self.values, self.layer.bias)
        return sum(array.nbytes for array in arrays if array is not None) + (0 if self.scale is None else 4)


def smallest(values: np.ndarray) -> np.ndarray:
    """Convert values to the smallest unsigned integer type that holds them."""
    top = int(values.max()) if values.size else 0
    for kind in _UNSIGNED:
        if top <= np.iinfo(kind).max:
            return values.astype(kind)
    raise ValueError(f"expected numbers below 2^32, found {top}.")


def gaps(pointers: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Encode the distance of each column to the previous one in its row (to 0 for the first) in bytes.

    A distance d becomes d // 255 bytes of value 255 and one byte of value d % 255.

    Example::

        >>> gaps(np.array([0, 3, 3, 4]), np.array([2, 5, 600, 0])).tolist()
        [2, 3, 255, 255, 85, 0]
    """
    distance = np.diff(columns, prepend=0)
    first = pointers[:-1][np.diff(pointers) > 0]
    distance[first] = columns[first]
    escapes = distance // ESCAPE
    result = np.full(int(escapes.sum()) + len(distance), ESCAPE, np.uint8)
    result[np.cumsum(escapes + 1) - 1] = distance % ESCAPE
    return result


def encode(layer: LinearLayer, weights: Weights) -> Encoded:
    """Encode a layer in the kind that takes the fewest bytes.

    Args:
        layer: a layer with float32 values.
        weights: the type of the stored values; int16 and int8 have one scale for the layer.

    Raises:
        ValueError: ``weights`` is not one of the three types.
    """
    values, scale, rounding = _quantized(layer.values, weights)
    counts = smallest(np.diff(layer.pointers))
    ways = [
        Encoded(layer, "gaps", counts, gaps(layer.pointers, layer.places), values, scale, rounding),
        Encoded(layer, "columns", counts, smallest(layer.places), values, scale, rounding),
    ]
    if layer.rows * layer.columns <= 4 * len(values) + layer.rows:  # only then can dense storage be the smallest
        dense = np.zeros((layer.rows, layer.columns), values.dtype)
        dense[np.repeat(np.arange(layer.rows), np.diff(layer.pointers)), layer.places] = values
        ways.append(Encoded(layer, "dense", None, None, dense.reshape(-1), scale, rounding))
    return min(ways, key=lambda way: way.size)


def _quantized(values: np.ndarray, weights: Weights) -> tuple[np.ndarray, float | None, float]:
    if weights == "float32":
        return values, None, 0.0
    if weights not in _LEVELS:
        raise ValueError(f'weights: expected "float32", "int16" or "int8", found {weights!r}.')
    levels = _LEVELS[weights]
    top = float(np.abs(values).max()) if values.size else 0.0
    scale = float(np.float32(top / levels)) or 1.0
    stored = np.clip(np.rint(values.astype(np.float64) / scale), -levels, levels).astype(weights)
    rounding = float(np.abs(stored * scale - values).max()) if values.size else 0.0
    return stored, scale, rounding
