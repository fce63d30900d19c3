"""Choose the tensors that become sparse."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_deepr.conversion.kinds import OTHER, Kind, kind_of
from lightning_deepr.weights.base import Parametrization
from lightning_deepr.weights.find import plain_name, slots_of

Connectivity = float | int | Mapping[str, float | int]
Predicate = Callable[[str, nn.Module], bool]
Modules = str | Sequence[str] | Predicate
Shapes = dict[str, tuple[int, ...]]
Distribution = str | Callable[[Shapes, float], "Mapping[str, float] | Sequence[float]"]


@dataclass(frozen=True)
class Candidate:
    """A tensor that can become sparse, or is sparse already."""

    name: str
    module_name: str
    module: nn.Module
    tensor_name: str
    shape: tuple[int, ...]
    slots: Parametrization | None  # None: not converted
    left_out: str = ""  # why "all" leaves it out

    @property
    def total(self) -> int:
        return math.prod(self.shape)

    @property
    def parameter(self) -> Tensor | None:
        return self.module._parameters.get(self.tensor_name)

    @property
    def kind(self) -> Kind:
        return kind_of(type(self.module))


def candidates(root: nn.Module) -> list[Candidate]:
    """List every weight of two or more dimensions that is no bias, in the order of ``named_modules``.

    ``left_out`` is empty for a tensor that "all" takes. For the others, which only a name selects, it says why.
    """
    found = []
    metrics: list[str] = []
    for prefix, module in root.named_modules():
        if isinstance(module, (parametrize.ParametrizationList, nn.ParameterList, nn.ParameterDict)):
            continue
        if any(kind.__module__.split(".")[0] == "torchmetrics" for kind in type(module).__mro__):
            metrics.append(prefix)
        metric = any(prefix == owner or prefix.startswith(f"{owner}.") or not owner for owner in metrics)
        own: dict[str, Tensor | None] = dict(module._parameters)
        parametrized = parametrize.is_parametrized(module)
        if parametrized:
            for tensor_name in module.parametrizations:  # type: ignore[union-attr]
                own.setdefault(tensor_name, None)
        kind = kind_of(type(module))
        for tensor_name, parameter in own.items():
            slots = slots_of(module, tensor_name)
            other = parametrized and slots is None and tensor_name in module.parametrizations  # type: ignore[operator]
            shape = tuple(slots.shape) if slots else _parametrized_shape(module, tensor_name) if other else _shape(parameter)
            if shape is None or len(shape) < 2:
                continue
            if not kind.takes(tensor_name) and ("bias" in tensor_name or (kind is not OTHER and "weight" not in tensor_name)):
                continue
            reason = ""
            if slots is not None:
                pass  # the user converted it, so a callback takes it in any kind of layer
            elif metric:
                reason = "belongs to a torchmetrics.Metric"
            elif other:
                reason = "has another parametrization"
            elif kind is OTHER:
                reason = f"{type(module).__name__} is not a known kind of layer: name the tensor to convert it"
            elif kind.only_when_named:
                reason = f"{type(module).__name__}: converted only when named"
            elif not kind.takes(tensor_name):
                # torch's old spectral_norm, weight_norm and prune leave `weight_orig`, `weight_v` and the like
                reason = f"no tensor of a plain {type(module).__name__}: name the tensor to convert it"
            elif parameter is not None and not parameter.requires_grad:
                reason = "requires_grad=False"
            name = plain_name(prefix, tensor_name)
            found.append(Candidate(name, name.rpartition(".")[0], module, tensor_name, shape, slots, reason))
    # A converted tensor is no longer in _parameters: its index, not this list, keeps its order within the module.
    return found


def _parametrized_shape(module: nn.Module, tensor_name: str) -> tuple[int, ...] | None:
    # Reading the tensor itself would make a spectral_norm take a step.
    originals = list(module.parametrizations[tensor_name].parameters(recurse=False))  # type: ignore[index, union-attr]
    return _shape(max(originals, key=Tensor.numel)) if originals else None


def _shape(parameter: Tensor | None) -> tuple[int, ...] | None:
    if parameter is None or is_lazy(parameter) or not parameter.is_floating_point():
        return None
    return tuple(parameter.shape)


# -- patterns ---------------------------------------------------------------------------------------------------------------


def matches(pattern: str, candidate: Candidate) -> bool:
    """Tell whether a pattern names the candidate's module or the candidate itself: a suffix at a dot, with fnmatch."""
    return any(
        fnmatchcase(name, pattern) or fnmatchcase(name, "*." + pattern) for name in (candidate.module_name, candidate.name)
    )


def select(
    found: Sequence[Candidate],
    target_modules: Modules,
    exclude_modules: Modules = (),
    connectivity: Connectivity | None = None,
) -> list[Candidate]:
    """Select the tensors that the arguments ask for, including converted ones.

    Raises:
        ValueError: a pattern matches nothing (the message lists the nearest names).
        TypeError: an argument has none of the accepted forms.
    """
    check_modules(target_modules, "target_modules")
    check_modules(exclude_modules, "exclude_modules")
    refuse_unknown(exclude_modules, found, "exclude_modules")
    excluded = {c.name for c in found if exclude_modules != () and _selects(exclude_modules, c, explicit=True)}
    if isinstance(connectivity, Mapping):
        refuse_unknown(list(connectivity), found, "connectivity")
        named = any(target_modules is word or target_modules == word for word in ("all", "all-linear"))
        chosen = [c for c in found if any(matches(key, c) for key in connectivity)]
        if not named or target_modules == "all-linear":
            chosen = [c for c in chosen if _selects(target_modules, c)]
    else:
        refuse_unknown(target_modules, found, "target_modules")
        chosen = [c for c in found if _selects(target_modules, c)]
    return [c for c in chosen if c.name not in excluded]


def _selects(modules: Modules, candidate: Candidate, explicit: bool = False) -> bool:
    if isinstance(modules, str):
        if modules == "all":
            return explicit or not candidate.left_out
        if modules == "all-linear":
            return candidate.kind.linear and (explicit or not candidate.left_out)
        return any(re.fullmatch(modules, name) for name in (candidate.module_name, candidate.name))
    if callable(modules):
        return bool(modules(candidate.module_name, candidate.module))
    return any(matches(pattern, candidate) for pattern in modules)


def check_modules(modules: Any, argument: str) -> None:
    """Validate ``target_modules`` or ``exclude_modules``.

    Raises:
        TypeError, ValueError: the message says what was expected and what was found.
    """
    if callable(modules):
        return
    if isinstance(modules, str):
        try:
            re.compile(modules)
        except re.error as error:
            raise ValueError(
                f"{argument}: {modules!r} is no regular expression ({error}). A list matches by suffix."
            ) from error
    elif not isinstance(modules, (Sequence, Set)) or not all(isinstance(pattern, str) for pattern in modules):
        raise TypeError(
            f'{argument}: expected "all", "all-linear", a list of names, a regular expression or a predicate(name, module), '
            f"found {modules!r}."
        )


def refuse_unknown(modules: Modules, found: Sequence[Candidate], argument: str) -> None:
    """Refuse a pattern that matches nothing; the message lists the nearest names."""
    if callable(modules) or (isinstance(modules, str) and modules in ("all", "all-linear")):
        return
    single = isinstance(modules, str)
    for pattern in [modules] if isinstance(modules, str) else modules:
        if not any(_selects(pattern, c) if single else matches(pattern, c) for c in found):
            names = sorted({c.module_name for c in found if c.module_name} | {c.name for c in found})
            near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3) or names[:8]
            kind = "the regular expression" if single else "the pattern"
            hint = (
                " (a single string is a regular expression for whole names; write a list to match by suffix)"
                if single and any(matches(pattern, c) for c in found)
                else ""
            )
            listed = ", ".join(f"`{name}`" for name in near) if near else "none: the model has no weight to convert"
            raise ValueError(
                f"{argument}: {kind} {pattern!r} matches no tensor{hint}. Expected the name of a layer with weights or of a "
                f"tensor in it; the nearest names are: {listed}."
            )


def best_key(keys: Iterable[str], candidate: Candidate, argument: str) -> str | None:
    """Find the key of a dict that applies to a tensor: the longest key that matches, or None.

    Raises:
        ValueError: two keys of the same length match.
    """
    matching = sorted((key for key in keys if matches(key, candidate)), key=len, reverse=True)
    if len(matching) > 1 and len(matching[0]) == len(matching[1]):
        raise ValueError(
            f"{argument}: the keys {matching[0]!r} and {matching[1]!r} both match `{candidate.name}` and are equally long. "
            "Make one of them more specific."
        )
    return matching[0] if matching else None


def entry_for(argument: str, value: Any, candidate: Candidate) -> Any:
    """Find the entry of ``l1``, ``temperature`` or ``lr_scale`` for a tensor. In a dict the longest matching key holds.

    Raises:
        ValueError: a dict has no key for the tensor.
    """
    if not isinstance(value, Mapping):
        return value
    key = best_key(value, candidate, argument)
    if key is None:
        none = 1.0 if argument == "lr_scale" else 0.0
        raise ValueError(
            f"{argument}: no key matches `{candidate.name}`; found {sorted(value)}. Add a key for it ({none} for none)."
        )
    return value[key]
