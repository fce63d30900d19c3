"""Let layers share one theta (``scope="global"``), and refuse layers that cannot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_deepr.weights import precision
from lightning_deepr.weights.find import Converted
from lightning_deepr.weights.install import warn_if_nobody_rewires
from lightning_deepr.weights.k_slots import KSlots
from lightning_deepr.weights.shared import Pool, SharedSlots

if TYPE_CHECKING:
    from lightning_deepr.conversion.selection import Candidate


def join(converted: Sequence[Converted]) -> Pool:
    """Let converted tensors share one theta.

    Call it before the optimizer is made: theta is a new parameter. The slots become new objects (:class:`SharedSlots`): look
    converted tensors up again afterwards.

    Args:
        converted: tensors of K slots each. If some of them share a theta already, all its tensors must be given. Tensors that
            are one pool already stay one.

    Returns:
        the pool.

    Raises:
        ValueError: the tensors differ in dtype or device, some are frozen and some are not, or a pool is incomplete.
    """
    converted = sorted(converted, key=lambda one: one.slots.index)
    own: list[KSlots] = []
    for one in converted:
        if not isinstance(one.slots, KSlots):
            raise ValueError(f"`{one.name}` has a theta for every potential connection: a shared K expects K slots.")
        own.append(one.slots)
    refuse_torn(converted)
    pools = {id(slots.pool) if isinstance(slots, SharedSlots) else 0 for slots in own}
    if isinstance(own[0], SharedSlots) and len(pools) == 1:
        retie(converted, own[0].pool)
        return own[0].pool
    refuse_mixed((one.name, one.theta) for one in converted)
    with torch.no_grad():
        values = torch.cat([one.slots.own(one.theta.detach()) for one in converted])
    theta = nn.Parameter(values, requires_grad=converted[0].theta.requires_grad)
    members = [SharedSlots.of(slots) for slots in own]
    for one, slots in zip(converted, members, strict=True):
        one.holder._parameters["original"] = theta
        one.holder[0] = slots
        slots.averages.clear()  # an averaged copy with a theta per layer can't follow a shared theta
    warn_if_nobody_rewires(theta, members[0], converted[0].name)
    return Pool(members, [one.name for one in converted], members[0].index)


def retie(converted: Sequence[Converted], pool: Pool) -> None:
    """Restore one shared theta after a move or a load (from meta, ``assign=True``) gave each layer its own parameter.

    Raises:
        ValueError: the parameters have different values.
    """
    theta = converted[0].theta
    for one in converted:
        if one.theta is not theta and not (one.theta.shape == theta.shape and torch.equal(one.theta, theta)):
            raise ValueError(
                f'`{one.name}` and `{converted[0].name}` shared one theta (scope="global"), but now have two with other '
                "values. Load the state of the whole network, or convert it again."
            )
        one.holder._parameters["original"] = theta
    for one in converted:
        if isinstance(one.slots, SharedSlots):
            pool.names[one.slots.position] = one.name


def refuse_torn(converted: Iterable[Converted]) -> None:
    """Refuse an incomplete pool: some of the layers that share a theta, without the others."""
    mine = list(converted)
    present = {id(one.slots) for one in mine}
    for one in mine:
        absent = [name for slots, name in one.slots.shared_with() if id(slots) not in present]
        if absent:
            raise ValueError(
                f'`{one.name}` shares one theta (scope="global") with {", ".join(f"`{name}`" for name in absent)}: expected '
                "all of them, found some. Name the whole network, all of these layers or none."
            )


def check(chosen: Sequence[Candidate], early: bool = True, device: torch.device | str | None = None) -> None:
    """Refuse tensors that can't share a theta, before any of them is converted.

    Args:
        chosen: dense weights and converted ones.
        early: True while no optimizer exists, so that parameters can be replaced.
        device: the device that dense weights are moved to; None: they stay where they are.
    """
    for c in chosen:
        if c.is_whole or (c.slots is not None and c.slots.is_tied):
            raise ValueError(
                f'`{c.name}` is a tied tensor: expected tensors of one layer each with scope="global". Leave it out with '
                'exclude_modules, or use scope="layer".'
            )
    found: list[tuple[str, Tensor]] = []
    apart = [c.name for c in chosen if isinstance(c.slots, KSlots) and not c.slots.shares]
    pools = {id(c.slots.pool) for c in chosen if isinstance(c.slots, SharedSlots)}
    if not early and (apart or len(pools) > 1):
        raise ValueError(
            'scope="global" expects layers that share one theta, found '
            + (
                f"a theta of its own in {', '.join(f'`{name}`' for name in apart)}"
                if apart
                else f"{len(pools)} that are shared"
            )
            + ': the optimizer holds them already. Call sparsify(net, ..., scope="global") before the optimizer is made, or '
            'use DeepR(scope="layer").'
        )
    for c in chosen:
        parameter = (
            c.parameter
            if c.slots is None
            # the theta of a converted tensor
            else c.module.parametrizations[c.tensor_name].original  # type: ignore[index, union-attr]
        )
        if parameter is not None:
            found.append((c.name, parameter))
    refuse_mixed(found, device)


def refuse_mixed(parameters: Iterable[tuple[str, Tensor]], target: torch.device | str | None = None) -> None:
    """Refuse layers with different dtypes or devices, and frozen layers beside trained ones: they can't share a theta."""
    known: tuple[str, dict[str, Any]] | None = None
    for name, parameter in parameters:
        device = torch.device(target) if target is not None else parameter.device
        device = torch.device("cpu") if device.type == "meta" else device
        facts = {"dtype": precision.kept(parameter.dtype), "device": device, "requires_grad": parameter.requires_grad}
        if known is None:
            known = name, facts
        for what, value in facts.items():
            if value != known[1][what]:
                raise ValueError(
                    f'scope="global" has one theta for all layers: expected one {what}, found {known[1][what]} in '
                    f"`{known[0]}` and {value} in `{name}`. Convert one of them separately (exclude_modules), or make them "
                    "alike."
                )


def refuse_small_total(total: int, sizes: Sequence[int], least: int) -> None:
    """Refuse a minimum per layer that needs more connections than the total."""
    needed = sum(min(least, size) for size in sizes)
    if total < needed:
        raise ValueError(
            f"least_per_layer = {least} needs {needed} connections in {len(sizes)} layers, found K = {total} in all: lower it "
            "or give more connections."
        )
