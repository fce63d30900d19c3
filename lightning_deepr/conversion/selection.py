"""Choose the tensors that become sparse."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_deepr.algorithm.units import Units
from lightning_deepr.conversion import connectivities
from lightning_deepr.conversion.barred import barrier, is_bias, refuse_barred, warn_of_lazy
from lightning_deepr.conversion.kinds import OTHER, Kind, kind_of
from lightning_deepr.conversion.tied import reason as tied_reason
from lightning_deepr.conversion.tied import tied_names
from lightning_deepr.weights.base import Parametrization
from lightning_deepr.weights.find import slots_of
from lightning_deepr.weights.names import join, paths_of

Connectivity = (
    Any  # float | int | "nonzero" | dict {pattern: float | int | "nonzero" | places}, see conversion/connectivities.py
)
Predicate = Callable[[str, nn.Module], bool]
Modules = str | Sequence[str] | Predicate
Shapes = dict[str, tuple[int, ...]]
Distribution = str | Callable[[Shapes, float], "Mapping[str, float] | Sequence[float]"]


_WHEN_NAMED = ("converted only when named", "name the tensor to convert it")  # ends of reasons to leave a tensor out


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
    aliases: tuple[str, ...] = ()  # its names on the other paths to its module
    by_own_name: bool = False  # only a pattern with the tensor's own name selects it, not its module's name
    barred: str = ""  # why it can't be converted at all
    is_whole: bool = False  # whether it stands for a tied tensor under all of its names (conversion/tied.py)

    @property
    def total(self) -> int:
        return math.prod(self.shape)

    @property
    def parameter(self) -> Tensor | None:
        return self.module._parameters.get(self.tensor_name)

    @property
    def kind(self) -> Kind:
        return kind_of(type(self.module))

    @property
    def units(self) -> Units:
        """Which output and input unit a place connects."""
        return self.kind.units(self.module, self.shape)


def candidates(root: nn.Module) -> list[Candidate]:
    """List every weight of two or more dimensions that is no bias, in the order of ``named_modules``.

    ``left_out`` is empty for a tensor that "all" takes. For the others, which only a name selects, it says why.
    """
    found: list[Candidate] = []
    tied = tied_names(root)
    metrics: list[str] = []
    known: dict[Parametrization, int] = {}
    for module, paths in paths_of(root).items():
        prefix = paths[0]
        if isinstance(module, (parametrize.ParametrizationList, Parametrization)):
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
            barred = "" if slots is not None else barrier(tensor_name, parameter)
            if not barred and (shape is None or len(shape) < 2):
                continue
            bias = is_bias(tensor_name)
            if bias and (kind is not OTHER or tensor_name == "bias") and not kind.takes(tensor_name):
                continue
            aside = not kind.takes(tensor_name) and (bias or (kind is not OTHER and "weight" not in tensor_name))
            reason = ""
            if slots is not None:
                pass  # the user converted it, so a callback takes it in any kind of layer
            elif barred:
                reason = barred
            elif metric:
                reason = "belongs to a torchmetrics.Metric"
            elif other:
                reason = "has another parametrization"
            elif aside:
                reason = f"{'a bias' if bias else 'no weight'} by its name: name the tensor itself to convert it"
            elif kind is OTHER:
                reason = f"{type(module).__name__} is not a known kind of layer: name the tensor to convert it"
            elif kind.only_when_named:
                reason = f"{type(module).__name__}: converted only when named"
            elif not kind.takes(tensor_name):
                # torch's old spectral_norm, weight_norm and prune leave `weight_orig`, `weight_v` and the like
                reason = f"no tensor of a plain {type(module).__name__}: name the tensor to convert it"
            elif parameter is not None and not parameter.requires_grad:
                reason = "requires_grad=False"
            name, *aliases = (join(path, tensor_name) for path in paths)
            if slots is not None and slots in known:  # a tied weight that was adapted: one tensor with several names
                first = known[slots]
                found[first] = replace(found[first], aliases=(*found[first].aliases, name, *aliases))
                continue
            if slots is not None:
                known[slots] = len(found)
            if not reason and parameter is not None and id(parameter) in tied:
                reason = tied_reason(tied[id(parameter)], name)
            found.append(
                Candidate(name, prefix, module, tensor_name, shape or (), slots, reason, tuple(aliases), aside, barred)
            )
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
    return _named(candidate, lambda name: fnmatchcase(name, pattern) or fnmatchcase(name, "*." + pattern))


_NOBODYS = "\0"  # a name that no tensor has


def _named(candidate: Candidate, fits: Callable[[str], object]) -> bool:
    """Tell whether a name of the candidate or of its module fits."""
    for name in (candidate.name, *candidate.aliases):
        owner = name.rpartition(".")[0]
        if not candidate.by_own_name:
            if fits(owner) or fits(name):
                return True
        elif fits(name) and not fits(owner) and not fits(join(owner, _NOBODYS)):  # "encoder.*" is not its own name
            return True
    return False


def names_of(pattern: str, name: str) -> bool:
    """Tell whether a pattern is a name or a suffix of it at a dot, with fnmatch."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, "*." + pattern)


def parents_of(candidate: Candidate) -> list[str]:
    """List the names of the modules that a candidate's module is in, the nearest first, on all paths to it."""
    found = []
    for name in (candidate.name, *candidate.aliases):
        parts = name.split(".")[:-1]
        found += [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
    return found


def covered(pattern: str, found: Sequence[Candidate], everything: bool = False) -> list[Candidate]:
    """List the tensors that a pattern covers: those that it names or, if it names none, those within a module that it names.

    Within a module it covers what "all" takes there. If this is nothing, it covers what is converted only when it is named
    (embeddings, unknown kinds of layers), since the module was named.

    Args:
        pattern: a suffix at a dot, with fnmatch.
        found: all candidates.
        everything: whether to cover all tensors of such a module, for ``exclude_modules``.
    """
    direct = [c for c in found if matches(pattern, c)]
    if direct:
        return direct
    within = [c for c in found if any(names_of(pattern, parent) for parent in parents_of(c))]
    if everything:
        return within
    return [c for c in within if not c.left_out] or [c for c in within if c.left_out.endswith(_WHEN_NAMED)]


def refuse_two_meanings(keys: Sequence[str], found: Sequence[Candidate], chosen: Sequence[Candidate]) -> None:
    """Refuse a key that names some tensors, and a parent of others that another key covers.

    Raises:
        ValueError: it is not clear which key the latter follow.
    """
    covers = {key: {c.name for c in covered(key, found)} for key in keys}
    for c in chosen:
        key = best_key(keys, c, "connectivity")
        if key is not None and c.name not in covers[key]:
            other = next(one for one in keys if c.name in covers[one])
            names = ", ".join(f"`{name}`" for name in sorted(covers[key])[:3])
            raise ValueError(
                f"connectivity: the key {key!r} names {names} and a parent of `{c.name}`, which {other!r} covers. Make "
                "one of them more specific."
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
    excluded = {c.name for c in _selected(exclude_modules, found, explicit=True)} if exclude_modules != () else set()
    if isinstance(connectivity, Mapping):
        refuse_unknown(list(connectivity), found, "connectivity")
        named = any(target_modules is word or target_modules == word for word in ("all", "all-linear"))
        chosen = _selected(list(connectivity), found)
        refuse_two_meanings(list(connectivity), found, chosen)
        if not named or target_modules == "all-linear":
            targets = {c.name for c in _selected(target_modules, found)}
            chosen = [c for c in chosen if c.name in targets]
    else:
        refuse_unknown(target_modules, found, "target_modules")
        if isinstance(target_modules, str) and target_modules in ("all", "all-linear"):
            warn_of_lazy(found)
        chosen = _selected(target_modules, found)
    chosen = [c for c in chosen if c.name not in excluded]
    refuse_barred(chosen, connectivity if isinstance(connectivity, Mapping) else target_modules, matches)
    chosen = [c for c in chosen if not c.barred]
    if chosen and connectivities.asks_for_nonzero(connectivity):
        chosen = connectivities.with_zeros(chosen, {c.name: connectivity_of(connectivity, c) for c in chosen})
    return chosen


def connectivity_of(connectivity: Any, candidate: Candidate) -> Any:
    """Find what a connectivity says of a tensor: a dict has a value for it, everything else holds for all tensors."""
    if not isinstance(connectivity, Mapping):
        return connectivity
    key = best_key(connectivity, candidate, "connectivity")
    return None if key is None else connectivity[key]


def _selected(modules: Modules, found: Sequence[Candidate], explicit: bool = False) -> list[Candidate]:
    """List the tensors that ``target_modules`` or ``exclude_modules`` (explicit) select, in their order."""
    if isinstance(modules, str) or callable(modules):
        return [c for c in found if _selects(modules, c, explicit)]
    names = {c.name for pattern in modules for c in covered(pattern, found, everything=explicit)}
    return [c for c in found if c.name in names]


def takes_what_is_usual(target_modules: Any, connectivity: Any) -> bool:
    """Whether the tensors are not named, but chosen by their kinds ("all", "all-linear")."""
    return isinstance(target_modules, str) and target_modules in ("all", "all-linear") and not isinstance(connectivity, Mapping)


def _selects(modules: str | Predicate, candidate: Candidate, explicit: bool = False) -> bool:
    if isinstance(modules, str):
        if modules == "all":
            return explicit or not candidate.left_out
        if modules == "all-linear":
            return candidate.kind.linear and (explicit or not candidate.left_out)
        expression = re.compile(modules)
        return _named(candidate, expression.fullmatch)
    return not candidate.by_own_name and bool(modules(candidate.module_name, candidate.module))


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
        if not (any(_selects(pattern, c) for c in found) if single else covered(pattern, found, everything=True)):
            names = sorted({c.module_name for c in found if c.module_name} | {c.name for c in found})
            kind = "the regular expression" if single else "the pattern"
            hint = (
                " (a single string is a regular expression for whole names; write a list to match by suffix)"
                if single and any(matches(pattern, c) for c in found)
                else ""
            )
            raise ValueError(
                f"{argument}: {kind} {pattern!r} matches no tensor{hint}. Expected the name of a layer with weights or of a "
                f"tensor in it; the nearest names are: {nearest(pattern, names)}."
            )


def nearest(pattern: str, names: Sequence[str]) -> str:
    """List the names that are most like a pattern, for a message."""
    near = difflib.get_close_matches(pattern, names, n=5, cutoff=0.3) or names[:8]
    return ", ".join(f"`{name}`" for name in near) if near else "none: the model has no weight to convert"


def best_key(keys: Iterable[str], candidate: Candidate, argument: str) -> str | None:
    """Find the key of a dict that applies to a tensor: the longest key that matches it, or else its nearest parent, or None.

    Raises:
        ValueError: two keys of the same length match.
    """
    known = list(keys)
    matching = [key for key in known if matches(key, candidate)]
    for parent in () if matching else parents_of(candidate):  # no key names it: the nearest parent that a key names
        matching = [key for key in known if names_of(key, parent)]
        if matching:
            break
    matching.sort(key=len, reverse=True)
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
