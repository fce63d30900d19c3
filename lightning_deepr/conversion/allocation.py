"""The number of connections of each tensor."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_deepr.conversion import connectivities
from lightning_deepr.conversion.connectivities import Given
from lightning_deepr.conversion.selection import Candidate, Connectivity, Distribution, best_key, connectivity_of

DISTRIBUTIONS = ("erdos_renyi", "erk", "uniform", "deepr")


DEEPR_FACTORS = (0.75, 2.3, 22.8)  # the paper's appendix A, as later work states it: the three layers of LeNet-300-100


def check_connectivity(connectivity: Any, where: str = "connectivity") -> None:
    """Validate a connectivity: a float in (0, 1], an int of at least 1, places that are given, or a dict of those.

    Raises:
        TypeError, ValueError: the message says what was expected and what was found.
    """
    if isinstance(connectivity, str) and connectivity != connectivities.NONZERO:
        raise TypeError(
            f'{where}: expected a float in (0, 1], an int, "nonzero", a mask, places or a dict, found {connectivity!r}. (The '
            "connections of a file or a model of the zoo: Topology(path).)"
        )
    if isinstance(connectivity, (list, tuple)) and any(
        isinstance(one, numbers.Real) and not _is_place(one) for one in connectivity
    ):
        raise TypeError(f"{where}: expected a list of places (integers), found {connectivity!r:.200}.")
    if connectivities.is_given(connectivity):
        return
    if isinstance(connectivity, Mapping):
        if not connectivity:
            raise ValueError(f"{where}: expected at least one pattern, found an empty dict.")
        for pattern, value in connectivity.items():
            check_connectivity(value, f"{where}[{pattern!r}]")
    elif isinstance(connectivity, bool) or not isinstance(connectivity, numbers.Real):
        raise TypeError(f'{where}: expected a float in (0, 1], an int, "nonzero" or a dict, found {connectivity!r}.')
    elif isinstance(connectivity, numbers.Integral):
        if connectivity < 1:
            raise ValueError(f"{where}: expected at least 1 connection, found {connectivity}.")
        if connectivity == 1:
            warnings.warn(f"{where} = 1 is an int and means one single connection; write 1.0 for all of them.", stacklevel=3)
    elif not 0.0 < float(connectivity) <= 1.0:  # also NaN
        raise ValueError(f"{where}: expected a fraction in (0, 1], found {connectivity}. An int is a number of connections.")


def _is_place(value: Any) -> bool:
    return isinstance(value, numbers.Integral)


class Shares(dict[str, int]):
    """K of each tensor, by name; and the places of those for which they were given.

    Attributes:
        given: {tensor name: its places}.
    """

    given: dict[str, Given]


def shares(chosen: Sequence[Candidate], connectivity: Connectivity, distribution: Distribution) -> Shares:
    """Find K of each tensor: the number of the places that are given, and :func:`allocate` for the others.

    Raises:
        ValueError: places or numbers do not fit the tensors.
    """
    values = {c.name: connectivity_of(connectivity, c) for c in chosen}
    given = {c.name: connectivities.places_of(c, values[c.name]) for c in chosen if connectivities.is_given(values[c.name])}
    rest = [c for c in chosen if c.name not in given]
    counts: dict[str, int] = {}
    if rest:
        if given and isinstance(connectivity, Mapping):
            connectivity = {key: value for key, value in connectivity.items() if not connectivities.is_given(value)}
        counts = allocate(rest, connectivity, distribution)
    found = Shares((c.name, given[c.name].places.numel() if c.name in given else counts[c.name]) for c in chosen)
    found.given = given
    return found


def allocate(chosen: Sequence[Candidate], connectivity: Connectivity, distribution: Distribution) -> dict[str, int]:
    """Compute K, the number of connections, of each tensor.

    With a float, ``uniform`` and ``deepr`` give K_l = round(f_l * c * N_l), at least 1 and at most N_l; ``erdos_renyi`` and
    ``erk`` share out round(c * N): they count the sizes of a matrix or a kernel, as the layer's kind says, so experts or heads
    that are stacked in one tensor get the density of one of their matrices. An int is the total and is shared out by largest
    remainder. A dict has a value per tensor.

    Args:
        chosen: the tensors, in order.
        connectivity: float in (0, 1] | int | dict {pattern: float | int}.
        distribution: "erdos_renyi" (Mocanu et al. 2018) | "erk" (Evci et al. 2020) | "uniform" | "deepr" (the paper, appendix
            A: 0.75, 2.3 and 22.8 times c for three layers) | a function that takes ({name: shape}, density) and returns a
            density for each tensor.

    Raises:
        ValueError: the connectivity does not fit the tensors.

    Example::

        >>> from lightning_deepr.conversion.selection import candidates
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
        # K_l / N_l is proportional to (in + out) / (in * out); "erk" counts the kernel's sizes, too.
        weights = []
        for candidate in chosen:
            sizes = candidate.kind.sizes(candidate.module, candidate.shape)
            sizes = sizes[:2] if distribution == "erdos_renyi" else sizes
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
                    f"connectivity[{key!r}] = {value} connections, but {', '.join(c.name for c in mine)} have only "
                    f"{sum(totals)}."
                )
            shares = share_out(int(value), [float(n) for n in totals], totals, f"connectivity[{key!r}] = {value}")
        else:
            shares = [min(max(round(float(value) * n), 1), n) for n in totals]
        counts.update((c.name, k) for c, k in zip(mine, shares, strict=True))
    return {c.name: counts[c.name] for c in chosen}


def share_out(budget: int, weights: Sequence[float], limits: Sequence[int], what: str) -> list[int]:
    """Share out a whole number in proportion to weights, by largest remainder.

    Each share is at least 1 and at most its limit. What a full tensor cannot take goes to the others in proportion.

    Args:
        budget: the number of connections to share out.
        weights: a positive weight per tensor.
        limits: the size N of each tensor.
        what: the argument's name and value, for the messages.

    Raises:
        ValueError: the budget is smaller than the number of tensors or larger than the sum of the limits.
    """
    count = len(weights)
    if budget < count:
        raise ValueError(
            f"{what} gives {budget} connections to {count} tensors. Expected at least one for each: raise it, or name fewer."
        )
    if budget > sum(limits):
        raise ValueError(f"{what} gives {budget} connections to tensors that have only {sum(limits)}. Lower it.")
    # The exact share is clamp(scale * weight, 1, limit). A share reaches a bound at each of the points. The right scale lies
    # between two neighbouring points, and the sum of the shares is linear between them.
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
