"""A short animation of the input map."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from lightning_deepr._needed import needed

_SIDE = 280  # pixels of the longer side, about


def animation(frames: Sequence[np.ndarray], path: str | PathLike[str], *, seconds: float = 0.2) -> Path:
    """Write a GIF of input maps, all on one scale.

    Args:
        frames: maps of one shape [rows, columns], see :func:`lightning_deepr.pictures.input_counts`.
        path: the .gif to write.
        seconds: the time of a frame; the last one stays five times as long.

    Returns:
        the path.

    Raises:
        ValueError: there is no frame, or the shapes differ, or the path is no .gif.
        ImportError: matplotlib (with Pillow) is missing.

    Example::

        >>> import tempfile
        >>> animation([np.eye(4), np.ones((4, 4))], f"{tempfile.mkdtemp()}/map.gif").name
        'map.gif'
    """
    matplotlib, pillow = needed("matplotlib", "PIL.Image", purpose="An animation", install="matplotlib pillow")
    path = Path(path)
    shapes = {np.shape(frame) for frame in frames}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"animation: expected maps of one shape [rows, columns], found {sorted(shapes) or 'none'}.")
    if path.suffix != ".gif":
        raise ValueError(f"animation: path: expected a .gif, found {path.name!r}.")
    most = max(float(np.max(frame)) for frame in frames) or 1.0
    scale = max(_SIDE // max(next(iter(shapes))), 1)
    pixel = np.ones((scale, scale, 1), np.uint8)
    colours = [(matplotlib.colormaps["magma"](np.asarray(frame) / most)[..., :3] * 255).astype(np.uint8) for frame in frames]
    images = [pillow.fromarray(np.kron(frame, pixel)) for frame in colours]
    path.parent.mkdir(parents=True, exist_ok=True)
    times = [round(1000 * seconds)] * (len(images) - 1) + [round(5000 * seconds)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=times, loop=0)
    return path
