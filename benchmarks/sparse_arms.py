"""The arms of the studies in ``reference/``: the methods that are sparse throughout, each with its defaults."""

from __future__ import annotations

from typing import Any

from grid import Job
from torch import nn

import lightning_deepr
from lightning_deepr import connectivity_report

Settings = dict[str, Any]
ARMS: dict[str, tuple[str, Settings]] = {
    "deepr": ("DeepR", {}),
    "rigl": ("RigL", {}),
    "set": ("SET", {}),
    "fixed": ("FixedRandom", {"signs": "free"}),
}
OLD: Settings = {"l1": None, "newborn": "start", "lr_scale": 1.0}  # DeepR's defaults before alpha was steered


def callback_of(job: Job, net: nn.Module, total: int, settings: Settings) -> Any:
    """Convert a network, and return the arm's callback, not yet attached; None for a dense arm.

    Args:
        job: the training; the first word of its arm names the method.
        net: the network.
        total: the number of weights that the connectivity counts.
        settings: further arguments of the callback. ``exponent``: theta's learning rate times (N / K) ** exponent, instead of
            the method's own ``lr_scale``.
    """
    if "dense" in job.arm:
        return None
    settings = {name: _value(entry) for name, entry in settings.items()}
    exponent = settings.pop("exponent", None)
    kind, own = ARMS[job.arm.split()[0].rstrip(",")]
    callback = getattr(lightning_deepr, kind)(round(job.connectivity * total), seed=job.seed, **(own | settings))
    callback.prepare(net)
    if exponent is not None:
        rows = connectivity_report(net)
        callback.lr_scale = {r["name"].removesuffix(".weight"): (r["total"] / r["active"]) ** exponent for r in rows}
    return callback


def _value(entry: Any) -> Any:
    kinds = {"LinearDecay": lightning_deepr.LinearDecay, "TurnoverTarget": lightning_deepr.TurnoverTarget}
    return kinds[entry[0]](*entry[1:]) if isinstance(entry, list) and entry[0] in kinds else entry
