"""Tell of converted weights that lost their weight decay, because theta is a vector."""

from __future__ import annotations

from collections.abc import Sequence

from torch.optim import Optimizer

from lightning_deepr.packages.messages import rank_zero_warn
from lightning_deepr.training.tracked import TrackedTensor


def warn_of_lost_decay(optimizer: Optimizer, matched: Sequence[tuple[TrackedTensor, int]], told: set[str]) -> None:
    """Warn if other groups of an optimizer decay, and those of converted weights do not.

    Args:
        optimizer: the optimizer.
        matched: its converted tensors, each with the index of its parameter group.
        told: what was said already.
    """
    decay = [float(group.get("weight_decay", 0) or 0) for group in optimizer.param_groups]
    names = [tensor.name for tensor, index in matched if decay[index] == 0]
    if not names or not any(decay):
        return
    shown = ", ".join(f"`{name}`" for name in names[:3]) + (", ..." if len(names) > 3 else "")
    line = (
        f"weight decay 0 on {len(names)} converted tensor{'s' * (len(names) > 1)} ({shown}), while other parameters of this "
        f"{type(optimizer).__name__} decay by {max(decay):g}: theta is a vector of K values, so a rule like `p.ndim >= 2` "
        "takes it for a bias, and the weights decay in the dense network. Use "
        f"`{type(optimizer).__name__}(lightning_deepr.decay_groups(model, weight_decay={max(decay):g}), ...)`."
    )
    if line not in told:
        told.add(line)
        rank_zero_warn(line)
