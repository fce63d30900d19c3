"""Call a function once per step of an optimizer, where the step really ends.

Usually that is torch's hook after the step. It is not enough in two cases:

- An optimizer that holds another one (Lookahead, SAM, ZeroRedundancyOptimizer) goes on after the inner step. Some of them never
  call hooks, since they do not call ``Optimizer.__init__``. A script may also step the inner one directly.
- A subclass whose ``step`` calls ``super().step()`` calls its hooks twice.

So all optimizers of the chain are hooked, and the call stack says whether a hook runs within another step of the chain. (A
counter would be wrong after an exception within a step.) An optimizer that calls no hooks gets a ``step`` of its own.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_deepr.training import guards

# the code of the function that torch puts around every ``step``; it calls the hooks
_HOOKED = Optimizer.profile_hook_step(lambda *args: None).__code__

Before = Callable[[Any, Any], None]  # called with the arguments of the step


class StepEnds:
    """The hooks on an optimizer and on all optimizers that it holds.

    Args:
        chain: the optimizers, the outermost first.
        needs_inner: whether a step of an inner optimizer moves all thetas, so that a step of the outer one without an inner
            one moved nothing (gradient accumulation, GradScaler).
        before: the functions to call just before a step.
        after: the function to call after it.
    """

    def __init__(self, chain: Sequence[Any], needs_inner: bool, before: Sequence[Before], after: Callable[[], None]) -> None:
        self._members = {id(one) for one in chain}
        self._inner = {id(one) for one in chain[1:]}
        self._after = after
        self._needs_inner, self._took = needs_inner, False
        self._undo: list[Callable[[], None]] = []
        self._may_nest = len(chain) > 1 or _steps_of_class(chain[0]) > 1
        self._before = tuple(before)
        # `torch.compile(optimizer.step)` must not trace the hooks: tracing changes the results of the rewiring
        begin, end = torch.compiler.disable(self._begin), torch.compiler.disable(self._end)
        for one in chain:
            if not _calls_hooks(one):
                self._undo.append(_wrap(one, self._begin, self._end))
                continue
            self._undo.append(one.register_step_post_hook(end).remove)
            if before or len(chain) > 1:
                self._undo.append(one.register_step_pre_hook(begin).remove)

    def remove(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    def _begin(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._may_nest and self._is_within_another(optimizer):
            return
        for function in self._before:
            function(args, kwargs)
        self._took = False

    def _end(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # a fused optimizer calls its hooks even if GradScaler made it skip the step
        if guards.was_skipped(optimizer):
            return
        if self._may_nest:
            if self._is_within_another(optimizer):
                self._took = self._took or id(optimizer) in self._inner
                return
            if self._needs_inner and id(optimizer) not in self._inner and not self._took:
                return
        self._after()

    def _is_within_another(self, optimizer: Any) -> bool:
        """Whether the step that calls a hook runs within a step of the chain: of another optimizer, or of a base class."""
        frame, own = sys._getframe(1), False
        while frame is not None:
            code = frame.f_code
            if code is _HOOKED or code is _WRAPPED:
                held = frame.f_locals
                who = held["args"][0] if code is _HOOKED else held["self"]
                if who is optimizer and not own:
                    own = True
                elif id(who) in self._members:
                    return True
            frame = frame.f_back  # type: ignore[assignment]
        return False


def _steps_of_class(optimizer: Any) -> int:
    """Count the classes of an optimizer that define a step."""
    return sum("step" in vars(kind) for kind in type(optimizer).__mro__ if kind is not Optimizer)


def _calls_hooks(optimizer: Any) -> bool:
    return getattr(type(optimizer).step, "hooked", False) and "_optimizer_step_post_hooks" in vars(optimizer)


def _wrapper(step: Any, begin: Any, end: Any, at_work: list[bool]) -> Any:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not at_work:
            return step(*args, **kwargs)
        begin(self, (self, *args), kwargs)
        result = step(*args, **kwargs)
        end(self, (self, *args), kwargs)
        return result

    return wrapped


_WRAPPED = _wrapper(None, None, None, []).__code__


def _wrap(optimizer: Any, begin: Any, end: Any) -> Callable[[], None]:
    """Give an optimizer that calls no hooks a step that does, and return a function that takes it away."""
    there, at_work = vars(optimizer).get("step"), [True]
    method = types.MethodType(_wrapper(optimizer.step, begin, end, at_work), optimizer)
    optimizer.step = method

    def undo() -> None:
        at_work.clear()  # a scheduler may have put its own function around this one
        if vars(optimizer).get("step") is method:
            if there is None:
                del optimizer.step
            else:
                optimizer.step = there

    return undo
