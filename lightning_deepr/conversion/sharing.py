"""Letting layers share one theta (``scope="global"``), and refusing what cannot share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_deepr.weights.find import Converted
from lightning_deepr.weights.install import warn_if_nobody_rewires
from lightning_deepr.weights.k_slots import KSlots
from lightning_deepr.weights.shared import Pool, SharedSlots

if TYPE_CHECKING:
    from lightning_deepr.conversion.selection import Candidate


def join(converted: Sequence[Converted]) -> Pool:
    """Let converted tensors share one theta. Before the optimizer is made: theta is a new parameter.

    Their slots are other objects afterwards (:class:`SharedSlots`): look converted tensors up again.

    Args:
        converted: of K slots each, with all that they share a theta with already; one pool is left as it is.

    Returns:
        the pool.

    Raises:
        ValueError: they can't share: other dtypes or devices, some frozen, some not, a pool that is torn apart.
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
        slots.averages.clear()  # copies that have a theta per layer can't follow
    warn_if_nobody_rewires(theta, members[0], converted[0].name)
    return Pool(members, [one.name for one in converted], members[0].index)


def retie(converted: Sequence[Converted], pool: Pool) -> None:
    """Some ways of moving or loading a module (from meta, ``assign=True``) give each layer a parameter of its own: share one again."""
    theta = converted[0].theta
    for one in converted:
        if one.theta is not theta and not (one.theta.shape == theta.shape and torch.equal(one.theta, theta)):
            raise ValueError(
                f'`{one.name}` and `{converted[0].name}` shared one theta (scope="global"), but now have two with other values. Load '
                "the state of the whole network, or convert it anew."
            )
        one.holder._parameters["original"] = theta
    for one in converted:
        if isinstance(one.slots, SharedSlots):
            pool.names[one.slots.position] = one.name


def refuse_torn(converted: Iterable[Converted]) -> None:
    """Refuse some of the layers that share a theta without the others."""
    mine = list(converted)
    present = {id(one.slots) for one in mine}
    for one in mine:
        absent = [name for slots, name in one.slots.shared_with() if id(slots) not in present]
        if absent:
            raise ValueError(
                f'`{one.name}` shares one theta (scope="global") with {", ".join(f"`{name}`" for name in absent)}: expected all of '
                "them, found some. Name the whole network, all of these layers or none."
            )


def check(chosen: Sequence[Candidate], early: bool = True, device: torch.device | str | None = None) -> None:
    """Refuse what can't be joined, before anything is converted.

    Args:
        chosen: dense weights and converted ones.
        early: no optimizer exists yet, so that parameters may become others.
        device: where dense weights are going to be; None: where they are.
    """
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
            + ': the optimizer holds them already. Call sparsify(net, ..., scope="global") before the optimizer is made, or use '
            'DeepR(scope="layer").'
        )
    for c in chosen:
        parameter = c.parameter if c.slots is None else c.module.parametrizations[c.tensor_name].original  # type: ignore[index, union-attr]
        if parameter is not None:
            found.append((c.name, parameter))
    refuse_mixed(found, device)


def refuse_mixed(parameters: Iterable[tuple[str, Tensor]], target: torch.device | str | None = None) -> None:
    """Layers can share a theta only if they have one dtype, one device, and are trained or frozen together."""
    known: tuple[str, dict[str, Any]] | None = None
    for name, parameter in parameters:
        device = torch.device(target) if target is not None else parameter.device
        device = torch.device("cpu") if device.type == "meta" else device
        facts = {"dtype": parameter.dtype, "device": device, "requires_grad": parameter.requires_grad}
        if known is None:
            known = name, facts
        for what, value in facts.items():
            if value != known[1][what]:
                raise ValueError(
                    f'scope="global" has one theta for all layers: expected one {what}, found {known[1][what]} in `{known[0]}` and '
                    f"{value} in `{name}`. Convert one of them separately (exclude_modules), or make them alike."
                )


def refuse_small_total(total: int, sizes: Sequence[int], least: int) -> None:
    """Refuse a floor that the total can't hold."""
    needed = sum(min(least, size) for size in sizes)
    if total < needed:
        raise ValueError(
            f"least_per_layer = {least} needs {needed} connections in {len(sizes)} layers, found K = {total} in all: lower it or give "
            "more connections."
        )
