"""Lists the models of the zoo, by name, task, connectivity and size."""

from __future__ import annotations

from lightning_deepr.zoo import inputs, loading, registry
from lightning_deepr.zoo.loading import info


def list_models(
    pattern: str = "*",
    *,
    task: str | None = None,
    connectivity: float | tuple[float, float] | None = None,
    max_bytes: int | None = None,
) -> list[str]:
    """List the names of the zoo's models that are installed, sorted, with numbers in numerical order.

    Args:
        pattern: shell wildcards, as in ``"lenet300_100.*"`` or ``"*1pct*"``.
        task: "image-classification" | "audio-classification" | "text-generation"; None: all.
        connectivity: the largest share of active connections among the potential ones, or the smallest and the largest one,
            as recorded in the files; None: all.
        max_bytes: the largest size of the file; None: all.

    Raises:
        ValueError: there is no such task (the message lists those that there are), or a bound is none.

    Example::

        >>> list_models("lenet300_100.deepr_1pct*")
        ['lenet300_100.deepr_1pct_mnist']
        >>> list_models(task="image-classification", max_bytes=20_000)
        ['lenet300_100.deepr_0p5pct_mnist', 'lenet300_100.deepr_1pct_mnist', 'lenet300_100.soft_deepr_1pct_mnist']
    """
    here = {entry.name for entry in registry.ENTRIES if entry.in_wheel or (loading.folder() / entry.filename).is_file()}
    names = [name for name in registry.list_models(pattern) if name in here]
    if task is None and connectivity is None and max_bytes is None:
        return names
    least, most = connectivity if isinstance(connectivity, tuple) else (0.0, 1.0 if connectivity is None else connectivity)
    if not 0 <= least <= most <= 1:
        raise ValueError(f"connectivity: expected a share in 0 to 1, or the least and the most, found {connectivity}.")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes: expected a number of bytes from 1, found {max_bytes}.")
    found = {name: info(name) for name in registry.list_models() if name in here}
    tasks = sorted(inputs.TASKS)  # of some the wheel may have no model
    if task is not None and task not in tasks:
        raise ValueError(f"task: expected {' or '.join([', '.join(tasks[:-1]), tasks[-1]])}, found {task!r}.")
    return [
        name
        for name in names
        if (task is None or found[name].get("task") == task)
        and least <= found[name]["connectivity"]["connectivity"] <= most
        and (max_bytes is None or found[name]["bytes"] <= max_bytes)
    ]
