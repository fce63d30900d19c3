"""Is a layer exactly what its class says? Only then can its computation be read from its class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules import module as modules
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from lightning_deepr.weights.base import Parametrization
from lightning_deepr.weights.find import stacked_upon

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_CALLS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__")


def foreign(part: nn.Module, plain: tuple[type[nn.Module], ...]) -> str:
    """Say what a layer computes beside what its class computes; "" if nothing.

    Args:
        part: the layer.
        plain: the classes that are known. A subclass that only constructs its layer in another way is known, too.

    Returns:
        the end of a sentence that begins with the layer's name.
    """
    kind = type_before_parametrizations(part)
    base = next((one for one in kind.__mro__ if one in plain), None)
    if base is None:
        return f"is a {kind.__name__}"
    changed = [name for name in _CALLS if getattr(kind, name, None) is not getattr(base, name, None)]
    changed += [name for name in ("weight", "bias", "in_features", "out_features") if hasattr(kind, name) and kind is not base]
    changed += [name for name in _CALLS if name in vars(part)]
    if changed:
        return f"is a {kind.__name__} with a `{changed[0]}` of its own"
    hooks = hooks_of(part)
    if hooks:
        return hooks
    for name, holder in part.parametrizations.items() if is_parametrized(part) else ():  # type: ignore[union-attr, operator]
        others = [*([] if isinstance(holder[0], Parametrization) else [holder[0]]), *stacked_upon(holder)]
        if others:
            return f"has another parametrization upon `{name}` ({type(others[0]).__name__})"
    parameters = {"weight", "bias"} if base is nn.Linear else set()
    extra = [
        name for name in (*part._parameters, *part._buffers, *part._modules) if name not in {*parameters, "parametrizations"}
    ]
    return f"has a `{extra[0]}` of its own" if extra else ""


def hooks_of(part: nn.Module) -> str:
    """Say which hook changes what a module computes, or may do so; "" if there is none."""
    for kind in _HOOKS:
        for hook in getattr(part, kind).values():
            return f"has a forward hook ({getattr(hook, '__name__', type(hook).__name__)})"
    for hook in (*modules._global_forward_hooks.values(), *modules._global_forward_pre_hooks.values()):
        return f"is under a forward hook of all modules ({getattr(hook, '__name__', type(hook).__name__)})"
    return ""


def called_otherwise(part: nn.Module) -> str:
    """Say whether calling a module does something else than its class's ``forward``, which is what a tracer follows."""
    kind = type_before_parametrizations(part)
    changed = [name for name in ("__call__", "_call_impl") if getattr(kind, name) is not getattr(nn.Module, name)]
    changed += [name for name in ("forward", "_call_impl") if name in vars(part)]
    return f"has a `{changed[0]}` of its own" if changed else ""


@contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and put each of its parts back afterwards."""
    before = {part: part.training for part in root.modules()}
    root.eval()
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training
