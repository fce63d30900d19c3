"""Finding the converted tensors of a module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from lightning_deepr.weights.base import Parametrization
from lightning_deepr.weights.names import join, paths_of, without_wrappers


class Converted(NamedTuple):
    """A converted tensor within a module."""

    name: str  # "fc1.weight"
    module: nn.Module
    tensor_name: str
    slots: Parametrization

    @property
    def theta(self) -> nn.Parameter:
        # looked up directly for speed, without a call of ``holder``: every step reads it several times
        holder = self.module._modules["parametrizations"]._modules[self.tensor_name]  # type: ignore[union-attr]
        try:
            return holder._parameters["original"]  # type: ignore[union-attr, return-value]
        except KeyError:
            raise RuntimeError(
                f"`{self.name}`: expected its parameter theta, found none: something has taken it out of the module (FSDP puts "
                "it into a flat parameter). Leave the converted layers out of the sharding (ignored_states), or use "
                "DistributedDataParallel."
            ) from None

    @property
    def is_there(self) -> bool:
        """Whether the tensor is converted still: ``densify`` makes it an ordinary one."""
        return slots_of(self.module, self.tensor_name) is self.slots

    @property
    def holder(self) -> parametrize.ParametrizationList:
        return self.module._modules["parametrizations"]._modules[self.tensor_name]  # type: ignore[union-attr, return-value]


def slots_of(module: nn.Module, tensor_name: str) -> Any:
    """Return the parametrization of a module's own tensor (nearly always KSlots), or None if it is not converted."""
    if not parametrize.is_parametrized(module, tensor_name):
        return None
    first = module.parametrizations[tensor_name][0]  # type: ignore[index, union-attr]
    return first if isinstance(first, Parametrization) else None


def converted_tensors(module: nn.Module, every: bool = False) -> Iterator[Converted]:
    """Iterate over the converted tensors of a module, in the order of conversion.

    Args:
        module: the network to search.
        every: whether a tensor that several layers hold (a tied weight that was adapted) comes once for each of them.
    """
    found = []
    seen: set[Parametrization] = set()
    for submodule, paths in paths_of(module).items():
        if parametrize.is_parametrized(submodule):
            for tensor_name in submodule.parametrizations:  # type: ignore[union-attr]
                slots = slots_of(submodule, tensor_name)
                if slots is not None and (every or slots not in seen):
                    seen.add(slots)
                    found.append(Converted(join(paths[0], tensor_name), submodule, tensor_name, slots))
    return iter(sorted(found, key=lambda converted: converted.slots.index))


def plain_name(prefix: str, tensor_name: str) -> str:
    """Return a tensor's name without the prefixes of the wrappers that compilers, Fabric and FSDP put around a module."""
    return join(without_wrappers(prefix), tensor_name)


def stacked_upon(holder: parametrize.ParametrizationList) -> list[nn.Module]:
    """List the parametrizations of others that were registered after ours: functions of the weight."""
    return [holder._modules[str(number)] for number in range(1, len(holder))]  # type: ignore[misc]
