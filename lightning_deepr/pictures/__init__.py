"""Pictures of sparse networks and of their training. matplotlib is imported when one is drawn.

Each function returns a ``matplotlib.figure.Figure``, which a notebook shows, and writes it to ``path`` where one is given.
:class:`Pictures` is the callback that draws during a fit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_deepr._lazy import lazy

if TYPE_CHECKING:
    from lightning_deepr.pictures.callback import Pictures
    from lightning_deepr.pictures.curves import accuracy, alpha, survival, turnover
    from lightning_deepr.pictures.moving import animation
    from lightning_deepr.pictures.networks import degrees, gates, input_counts, input_map, kernels

__all__ = [
    "Pictures",
    "accuracy",
    "alpha",
    "animation",
    "degrees",
    "gates",
    "input_counts",
    "input_map",
    "kernels",
    "survival",
    "turnover",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Pictures": "lightning_deepr.pictures.callback",
        "animation": "lightning_deepr.pictures.moving",
        **dict.fromkeys(("accuracy", "alpha", "survival", "turnover"), "lightning_deepr.pictures.curves"),
        **dict.fromkeys(("degrees", "gates", "input_counts", "input_map", "kernels"), "lightning_deepr.pictures.networks"),
    },
)
