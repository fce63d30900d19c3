"""Learn how an optimizer behaves: a second optimizer of its class takes steps on a parameter of its own.

The first optimizer does not change, none of its hooks is called, and the global random generators stay as they are. A second
optimizer is a copy of the first one, or constructed anew; not every class allows both.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def options_of(group: Mapping[str, Any], lr: float | None = None) -> dict[str, Any]:
    """Return the options of a parameter group.

    Args:
        group: the parameter group.
        lr: a learning rate for the probe, for a group that has one: the group's may be 0 now, in a warm-up.
    """
    options = {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
    return options if lr is None or "lr" not in options else options | {"lr": lr}


def take_steps(second: Optimizer, parameter: nn.Parameter, gradient: float, count: int) -> float:
    """Take steps with a constant gradient, and return the length of the last one."""
    step, before = inspect.unwrap(type(second).step), 0.0  # unwrapped: no hook fires
    with untouched_generators(parameter.device):  # and all probes draw the same numbers
        for _ in range(count):
            before = float(parameter.detach())
            parameter.grad = torch.full_like(parameter, gradient)
            step(second)
    return abs(float(parameter.detach()) - before)


@contextmanager
def untouched_generators(device: torch.device) -> Iterator[None]:
    """Restore the global random generators afterwards: a step of a probe may draw from them."""
    state = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global one is meant)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])  # noqa: NPY002


def _by_copy(optimizer: Optimizer, options: dict[str, Any], probe: nn.Parameter) -> Optimizer:
    """Copy an optimizer, with one parameter. The copy has all attributes that the constructor set."""
    second = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if isinstance(value, Optimizer):
            raise TypeError("A wrapped optimizer would take a real step.")
        if name not in ("state", "param_groups"):
            own = isinstance(value, (list, dict, set, Tensor, random.Random, np.random.Generator)) and not name.startswith(
                "_optimizer_"
            )  # torch's dicts of hooks
            if isinstance(value, torch.Generator):
                second.__dict__[name] = value.clone_state()
                continue
            second.__dict__[name] = copy.deepcopy(value) if own else value
    second.state = defaultdict(dict)
    second.param_groups = [{**options, "params": [probe]}]
    return second


def _by_constructor(optimizer: Optimizer, options: dict[str, Any], probe: nn.Parameter) -> Optimizer:
    """Construct a new optimizer, for a class that makes its state in the constructor (Adagrad)."""
    accepted = inspect.signature(type(optimizer).__init__).parameters
    return type(optimizer)(
        [probe],  # type: ignore[arg-type]
        **{name: value for name, value in options.items() if name in accepted},
    )


WAYS: tuple[Callable[[Optimizer, dict[str, Any], nn.Parameter], Optimizer], ...] = (_by_copy, _by_constructor)
