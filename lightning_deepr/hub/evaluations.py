"""Evaluation results in the Hub's present form: files ``.eval_results/*.yaml`` of a model's repository.

https://huggingface.co/docs/hub/eval-results describes the form. The card's ``model-index`` is the older one; programs read
either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_deepr.hub.cards import DATA_SETS, data_of, metrics, rounded

FOLDER = ".eval_results"
# The form asks for a task of the data set. These data sets define none, so it is their only configuration, by its name there.
_TASKS = {"ylecun/mnist": "mnist", "uoft-cs/cifar10": "plain_text", "karpathy/tiny_shakespeare": "default"}


def evaluations(info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the results of a model on data sets of the Hub.

    Args:
        info: the result of ``zoo.info`` for the model.

    Returns:
        one entry for each recorded metric; none if the data set is not on the Hub.

    Example::

        >>> evaluations({"data": {"name": "MNIST"}, "metrics": {"test_accuracy": 0.97531}})
        [{'dataset': {'id': 'ylecun/mnist', 'task_id': 'mnist'}, 'value': 0.9753, 'notes': 'test accuracy'}]
    """
    data_set = DATA_SETS.get(str(data_of(info).get("name")).lower())
    if data_set is None:
        return []
    found = []
    for name, numbers in metrics(info).items():
        if numbers.get("value") is None:
            continue
        notes = name.replace("_", " ")
        if numbers.get("correct") is not None and numbers.get("examples") is not None:
            notes += f", {numbers['correct']:,} of {numbers['examples']:,} right"
        entry = {"dataset": {"id": data_set, "task_id": _TASKS[data_set]}, "value": rounded(numbers["value"]), "notes": notes}
        found.append(entry)
    return found


def text(found: list[dict[str, Any]]) -> str:
    """Write the results as YAML."""
    import yaml  # type: ignore[import-untyped]

    written: str = yaml.safe_dump(found, sort_keys=False, allow_unicode=True, width=120)
    return written
