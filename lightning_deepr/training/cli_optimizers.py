"""The optimizer that LightningCLI makes from ``--optimizer``: before any callback could convert the network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.optim import Optimizer

from lightning_deepr.weights.find import slots_of


def optimizers_of(module: nn.Module) -> list[Optimizer]:
    """List the optimizers that LightningCLI has bound to the ``configure_optimizers`` of a LightningModule."""
    method = vars(module).get("configure_optimizers")
    bound = getattr(getattr(method, "__func__", method), "keywords", None) or {}
    return [value for value in bound.values() if isinstance(value, Optimizer)]


@contextmanager
def following(module: nn.Module) -> Iterator[None]:
    """A context in which weights are converted: afterwards the command line's optimizer holds theta in each one's place.

    Such an optimizer has taken no step, so it keeps nothing for the dense weights. Its settings and groups stay.
    """
    optimizers = optimizers_of(module)
    if not optimizers:
        yield
        return
    layers = [(layer, name, id(p)) for layer in module.modules() for name, p in layer._parameters.items() if p is not None]
    yield
    thetas = {
        weight: layer.parametrizations[name].original  # type: ignore[index, union-attr]
        for layer, name, weight in layers
        if slots_of(layer, name) is not None
    }
    for optimizer in optimizers:
        taken: set[int] = set()
        for group in optimizer.param_groups:
            held = [thetas.get(id(parameter), parameter) for parameter in group["params"]]
            group["params"] = [p for p in held if not (id(p) in taken or taken.add(id(p)))]  # type: ignore[func-returns-value]
