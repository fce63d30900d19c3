"""Figures without a display."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from lightning_deepr._needed import needed


def figure(panels: int = 1, across: int = 4, width: float = 3.3, height: float = 3.1) -> tuple[Any, list[Any]]:
    """Make a figure and its panels.

    Raises:
        ImportError: matplotlib is missing.
    """
    across = min(panels, across)
    down = -(-panels // across)
    agg, shapes = needed("matplotlib.backends.backend_agg", "matplotlib.figure", purpose="A picture")
    made = shapes.Figure(figsize=(max(width * across, 4.0), height * down), layout="constrained")
    agg.FigureCanvasAgg(made)
    axes = list(made.subplots(down, across, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.set_visible(False)
    return made, axes[:panels]


def finished(made: Any, path: str | PathLike[str] | None, **texts: str) -> Any:
    """Write a figure to a file, if there is a path, and return it. The suffix says the format; folders are made.

    ``texts`` are written into a PNG as its metadata.
    """
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # without a date and a version, so that the same network gives the same file
        metadata = {"Software": None, **texts} if path.suffix == ".png" else None
        made.savefig(path, dpi=110, metadata=metadata)
    return made


def image(made: Any, axis: Any, values: Any, title: str, **options: Any) -> None:
    """Draw a matrix with a colour bar."""
    shown = axis.imshow(values, cmap=options.pop("cmap", "magma"), interpolation="nearest", **options)
    axis.set_title(title, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])
    made.colorbar(shown, ax=axis, shrink=0.8)
