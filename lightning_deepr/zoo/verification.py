"""Verifies a model: its bytes, its connections, its network and, with data, its recorded metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_deepr.files import architectures, container, sparse_file
from lightning_deepr.files.gaps import FormatError
from lightning_deepr.zoo import loading
from lightning_deepr.zoo.registry import entry_of


class Verification(NamedTuple):
    """The checks that a model passed. It prints as a table.

    Attributes:
        name: name of the model.
        checks: pairs of (checked thing, found value).
    """

    name: str
    checks: list[tuple[str, str]]

    def __str__(self) -> str:
        width = max(len(what) for what, _ in self.checks)
        return "\n".join([f"{self.name}: as recorded", *(f"  {what.ljust(width)}  {found}" for what, found in self.checks)])


def verify(
    name_or_path: str | PathLike[str], data: Iterable[Any] | None = None, *, module: nn.Module | None = None
) -> Verification:
    """Check everything about a model that can be checked.

    Args:
        name_or_path: a model or file, as for :func:`lightning_deepr.zoo.load`.
        data: batches (inputs, labels) or (inputs, labels, lengths) of the test set that gave the recorded metric. The count of
            correct predictions may differ by one from the recorded count, since another BLAS may round otherwise.
        module: the network to load into, as for :func:`lightning_deepr.zoo.load`. Without it the network of an unknown
            architecture is not built.

    Returns:
        the found values: sha256, format, K per tensor, connectivity, the network, the metric.

    Raises:
        FileNotFoundError: ``name_or_path`` is neither a name nor a file.
        FormatError: (a ValueError) something is not as recorded. The message names the first such thing.
        ValueError: data is given, but the file records no metric to compare with.

    Example::

        >>> import tempfile
        >>> from lightning_deepr import sparsify, zoo
        >>> from lightning_deepr.models import LeNet300100
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(zoo.verify(zoo.save(sparsify(LeNet300100(), 0.01), f"{folder}/net.safetensors")))  # doctest: +ELLIPSIS
        net: as recorded
          sha256        ...
          format        1
          fc1.weight    K = 1,810 of 235,200 (0.770%)
          fc2.weight    K = 668 of 30,000 (2.227%)
          fc3.weight    K = 184 of 1,000 (18.400%)
          connectivity  2,662 of 266,200 (1.000%)
          network       lenet300_100
    """
    path, contents = loading.open_file(name_or_path)
    known = isinstance(name_or_path, str) and entry_of(name_or_path) is not None
    checks = [
        ("sha256", contents.sha256 + (" (the registry's)" if known else "")),
        ("format", str(container.VERSION)),
    ]
    with container.about(path):
        for tensor, found in sparse_file.all_connections(contents):
            checks.append((tensor, _share(len(found.places), contents.record["sparse"][tensor]["total"])))
        sums = contents.record["connectivity"]
        if sums["total"]:
            checks.append(("connectivity", _share(sums["active"], sums["total"]).removeprefix("K = ")))
        architecture = contents.record["architecture"]
        if module is None and architecture not in architectures.ARCHITECTURES:
            if data is not None:
                architectures.build(architecture, {})  # raises an error that asks for module=
            checks.append(("network", "not built: give module="))
            return Verification(path.stem, checks)
        net = loading.load_contents(contents, module).eval()
        checks.append(("network", str(architecture or type(net).__name__)))
        if data is not None:
            checks.append(_measure(net, data, contents.record))
    return Verification(path.stem, checks)


def _share(active: int, total: int) -> str:
    return f"K = {active:,} of {total:,} ({active / total:.3%})"


def _measure(net: nn.Module, data: Iterable[Any], record: dict[str, Any]) -> tuple[str, str]:
    recorded = record["metadata"].get("metrics")
    counted = {
        name: metric
        for name, metric in (recorded if isinstance(recorded, dict) else {}).items()
        if isinstance(metric, dict) and all(type(metric.get(key)) is int for key in ("correct", "examples"))
    }
    if len(counted) != 1:
        raise ValueError(
            f"expected one metric with `correct` and `examples` in the file, found {', '.join(counted) or 'none'}: "
            "there is nothing to compare with."
        )
    ((name, metric),) = counted.items()
    correct, examples = evaluate(net, data, counting(record["architecture"]))
    if examples != metric["examples"] or abs(correct - metric["correct"]) > 1:
        raise FormatError(
            f"{name}: expected {metric['correct']} of {metric['examples']} right, as recorded, found {correct} of {examples}. "
            f"Is this the test set of {record['metadata'].get('data', 'the record')}, prepared as its recipe does?"
        )
    return name, f"{correct:,} of {examples:,} ({correct / examples:.2%}), recorded {metric['correct']:,}"


@torch.no_grad()
def evaluate(net: nn.Module, data: Iterable[Any], count: Any) -> tuple[int, int]:
    """Count the correct predictions and all predictions.

    Args:
        net: the network, in eval mode.
        data: batches (inputs, labels) or (inputs, labels, lengths).
        count: a function from logits and labels to (number of correct predictions, number of predictions).
    """
    correct = examples = 0
    for inputs, labels, *lengths in data:
        right, all_ = count(net(inputs, *lengths), labels)
        correct, examples = correct + right, examples + all_
    return correct, examples


def counting(architecture: str | None) -> Callable[[Tensor, Tensor], tuple[int, int]]:
    """Return the function that counts an architecture's predictions, for :func:`evaluate`."""
    return _frames if architecture == "timit_blstm" else labels_hit


def labels_hit(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    """Count the predictions whose largest logit is the label; negative labels do not count."""
    counts = labels >= 0
    return int((logits.argmax(-1) == labels)[counts].sum()), int(counts.sum())


def _frames(logits: Tensor, labels: Tensor) -> tuple[int, int]:
    """Count TIMIT's frames in 39 classes, for networks with 60 or 39 outputs."""
    from lightning_deepr.recipes.speech import frame_errors
    from lightning_deepr.recipes.timit_phones import folding

    wrong = frame_errors(logits, labels, folding(logits.shape[-1]))
    return wrong.numel() - int(wrong.sum()), wrong.numel()
