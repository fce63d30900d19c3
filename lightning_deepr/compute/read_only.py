"""What ``layer.weight`` of a converted layer returns to user code: the dense-shaped weight, which refuses writes.

The weight is built from the connections at each read, so a write to it would be lost. torch's own layers read the plain tensor:
they compute and don't write, and run as fast as before.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_deepr.compute.eager import dispatch_modes, is_recorded, transforms

# frames between a reader of `layer.weight` and the parametrization
_BETWEEN = frozenset({"torch.nn.utils.parametrize", "torch.nn.modules.module"})
_READERS = ("torch.nn.modules.", "lightning_deepr.")
_OPERATORS = frozenset(
    f"__{name}__"
    for name in (
        "setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "idiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift",
        "irshift", "set",
    )
)  # fmt: skip


class Refusing(Protocol):
    """A converted weight that can say why it can't be written to."""

    keeps_no_writes: bool  # False: the weight is a view of theta, and only what replaces its memory is lost

    def lost_write(self, operation: str) -> str: ...


class ReadOnlyWeight(torch.Tensor):
    """A tensor that computes like any other and refuses in-place operations, also through its views.

    ``clone()`` returns an ordinary tensor.
    """

    refuses_writes = True
    _slots: Refusing

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        refuse_write(func, args, kwargs)
        if func is Tensor.__deepcopy__ or func is Tensor.__reduce_ex__:
            return func(args[0].as_subclass(Tensor), *args[1:])
        if any(one is not cls for one in types):  # another subclass, for example a SparseWeight, has its own way
            args, kwargs = tree_map(_plain, (args, kwargs))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
            if isinstance(found, (bool, int, float, str, torch.Size)) or func is Tensor.as_subclass:
                return found
            mine = _first((*args, *kwargs.values()))
            return found if mine is None else tree_map(lambda one: _view(one, mine), found)

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(self._slots.lost_write("set_"))  # torch does not ask __torch_function__


def guard(weight: Tensor, slots: Refusing) -> Tensor:
    """Let a weight that was built refuse writes, unless torch itself, a tracer or a transform reads it."""
    if type(weight) is not Tensor or dispatch_modes() != 0 or transforms() is not None or is_recorded():
        return weight
    return weight if _torch_reads() else refusing(weight, slots)


def refusing(weight: Tensor, slots: Refusing) -> ReadOnlyWeight:
    """Let a weight refuse writes, whoever reads it."""
    found = weight.as_subclass(ReadOnlyWeight)
    found._slots = slots
    return found


def _torch_reads() -> bool:
    """Whether a module of torch or of this package reads the weight in order to compute. It takes half a microsecond."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name not in _BETWEEN and not name.startswith("lightning_deepr.weights."):
            return name.startswith(_READERS) and "reset_parameters" not in frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
    return False


def refuse_write(func: Any, args: Any, kwargs: Any) -> None:
    """Refuse an operation that writes to a converted weight.

    Args:
        func: what ``__torch_function__`` receives.
        args, kwargs: its arguments.

    Raises:
        RuntimeError: the operation writes; the message names the weight and says what to do.
    """
    out = kwargs.get("out")
    written = _first(out if isinstance(out, (list, tuple)) else (out,)) if out is not None else None
    name = getattr(func, "__name__", "")
    if written is None and (name in _OPERATORS or (name.endswith("_") and not name.endswith("__"))):
        target = args[0] if args else next(iter(kwargs.values()), None)
        written = _first(target if isinstance(target, (list, tuple)) else (target,))
    if written is None or not (written._slots.keeps_no_writes or name in ("__set__", "set_", "requires_grad_")):
        return
    if name == "__set__":
        owner = getattr(func, "__self__", None)
        name = f".{getattr(owner, '__name__', 'an attribute')} ="
    raise RuntimeError(written._slots.lost_write(name))


def _plain(value: Any) -> Any:
    return value.as_subclass(Tensor) if type(value) is ReadOnlyWeight else value


def _first(values: Any) -> Any:
    """Return the first converted weight among some values."""
    for value in values:
        if isinstance(value, Tensor) and getattr(type(value), "refuses_writes", False):
            return value
        if isinstance(value, (list, tuple)):
            for one in value:
                if isinstance(one, Tensor) and getattr(type(one), "refuses_writes", False):
                    return one
    return None


def _view(found: Any, weight: Any) -> Any:
    """Let what shares the weight's memory refuse writes, too."""
    if type(found) is np.ndarray:
        if found.size and np.shares_memory(found, weight.detach().as_subclass(Tensor).numpy()):
            found.flags.writeable = False
        return found
    if type(found) is not Tensor or found.layout is not torch.strided:
        return found
    if _inside(found).untyped_storage().data_ptr() != _inside(weight).untyped_storage().data_ptr() or found.numel() == 0:
        return found
    return refusing(found, weight._slots)


def _inside(value: Tensor) -> Tensor:
    """Return the tensor with memory within those that ``torch.func`` wraps around it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value
