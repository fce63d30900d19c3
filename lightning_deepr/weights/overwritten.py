"""Values that were written into the theta of a network that is rewired, from thetas of other steps.

``shadow = [p.detach().clone() for p in net.parameters()]`` is averaged or kept, and later written back by ``p.data.copy_``: an
exponential moving average by hand, ``torch_ema``, the best parameters so far. A slot of theta has stood for another place
since, and plain tensors know nothing of it. But right after a step the newborns are 0, so values of other steps are seen: at
the next forward pass in eval mode, and when the network is saved or read.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_deepr.compute.eager import is_recorded, transforms, unwatched


def look(slots: Any) -> None:
    """Warn once if theta was written to since the last step, where connections have moved.

    It looks at the first use after a step, the second, the fourth, ...: a validation costs next to nothing more.

    Args:
        slots: the parametrization of a tensor that a callback has rewired.
    """
    step, number = slots.last_step, 1
    if slots.looked is not None and slots.looked[0] == step:
        number += slots.looked[1]
    vars(slots)["looked"] = (step, number)  # (a module's setattr is slow)
    if number & (number - 1) or slots.notice.has_overwritten:
        return
    holder = slots.holder_of_theta()
    theta = None if holder is None else holder._parameters["original"]
    if type(theta) is not nn.Parameter or theta.is_meta or transforms() is not None or is_recorded():
        return
    with unwatched():
        own = slots.own(theta.detach())
        if own.shape != slots.born.shape or own.device != slots.born.device or not slots.count:
            return  # the gate says so
        newborn = slots.born == step
        if bool(newborn.any()):  # clamp_, a factor and the like leave them at 0
            if not bool((own[newborn] != 0).any()):
                return
            found = f"{int(newborn.sum())} connections that were born in the last step, which start at 0, are not 0"
        elif theta._version != slots.seen_version and not slots.averages and slots.last_birth() >= 0:
            found = "theta was written to since the last step"
        else:
            return
    slots.notice.overwritten(slots.name, found)
