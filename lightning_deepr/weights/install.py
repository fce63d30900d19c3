"""Replace a weight by a parametrization, and undo that."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_deepr.weights.averages import watch_for_averaged_models
from lightning_deepr.weights.base import Parametrization
from lightning_deepr.weights.find import Converted, slots_of


def install(module: nn.Module, tensor_name: str, theta: Tensor, slots: Parametrization, name: str) -> None:
    """Replace a weight by a parametrization.

    theta is a *new* parameter. This makes an optimizer with the old parameter detectable.
    ``slots.layer`` replaces the module's forward if needed; :func:`remove` calls it to restore the old one.

    Args:
        module: the layer.
        tensor_name: the name of the weight in the layer.
        theta: the values of the new parameter.
        slots: the parametrization.
        name: the weight's name in the network, for a warning.
    """
    watch_for_averaged_models()
    _own_class(module)
    old = module._parameters[tensor_name]
    requires_grad = True if old is None else old.requires_grad
    parameter = nn.Parameter(theta, requires_grad=requires_grad)
    module._parameters[tensor_name] = parameter
    # unsafe=True: torch would otherwise build the weight to check dtype and shape, and a very large layer has no memory for
    # that
    parametrize.register_parametrization(module, tensor_name, slots, unsafe=True)
    slots.layer.take_over(module, tensor_name)
    type(module).register_parameter = _register_parameter  # type: ignore[method-assign]
    warn_if_nobody_rewires(parameter, slots, name)


def _register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """Raise the same error for ``layer.weight = nn.Parameter(...)`` as for the assignment of a tensor, not torch's KeyError."""
    slots = slots_of(self, name)
    if slots is not None and param is not None:
        slots.right_inverse(param)
    nn.Module.register_parameter(self, name, param)


def remove(converted: Converted) -> None:
    """Turn a converted weight back into an ordinary dense parameter, with zeros at dormant places."""
    with torch.no_grad():
        weight = converted.slots.whole(converted.theta.detach())
    requires_grad = converted.theta.requires_grad
    _own_class(converted.module)
    parametrize.remove_parametrizations(converted.module, converted.tensor_name, leave_parametrized=False)
    converted.module._parameters[converted.tensor_name] = nn.Parameter(weight, requires_grad=requires_grad)
    converted.slots.layer.give_back(converted.module, converted.tensor_name)


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module its own class.

    torch makes a class per parametrized module, and this class has the properties of the converted tensors. A deep copy shares
    the class, so converting or densifying the copy would also change the original.
    """
    if parametrize.is_parametrized(module):
        shared = type(module)
        members = {name: value for name, value in shared.__dict__.items() if name not in ("__dict__", "__weakref__")}
        module.__class__ = type(shared.__name__, shared.__bases__, members)


def warn_if_nobody_rewires(theta: nn.Parameter, slots: Parametrization, name: str) -> None:
    """Register a hook that warns when a backward pass reaches theta and no callback is at work on it."""
    slots_ref, theta_ref = weakref.ref(slots), weakref.ref(theta)

    def after_accumulation(_: Tensor) -> None:
        slots, theta = slots_ref(), theta_ref()
        if slots is not None and theta is not None and slots.owner() is None:
            slots.notice.untrained(name)

    trainable = theta.requires_grad
    theta.requires_grad_(True)  # torch requires this to register a hook; a frozen theta may be unfrozen later
    theta.register_post_accumulate_grad_hook(after_accumulation)
    theta.requires_grad_(trainable)
