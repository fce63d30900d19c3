"""Refuse optimizers that average weights where rewiring can't follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def refuse_averaging_optimizers(chain: Sequence[Any], method: str) -> None:
    """Refuse optimizers whose averages stand for theta, or mix the thetas of ranks with different connections.

    Args:
        chain: the optimizer and those that it holds.
        method: the name of the callback's class.

    Raises:
        ValueError: the message names the optimizer.
    """
    for one in chain:
        name = type(one).__name__
        if getattr(one, "_overlap_with_ddp", False):
            raise ValueError(
                f"{name}(overlap_with_ddp=True) steps within the backward pass, where nothing can be rewired. {method} expects "
                "a step after it: leave overlap_with_ddp out."
            )
        if is_schedule_free(one):
            raise ValueError(
                f"{name} puts an average of theta in theta's place for evaluation, and the average may be below 0: a "
                f"connection would have the wrong sign. {method} expects an optimizer that only steps: use the plain "
                "optimizer with a schedule of the learning rate, or with WeightAveraging, whose averages follow the rewiring."
            )
        averager = _averager_of(one)
        if averager is not None:
            raise ValueError(
                f"{name} averages the weights of ranks that step apart ({averager}). Their connections differ then, and the "
                f"average would mix different places. {method} expects gradients that are averaged in every step: use "
                "DistributedDataParallel with the plain optimizer."
            )


def is_schedule_free(optimizer: Any) -> bool:
    """Whether an optimizer has a mode for training and one for evaluation, in which theta is an average."""
    if not (callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))):
        return False
    return "train_mode" in vars(optimizer) or any("train_mode" in group for group in optimizer.param_groups)


def _averager_of(optimizer: Any) -> str | None:
    for value in vars(optimizer).values():
        if any(kind.__module__.startswith("torch.distributed.algorithms.model_averaging") for kind in type(value).__mro__):
            return type(value).__name__
    return None
