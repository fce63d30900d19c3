"""Which optimizers have really stepped: Fabric's callbacks are called also when GradScaler has skipped the step.

torch's hooks on all optimizers know. They are registered once and stay: removing one while an optimizer goes through them, as the
end of a callback's life would do at any moment, is an error in torch.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_listeners: weakref.WeakSet[Any] = weakref.WeakSet()
_registered: list[Any] = []


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for callback in _listeners:
        callback.before_step_under_fabric(optimizer, args, kwargs)


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for callback in _listeners:
        callback.after_step_under_fabric(optimizer)


def listen(callback: Any) -> None:
    """Tell a callback, as long as it lives, before and after each step of any optimizer."""
    _listeners.add(callback)
    if not _registered:
        # (a compiled step does not trace them)
        _registered.append(register_optimizer_step_pre_hook(torch.compiler.disable(_before)))
        _registered.append(register_optimizer_step_post_hook(torch.compiler.disable(_after)))
