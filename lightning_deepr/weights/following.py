"""``follow``: an averaged copy of a network follows the network's rewiring."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_deepr.weights import copies
from lightning_deepr.weights.averages import link
from lightning_deepr.weights.dense_theta import DenseTheta
from lightning_deepr.weights.find import Converted, converted_tensors
from lightning_deepr.weights.install import install
from lightning_deepr.weights.k_slots import KSlots
from lightning_deepr.weights.shared import SharedSlots


def follow(copy: nn.Module, source: nn.Module | None) -> nn.Module:
    """Let the converted weights of a copy follow those of the network that is trained.

    For averages that your own code computes over ``parameters()``: a momentum teacher, a target network, an EMA. Call it once,
    when the copy is made, or before the training starts. From then on each rewiring of ``source`` moves the same connections in
    ``copy``. The copy's value of a connection that was reborn restarts at 0, like the connection itself. So
    ``p.lerp_(q, weight)`` over both modules' parameters is an average of each connection since its birth.

    ``AveragedModel``, Lightning's ``WeightAveraging`` and classes whose name says EMA or Average (timm's ``ModelEmaV3``) need
    no call: what they copy follows. Both modules may be parts of one module: under a Trainer, call it in the LightningModule's
    ``setup``, which comes after the callback's conversion and before a checkpoint is loaded.

    Args:
        copy: a module with the layers of ``source``: a deep copy, a network of the same architecture that was converted in the
            same way, or its dense layers. Connections that both have keep the copy's values, others take the source's; a dense
            weight of the copy becomes a copy of the source's. Its thetas are frozen (``requires_grad=False``): an average is
            not trained.
        source: the network that is trained and rewired. None: the copy stands on its own from now on.

    Returns:
        the copy.

    Raises:
        ValueError: ``source`` is not converted, ``copy`` is the source itself or follows it in a circle, or a layer is missing
            or does not fit. Nothing is changed then.

    Example::

        >>> import copy
        >>> from lightning_deepr import DeepR, connections, follow, sparsify
        >>> student = sparsify(nn.Linear(100, 10), 0.05)
        >>> teacher = follow(copy.deepcopy(student), student)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> rewiring = DeepR().attach(student, optimizer)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     student(torch.ones(4, 100)).square().sum().backward()
        ...     optimizer.step()
        ...     with torch.no_grad():
        ...         for mean, value in zip(teacher.parameters(), student.parameters()):
        ...             _ = mean.lerp_(value, 0.1)
        >>> torch.equal(connections(teacher)["weight"][1], connections(student)["weight"][1])
        True
    """
    if source is None:
        _release(copy)
        return copy
    theirs = {one.name: one for one in converted_tensors(source)}
    if not theirs:
        raise ValueError(
            f"follow expects a converted source, found {type(source).__name__} without a converted tensor. Call "
            "`sparsify(source, connectivity)` first, or follow in the module's `setup`, which comes after the callback's."
        )
    mine = {one.name: one for one in converted_tensors(copy)}
    dense = {name: _dense(copy, one) for name, one in theirs.items() if name not in mine}
    for name, their in theirs.items():
        _refuse(name, mine.get(name), their, dense.get(name))
    for name, their in theirs.items():
        if name in mine:
            _align(mine[name], their)
        else:
            module = dense[name]
            assert module is not None
            mine[name] = _convert(module, their)
        theta = mine[name].theta
        theta.requires_grad_(False)
        theta.grad = None
        copies.release(mine[name].slots)
        link(mine[name].holder, mine[name].slots, their.slots)
    for pool in {id(one.slots.pool): one.slots.pool for one in theirs.values() if isinstance(one.slots, SharedSlots)}.values():
        pool.realign_averages()
    for one in theirs.values():
        if isinstance(one.slots, DenseTheta):
            with torch.no_grad():
                one.slots.align_averages()
    return copy


def _release(copy: nn.Module) -> None:
    for one in converted_tensors(copy):
        followed = one.slots.followed()
        if followed is not None:
            followed.averages.discard(one.holder)
        one.slots.followed = copies.nobody
        copies.release(one.slots)


def _dense(copy: nn.Module, their: Converted) -> nn.Module | None:
    """Find the layer of a copy that holds the dense counterpart of a converted tensor."""
    prefix = their.name.rpartition(".")[0]
    try:
        module = copy.get_submodule(prefix)
    except AttributeError:
        return None
    parameter = module._parameters.get(their.tensor_name)
    fits = parameter is not None and parameter.shape == their.slots.shape and isinstance(their.slots, KSlots)
    return module if fits and not their.slots.shares else None


def _refuse(name: str, mine: Converted | None, their: Converted, dense: nn.Module | None) -> None:
    if mine is None:
        if dense is None:
            raise ValueError(
                f"follow: expected a layer for `{name}` of shape {tuple(their.slots.shape)} in the copy, found none that fits. "
                "Make the copy by copy.deepcopy(source)."
            )
        return
    above: Any = their.slots
    while above is not None:
        if above is mine.slots:
            raise ValueError(
                f"follow: expected a copy and its source, found `{name}` of the source to be that of the copy, or to follow "
                "it. Give the copy first, and then the network that is trained."
            )
        above = above.followed()
    same = type(mine.slots) is type(their.slots) and mine.slots.shape == their.slots.shape
    if same and isinstance(mine.slots, SharedSlots) and isinstance(their.slots, SharedSlots):
        same = mine.slots.position == their.slots.position and mine.slots.pool.count == their.slots.pool.count
    if not same:
        raise ValueError(
            f"follow: `{name}` of the copy is {mine.slots.extra_repr()} ({type(mine.slots).__name__}), that of the source "
            f"{their.slots.extra_repr()} ({type(their.slots).__name__}): expected the same kind of conversion. Make the copy "
            "by copy.deepcopy(source)."
        )


def _convert(module: nn.Module, their: Converted) -> Converted:
    """Convert a dense weight of a copy into the connections of the source, with the source's values."""
    slots: KSlots = their.slots  # type: ignore[assignment]
    device = module._parameters[their.tensor_name].device  # type: ignore[union-attr]
    theta = their.theta.detach().to(device, copy=True)
    dtype = slots.weight_dtype
    new = KSlots(slots.shape, slots.places.to(device, copy=True), slots.index, slots.sign_seed,
                 slots.exceptions.to(device, copy=True), dtype, slots.notice,
                 allowed=slots.allowed, sign_table=slots.sign_table)  # fmt: skip
    new.born = slots.born.to(device, copy=True)
    new.take_rules(slots)
    new.layer, new.l1_taken, new.lr_scale_taken = slots.layer, slots.l1_taken, slots.lr_scale_taken
    new.choose_compute(
        "tune" if slots.tunes else slots.policy, slots.layer.capable(module, their.tensor_name, tuple(slots.shape))
    )
    install(module, their.tensor_name, theta, new, their.name)
    one = Converted(their.name, module, their.tensor_name, new)
    new.hold(one.holder)
    return one


@torch.no_grad()
def _align(mine: Converted, their: Converted) -> None:
    """Move the connections of a copy to the places of the source. Connections that both have keep the copy's values."""
    target, other = mine.slots, their.slots
    if not isinstance(target, KSlots) or not isinstance(other, KSlots) or isinstance(target, SharedSlots):
        return  # a pool is aligned as a whole; a theta for every place follows as it is
    device = target.places.device
    places = other.places.to(device, copy=True)
    exceptions = other.exceptions.to(device, copy=True)
    same = target.sign_seed == other.sign_seed and torch.equal(target.exceptions, exceptions)
    same = same and target.sign_table == other.sign_table
    target.take_rules(other)
    if same and torch.equal(target.places, places):
        return
    values = mine.theta.detach() * target.signs
    target.sign_seed, target.exceptions = other.sign_seed, exceptions
    theta = their.theta.detach().to(mine.theta, copy=True)
    signs = target.signs_at(places)
    ordered, order = target.places.sort()
    slot = order[torch.searchsorted(ordered, places).clamp_(max=ordered.numel() - 1)]
    theta = torch.where(target.places[slot] == places, values[slot] * signs, theta)
    target.places, target.signs, target.born = places, signs, other.born.to(device, copy=True)
    if theta.shape == mine.theta.shape:
        mine.theta.copy_(theta)
    else:  # the two were converted with other shares of one number of connections
        mine.holder._parameters["original"] = nn.Parameter(theta, requires_grad=False)
    target.places_changed()
    target.ask_again()
