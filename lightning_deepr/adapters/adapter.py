"""An adapter by itself: the connections of a difference, the digests of the weights that it belongs to, and no network."""

from __future__ import annotations

import hashlib
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_deepr.algorithm.randomness import signs_of
from lightning_deepr.files.sparse_file import Connections, connections_of
from lightning_deepr.weights.find import Converted, converted_tensors, plain_name
from lightning_deepr.weights.k_slots import KSlots
from lightning_deepr.weights.names import paths_of


@dataclass(frozen=True, eq=False)
class Adapter:
    """A sparse difference to a network's weights. It is not changed by anything that happens to a network.

    Attributes:
        tensors: {tensor name: its connections}, with signed values in the order of their places.
        digests: {tensor name: digest of the weight that it is a difference to}.
        others: {name: value} of what was trained beside it: biases, norms, a head, and running statistics of batch norms.
    """

    tensors: dict[str, Connections]
    digests: dict[str, str]
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """K, the number of connections of all tensors."""
        return sum(found.places.numel() for found in self.tensors.values())

    def scaled(self, scale: float) -> Adapter:
        """Multiply all values of the difference. What was trained beside it stays as it is.

        Raises:
            TypeError, ValueError: ``scale`` is no finite number.
        """
        check_number("scale", scale)
        return Adapter(
            {name: with_values(found, found.values * scale) for name, found in self.tensors.items()}, self.digests, self.others
        )

    def is_same(self, other: Adapter) -> bool:
        """Whether another adapter computes the same, bit for bit."""
        if self.tensors.keys() != other.tensors.keys() or self.others.keys() != other.others.keys():
            return False
        return self.digests == other.digests and all(
            torch.equal(one, two)
            for name, found in self.tensors.items()
            for one, two in zip(found[1:3], other.tensors[name][1:3], strict=True)
        ) and all(torch.equal(value, other.others[name]) for name, value in self.others.items())  # fmt: skip

    def __repr__(self) -> str:
        beside = f", {sum(value.numel() for value in self.others.values()):,} values beside it" if self.others else ""
        return f"Adapter({self.count:,} connections in {len(self.tensors)} tensors{beside})"


def adapter_of(net: nn.Module, digests: Mapping[str, str] | None = None) -> Adapter:
    """Take the present adapter of a network, as a copy on the CPU.

    Args:
        net: an adapted network.
        digests: the digests of its frozen weights; None: they are computed, in O(N).

    Raises:
        ValueError: the network is not adapted, or other weights of it are sparse.

    Example::

        >>> from lightning_deepr import adapt
        >>> adapter_of(adapt(nn.Linear(100, 10), 0.05))
        Adapter(50 connections in 1 tensors)
    """
    adapted = adapted_tensors(net)
    tensors, own = {}, {}
    for one, slots in adapted:
        found = connections_of(slots, one.theta.detach())
        tensors[one.name] = with_values(found, found.values)
        own[one.name] = digest_of(slots.unmerged()) if digests is None else digests[one.name]
    return Adapter(tensors, own, beside_of(net))


def adapted_tensors(net: nn.Module) -> list[tuple[Converted, KSlots]]:
    """List the adapted tensors of a network.

    Raises:
        ValueError: there is none, or other weights are converted.
    """
    found = []
    for one in converted_tensors(net):
        if not one.slots.adapts:
            raise ValueError(
                f"`{one.name}` is sparse without a frozen weight below it: expected adapted weights alone. `save_sparse` and "
                "`load_state_dict` are for sparse networks."
            )
        assert isinstance(one.slots, KSlots)
        found.append((one, one.slots))
    if not found:
        raise ValueError(
            f"{type(net).__name__} has no adapter: expected a network after `adapt(net, connectivity)`, "
            '`DeepR(connectivity, of="difference")` or `load_adapter(net, path)`.'
        )
    return found


def beside_of(net: nn.Module) -> dict[str, Tensor]:
    """Copy what is trained beside an adapter, and what batch norms count in training."""
    thetas = {id(one.theta) for one in converted_tensors(net)}
    found: dict[str, Tensor] = {}
    for module, paths in paths_of(net).items():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and id(parameter) not in thetas:
                found[plain_name(paths[0], name)] = parameter.detach().cpu().clone()
        if isinstance(module, nn.modules.batchnorm._NormBase):  # what `train()` changes, also in a frozen layer
            for name, value in module._buffers.items():
                if value is not None:
                    found[plain_name(paths[0], name)] = value.detach().cpu().clone()
    return found


def digest_of(weight: Tensor) -> str:
    """Compute the digest of a weight: 32 hex digits of the sha256 over dtype, shape and values.

    Example::

        >>> digest_of(torch.zeros(2, 3)) == digest_of(torch.zeros(3, 2))
        False
    """
    flat = weight.detach().cpu().contiguous().reshape(-1)
    found = hashlib.sha256(f"{weight.dtype} {tuple(weight.shape)}".encode())
    if flat.numel():
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]


def with_values(found: Connections, values: Tensor) -> Connections:
    """Give connections other values; the exceptions follow their signs."""
    table = found.sign_table
    active = signs_of(found.sign_seed, found.places, torch.float32) < 0 if table is None else table.are_negative(found.places)
    dormant = found.exceptions[~torch.isin(found.exceptions, found.places)]
    exceptions = torch.cat([found.places[torch.signbit(values) != active], dormant]).sort().values
    return found._replace(values=values, exceptions=exceptions)


def check_number(what: str, value: object) -> None:
    """Refuse what is no finite number: a scale of nan would make all weights nan."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{what}: expected a number, found {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"{what}: expected a finite number, found {value}.")


def average(adapters: Mapping[Adapter, float]) -> Adapter:
    """Average adapters of one network: the weighted sum of the differences.

    Where places agree, their values are added up; a place that only some have keeps its share of the sum. So the result has
    the connections of all of them.

    Args:
        adapters: {adapter: its weight}; weights of 1 / n are the mean.

    Raises:
        TypeError: a weight is no number.
        ValueError: there is none, they belong to different networks, what was trained beside them differs in names, a weight is
            not finite, or they add up to 0 while tensors were trained beside the differences.
    """
    listed = list(adapters)
    for weight in adapters.values():
        check_number("average: weight", weight)
    if not listed:
        raise ValueError("average: expected at least one adapter, found none.")
    if not sum(adapters.values()) and any(value.is_floating_point() for value in listed[0].others.values()):
        raise ValueError(
            f"average: `{min(listed[0].others)}` was trained beside the differences and is averaged by the weights' shares: "
            "expected weights whose sum is not 0, found a sum of 0."
        )
    digests: dict[str, str] = {}
    for one in listed:
        for name, digest in one.digests.items():
            if digests.setdefault(name, digest) != digest:
                raise ValueError(f"average: `{name}`: expected differences to one weight, found {digests[name]} and {digest}.")
        if one.others.keys() != listed[0].others.keys():
            differing = sorted(one.others.keys() ^ listed[0].others.keys())
            raise ValueError(f"average: expected equal names beside the differences, found {differing[0]!r} in some only.")
    tensors = {}
    for name in digests:
        parts = [(one.tensors[name], weight) for one, weight in adapters.items() if name in one.tensors]
        first = parts[0][0]
        places, at = torch.cat([found.places for found, _ in parts]).unique(return_inverse=True)
        values = torch.cat([found.values * weight for found, weight in parts])
        summed = torch.zeros(places.numel(), dtype=values.dtype).index_add(0, at, values)
        tensors[name] = with_values(first._replace(places=places, allowed=None), summed)
    others = {}
    for name, value in listed[0].others.items():
        if not value.is_floating_point():
            others[name] = value
            continue
        total = sum(one.others[name].double() * weight for one, weight in adapters.items())
        assert isinstance(total, Tensor)
        others[name] = (total / sum(adapters.values())).to(value.dtype)
    return Adapter(tensors, digests, others)
