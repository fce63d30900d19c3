"""Curves of a training: turnover, alpha, survival, and accuracy over connectivity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

from lightning_deepr.pictures.figures import figure, finished

Path = str | PathLike[str] | None
History = Sequence[tuple[int, Mapping[str, float]]]


def _over_time(history: History, key: str, what: str, path: Path, log: bool) -> Any:
    names = sorted({name for _, values in history for name in values if name.rpartition("/")[2] == key})
    if not names:
        raise ValueError(
            f"{what}: expected a history [(step, statistics)] with a key that ends in `{key}`, such as `callback.history` "
            f"after a fit, found {len(history)} entries without one."
        )
    made, (axis,) = figure(width=6, height=3.5)
    for name in names:
        steps = [step for step, values in history if name in values]
        numbers = [values[name] for _, values in history if name in values]
        axis.plot(steps, numbers, label=name, marker="." if len(steps) < 30 else None)
    if log and all(values[name] > 0 for _, values in history for name in names if name in values):
        axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel(what)
    axis.legend(fontsize=7)
    return finished(made, path)


def turnover(history: History, *, path: Path = None) -> Any:
    """Draw the share of connections that is reborn per step, over the training.

    Args:
        history: [(step, statistics)], such as ``callback.history`` after a fit.
        path: the file to write; None: none.

    Returns:
        the figure.

    Raises:
        ValueError: the history has no turnover.
        ImportError: matplotlib is missing.

    Example::

        >>> made = turnover([(50, {"deepr/turnover": 0.1}), (100, {"deepr/turnover": 0.05})])
    """
    return _over_time(history, "turnover", "share reborn per step", path, log=False)


def alpha(history: History, *, path: Path = None) -> Any:
    """Draw alpha in effect over the training, on a logarithmic axis. The arguments are those of :func:`turnover`.

    Raises:
        ValueError: the history has no alpha: the method has no L1.
        ImportError: matplotlib is missing.

    Example::

        >>> made = alpha([(50, {"deepr/alpha": 1e-4}), (100, {"deepr/alpha": 2e-4})])
    """
    return _over_time(history, "alpha", "alpha", path, log=True)


def survival(statistics: Mapping[str, float], *, path: Path = None) -> Any:
    """Draw the share of connections that live longer than some number of steps.

    Args:
        statistics: the result of ``callback.statistics("all")``.
        path: the file to write; None: none.

    Raises:
        ValueError: there is no survival among them.
        ImportError: matplotlib is missing.

    Example::

        >>> made = survival({"deepr/survival/1": 0.5, "deepr/survival/2": 0.4})
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    for key, value in statistics.items():
        name, _, steps = key.rpartition("/")
        if name.rpartition("/")[2] == "survival":
            curves.setdefault(name.rpartition("/")[0], []).append((int(steps), value))
    if not curves:
        raise ValueError('survival: expected callback.statistics("all") with log_statistics="all", found no key of survival.')
    made, (axis,) = figure(width=6, height=3.5)
    for name, points in curves.items():
        axis.plot(*zip(*sorted(points), strict=True), label=name, marker=".")
    axis.set_xscale("log", base=2)
    axis.set_ylim(0, None)
    axis.set_xlabel("steps")
    axis.set_ylabel("share that lives longer")
    axis.legend(fontsize=7)
    return finished(made, path)


def accuracy(
    runs: Iterable[tuple[float, float]] | Mapping[str, Iterable[tuple[float, float]]],
    *,
    label: str = "accuracy",
    path: Path = None,
) -> Any:
    """Draw accuracy over connectivity.

    Args:
        runs: [(connectivity, accuracy)], or {method: such a list}.
        label: the name of the metric.
        path: the file to write; None: none.

    Raises:
        ValueError: there is no point, or a connectivity is not in (0, 1].
        ImportError: matplotlib is missing.

    Example::

        >>> made = accuracy({"DeepR": [(0.01, 97.0), (0.05, 98.0)], "SET": [(0.01, 94.9)]})
    """
    curves = {name: sorted(points) for name, points in (runs.items() if isinstance(runs, Mapping) else [("", runs)])}
    found = [connectivity for points in curves.values() for connectivity, _ in points]
    if not found or not all(0 < one <= 1 for one in found):
        raise ValueError(f"accuracy: expected pairs (connectivity in (0, 1], {label}), found {found or 'none'}.")
    made, (axis,) = figure(width=6, height=3.5)
    for name, points in curves.items():
        axis.plot([100 * one for one, _ in points], [value for _, value in points], marker="o", label=name or None)
    axis.set_xscale("log")
    ticks = sorted({100 * one for one in found})
    axis.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("connectivity, %")
    axis.set_ylabel(label)
    if any(curves):
        axis.legend(fontsize=7)
    return finished(made, path)
