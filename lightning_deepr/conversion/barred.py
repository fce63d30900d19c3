"""Tensors that can't be converted at all, and tensors whose names say that they are no weights."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

LAZY = "lazy, without a shape before its first forward pass (run one batch through the network before the conversion)"
COMPLEX = "complex, and a connection has a real magnitude and a constant sign"
EMPTY = "empty: one of its sizes is 0, so it has no place for a connection"
SHARDED = "sharded over ranks (a DTensor): convert a layer first, and shard what is around it then (docs/distributed.md)"
_WILD = re.compile(r"[*?\[]")


def barrier(tensor_name: str, parameter: Tensor | None) -> str:
    """Say what keeps a parameter from being converted at all, as the end of "it is"; "" if nothing does, or if it is a bias."""
    if parameter is None or is_bias(tensor_name):
        return ""
    if is_lazy(parameter):
        return LAZY
    if parameter.dim() < 2:
        return ""
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is not None and isinstance(parameter, tensor.DTensor):
        return SHARDED
    return COMPLEX if parameter.is_complex() else "" if parameter.numel() else EMPTY


def is_bias(tensor_name: str) -> bool:
    """Tell whether a tensor is a bias by its name: one of the words in it is "bias".

    Example::

        >>> [name for name in ("bias", "bias_k", "in_proj_bias", "unbiased", "debias1") if is_bias(name)]
        ['bias', 'bias_k', 'in_proj_bias']
    """
    return not {"bias", "biases"}.isdisjoint(re.split(r"[^a-z]+", tensor_name.lower()))


def refuse_barred(chosen: Sequence[Any], patterns: Any, matches: Callable[[str, Any], bool]) -> None:
    """Refuse a tensor that can't be converted, if the user names it; a wildcard or a rule passes over it.

    Args:
        chosen: the tensors that the arguments select.
        patterns: ``target_modules``, or the dict of ``connectivity``.
        matches: a function that tells whether a pattern names a tensor.

    Raises:
        ValueError: the user names such a tensor, or asks for nothing else.
    """
    barred = [one for one in chosen if one.barred]
    if barred and len(barred) < len(chosen):
        plain = [] if isinstance(patterns, str) or callable(patterns) else _without_wildcards(patterns)
        barred = [one for one in barred if any(matches(pattern, one) for pattern in plain)]
    if barred:
        raise ValueError(f"`{barred[0].name}` can't be converted: it is {barred[0].barred}. Leave it out with exclude_modules.")


def warn_of_lazy(found: Sequence[Any]) -> None:
    """Warn that layers stay dense because they are still without a shape."""
    names = [one.name for one in found if one.barred == LAZY]
    if names:
        listed = ", ".join(f"`{name}`" for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(f"{listed} stay dense: they are {LAZY}.", stacklevel=4)


def _without_wildcards(patterns: Iterable[str]) -> list[str]:
    return [pattern for pattern in patterns if not _WILD.search(pattern)]
