"""How many optimizer steps a Trainer's training has, and what to say where nobody knows."""

from __future__ import annotations

import math
from typing import Any

from lightning_deepr.packages.names import is_a


def total_steps(trainer: Any) -> float | None:
    """Count the optimizer steps of the whole training, also of a part that lies before a resume.

    The accumulation may change with the epoch (``GradientAccumulationScheduler``), or on a resume: then the steps that were
    taken count as they were, and those to come as they will be. A Trainer's ``estimated_stepping_batches`` knows neither.

    Args:
        trainer: a Trainer in ``on_train_start`` or later.

    Returns:
        the number of steps; None: data without a length, or a training without an end.
    """
    estimate = trainer.estimated_stepping_batches  # loads the data, if need be
    batches, epochs, longest = trainer.num_training_batches, trainer.max_epochs, trainer.max_steps
    known = math.isfinite(estimate) and estimate > 0
    if not known or epochs in (None, -1) or not math.isfinite(batches) or not _is_automatic(trainer):
        return float(estimate) if known else None
    per_epoch = [math.ceil(batches / _accumulation(trainer, epoch)) for epoch in range(max(epochs, 1))]
    total, taken, epoch = sum(per_epoch), trainer.global_step, trainer.current_epoch
    before = sum(per_epoch[:epoch])
    within = per_epoch[epoch] if epoch < len(per_epoch) else 0
    if not before <= taken <= before + within:  # the steps so far were not taken in this way
        total += taken - before
    return float(total if longest == -1 else min(total, longest))


def _is_automatic(trainer: Any) -> bool:
    module = trainer.lightning_module
    return module is None or module.automatic_optimization


def _accumulation(trainer: Any, epoch: int) -> int:
    """Return the number of batches per step in an epoch."""
    for callback in trainer.callbacks:
        if is_a(callback, "callbacks.gradient_accumulation_scheduler", "GradientAccumulationScheduler"):
            return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def advice(trainer: Any) -> str:
    """Say how to give a training a length that is not known."""
    if not math.isfinite(trainer.num_training_batches) and trainer.max_epochs != -1:
        return (
            "The training data has no length (an iterable dataset without `__len__`): give the Trainer max_steps, or "
            "limit_train_batches as a number of batches."
        )
    if time_limit(trainer) is not None:
        return "max_time does not say how many steps there will be: give the Trainer max_steps or max_epochs, too."
    return "Give the Trainer max_epochs or max_steps."


def time_limit(trainer: Any) -> float | None:
    """Return the seconds after which a ``Timer`` (``max_time``) stops the training, or None."""
    for callback in trainer.callbacks:
        if is_a(callback, "callbacks.timer", "Timer"):
            return callback._duration
    return None


def change(before: float | None, now: float | None, done: int) -> str | None:
    """Say that a training goes on with another length than it had, or None.

    Args:
        before: the number of steps that the checkpoint's training was to have; None: not known.
        now: the number of steps that it has now.
        done: the number of steps that were taken.
    """
    if before == now or before is None:
        return None
    if now is None:
        return f"the training was to have {before:g} steps, now its length is not known"
    gone = "" if done < now else ", which are done already: schedules are at their end"
    return f"goes on with {now:g} steps in all (in the checkpoint: {before:g}) at step {done}{gone}"
