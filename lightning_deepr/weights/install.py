"""Replace a weight by a parametrization, and undo that."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_deepr.compute.layer import LayerCompute
from lightning_deepr.weights import precision
from lightning_deepr.weights.averages import watch_for_averaged_models
from lightning_deepr.weights.base import FORMAT_KEY, UPON_KEY, Parametrization
from lightning_deepr.weights.ddp import watch_for_ddp
from lightning_deepr.weights.find import Converted, slots_of, stacked_upon

UNSEEN = 5  # a change may be a load or a swap of averages; this many, without a step between them, are an optimizer


def install(
    module: nn.Module,
    tensor_name: str,
    theta: Tensor,
    slots: Parametrization,
    name: str,
    tied: LayerCompute | None = None,
) -> None:
    """Replace a weight by a parametrization.

    theta is a *new* parameter. This makes an optimizer with the old parameter detectable.
    ``slots.layer`` replaces the module's forward if needed; :func:`remove` calls it to restore the old one.

    Args:
        module: the layer.
        tensor_name: the name of the weight in the layer.
        theta: the values of the new parameter.
        slots: the parametrization.
        name: the weight's name in the network, for a warning.
        tied: None, or how this layer computes, if ``theta`` is the parameter of another layer whose tensor it shares.
    """
    watch_for_averaged_models()
    watch_for_ddp()
    _own_class(module)
    old = module._parameters[tensor_name]
    requires_grad = True if old is None or slots.adapts else old.requires_grad
    parameter = theta if tied is not None else nn.Parameter(theta, requires_grad=requires_grad)
    assert isinstance(parameter, nn.Parameter)
    module._parameters[tensor_name] = parameter
    names = list(module._parameters)
    later = tuple(names[names.index(tensor_name) + 1 :])
    # unsafe=True: torch would otherwise build the weight to check dtype and shape, and a very large layer has no memory for
    # that
    parametrize.register_parametrization(module, tensor_name, slots, unsafe=True)
    holder: Any = module.parametrizations[tensor_name]  # type: ignore[index, union-attr]
    holder.__class__ = ThetaHolder
    holder.later = later
    holder.register_state_dict_post_hook(_record_others)
    layer = slots.layer if tied is None else tied
    layer.take_over(module, tensor_name)
    if tied is not None:
        holder.layer = tied
    own: Any = type(module)
    if hasattr(own, "reset_parameters"):
        own.reset_parameters = _reset_parameters
    own._load_from_state_dict = _load_from_state_dict
    type(module).register_parameter = _register_parameter  # type: ignore[method-assign]
    if tied is None:
        slots.name = name
        warn_if_nobody_rewires(parameter, slots, name)


class ThetaHolder(parametrize.ParametrizationList):
    """torch's holder of theta and its parametrization. It keeps theta in float32 where the module is cast to fewer bits.

    Attributes:
        later: the names of the layer's parameters that followed the weight.
    """

    later: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ThetaHolder:
        if recurse:
            for child in self.children():
                child._apply(fn)  # other parametrizations upon ours are cast as ever
        dtype = precision.kept(self[0].weight_dtype)  # type: ignore[arg-type]
        super()._apply(precision.keeping(fn, dtype), recurse=False)
        return self

    # A hook stays with its tensor: a deep copy and load_state_dict(assign=True) have another one.

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "original" and isinstance(value, nn.Parameter):
            self._watch()

    def _watch(self) -> None:
        slots: Any = self._modules.get("0")
        theta = self._parameters.get("original")
        if slots is None or theta is None or "layer" in self.__dict__ or getattr(slots, "position", 0) != 0:
            return  # several holders have one theta: the first of them watches it
        slots.seen_version, slots.last_step = -1, -2
        warn_if_nobody_rewires(theta, slots, slots.name)


ThetaHolder.__module__ = parametrize.ParametrizationList.__module__  # torch.fx does not trace into the modules of torch.nn


def _register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """Raise the same error for ``layer.weight = nn.Parameter(...)`` as for the assignment of a tensor, not torch's KeyError."""
    owner, _, _ = name.rpartition(".original")
    slots = slots_of(self, owner.removeprefix("parametrizations."))
    if slots is not None:  # torch's tensor-parallel plans split each parameter of a layer
        raise ValueError(
            f"`{slots.name}`: theta: expected K values in one vector on every rank, found a {type(param).__name__}: a plan "
            "such as ColwiseParallel splits the rows of a weight, and slots are in no order of rows. Leave the layer out of "
            "the plan, or give the layer, before its conversion, "
            "`lightning_deepr.conversion.row_blocks.RowBlocks(connectivity, blocks=...)`."
        )
    slots = slots_of(self, name.removesuffix("_orig"))
    if slots is not None and name.endswith("_orig"):
        raise ValueError(
            f"`{slots.name}`: expected no mask upon a converted weight, found torch.nn.utils.prune or ModelPruning, which puts "
            f"one there: {slots.wanted} of its {slots.total} weights are kept anyway. For fewer connections convert with a "
            "lower connectivity; to prune a dense network, call `lightning_deepr.densify(module)` first, or use "
            "MagnitudePruning."
        )
    slots = slots_of(self, name)
    if slots is not None and param is not None:
        slots.right_inverse(param)
    nn.Module.register_parameter(self, name, param)


def _record_others(holder: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Record how many parametrizations of others lie upon ours: one without a state leaves no other trace."""
    others = len(stacked_upon(holder))  # type: ignore[arg-type]
    if others:
        state[f"{prefix}0.{UPON_KEY}"] = torch.tensor(others)


def _inherited(module: nn.Module, function: Any, name: str) -> Any:
    """Return the method that a function of the module's own class replaces. Others may have derived from that class."""
    own = next(kind for kind in type(module).__mro__ if kind.__dict__.get(name) is function)
    return getattr(super(own, module), name)


def _reset_parameters(self: Any) -> None:
    """Refuse ``reset_parameters``: some layers (LSTM) write to theta itself, with values that are none of the K connections."""
    for tensor_name in self.parametrizations:
        slots = slots_of(self, tensor_name)
        if slots is not None and slots.keeps_no_writes:
            raise RuntimeError(slots.lost_write("reset_parameters"))
    _inherited(self, _reset_parameters, "reset_parameters")()


def _load_from_state_dict(self: Any, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
    """Load as torch does, and refuse a dense weight, or theta without its places: ``strict=False`` would say nothing."""
    _inherited(self, _load_from_state_dict, "_load_from_state_dict")(state_dict, prefix, *args)
    unexpected, errors = args[-2:]
    for tensor_name in self.parametrizations:
        slots = slots_of(self, tensor_name)
        holder = f"{prefix}parametrizations.{tensor_name}."
        if f"{holder}original" in state_dict and f"{holder}0.{FORMAT_KEY}" not in state_dict:
            if slots is not None and "places" in slots.records and not slots.stays:
                errors.append(
                    f"`{prefix}{tensor_name}`: expected theta and its places, found theta alone: its slots may stand for other "
                    "connections than those of this network. Save `net.state_dict()`, which has both: named_parameters(), "
                    "and what a filter by requires_grad leaves, have no places."
                )
            continue
        if slots is None or prefix + tensor_name not in state_dict:
            continue
        if f"{prefix}parametrizations.{tensor_name}.original" in state_dict:  # a file of save_pretrained has both
            unexpected[:] = [name for name in unexpected if name != prefix + tensor_name]
        else:
            errors.append(
                f"`{prefix}{tensor_name}`: expected {slots.wanted} connections, found a dense weight, for which a converted "
                'layer has no place. Load dense weights before the conversion (init="largest" keeps the largest), or call '
                "`lightning_deepr.densify(module)`, load, and convert again."
            )


def remove(converted: Converted, parameter: nn.Parameter | None = None) -> nn.Parameter:
    """Turn a converted weight back into an ordinary dense parameter, with zeros at dormant places.

    Parametrizations of others that were registered upon ours stay: they compute from the dense weight as they did from ours.

    Args:
        converted: the tensor.
        parameter: what becomes the weight; None: a new parameter with the tensor's values.

    Returns:
        the weight.
    """
    with torch.no_grad():
        weight = converted.slots.whole(converted.theta.detach()) if parameter is None else parameter
    requires_grad = converted.theta.requires_grad
    module, name, upon = converted.module, converted.tensor_name, stacked_upon(converted.holder)
    layer: LayerCompute = getattr(converted.holder, "layer", converted.slots.layer)
    later: tuple[str, ...] = getattr(converted.holder, "later", ())
    _own_class(module)
    for number in range(len(upon), 0, -1):
        del converted.holder._modules[
            str(number)
        ]  # or torch would let them compute once more, and a spectral norm takes a step
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    parameter = nn.Parameter(weight, requires_grad=requires_grad) if parameter is None else parameter
    module._parameters[name] = parameter
    for other in later:  # the order is the optimizers' numbering, in their state_dicts, too
        if other in module._parameters:
            module._parameters[other] = module._parameters.pop(other)
    layer.give_back(module, name)
    if upon:
        _register_again(module, name, upon)
    return parameter


def _register_again(module: nn.Module, name: str, parametrizations: list[nn.Module]) -> None:
    """Register parametrizations with a weight that is theirs already.

    torch passes a newly parametrized weight through ``right_inverse``, which would change it, so a stand-in is registered
    first.
    """
    parametrize.register_parametrization(module, name, nn.Identity(), unsafe=True)
    holder: Any = module.parametrizations[name]  # type: ignore[index, union-attr]
    for number, one in enumerate(parametrizations):
        holder._modules[str(number)] = one


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
        if slots is None or theta is None:
            return
        owner = slots.owner()
        if owner is None:
            slots.notice.untrained(name)
            slots.last_step = -2  # what somebody else trains is no longer as the callback's last step left it
        elif theta._version != slots.seen_version:  # by something else than a step that the callback saw
            slots.unseen_changes += slots.seen_version >= 0  # (the first backward pass only looks)
            slots.seen_version = theta._version
            if slots.unseen_changes == UNSEEN:
                slots.notice.unseen(name, type(owner).__name__)

    trainable = theta.requires_grad
    theta.requires_grad_(True)  # torch requires this to register a hook; a frozen theta may be unfrozen later
    theta.register_post_accumulate_grad_hook(after_accumulation)
    theta.requires_grad_(trainable)
