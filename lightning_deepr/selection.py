"""Which tensors become sparse, and how many connections each of them gets."""

from __future__ import annotations

import difflib
import math
import numbers
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_deepr.connections import plain_name, slots_of
from lightning_deepr.parametrization import Parametrization

Connectivity = float | int | Mapping[str, float | int]
Predicate = Callable[[str, nn.Module], bool]
Modules = str | Sequence[str] | Predicate
Shapes = dict[str, tuple[int, ...]]
Distribution = str | Callable[[Shapes, float], "Mapping[str, float] | Sequence[float]"]

DISTRIBUTIONS = ("erdos_renyi", "erk", "uniform", "deepr")
DEEPR_FACTORS = (0.75, 2.3, 22.8)  # appendix A of the paper, as carried by later work: LeNet-300-100's three layers

_KINDS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Embedding,
    nn.EmbeddingBag,
)
_ONLY_WHEN_NAMED = (nn.Embedding, nn.EmbeddingBag)
_WEIGHTS = re.compile(r"weight|weight_(ih|hh|hr)(_l\d+(_reverse)?)?|(in|[qkv])_proj_weight")


@dataclass(frozen=True)
class Candidate:
    """A tensor that could be sparse, or already is."""

    name: str
    module_name: str
    module: nn.Module
    tensor_name: str
    shape: tuple[int, ...]
    slots: Parametrization | None  # set where it is converted
    left_out: str = ""  # why "all" leaves it out

    @property
    def total(self) -> int:
        return math.prod(self.shape)

    @property
    def parameter(self) -> Tensor | None:
        return self.module._parameters.get(self.tensor_name)


def candidates(root: nn.Module) -> list[Candidate]:
    """Every weight of two or more dimensions that is no bias, in the order of ``named_modules``.

    Layers of the kinds that "all" takes come with an empty ``left_out``; what only a name can select says why.
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
        known = isinstance(module, _KINDS)
        for tensor_name, parameter in own.items():
            slots = slots_of(module, tensor_name)
            other = parametrized and slots is None and tensor_name in module.parametrizations  # type: ignore[operator]
            shape = tuple(slots.shape) if slots else _parametrized_shape(module, tensor_name) if other else _shape(parameter)
            if shape is None or len(shape) < 2 or "bias" in tensor_name or (known and "weight" not in tensor_name):
                continue
            reason = ""
            if slots is not None:
                pass  # converted already, so somebody wanted it: a callback takes it as it is
            elif metric:
                reason = "belongs to a torchmetrics.Metric"
            elif other:
                reason = "has another parametrization"
            elif not known:
                reason = f"{type(module).__name__} is no kind that is known: name the tensor to convert it"
            elif isinstance(module, _ONLY_WHEN_NAMED):
                reason = f"{type(module).__name__}: converted only when named"
            elif not _WEIGHTS.fullmatch(tensor_name):
                # the old spectral_norm, weight_norm and prune leave `weight_orig`, `weight_v` and the like
                reason = f"no tensor of a plain {type(module).__name__}: name the tensor to convert it"
            elif parameter is not None and not parameter.requires_grad:
                reason = "requires_grad=False"
            name = plain_name(prefix, tensor_name)
            found.append(Candidate(name, name.rpartition(".")[0], module, tensor_name, shape, slots, reason))
    # conversion takes a tensor out of _parameters, so that its order within a module is kept by the index
    return found


def _parametrized_shape(module: nn.Module, tensor_name: str) -> tuple[int, ...] | None:
    # (reading the tensor itself would let a spectral_norm take a step)
    originals = list(module.parametrizations[tensor_name].parameters(recurse=False))  # type: ignore[index, union-attr]
    return _shape(max(originals, key=Tensor.numel)) if originals else None


def _shape(parameter: Tensor | None) -> tuple[int, ...] | None:
    if parameter is None or is_lazy(parameter) or not parameter.is_floating_point():
        return None
    return tuple(parameter.shape)


# -- patterns ---------------------------------------------------------------------------------------------------------------


def matches(pattern: str, candidate: Candidate) -> bool:
    """Whether a pattern names the candidate's module or the candidate itself: a suffix at a dot, with fnmatch."""
    return any(
        fnmatchcase(name, pattern) or fnmatchcase(name, "*." + pattern) for name in (candidate.module_name, candidate.name)
    )


def select(
    found: Sequence[Candidate],
    target_modules: Modules,
    exclude_modules: Modules = (),
    connectivity: Connectivity | None = None,
) -> list[Candidate]:
    """The tensors that the arguments ask for, converted ones included.

    Raises:
        ValueError: a pattern that matches nothing (the message lists the nearest names).
        TypeError: no form of naming modules.
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
            return isinstance(candidate.module, nn.Linear) and (explicit or not candidate.left_out)
        return any(re.fullmatch(modules, name) for name in (candidate.module_name, candidate.name))
    if callable(modules):
        return bool(modules(candidate.module_name, candidate.module))
    return any(matches(pattern, candidate) for pattern in modules)


def check_modules(modules: Any, argument: str) -> None:
    """Validate ``target_modules`` or ``exclude_modules``.

    Raises:
        TypeError, ValueError: says what was expected and what was found.
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
    """The key of a dict that holds for a tensor: the longest that matches.

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


# -- counts -----------------------------------------------------------------------------------------------------------------


def check_connectivity(connectivity: Any, where: str = "connectivity") -> None:
    """Validate a connectivity: a float in (0, 1], an int of at least 1, or a dict of those.

    Raises:
        TypeError, ValueError: says what was expected and what was found.
    """
    if isinstance(connectivity, Mapping):
        if not connectivity:
            raise ValueError(f"{where}: expected at least one pattern, found an empty dict.")
        for pattern, value in connectivity.items():
            check_connectivity(value, f"{where}[{pattern!r}]")
    elif isinstance(connectivity, bool) or not isinstance(connectivity, numbers.Real):
        raise TypeError(f"{where}: expected a float in (0, 1], an int or a dict, found {connectivity!r}.")
    elif isinstance(connectivity, numbers.Integral):
        if connectivity < 1:
            raise ValueError(f"{where}: expected at least 1 connection, found {connectivity}.")
        if connectivity == 1:
            warnings.warn(f"{where} = 1 is an int and means one single connection; write 1.0 for all of them.", stacklevel=3)
    elif not 0.0 < float(connectivity) <= 1.0:  # also NaN
        raise ValueError(f"{where}: expected a fraction in (0, 1], found {connectivity}. An int is a number of connections.")


def allocate(chosen: Sequence[Candidate], connectivity: Connectivity, distribution: Distribution) -> dict[str, int]:
    """K of each tensor.

    A float gives ``uniform`` and ``deepr`` K_l = round(f_l * c * N_l), at least 1 and at most N_l; ``erdos_renyi`` and ``erk``
    share out round(c * N). An int is the total, by largest remainder. A dict has a value per tensor.

    Args:
        chosen: the tensors, in order.
        connectivity: float in (0, 1] | int | dict {pattern: float | int}.
        distribution: "erdos_renyi" (Mocanu et al. 2018) | "erk" (Evci et al. 2020) | "uniform" | "deepr" (the paper, appendix
            A: 0.75, 2.3 and 22.8 times c for three layers) | a function of ({name: shape}, density) that returns a density
            for each tensor.

    Raises:
        ValueError: the connectivity does not fit the tensors.

    Example::

        >>> from lightning_deepr.models import LeNet300100
        >>> found = candidates(LeNet300100())
        >>> allocate(found, 0.01, "deepr")
        {'fc1.weight': 1764, 'fc2.weight': 690, 'fc3.weight': 228}
        >>> sum(allocate(found, 2662, "uniform").values())
        2662
    """
    if isinstance(connectivity, Mapping):
        return _allocate_by_key(chosen, connectivity)
    totals = [c.total for c in chosen]
    everything = sum(totals)
    if isinstance(connectivity, numbers.Integral):
        budget: int | None = int(connectivity)
        density = int(connectivity) / everything
        if int(connectivity) > everything:
            raise ValueError(
                f"connectivity = {connectivity} connections, but the {len(chosen)} chosen tensors have only {everything}. "
                "Give at most that many, or a fraction."
            )
    else:
        budget, density = None, float(connectivity)
    if callable(distribution) or distribution in ("uniform", "deepr"):
        densities = _densities(chosen, density, distribution)
        if budget is None:
            return {c.name: min(max(round(d * c.total), 1), c.total) for c, d in zip(chosen, densities, strict=True)}
        weights = [d * n for d, n in zip(densities, totals, strict=True)]
    elif distribution in ("erdos_renyi", "erk"):
        if budget is None:
            budget = round(density * everything)
        # K_l / N_l in proportion to (in + out) / (in * out), the kernel's sizes left out, or (erk) put in
        weights = []
        for candidate in chosen:
            sizes = candidate.shape[:2] if distribution == "erdos_renyi" else candidate.shape
            weights.append(sum(sizes) / math.prod(sizes) * candidate.total)
    else:
        raise ValueError(f"distribution: expected one of {', '.join(DISTRIBUTIONS)} or a function, found {distribution!r}.")
    counts = share_out(budget, weights, totals, f"connectivity = {connectivity}")
    return {c.name: k for c, k in zip(chosen, counts, strict=True)}


def _densities(chosen: Sequence[Candidate], density: float, distribution: Distribution) -> list[float]:
    if distribution == "uniform":
        return [density] * len(chosen)
    if distribution == "deepr":
        if len(chosen) != len(DEEPR_FACTORS):
            raise ValueError(
                f'distribution="deepr" is the paper\'s for {len(DEEPR_FACTORS)} layers (0.75, 2.3 and 22.8 times the '
                f'connectivity), found {len(chosen)}: {", ".join(c.name for c in chosen)}. Use "erdos_renyi", or a dict.'
            )
        return [factor * density for factor in DEEPR_FACTORS]
    assert callable(distribution)
    given = distribution({c.name: c.shape for c in chosen}, density)
    if isinstance(given, Mapping):
        if set(given) != {c.name for c in chosen}:
            raise ValueError(f"distribution: expected a density for each of {[c.name for c in chosen]}, found {sorted(given)}.")
        given = [given[c.name] for c in chosen]
    densities = [float(d) for d in given]
    if len(densities) != len(chosen) or not all(0.0 < d <= 1.0 for d in densities):
        raise ValueError(f"distribution: expected {len(chosen)} densities in (0, 1], found {densities}.")
    return densities


def _allocate_by_key(chosen: Sequence[Candidate], connectivity: Mapping[str, float | int]) -> dict[str, int]:
    keys = {c.name: best_key(connectivity, c, "connectivity") for c in chosen}
    counts: dict[str, int] = {}
    for key, value in connectivity.items():
        mine = [c for c in chosen if keys[c.name] == key]
        totals = [c.total for c in mine]
        if isinstance(value, numbers.Integral) and mine:
            if int(value) > sum(totals):
                raise ValueError(
                    f"connectivity[{key!r}] = {value} connections, but {', '.join(c.name for c in mine)} have only {sum(totals)}."
                )
            shares = share_out(int(value), [float(n) for n in totals], totals, f"connectivity[{key!r}] = {value}")
        else:
            shares = [min(max(round(float(value) * n), 1), n) for n in totals]
        counts.update((c.name, k) for c, k in zip(mine, shares, strict=True))
    return {c.name: counts[c.name] for c in chosen}


def share_out(budget: int, weights: Sequence[float], limits: Sequence[int], what: str) -> list[int]:
    """Share out a whole number in proportion to weights, by largest remainder: each at least 1 and at most its limit.

    What a full tensor cannot take goes to the others in proportion.

    Raises:
        ValueError: the budget is smaller than the number of tensors.
    """
    count = len(weights)
    if budget < count:
        raise ValueError(
            f"{what} gives {budget} connections to {count} tensors. Expected at least one for each: raise it, or name fewer."
        )
    if budget > sum(limits):
        raise ValueError(f"{what} gives {budget} connections to tensors that have only {sum(limits)}. Lower it.")
    # The exact share is clamp(scale * weight, 1, limit); the scale at which the shares add up to the budget lies between two
    # of the points where a share reaches a bound, and is linear there.
    points = sorted({1 / w for w in weights} | {n / w for n, w in zip(limits, weights, strict=True)})
    bounded = list(zip(weights, limits, strict=True))
    low, high = 0.0, points[-1]
    for high in points:
        if sum(min(max(high * w, 1.0), n) for w, n in bounded) >= budget:
            break
        low = high
    free = [i for i, (w, n) in enumerate(bounded) if 1 / w <= low and n / w >= high]
    pinned = sum(1 if 1 / w > low else n for i, (w, n) in enumerate(bounded) if i not in free)
    scale = (budget - pinned) / sum(weights[i] for i in free) if free else high
    shares = [min(max(scale * w, 1.0), float(n)) for w, n in bounded]
    result = [math.floor(share) for share in shares]
    open_ = [i for i in range(count) if result[i] < limits[i]]
    by_remainder = sorted(open_, key=lambda i: (result[i] - shares[i], i))
    for i in by_remainder[: budget - sum(result)]:
        result[i] += 1
    assert sum(result) == budget and all(1 <= k <= n for k, n in zip(result, limits, strict=True)), (result, budget)
    return result
