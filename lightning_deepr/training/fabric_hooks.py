"""Find out which optimizers really stepped. Fabric calls its callbacks even if GradScaler skipped the step.

torch's global optimizer hooks run only if ``optimizer.step`` ran; ``guards.was_skipped`` covers a fused optimizer, which skips
a step by itself. The hooks are registered once and stay registered: torch raises an error if a hook is removed while an
optimizer iterates over the hooks, and a callback can be deleted at any moment.
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
    """Call a callback before and after each step of any optimizer, as long as the callback exists."""
    _listeners.add(callback)
    if not _registered:
        # `torch.compile(optimizer.step)` must not trace them, see Stepper._wire
        _registered.append(register_optimizer_step_pre_hook(torch.compiler.disable(_before)))
        _registered.append(register_optimizer_step_post_hook(torch.compiler.disable(_after)))
