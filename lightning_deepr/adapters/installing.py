"""Put an adapter upon a network, and take it off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_deepr.adapters.adapter import Adapter, beside_of, digest_of
from lightning_deepr.conversion import adapting
from lightning_deepr.conversion.convert import convert
from lightning_deepr.conversion.draws import note_used
from lightning_deepr.conversion.selection import Candidate, candidates
from lightning_deepr.files.sparse_file import Connections
from lightning_deepr.weights.find import converted_tensors, plain_name
from lightning_deepr.weights.install import remove
from lightning_deepr.weights.k_slots import KSlots
from lightning_deepr.weights.names import Finder, paths_of
from lightning_deepr.weights.precision import kept


def install_adapter(net: nn.Module, adapter: Adapter) -> nn.Module:
    """Put an adapter upon a network, in place of the one that it has.

    Everything else stays as it is, except what was trained beside the adapter: these values are written. The network is then
    frozen but for the difference and for them.

    Args:
        net: a network with the weights that the adapter belongs to.
        adapter: the adapter.

    Returns:
        the network itself.

    Raises:
        ValueError: a weight is not there, has another shape or other values, or is sparse, or the present adapter has trained
            tensors that this one would leave as they are; nothing is changed then.
        RuntimeError: a callback is at work on the network.
    """
    if any(one.slots.adapts for one in converted_tensors(net)):
        left = beside_of(net).keys() - adapter.others.keys()
        if left:
            raise ValueError(
                f"`{min(left)}` was trained beside the present adapter, and would keep its values under the new one: expected "
                "an adapter with the same tensors beside it. Load the pretrained network, then the adapter."
            )
    return exchange(net, adapter, *fit(net, adapter))


def exchange(net: nn.Module, adapter: Adapter, found: dict[str, Connections], values: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Put an adapter upon a network that it was found to fit; see :func:`install_adapter` and :func:`fit`."""
    detach(net, missing_ok=True)
    chosen = [one for one in candidates(net) if one.name in found or not found.keys().isdisjoint(one.aliases)]
    counts, connections = {}, {}
    for one in chosen:
        name = next(name for name in (one.name, *one.aliases) if name in found)
        connections[one.name] = found[name]
        counts[one.name] = found[name].places.numel()

    def begin(candidate: Candidate, count: int, index: int, **options: Any) -> tuple[Tensor, KSlots]:
        weight, mine = candidate.parameter, connections[candidate.name]
        assert isinstance(weight, nn.Parameter)
        slots = mine.slots(weight.dtype, options["device"])
        slots.put_upon(weight)
        return mine.theta.to(options["device"], kept(weight.dtype)), slots

    convert(net, chosen, counts, init="module", seed=0, compute="auto", begin=begin, upon=set(counts))
    write(net, values)
    thetas = {id(one.theta) for one in converted_tensors(net)}
    beside = {id(tensor) for tensor, _ in values}
    for parameter in net.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(id(parameter) in thetas or id(parameter) in beside)
    return net


def fit(net: nn.Module, adapter: Adapter, digests: bool = True) -> tuple[dict[str, Connections], list[tuple[Tensor, Tensor]]]:
    """Find the tensors of a network that an adapter names, and refuse what does not fit. Nothing is changed.

    Args:
        net: the network.
        adapter: the adapter.
        digests: whether to compare the weights' values, in O(N).

    Returns:
        {the network's tensor name: connections}, and [(tensor, value)] of what was trained beside the adapter.

    Raises:
        ValueError: as :func:`install_adapter`.
    """
    refuse_work(net)
    known = {name: one for one in candidates(net) for name in (one.name, *one.aliases)}
    finder, found = Finder(known), {}
    for name, connections in adapter.tensors.items():
        target = finder.find(name)
        if target is None:
            listed = ", ".join(f"`{one}`" for one in list(known)[:8])
            raise ValueError(
                f"The adapter has a difference for `{name}`, but {type(net).__name__} has no such weight. Expected the network "
                f"that it was made for; the weights here are: {listed or 'none'}."
            )
        one = known[target]
        if one.shape != tuple(connections.shape):
            raise ValueError(
                f"`{name}`: expected a weight of shape {tuple(connections.shape)}, as the adapter has it, found {one.shape}: "
                "another network."
            )
        if one.slots is None:
            adapting.refuse_unfit([one])
        adapting.refuse_sparse([one])
        slots: Any = one.slots
        weight = one.parameter if slots is None else slots.unmerged()
        assert isinstance(weight, Tensor)
        digest = digest_of(weight) if digests else adapter.digests[name]
        if digest != adapter.digests[name]:
            raise ValueError(
                f"`{name}`: the adapter belongs to another network: expected a weight with the digest {adapter.digests[name]}, "
                f"found {digest} ({weight.dtype}). Load the pretrained weights that it was trained upon, in the same dtype, "
                "before the adapter."
            )
        found[target] = connections
    return found, beside(net, adapter)


def beside(net: nn.Module, adapter: Adapter) -> list[tuple[Tensor, Tensor]]:
    """Find the tensors of a network that were trained beside an adapter: [(tensor, value in the adapter)], in its order."""
    own: dict[str, Tensor] = {}
    for module, paths in paths_of(net).items():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                own.update((plain_name(path, name), tensor) for path in paths)
    finder, values = Finder(own), []
    for name, value in adapter.others.items():
        target = finder.find(name)
        mine = None if target is None else own[target]
        if mine is None or mine.shape != value.shape:
            raise ValueError(
                f"`{name}`, which was trained beside the adapter: expected a tensor of shape {tuple(value.shape)}, found "
                f"{'none' if mine is None else tuple(mine.shape)}. Build the network as it was trained (with the same head)."
            )
        values.append((mine, value))
    return values


def write(net: nn.Module, values: list[tuple[Tensor, Tensor]]) -> None:
    """Write what was trained beside an adapter."""
    with torch.no_grad():
        for mine, value in values:
            mine.copy_(value)


def detach(net: nn.Module, missing_ok: bool = False) -> nn.Module:
    """Take the adapter off: the network has its own weights again, the same parameters as before. They stay frozen.

    Args:
        net: an adapted network.
        missing_ok: whether a network without an adapter is left as it is.

    Returns:
        the network itself.

    Raises:
        ValueError: there is no adapter.
        RuntimeError: a callback is at work on the network, or the adapter is merged.
    """
    refuse_work(net)
    adapted = [one for one in converted_tensors(net, every=True) if one.slots.adapts]
    if not adapted and not missing_ok:
        raise ValueError(f"detach: {type(net).__name__} has no adapter.")
    for one in adapted:
        slots: Any = one.slots
        if slots.is_merged:
            raise RuntimeError(f"`{one.name}`: the adapter is merged into the weight. Call unmerge(net) first.")
    for one in adapted:
        note_used(one)
        remove(one, one.slots.base)  # type: ignore[arg-type]
    return net


def refuse_work(net: nn.Module) -> None:
    """Refuse a network on which a callback is at work: its optimizer holds the present difference."""
    for one in converted_tensors(net):
        owner = one.slots.owner()
        if owner is not None:
            raise RuntimeError(
                f"`{one.name}`: {type(owner).__name__} is at work on this network, and its optimizer holds the present "
                "difference. Expected a network whose training is over: after the fit, or after `rewiring.remove()`."
            )
