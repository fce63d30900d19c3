"""Methods without lr_scale and without neutral newborns: the steps are the optimizer's own, as NumPy's oracle has them."""

# no `from __future__ import annotations`: see lightning_deepr/training/arguments.py
from dataclasses import dataclass

import lightning_deepr


@dataclass(kw_only=True, eq=False, repr=False)
class PlainDeepR(lightning_deepr.DeepR):
    """DeepR with the optimizer's own steps and starting states."""

    lr_scale: float | dict[str, float | str] | str = 1.0
    newborn: str = "start"


@dataclass(kw_only=True, eq=False, repr=False)
class PlainRigL(lightning_deepr.RigL):
    """RigL, the same way."""

    lr_scale: float | dict[str, float | str] | str = 1.0
    newborn: str = "start"


@dataclass(kw_only=True, eq=False, repr=False)
class PlainSET(lightning_deepr.SET):
    """SET, the same way."""

    lr_scale: float | dict[str, float | str] | str = 1.0
    newborn: str = "start"
