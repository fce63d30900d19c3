"""Fine-tuning callbacks (``BackboneFinetuning``), which freeze layers before a training and unfreeze them within it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from lightning_deepr.packages.names import is_a
from lightning_deepr.training.tracked import TrackedTensor
from lightning_deepr.weights.find import converted_tensors


def finetuning(trainer: Any) -> list[Any]:
    """List the Trainer's fine-tuning callbacks."""
    return [one for one in trainer.callbacks if is_a(one, "callbacks.finetuning", "BaseFinetuning")]


@contextmanager
def thawed(trainer: Any, module: nn.Module, callback: Any) -> Iterator[None]:
    """A context in which weights count as trained that a fine-tuning callback has frozen for a while.

    A callback that is listed before ours has frozen its layers by the time of our ``setup``, and they look like layers that
    the user froze for good, which "all" leaves out. What it froze is found out by letting it freeze once more, with everything
    unfrozen before. Afterwards everything is frozen as it was: converted weights, too.
    """
    position = next((i for i, one in enumerate(trainer.callbacks) if one is callback), 0)
    earlier = [one for one in trainer.callbacks[:position] if one in finetuning(trainer)]
    before = {parameter: parameter.requires_grad for parameter in module.parameters()}
    frozen = [parameter for parameter, trained in before.items() if not trained]
    if not earlier or not frozen:
        yield
        return
    for parameter in frozen:
        parameter.requires_grad_(True)
    for one in earlier:
        one.freeze_before_training(module)
    for_a_while = [parameter for parameter in frozen if not parameter.requires_grad]
    for parameter, trained in before.items():
        parameter.requires_grad_(trained or any(parameter is one for one in for_a_while))
    places = {(id(layer), name): p for layer in module.modules() for name, p in layer._parameters.items() if p is not None}
    still = {place for place, parameter in places.items() if any(parameter is one for one in for_a_while)}
    try:
        yield
    finally:
        for parameter in for_a_while:
            parameter.requires_grad_(False)
        for converted in converted_tensors(module):
            if (id(converted.module), converted.tensor_name) in still:
                converted.theta.requires_grad_(False)


def refuse_frozen_pools(trainer: Any, tensors: list[TrackedTensor]) -> None:
    """Refuse a fine-tuning callback that freezes layers which share one theta.

    Raises:
        ValueError: it would freeze all of them, and unfreeze theta once per layer.
    """
    callbacks = finetuning(trainer)
    for tensor in tensors:
        names = tensor.slots.shares
        if callbacks and names and not tensor.theta.requires_grad:
            raise ValueError(
                f'With scope="global" {", ".join(f"`{name}`" for name in names)} have one parameter, theta: '
                f"{type(callbacks[0]).__name__} freezes it in all of these layers at once. Expected layers that can be frozen "
                'one by one: use scope="layer", or leave out the layers that it freezes (exclude_modules).'
            )
