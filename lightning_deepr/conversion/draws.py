"""Which number a converted tensor draws by. Every draw is a function of (seed, step, this number, slot).

A first conversion numbers its tensors 0, 1, 2, ... in their order. A module that was dense in between goes on with numbers that
it has not used, so that a second conversion with the same seed gets other places, signs and births than the first.
"""

from __future__ import annotations

import weakref

from torch import nn

from lightning_deepr.weights.find import Converted, converted_tensors

_used: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def note_used(converted: Converted) -> None:
    """Remember, before a tensor becomes dense, that its module has drawn by its number."""
    if converted.slots.is_block:
        return
    _used[converted.module] = max(converted.slots.index, _used.get(converted.module, -1))


def first_unused(root: nn.Module) -> int:
    """Return the first number after all by which the tensors of a network draw or have drawn."""
    # (blocks have numbers of their own: this one must not depend on which of them are on this rank)
    drawing = (converted.slots.index for converted in converted_tensors(root) if not converted.slots.is_block)
    drawn = (_used[module] for module in root.modules() if module in _used)
    return 1 + max((*drawing, *drawn), default=-1)
